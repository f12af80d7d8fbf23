//! A handwritten digit of the held-out set: drawn in the terminal, and put to the model.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::{Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use npyz::NpyFile;
use serde_json::{Value, json};
use zip::ZipArchive;

use super::gateway::Client;

/// Pixels of a row, and rows of an image.
const SIDE: usize = 8;
/// Paper to ink.
const SHADES: [&str; 5] = ["  ", "░░", "▒▒", "▓▓", "██"];

/// The images that the models never saw in training, with what they show.
#[derive(Clone)]
pub(super) struct HeldOut {
    pixels: Vec<f32>,
    labels: Vec<i64>,
}

impl HeldOut {
    /// Reads the arrays `image`, float32 [samples, 1, 8, 8] from 0 (paper) to 1 (ink), and `y`, int64 [samples].
    ///
    /// # Errors
    /// Where the file is not that.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let open = || File::open(path).with_context(|| format!("cannot read {}", path.display()));
        let mut archive = ZipArchive::new(open()?).with_context(|| format!("{} is no NumPy archive", path.display()))?;
        let pixels: Vec<f32> = array(archive.by_name("image.npy")?)?;
        let labels: Vec<i64> = array(archive.by_name("y.npy")?)?;
        ensure!(
            !labels.is_empty() && pixels.len() == labels.len() * SIDE * SIDE,
            "{} does not hold {SIDE}x{SIDE} images",
            path.display()
        );
        Ok(Self { pixels, labels })
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.labels.len()
    }

    /// Another one every time.
    pub(super) fn any(&self) -> usize {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        now.subsec_micros() as usize % self.count()
    }

    fn image(&self, index: usize) -> &[f32] {
        &self.pixels[index * SIDE * SIDE..][..SIDE * SIDE]
    }

    /// The request for one image, in the Open Inference Protocol.
    pub(super) fn request(&self, index: usize) -> Vec<u8> {
        let input = json!({"name": "image", "datatype": "FP32", "shape": [1, 1, SIDE, SIDE], "data": self.image(index)});
        json!({"inputs": [input]}).to_string().into_bytes()
    }

    /// Puts one image to the model at `path`.
    ///
    /// # Errors
    /// Where it does not answer with ten scores.
    pub(super) fn ask(&self, client: &Client, path: &str, index: usize) -> Result<Prediction> {
        let begun = Instant::now();
        let answer = client
            .post(path, "application/json", &self.request(index))?
            .expect_success()
            .context("the model gives no answer")?;
        let took = begun.elapsed();
        let answer: Value = serde_json::from_slice(&answer.body).context("the model's answer is no JSON")?;
        let scores: Vec<f64> = answer["outputs"][0]["data"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_f64)
            .collect();
        ensure!(scores.len() == 10, "the model gave {} scores instead of 10: {answer}", scores.len());
        Ok(Prediction {
            image: self.image(index).to_vec(),
            label: self.labels[index],
            probabilities: softmax(&scores),
            milliseconds: took.as_secs_f64() * 1e3,
        })
    }
}

fn array<T: npyz::Deserialize>(reader: impl Read) -> Result<Vec<T>> {
    NpyFile::new(reader)?
        .into_vec()
        .context("an array is of another type than expected")
}

fn softmax(scores: &[f64]) -> Vec<f64> {
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.iter().map(|power| power / sum).collect()
}

/// What the model says of an image; shown beside it.
pub(super) struct Prediction {
    image: Vec<f32>,
    label: i64,
    probabilities: Vec<f64>,
    milliseconds: f64,
}

impl fmt::Display for Prediction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut digits: Vec<usize> = (0..self.probabilities.len()).collect();
        digits.sort_by(|a, b| self.probabilities[*b].total_cmp(&self.probabilities[*a]));
        let share = |digit: usize| format!("{digit}  {:5.1} %", self.probabilities[digit] * 100.0);
        let beside = [
            String::new(),
            "the model says".to_owned(),
            format!("  {}", share(digits[0])),
            format!("  {}", share(digits[1])),
            format!("  {}", share(digits[2])),
            format!("a person wrote: {}", self.label),
            format!("answered in {:.1} ms", self.milliseconds),
            String::new(),
        ];
        for (row, words) in self.image.chunks(SIDE).zip(beside) {
            write!(f, "  │")?;
            for pixel in row {
                write!(f, "{}", shade(*pixel))?;
            }
            writeln!(f, "│  {words}")?;
        }
        Ok(())
    }
}

fn shade(pixel: f32) -> &'static str {
    // The highest shade for full ink alone would leave strokes grey.
    SHADES[((pixel.clamp(0.0, 1.0) * SHADES.len() as f32) as usize).min(SHADES.len() - 1)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace;

    #[test]
    fn the_held_out_set_is_read_and_drawn() {
        let held_out = HeldOut::read(&workspace::root().join("tests/models/digits/digits-heldout.npz")).unwrap();
        assert_eq!(held_out.count(), 450);
        assert!(held_out.labels.iter().all(|label| (0..10).contains(label)));
        let prediction = Prediction {
            image: held_out.image(3).to_vec(),
            label: held_out.labels[3],
            probabilities: softmax(&[0.0; 10]),
            milliseconds: 1.0,
        };
        let drawn = prediction.to_string();
        assert_eq!(drawn.lines().count(), SIDE);
        assert!(drawn.contains('█') && drawn.contains("10.0 %"), "{drawn}");
    }

    #[test]
    fn a_request_speaks_the_protocol() {
        let held_out = HeldOut {
            pixels: vec![0.5; 64],
            labels: vec![3],
        };
        let request: Value = serde_json::from_slice(&held_out.request(0)).unwrap();
        assert_eq!(request["inputs"][0]["shape"], json!([1, 1, 8, 8]));
        assert_eq!(request["inputs"][0]["data"].as_array().unwrap().len(), 64);
    }

    #[test]
    fn ink_is_dark_and_paper_is_light() {
        assert_eq!((shade(0.0), shade(0.5), shade(1.0), shade(7.0)), ("  ", "▒▒", "██", "██"));
    }
}
