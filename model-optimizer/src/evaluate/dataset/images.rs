//! Pictures in an archive, with their labels in `labels.csv` (`file,label`) and, where the model wants more than values from 0 to 1,
//! `preprocessing.json`.

use std::collections::HashMap;
use std::io::{Cursor, Read};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use image::imageops::FilterType;
use image::{ImageReader, Limits};
use plimsoll_package::manifest::{Datatype, TensorSpec};
use plimsoll_runtime::engine::Data;
use rayon::prelude::*;
use serde::Deserialize;

use super::archive::{Kind, for_each_file};
use super::fit::Feed;
use super::format::{Request, too_large};
use super::rows::unnamed_file;
use super::{Column, Dataset, LABELS, Values, encode, size_of_type};

/// Most bytes of one picture's file.
const FILE_BYTES_MAX: u64 = 256 << 20;
/// Most pixels along a side of a picture.
const SIDE_MAX: u32 = 1 << 15;
/// Most bytes of `labels.csv` and of `preprocessing.json`.
const TEXT_BYTES_MAX: u64 = 256 << 20;
/// Pictures decoded at once.
const DECODED_AT_ONCE: usize = 32;
const LABELS_FILE: &str = "labels.csv";
const PREPROCESSING_FILE: &str = "preprocessing.json";

/// `preprocessing.json`: how pixels become values. Without it a value is the pixel's divided by 255; of an integer input, the pixel's.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Preprocessing {
    /// Subtracted from each channel's value of 0 to 1: one number a channel, or one for all.
    #[serde(default)]
    mean: Vec<f64>,
    /// That each channel's value is divided by then.
    #[serde(default)]
    std: Vec<f64>,
    /// Height and width, where the model leaves them open.
    size: Option<[usize; 2]>,
    /// The order of axes, where the model's shape does not tell.
    layout: Option<Layout>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
enum Layout {
    #[serde(rename = "NCHW")]
    Nchw,
    #[serde(rename = "NHWC")]
    Nhwc,
}

pub(super) fn read(request: &Request, kind: Kind) -> Result<Dataset, String> {
    let (labels, preprocessing, pictures) = described(request, kind)?;
    let [spec] = request.specs else {
        return Err(format!(
            "it holds pictures for one input, and the model takes {}; give a NumPy archive",
            request.specs.len()
        ));
    };
    let form = Form::of(spec, preprocessing)?;
    let row_bytes = (form.values() * size_of_type(spec.datatype).unwrap_or_default()) as u64;
    let (files, labels) = match labels {
        Some((files, labels)) => (files, labels),
        // Unlabelled ones serve for calibration.
        None => (pictures, None),
    };
    if row_bytes
        .checked_mul(files.len() as u64)
        .is_none_or(|bytes| bytes > request.bytes_max)
    {
        return Err(too_large(request.bytes_max));
    }
    let mut places: HashMap<&str, usize> = HashMap::with_capacity(files.len());
    for (place, name) in files.iter().enumerate() {
        if places.insert(name, place).is_some() {
            return Err(format!("{LABELS_FILE} names `{name}` twice"));
        }
    }
    let laid_down = unnamed_file(request.path)?;
    let lay_down = |pictures: &mut Vec<(String, usize, Vec<u8>)>| {
        pictures.par_drain(..).try_for_each(|(name, place, bytes)| {
            let row = form.row(&bytes).map_err(|why| format!("its picture `{name}` {why}"))?;
            let written = laid_down.write_all_at(&encode(&row), place as u64 * row_bytes);
            written.map_err(|error| format!("cannot lay down its samples: {error}"))
        })
    };
    let mut left = request.bytes_max;
    let mut waiting = Vec::with_capacity(DECODED_AT_ONCE);
    for_each_file(request.path, kind, |name, content| {
        let Some(place) = places.remove(name) else { return Ok(()) };
        let bytes = limited(content, FILE_BYTES_MAX.min(left), name)?;
        left -= bytes.len() as u64;
        waiting.push((name.to_owned(), place, bytes));
        if waiting.len() == DECODED_AT_ONCE {
            lay_down(&mut waiting)?;
        }
        Ok(())
    })?;
    lay_down(&mut waiting)?;
    if let Some(missing) = places.keys().min() {
        return Err(format!("{LABELS_FILE} names `{missing}`, which it does not hold"));
    }
    let column = Column {
        values: Values::Stored {
            file: Arc::new(laid_down),
            offset: 0,
            datatype: spec.datatype,
        },
        shape: form.shape(),
        datatype: spec.datatype,
        feed: Feed::Row,
    };
    Dataset::of(vec![column], request.specs, labels, files.len())
}

