//! Images: decoded, and made into the tensor that the model takes.

use std::io::Cursor;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};
use plimsoll_package::manifest::{Datatype, TensorSpec};

use super::companions::Companions;
use crate::engine::{Data, Tensor};

mod resize;
mod specification;

use specification::{Size, Specification};

/// The input of encoded images.
pub(super) const IMAGE: &str = "image";

/// The file that says what is done to images.
const FILE: &str = "preprocessor_config.json";

/// Largest side of an encoded image, in pixels.
const SIDE_MAX: u32 = 1 << 14;
/// Most pixels of an encoded image.
const PIXELS_MAX: u64 = 1 << 25;
/// Most bytes that decoding one takes.
const DECODING_BYTES_MAX: u64 = 512 << 20;
/// Bytes of a decoded pixel, at most: four channels of 16 bits, and three of 8 once they are converted.
const PIXEL_BYTES: u64 = 11;

/// Values of 8 bits by row, column and channel.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pixels {
    width: usize,
    height: usize,
    channels: usize,
    data: Vec<u8>,
}

/// Where the channels are among the dimensions of the model's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// `[images, channels, height, width]`
    ChannelsFirst,
    /// `[images, height, width, channels]`
    ChannelsLast,
}

/// How a model takes images.
pub(super) struct Images {
    input: TensorSpec,
    layout: Layout,
    channels: usize,
    specification: Specification,
    /// By channel, what each value of 0 to 255 becomes.
    values: Vec<Vec<f32>>,
}

impl Images {
    /// Reads what the model's files say; `None` where they say nothing of images.
    ///
    /// # Errors
    /// In words that begin with the file's path, where it cannot be done, or does not fit the model.
    pub(super) fn read(companions: &Companions, inputs: &[TensorSpec]) -> Result<Option<Self>, String> {
        let Some(json) = companions.get(FILE) else { return Ok(None) };
        let refuse = |text: String| format!("{FILE}: {text}");
        let specification = Specification::parse(json).map_err(refuse)?;
        Self::new(specification, inputs).map(Some).map_err(refuse)
    }

    fn new(specification: Specification, inputs: &[TensorSpec]) -> Result<Self, String> {
        let is_image = |spec: &&TensorSpec| spec.shape.len() == 4 && spec.datatype != Datatype::Bytes && spec.datatype != Datatype::Bool;
        let named = inputs.iter().find(|spec| spec.name == "pixel_values").filter(is_image);
        let mut others = inputs.iter().filter(is_image);
        let only = match (others.next(), others.next()) {
            (Some(only), None) => Some(only),
            _ => None,
        };
        let input = named.or(only).ok_or("the model has no input of four dimensions for it")?.clone();
        let is_channels = |size: i64| size == 1 || size == 3;
        let (layout, channels) = match (input.shape[1], input.shape[3]) {
            (first, last) if is_channels(last) && !is_channels(first) => (Layout::ChannelsLast, last),
            (first, _) if is_channels(first) => (Layout::ChannelsFirst, first),
            // As models of images are exported, where nothing says otherwise.
            (first, last) if first < 0 && last < 0 => (Layout::ChannelsFirst, 3),
            _ => {
                return Err(format!(
                    "input `{}` of shape {:?} has neither 1 nor 3 channels",
                    input.name, input.shape
                ));
            }
        };
        let channels = channels as usize;
        let values = values(&specification, channels)?;
        Ok(Self {
            input,
            layout,
            channels,
            specification,
            values,
        })
    }

    /// The model's input that is filled.
    pub(super) fn input(&self) -> &str {
        &self.input.name
    }

