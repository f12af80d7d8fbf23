//! Resizing as Pillow does it, bit for bit: models are trained and exported with its numbers.
//!
//! Where an image shrinks, the filter is widened so that every pixel counts (unlike in OpenCV or PyTorch without `antialias`). Pillow sums
//! 8-bit values in integers, first along rows, then along columns, and rounds between the two (Pillow, "Concepts: Filters").

use super::Pixels;

/// Bits behind the point of a weight; what is left of 32 bits holds a pixel and the overshoot of a sharpening filter.
const WEIGHT_BITS: u32 = 32 - 8 - 2;

/// Which pixels become one, by the numbers that `preprocessor_config.json` has from Pillow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filter {
    Nearest,
    Lanczos,
    Bilinear,
    Bicubic,
    Box,
    Hamming,
}

impl Filter {
    pub(super) fn of_number(number: u8) -> Option<Self> {
        let filters = [
            Self::Nearest,
            Self::Lanczos,
            Self::Bilinear,
            Self::Bicubic,
            Self::Box,
            Self::Hamming,
        ];
        filters.get(usize::from(number)).copied()
    }

    /// How far it reaches, in pixels of the larger image.
    fn support(self) -> f64 {
        match self {
            Self::Nearest => 0.0,
            Self::Box => 0.5,
            Self::Bilinear | Self::Hamming => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    /// The weight of a pixel at that distance.
    fn weight(self, x: f64) -> f64 {
        let sinc = |x: f64| {
            let x = x * std::f64::consts::PI;
            if x == 0.0 { 1.0 } else { x.sin() / x }
        };
        match self {
            Self::Nearest => 1.0,
            Self::Box => f64::from(u8::from(x > -0.5 && x <= 0.5)),
            Self::Bilinear => (1.0 - x.abs()).max(0.0),
            Self::Hamming if x.abs() < 1.0 => sinc(x) * (0.54 + 0.46 * (x * std::f64::consts::PI).cos()),
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Hamming | Self::Lanczos => 0.0,
            // Keys 1981, "Cubic convolution interpolation for digital image processing", with a = -1/2.
            Self::Bicubic => match x.abs() {
                x if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
                x if x < 2.0 => ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0,
                _ => 0.0,
            },
        }
    }
}

/// The pixels that make up one, and what each weighs.
struct Window {
    first: usize,
    weights: Vec<i32>,
}

/// The windows of each of `to` pixels over `from`.
fn windows(from: usize, to: usize, filter: Filter) -> Vec<Window> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    let window = |at: usize| {
        let center = (at as f64 + 0.5) * scale;
        let first = ((center - support + 0.5) as i64).max(0) as usize;
        let end = ((center + support + 0.5) as usize).min(from);
        let weights: Vec<f64> = (first..end)
            .map(|pixel| filter.weight((pixel as f64 - center + 0.5) * (1.0 / stretch)))
            .collect();
        let sum: f64 = weights.iter().sum();
        let fixed = |weight: &f64| {
            let share = if sum == 0.0 { *weight } else { weight / sum };
            (share * f64::from(1 << WEIGHT_BITS)).round() as i32
        };
        Window {
            first,
            weights: weights.iter().map(fixed).collect(),
        }
    };
    (0..to).map(window).collect()
}

/// The sum of `values`, as they are weighed, as a pixel.
fn weighed(weights: &[i32], values: impl Iterator<Item = u8>) -> u8 {
    let half = 1 << (WEIGHT_BITS - 1);
    let sum: i32 = weights.iter().zip(values).map(|(weight, value)| weight * i32::from(value)).sum();
    ((sum + half) >> WEIGHT_BITS).clamp(0, 255) as u8
}

/// The image at another size, each side 1 or more.
pub(super) fn resize(image: &Pixels, width: usize, height: usize, filter: Filter) -> Pixels {
    if filter == Filter::Nearest {
        return nearest(image, width, height);
    }
    let narrowed;
    let image = if image.width == width {
        image
    } else {
        narrowed = resize_rows(image, &windows(image.width, width, filter));
        &narrowed
    };
    if image.height == height {
        image.clone()
    } else {
        resize_columns(image, &windows(image.height, height, filter))
    }
}

fn resize_rows(image: &Pixels, windows: &[Window]) -> Pixels {
    let channels = image.channels;
    let mut data = Vec::with_capacity(windows.len() * image.height * channels);
    for row in image.data.chunks_exact(image.width * channels) {
        for Window { first, weights } in windows {
            for channel in 0..channels {
                data.push(weighed(
                    weights,
                    row[first * channels + channel..].iter().step_by(channels).copied(),
                ));
            }
        }
    }
    Pixels {
        width: windows.len(),
        data,
        ..*image
    }
}

fn resize_columns(image: &Pixels, windows: &[Window]) -> Pixels {
    let row_length = image.width * image.channels;
    let mut data = Vec::with_capacity(windows.len() * row_length);
    let mut sums = vec![0_i32; row_length];
    for Window { first, weights } in windows {
        sums.fill(1 << (WEIGHT_BITS - 1));
        for (weight, row) in weights.iter().zip(image.data[first * row_length..].chunks_exact(row_length)) {
            sums.iter_mut().zip(row).for_each(|(sum, &value)| *sum += weight * i32::from(value));
        }
        data.extend(sums.iter().map(|sum| (sum >> WEIGHT_BITS).clamp(0, 255) as u8));
    }
    Pixels {
        height: windows.len(),
        data,
        ..*image
    }
}

fn nearest(image: &Pixels, width: usize, height: usize) -> Pixels {
    let place = |at: usize, from: usize, to: usize| (((at as f64 + 0.5) * (from as f64 / to as f64)) as usize).min(from - 1);
    let columns: Vec<usize> = (0..width).map(|x| place(x, image.width, width) * image.channels).collect();
    let mut data = Vec::with_capacity(width * height * image.channels);
    for y in 0..height {
        let row = &image.data[place(y, image.height, height) * image.width * image.channels..];
        for &column in &columns {
            data.extend_from_slice(&row[column..column + image.channels]);
        }
    }
    Pixels {
        width,
        height,
        channels: image.channels,
        data,
    }
}