type Labelled = (Vec<String>, Option<Vec<f64>>);

/// The labelled files, how they are preprocessed, and the names of all pictures, sorted.
fn described(request: &Request, kind: Kind) -> Result<(Option<Labelled>, Preprocessing, Vec<String>), String> {
    let (mut labels, mut preprocessing, mut pictures) = (None, Preprocessing::default(), Vec::new());
    for_each_file(request.path, kind, |name, content| {
        let (folder, file) = name.rsplit_once('/').map_or(("", name), |(folder, file)| (folder, file));
        match file {
            LABELS_FILE => {
                let text = limited(content, TEXT_BYTES_MAX.min(request.bytes_max), name)?;
                if labels.replace(parse_labels(&text, folder, request.labels)?).is_some() {
                    return Err(format!("it holds more than one {LABELS_FILE}"));
                }
            }
            PREPROCESSING_FILE => {
                let text = limited(content, TEXT_BYTES_MAX.min(request.bytes_max), name)?;
                preprocessing = serde_json::from_slice(&text).map_err(|error| format!("its {name} cannot be read: {error}"))?;
            }
            _ if image::ImageFormat::from_path(file).is_ok() => pictures.push(name.to_owned()),
            _ => {}
        }
        Ok(())
    })?;
    if labels.is_none() && pictures.is_empty() {
        return Err(format!("it holds neither NumPy arrays nor pictures with a {LABELS_FILE}"));
    }
    pictures.sort_unstable();
    Ok((labels, preprocessing, pictures))
}

fn limited(content: &mut dyn Read, bytes_max: u64, name: &str) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let read = content.take(bytes_max.saturating_add(1)).read_to_end(&mut bytes);
    read.map_err(|error| format!("its file `{name}` is broken: {error}"))?;
    if bytes.len() as u64 > bytes_max {
        return Err(format!("its file `{name}` unpacks to more than {bytes_max} bytes"));
    }
    Ok(bytes)
}

fn parse_labels(text: &[u8], folder: &str, named: Option<&str>) -> Result<Labelled, String> {
    let broken = |error: csv::Error| format!("its {LABELS_FILE} is no CSV: {error}");
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(text);
    let header = reader.headers().map_err(broken)?.clone();
    let find = |wanted: &str| header.iter().position(|name| name.trim_start_matches('\u{feff}') == wanted);
    let file = find("file").ok_or_else(|| format!("its {LABELS_FILE} has no column `file`; its first line is `file,label`"))?;
    let label = match named {
        Some(name) => Some(find(name).ok_or_else(|| format!("its {LABELS_FILE} has no column `{name}` for the labels"))?),
        None => LABELS.iter().find_map(|name| find(name)),
    };
    let (mut files, mut labels) = (Vec::new(), Vec::new());
    for record in reader.records() {
        let record = record.map_err(broken)?;
        let name = &record[file];
        files.push(if folder.is_empty() {
            name.to_owned()
        } else {
            format!("{folder}/{name}")
        });
        if let Some(label) = label {
            let text = &record[label];
            let value = text.parse::<f64>();
            labels.push(value.map_err(|_| format!("the label of `{name}` is `{text}`; write the number of the class"))?);
        }
    }
    Ok((files, label.map(|_| labels)))
}

/// The form in which the model takes a picture.
struct Form {
    layout: Layout,
    height: usize,
    width: usize,
    channels: usize,
    datatype: Datatype,
    /// For each channel: what a pixel of 0 to 255 is multiplied by, and what is added then.
    linear: Vec<(f64, f64)>,
}