    /// The tensor of the encoded images in `images`, of at most `bytes_max` bytes. `hold` is asked for the memory that decoding one takes,
    /// and holds it for as long as what it gives lives.
    ///
    /// # Errors
    /// [`Refused`], in words that name the input and the image.
    pub(super) fn fill<H, E>(
        &self,
        images: &Tensor,
        bytes_max: usize,
        mut hold: impl FnMut(usize) -> Result<H, E>,
    ) -> Result<Tensor, Refused<E>> {
        let given = |text: String| Refused::Given(format!("input `{IMAGE}`{text}"));
        let Data::Bytes(encoded) = images.data() else {
            return Err(given(format!(" takes BYTES, {} was given", images.datatype())));
        };
        if encoded.is_empty() {
            return Err(given(" holds no image".into()));
        }
        if !matches!(images.shape(), [_] | [_, 1]) {
            return Err(given(format!(
                " takes shape [-1] (an image for each), {:?} was given",
                images.shape()
            )));
        }
        let mut size = None;
        let mut values = vec![];
        for (index, encoded) in encoded.iter().enumerate() {
            let of_image = |text: String| given(format!(": image {index}: {text}"));
            let unpacked = unwrap_base64(encoded);
            let decoder = Decoder::new(unpacked.as_deref().unwrap_or(encoded)).map_err(of_image)?;
            let held = hold(decoder.bytes()).map_err(Refused::Memory)?;
            let pixels = decoder.decode(self.channels).map_err(of_image)?;
            let pixels = self.shape(pixels).map_err(of_image)?;
            drop(held);
            let this = (pixels.height, pixels.width);
            let first = *size.get_or_insert(this);
            if first != this {
                let text = format!(
                    "it has {} by {} pixels after resizing, the first has {} by {}",
                    this.0, this.1, first.0, first.1
                );
                return Err(of_image(text));
            }
            let bytes = pixels
                .data
                .len()
                .saturating_mul(size_of::<f32>())
                .saturating_mul(images.data().len());
            if bytes > bytes_max {
                let text = format!(
                    ": {} images are more than the {bytes_max} bytes that this server takes; send fewer at a time",
                    images.data().len()
                );
                return Err(given(text));
            }
            self.append(&pixels, &mut values);
        }
        let (height, width) = size.unwrap_or_default();
        let shape = match self.layout {
            Layout::ChannelsFirst => vec![encoded.len(), self.channels, height, width],
            Layout::ChannelsLast => vec![encoded.len(), height, width, self.channels],
        };
        let fits = shape
            .iter()
            .zip(&self.input.shape)
            .skip(1)
            .all(|(&size, &taken)| taken < 0 || taken == size as i64);
        if !fits {
            let text = format!(
                " becomes shape {shape:?}, the model's `{}` takes {:?}",
                self.input.name, self.input.shape
            );
            return Err(given(text));
        }
        let data = match self.input.datatype {
            Datatype::Fp32 => Data::Fp32(values),
            other => Data::from_f64(other, &values.into_iter().map(f64::from).collect::<Vec<_>>()),
        };
        Tensor::new(shape, data).map_err(|error| given(format!(": {error}")))
    }

    /// Resizes and crops.
    fn shape(&self, mut pixels: Pixels) -> Result<Pixels, String> {
        if let Some((size, filter)) = self.specification.resize {
            let (height, width) = match size {
                Size::Exact(height, width) => (height, width),
                Size::ShortestEdge(edge) => shortest_edge(pixels.height, pixels.width, edge),
            };
            if (height as u64) * (width as u64) > PIXELS_MAX {
                return Err(format!("{} by {} pixels become {height} by {width}", pixels.height, pixels.width));
            }
            pixels = resize::resize(&pixels, width, height, filter);
        }
        Ok(match self.specification.crop {
            Some((height, width)) => crop(&pixels, height, width),
            None => pixels,
        })
    }

    /// Appends the values of an image in the model's layout.
    fn append(&self, pixels: &Pixels, values: &mut Vec<f32>) {
        let convert = |channel: usize, value: &u8| self.values[channel][usize::from(*value)];
        match self.layout {
            Layout::ChannelsFirst => {
                for channel in 0..self.channels {
                    values.extend(
                        pixels.data[channel..]
                            .iter()
                            .step_by(self.channels)
                            .map(|value| convert(channel, value)),
                    );
                }
            }
            Layout::ChannelsLast => {
                values.extend(
                    pixels
                        .data
                        .iter()
                        .enumerate()
                        .map(|(index, value)| convert(index % self.channels, value)),
                );
            }
        }
    }
}

/// Why an image is not taken.
#[derive(Debug)]
pub(super) enum Refused<E> {
    /// For what it is, in words.
    Given(String),
    /// For want of memory.
    Memory(E),
}

/// By channel, what each value of 0 to 255 becomes: in single precision, as Hugging Face computes it.
fn values(specification: &Specification, channels: usize) -> Result<Vec<Vec<f32>>, String> {
    let of_channel = |name: &str, values: &[f64], channel: usize| match values {
        [one] => Ok(*one),
        many => many
            .get(channel)
            .copied()
            .filter(|_| many.len() == channels)
            .ok_or_else(|| format!("{name} has {} values, the model takes {channels} channels", many.len())),
    };
    let channel = |channel: usize| {
        let mut values: Vec<f32> = (0..=255_u8).map(f32::from).collect();
        if let Some(factor) = specification.rescale {
            values.iter_mut().for_each(|value| *value = (f64::from(*value) * factor) as f32);
        }
        if let Some((mean, std)) = &specification.normalize {
            let (mean, std) = (
                of_channel("image_mean", mean, channel)? as f32,
                of_channel("image_std", std, channel)? as f32,
            );
            values.iter_mut().for_each(|value| *value = (*value - mean) / std);
        }
        Ok(values)
    };
    (0..channels).map(channel).collect()
}

