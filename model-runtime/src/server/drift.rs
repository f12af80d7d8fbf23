//! Drift: how far the inputs and outputs of the last minutes are from those that the optimiser recorded in the package.
//!
//! Of at most a thousand requests a second, and about a thousand values of each of their tensors, it is counted into which of the reference's
//! bins they fall. The counts lie in a ring of parts of the window, so that memory does not depend on the traffic, and old ones go.

use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use plimsoll_package::drift::{DRIFT_FILE, Distribution, Reference, Source, TensorReference, kolmogorov_smirnov, psi, psi_by_chance};
use plimsoll_package::manifest::{Manifest, TensorSpec};
use serde::Serialize;

use super::model::chain;
use crate::engine::Tensor;
use crate::observation::{self, Mask};

/// Parts of the window: the oldest tenth of it goes at once.
const PARTS: u64 = 10;
/// The least time between two requests that are looked at, in microseconds.
const PACE_US: u64 = 1000;
/// Values of a tensor that are looked at, about.
const VALUES_MAX: usize = 1024;
/// The least number of samples in the window that a verdict is founded on.
const ROWS_MIN: u64 = 100;
/// From this PSI on a distribution has changed somewhat, and from the other one on much (Siddiqi 2006, "Credit Risk Scorecards").
const MODERATE: f64 = 0.1;
const SIGNIFICANT: f64 = 0.25;

/// Where a tensor stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, strum::IntoStaticStr)]
#[serde(rename_all = "lowercase")]
#[strum(serialize_all = "lowercase")]
pub(super) enum Side {
    Input,
    Output,
}

/// What of a tensor is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, strum::IntoStaticStr)]
#[serde(rename_all = "lowercase")]
#[strum(serialize_all = "lowercase")]
pub(super) enum Kind {
    Values,
    /// Tokens of a text, by the mask.
    Lengths,
    /// Which column of a row is the largest.
    Classes,
}

/// How far a distribution is from its reference, best news first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) enum Verdict {
    /// Too little was seen to tell, or the reference was made from too little.
    TooFew,
    Stable,
    Moderate,
    Significant,
}

/// One distribution beside its reference.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Comparison<'a> {
    pub(super) name: &'a str,
    pub(super) side: Side,
    pub(super) kind: Kind,
    /// `None` where nothing was seen.
    pub(super) psi: Option<f64>,
    /// `None` where nothing was seen, and of classes, which have no order.
    pub(super) ks: Option<f64>,
    /// How much was seen: values, texts or rows.
    pub(super) count: u64,
    pub(super) verdict: Verdict,
}

/// What the window shows.
#[derive(Debug, Serialize)]
pub(super) struct Summary<'a> {
    pub(super) window_s: f64,
    pub(super) reference: Origin,
    pub(super) thresholds: Thresholds,
    /// Samples that were looked at.
    pub(super) rows: u64,
    /// The worst of the tensors'.
    pub(super) verdict: Verdict,
    pub(super) tensors: Vec<Comparison<'a>>,
}

/// What the reference was made from.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Origin {
    from: Source,
    samples: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct Thresholds {
    moderate: f64,
    significant: f64,
    rows_min: u64,
}

/// What is looked at of each request.
struct Track {
    name: String,
    /// Of the tensor among the model's inputs or outputs.
    index: usize,
    side: Side,
    bins: Bins,
    /// Where its counts lie among all.
    place: Range<usize>,
    expected: Vec<u64>,
}

enum Bins {
    Values(Distribution),
    Lengths(Distribution),
    Classes,
}

/// A request that is looked at, from its inputs to its outputs.
pub(super) struct Look {
    mask: Option<Mask>,
    turn: usize,
}

/// Compares what goes through the server with the package's reference.
pub(super) struct Drift {
    reference: Origin,
    tracks: Vec<Track>,
    specs: Vec<TensorSpec>,
    started: Instant,
    window: Duration,
    /// When a request is looked at next, in microseconds since the start.
    due_us: AtomicU64,
    seen: Mutex<Ring>,
}

/// Counts of the parts of the window.
struct Ring {
    parts: Vec<Part>,
    turn: usize,
}

#[derive(Clone)]
struct Part {
    /// Which part of all time it is.
    number: u64,
    rows: u64,
    counts: Vec<u64>,
}