impl Form {
    fn of(spec: &TensorSpec, preprocessing: Preprocessing) -> Result<Self, String> {
        let shape = &spec.shape;
        let unfit = |why: &str| format!("input `{}` of shape {shape:?} {why}", spec.name);
        let &[_, a, b, c] = &shape[..] else {
            return Err(unfit("takes no pictures, which have 4 dimensions with the batch"));
        };
        let is_channels = |size: i64| size == 1 || size == 3;
        let layout = match preprocessing.layout {
            Some(layout) => layout,
            None if is_channels(a) => Layout::Nchw,
            None if is_channels(c) => Layout::Nhwc,
            None => {
                return Err(unfit(&format!(
                    "does not tell which axis counts channels; write layout into {PREPROCESSING_FILE}"
                )));
            }
        };
        let (channels, height, width) = match layout {
            Layout::Nchw => (a, b, c),
            Layout::Nhwc => (c, a, b),
        };
        if !is_channels(channels) {
            return Err(unfit(&format!("takes {channels} channels; pictures have 1 or 3")));
        }
        let channels = if channels == 1 { 1 } else { 3 };
        let side = |fixed: i64, asked: Option<usize>| match (usize::try_from(fixed).ok(), asked) {
            (Some(fixed), Some(asked)) if fixed != asked => {
                Err(unfit(&format!("takes a side of {fixed}, {PREPROCESSING_FILE} says {asked}")))
            }
            (fixed, asked) => fixed.or(asked).ok_or_else(|| {
                unfit(&format!(
                    "leaves the size of pictures open; write size, such as [224, 224], into {PREPROCESSING_FILE}"
                ))
            }),
        };
        let height = side(height, preprocessing.size.map(|size| size[0]))?;
        let width = side(width, preprocessing.size.map(|size| size[1]))?;
        if height == 0 || width == 0 || height.max(width) > SIDE_MAX as usize {
            return Err(unfit(&format!(
                "takes pictures of {height} x {width}; each side is from 1 to {SIDE_MAX}"
            )));
        }
        let is_float = matches!(spec.datatype, Datatype::Fp16 | Datatype::Bf16 | Datatype::Fp32 | Datatype::Fp64);
        if spec.datatype == Datatype::Bytes || !(is_float || preprocessing.mean.is_empty() && preprocessing.std.is_empty()) {
            return Err(unfit(&format!("takes {}, which has no mean and std", spec.datatype)));
        }
        let of_channel = |values: &[f64], default: f64, name: &str| match values {
            [] => Ok(vec![default; channels]),
            [one] => Ok(vec![*one; channels]),
            several if several.len() == channels => Ok(several.to_vec()),
            several => Err(format!(
                "{PREPROCESSING_FILE}: {name} has {} values for {channels} channels",
                several.len()
            )),
        };
        let mean = of_channel(&preprocessing.mean, 0.0, "mean")?;
        let std = of_channel(&preprocessing.std, 1.0, "std")?;
        if std.iter().any(|std| *std <= 0.0) {
            return Err(format!("{PREPROCESSING_FILE}: std is not above 0"));
        }
        let scale = if is_float { 255.0 } else { 1.0 };
        Ok(Self {
            layout,
            height,
            width,
            channels,
            datatype: spec.datatype,
            linear: mean
                .iter()
                .zip(&std)
                .map(|(mean, std)| (1.0 / (scale * std), -mean / std))
                .collect(),
        })
    }

    fn values(&self) -> usize {
        self.channels * self.height * self.width
    }

    fn shape(&self) -> Vec<usize> {
        match self.layout {
            Layout::Nchw => vec![self.channels, self.height, self.width],
            Layout::Nhwc => vec![self.height, self.width, self.channels],
        }
    }

    /// The values of one picture's file.
    fn row(&self, bytes: &[u8]) -> Result<Data, String> {
        let mut reader = ImageReader::new(Cursor::new(bytes));
        let mut limits = Limits::default();
        limits.max_image_width = Some(SIDE_MAX);
        limits.max_image_height = Some(SIDE_MAX);
        reader.limits(limits);
        let reader = reader.with_guessed_format().map_err(|error| error.to_string())?;
        let picture = reader
            .decode()
            .map_err(|error| format!("cannot be read (PNG, JPEG and WebP can): {error}"))?;
        let picture = if self.channels == 1 {
            picture.to_luma8().into()
        } else {
            image::DynamicImage::from(picture.to_rgb8())
        };
        // Both sides are at most SIDE_MAX.
        let picture = picture.resize_exact(self.width as u32, self.height as u32, FilterType::Triangle);
        let pixels = picture.as_bytes();
        let value = |channel: usize, pixel: u8| {
            let (factor, offset) = self.linear[channel];
            f64::from(pixel) * factor + offset
        };
        let values: Vec<f64> = match self.layout {
            Layout::Nhwc => pixels
                .iter()
                .enumerate()
                .map(|(index, pixel)| value(index % self.channels, *pixel))
                .collect(),
            Layout::Nchw => (0..self.channels)
                .flat_map(|channel| {
                    pixels
                        .iter()
                        .skip(channel)
                        .step_by(self.channels)
                        .map(move |pixel| (channel, *pixel))
                })
                .map(|(channel, pixel)| value(channel, pixel))
                .collect(),
        };
        Ok(Data::from_f64(self.datatype, &values))
    }
}