/// Height and width of an image whose shorter edge becomes `edge`.
fn shortest_edge(height: usize, width: usize, edge: usize) -> (usize, usize) {
    let longer = |shorter: usize, longer: usize| (edge as u64 * longer as u64 / shorter as u64) as usize;
    if width <= height {
        (longer(width, height), edge)
    } else {
        (edge, longer(height, width))
    }
}

/// The middle of an image; what lies outside of it is black.
fn crop(pixels: &Pixels, height: usize, width: usize) -> Pixels {
    /// Where the first row or column of the piece lies in the image.
    fn start(from: usize, to: usize) -> i64 {
        let (from, to) = (from as i64, to as i64);
        // Rounded as Hugging Face does: down where something is cut off, and up where something is added.
        if from >= to { (from - to) / 2 } else { -((to - from + 1) / 2) }
    }
    let channels = pixels.channels;
    let (top, left) = (start(pixels.height, height), start(pixels.width, width));
    let mut data = vec![0; height * width * channels];
    let first = (-left).max(0) as usize;
    let count = (width - first).min(pixels.width - left.max(0) as usize);
    for row in 0..height {
        let Ok(y) = usize::try_from(top + row as i64) else { continue };
        if y >= pixels.height {
            break;
        }
        let from = (y * pixels.width + left.max(0) as usize) * channels;
        let to = (row * width + first) * channels;
        data[to..to + count * channels].copy_from_slice(&pixels.data[from..from + count * channels]);
    }
    Pixels {
        width,
        height,
        channels,
        data,
    }
}

/// The bytes that base64 stands for, with or without `data:...;base64,` before it: JSON cannot hold the bytes of an image. `None` where it
/// is none, as no image's first bytes are.
fn unwrap_base64(encoded: &[u8]) -> Option<Vec<u8>> {
    if format_of(encoded).is_some() {
        return None;
    }
    let written = match encoded.strip_prefix(b"data:") {
        Some(rest) => &rest[rest.windows(8).position(|window| window == b";base64,")? + 8..],
        None => encoded,
    };
    STANDARD.decode(written.trim_ascii()).ok()
}

fn format_of(encoded: &[u8]) -> Option<ImageFormat> {
    let format = image::guess_format(encoded).ok()?;
    matches!(format, ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP).then_some(format)
}

/// An image whose head has been read.
struct Decoder<'a> {
    decoder: Box<dyn ImageDecoder + 'a>,
    pixels: u64,
}

impl<'a> Decoder<'a> {
    fn new(encoded: &'a [u8]) -> Result<Self, String> {
        let format = format_of(encoded).ok_or("it is none of PNG, JPEG and WebP, nor base64 of one")?;
        let broken = |error: image::ImageError| format!("it cannot be decoded: {error}");
        let mut limits = Limits::default();
        limits.max_image_width = Some(SIDE_MAX);
        limits.max_image_height = Some(SIDE_MAX);
        limits.max_alloc = Some(DECODING_BYTES_MAX);
        let mut reader = ImageReader::with_format(Cursor::new(encoded), format);
        reader.limits(limits);
        let decoder = reader.into_decoder().map_err(broken)?;
        let (width, height) = decoder.dimensions();
        let pixels = u64::from(width) * u64::from(height);
        if pixels > PIXELS_MAX {
            return Err(format!("it has {width} by {height} pixels, the most are {PIXELS_MAX}"));
        }
        if pixels == 0 {
            return Err("it has no pixels".into());
        }
        Ok(Self {
            decoder: Box::new(decoder),
            pixels,
        })
    }

    /// Bytes that decoding takes, at most.
    fn bytes(&self) -> usize {
        usize::try_from(self.pixels * PIXEL_BYTES).unwrap_or(usize::MAX)
    }

    /// Decodes it the right way up; transparency is left out, as Pillow's `convert("RGB")` does.
    fn decode(mut self, channels: usize) -> Result<Pixels, String> {
        let broken = |error: image::ImageError| format!("it cannot be decoded: {error}");
        let orientation = self.decoder.orientation().map_err(broken)?;
        let mut image = DynamicImage::from_decoder(self.decoder).map_err(broken)?;
        image.apply_orientation(orientation);
        let image = image.into_rgb8();
        let (width, height) = (image.width() as usize, image.height() as usize);
        let data = if channels == 1 {
            image.pixels().map(|pixel| luma(pixel.0)).collect()
        } else {
            image.into_raw()
        };
        Ok(Pixels {
            width,
            height,
            channels,
            data,
        })
    }
}

/// The brightness of a colour as Pillow's `convert("L")` has it (ITU-R BT.601).
fn luma([red, green, blue]: [u8; 3]) -> u8 {
    let sum = u32::from(red) * 19595 + u32::from(green) * 38470 + u32::from(blue) * 7471 + 0x8000;
    (sum >> 16) as u8
}

#[cfg(test)]
mod tests;