impl Drift {
    /// Reads the reference of the package in `path`, for a model of those inputs and outputs.
    ///
    /// # Errors
    /// In words for whoever asks for the drift, where there is nothing to compare with.
    pub(super) fn read(
        path: &Path,
        manifest: Option<&Manifest>,
        window: Duration,
        inputs: &[TensorSpec],
        outputs: &[TensorSpec],
    ) -> Result<Self, String> {
        if window.is_zero() {
            return Err("drift is turned off; start the server with a --drift-window other than 0".into());
        }
        if !manifest.is_some_and(|manifest| manifest.files.contains_key(DRIFT_FILE)) {
            return Err(format!(
                "the model came without a {DRIFT_FILE} to compare with; optimise it with calibration or evaluation data \
                 (`spec.optimize.calibration` or `.evaluation`, `--calibration` or `--evaluation` on a laptop) and serve that package"
            ));
        }
        let reference = Reference::read(path).map_err(|error| format!("{} to compare with; optimise the model anew", chain(&error)))?;
        Ok(Self::new(&reference, window, inputs, outputs))
    }

    fn new(reference: &Reference, window: Duration, inputs: &[TensorSpec], outputs: &[TensorSpec]) -> Self {
        let mut tracks = vec![];
        let mut end = 0;
        for (side, specs, tensors) in [
            (Side::Input, inputs, &reference.inputs),
            (Side::Output, outputs, &reference.outputs),
        ] {
            for tensor in tensors {
                let Some(index) = specs.iter().position(|spec| spec.name == tensor.name) else {
                    continue;
                };
                for (bins, expected) in bins(tensor) {
                    let place = end..end + expected.len();
                    end = place.end;
                    tracks.push(Track {
                        name: tensor.name.clone(),
                        index,
                        side,
                        bins,
                        place,
                        expected,
                    });
                }
            }
        }
        let part = Part {
            number: 0,
            rows: 0,
            counts: vec![0; end],
        };
        Self {
            reference: Origin {
                from: reference.from,
                samples: reference.samples,
            },
            tracks,
            specs: inputs.to_vec(),
            started: Instant::now(),
            window,
            due_us: AtomicU64::new(0),
            seen: Mutex::new(Ring {
                parts: vec![part; PARTS as usize],
                turn: 0,
            }),
        }
    }

    /// Looks at the inputs of a request, where it is time for one.
    pub(super) fn look(&self, inputs: &[Tensor]) -> Option<Look> {
        self.look_at(self.started.elapsed(), inputs)
    }

    fn look_at(&self, now: Duration, inputs: &[Tensor]) -> Option<Look> {
        let now_us = now.as_micros() as u64;
        let due_us = self.due_us.load(Ordering::Relaxed);
        let next_us = now_us + PACE_US;
        let is_taken = now_us >= due_us
            && self
                .due_us
                .compare_exchange(due_us, next_us, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok();
        if !is_taken {
            return None;
        }
        let mask = Mask::of(&self.specs, inputs);
        let mut ring = self.ring();
        ring.turn = ring.turn.wrapping_add(1);
        let look = Look { mask, turn: ring.turn };
        let part = ring.part(self.number(now));
        part.rows += observation::rows(inputs) as u64;
        self.count(part, Side::Input, &look, inputs);
        Some(look)
    }

    /// Looks at the outputs of the same request.
    pub(super) fn outputs(&self, look: &Look, outputs: &[Tensor]) {
        self.outputs_at(self.started.elapsed(), look, outputs);
    }

    fn outputs_at(&self, now: Duration, look: &Look, outputs: &[Tensor]) {
        self.count(self.ring().part(self.number(now)), Side::Output, look, outputs);
    }

    fn count(&self, part: &mut Part, side: Side, look: &Look, tensors: &[Tensor]) {
        for track in self.tracks.iter().filter(|track| track.side == side) {
            let Some(tensor) = tensors.get(track.index) else { continue };
            let counts = &mut part.counts[track.place.clone()];
            match &track.bins {
                Bins::Values(expected) => {
                    observation::values(tensor, look.mask.as_ref(), VALUES_MAX, look.turn, |value| {
                        counts[expected.bin(value)] += 1
                    });
                }
                Bins::Lengths(expected) => {
                    let lengths = look.mask.iter().flat_map(Mask::lengths);
                    lengths.for_each(|length| counts[expected.bin(length)] += 1);
                }
                // A column that the reference does not know cannot be counted.
                Bins::Classes if observation::class_count(tensor) != Some(counts.len()) => {}
                Bins::Classes => observation::classes(tensor, VALUES_MAX, look.turn, |class| counts[class] += 1),
            }
        }
    }

    /// Compares what the window holds.
    pub(super) fn summary(&self) -> Summary<'_> {
        self.summary_at(self.started.elapsed())
    }

    fn summary_at(&self, now: Duration) -> Summary<'_> {
        let (rows, counts) = self.ring().sum(self.number(now));
        let tracks = self.tracks.iter();
        let tensors: Vec<Comparison> = tracks.map(|track| track.compare(&counts[track.place.clone()], rows)).collect();
        Summary {
            window_s: self.window.as_secs_f64(),
            reference: self.reference,
            thresholds: Thresholds {
                moderate: MODERATE,
                significant: SIGNIFICANT,
                rows_min: ROWS_MIN,
            },
            rows,
            verdict: tensors.iter().map(|tensor| tensor.verdict).max().unwrap_or(Verdict::TooFew),
            tensors,
        }
    }

    /// The part of all time that `now` lies in.
    fn number(&self, now: Duration) -> u64 {
        (now.as_nanos() * u128::from(PARTS) / self.window.as_nanos().max(1)) as u64
    }

    fn ring(&self) -> std::sync::MutexGuard<'_, Ring> {
        // Counts that a panic left half done are still counts.
        self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// What is looked at of a tensor, with how often each bin is expected.
fn bins(tensor: &TensorReference) -> Vec<(Bins, Vec<u64>)> {
    let values = tensor.values.iter().map(|values| (Bins::Values(values.clone()), values.counts()));
    let lengths = tensor
        .lengths
        .iter()
        .map(|lengths| (Bins::Lengths(lengths.clone()), lengths.counts()));
    let classes = tensor.classes.iter().map(|classes| (Bins::Classes, classes.clone()));
    values.chain(lengths).chain(classes).collect()
}

impl Track {
    fn kind(&self) -> Kind {
        match self.bins {
            Bins::Values(_) => Kind::Values,
            Bins::Lengths(_) => Kind::Lengths,
            Bins::Classes => Kind::Classes,
        }
    }

    fn compare(&self, actual: &[u64], rows: u64) -> Comparison<'_> {
        let psi = psi(&self.expected, actual);
        let kind = self.kind();
        // What chance alone may well give says nothing.
        let is_founded = rows >= ROWS_MIN && psi_by_chance(&self.expected, actual) < MODERATE;
        let verdict = match psi {
            Some(psi) if is_founded && psi >= SIGNIFICANT => Verdict::Significant,
            Some(psi) if is_founded && psi >= MODERATE => Verdict::Moderate,
            Some(_) if is_founded => Verdict::Stable,
            _ => Verdict::TooFew,
        };
        Comparison {
            name: &self.name,
            side: self.side,
            kind,
            psi,
            ks: kolmogorov_smirnov(&self.expected, actual).filter(|_| kind != Kind::Classes),
            count: actual.iter().sum(),
            verdict,
        }
    }
}

impl Ring {
    /// The counts of the part `number`, which takes the place of the one that left the window.
    fn part(&mut self, number: u64) -> &mut Part {
        let part = &mut self.parts[(number % PARTS) as usize];
        // A request that waited for the lock may be older than what is there.
        if part.number < number {
            part.number = number;
            part.rows = 0;
            part.counts.fill(0);
        }
        part
    }

    /// All that the window of which `number` is the last part holds.
    fn sum(&self, number: u64) -> (u64, Vec<u64>) {
        let mut rows = 0;
        let mut sum = vec![0; self.parts[0].counts.len()];
        for part in self.parts.iter().filter(|part| part.number + PARTS > number) {
            rows += part.rows;
            sum.iter_mut().zip(&part.counts).for_each(|(sum, count)| *sum += count);
        }
        (rows, sum)
    }
}

#[cfg(test)]
mod tests;
