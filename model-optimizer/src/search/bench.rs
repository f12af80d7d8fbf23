//! Where recipes are tried: each is applied, loaded beside the original and held against the budget, as the result will be.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use plimsoll_package::key::ArtifactKey;
use plimsoll_package::manifest::MODEL_FILE;
use plimsoll_package::recipe::{Distill, Metric, Quantize, Technique};
use plimsoll_package::report::front::{Candidate, Front, Outcome, Sensitivity};
use plimsoll_package::report::{FailureReason, Verdict};
use plimsoll_package::units::display_size;
use plimsoll_runtime::engine::Engine;

use super::exploration::{Judge, Layer, Stop};
use super::front::{self, Judged};
use super::journal::{Journal, Swept};
use super::sensitivity::{Sweep, Unit};
use super::{FOLDER, SEED};
use crate::convert;
use crate::evaluate::engines;
use crate::failure::{Failure, disk};
use crate::progress::Console;
use crate::step::compress::{Compressed, Materials};
use crate::step::evaluate::{self, Data, Measurement};
use crate::step::fetch::{self, Fetched};
use crate::step::{Context, compress, write_json};

/// The file of the journal.
const JOURNAL: &str = "journal.jsonl";
/// How many times as long as an inference a step of training on one sample takes, at most.
const TRAINING_COST: f64 = 30.0;
/// The share of the time that is left that finding the sensitive layers of one scheme may take.
const SWEEP_SHARE: f64 = 0.5;

/// The time that a search may take; what it took before it was cut off counts.
struct Clock {
    begun: Instant,
    before_ms: f64,
    limit_ms: f64,
}

impl Clock {
    fn spent_ms(&self) -> f64 {
        self.before_ms + elapsed_ms(self.begun)
    }

    fn left_ms(&self) -> f64 {
        self.limit_ms - self.spent_ms()
    }
}

fn elapsed_ms(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1e3
}

/// The mean of `times`; 0 of none.
fn mean(times: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = times.fold((0.0, 0_u32), |(sum, count), time| (sum + time, count + 1));
    sum / f64::from(count.max(1))
}

/// Where recipes are tried.
pub(super) struct Bench<'a> {
    context: &'a Context,
    fetched: Fetched,
    materials: Materials,
    data: Data,
    /// The original on each engine, loaded once.
    original: Vec<Arc<dyn Engine>>,
    journal: Journal,
    clock: Clock,
    /// Made when the first layer is quantised alone.
    sweep: Option<Sweep>,
}

impl<'a> Bench<'a> {
    /// Goes on with a search that was cut off, where there is one.
    pub(super) fn open(context: &'a Context, materials: Materials, limit: Duration) -> Result<Self, Failure> {
        let fetched: Fetched = context.read(fetch::RECORD)?;
        let mut data = Data::of(context, &evaluate::signature(context, &materials.original)?.0)?;
        let original = engines::load_original(context, &mut data.samples)?;
        let folder = context.work.join(FOLDER);
        fs::create_dir_all(&folder).map_err(disk("make", &folder))?;
        let journal = Journal::open(&folder.join(JOURNAL), &key(context, &fetched)).map_err(disk("write", &folder))?;
        let bench = Self {
            clock: Clock {
                begun: Instant::now(),
                before_ms: journal.took_ms(),
                limit_ms: limit.as_secs_f64() * 1e3,
            },
            context,
            fetched,
            materials,
            data,
            original,
            journal,
            sweep: None,
        };
        let judged = bench.journal.judged();
        if !judged.is_empty() {
            context
                .console
                .info(&format!("the search goes on: {} recipes were judged before", judged.len()));
        }
        bench.remove_models_but(front::kept(judged))?;
        Ok(bench)
    }

    pub(super) fn materials(&self) -> &Materials {
        &self.materials
    }

    /// The folder of the model that the recipe of that index gave.
    fn folder(&self, index: usize) -> PathBuf {
        self.context.work.join(FOLDER).join(index.to_string())
    }

    /// Memory and disk hold one candidate beside the best so far.
    fn remove_models_but(&self, kept: Option<usize>) -> Result<(), Failure> {
        let folder = self.context.work.join(FOLDER);
        let kept = kept.map(|index| self.folder(index));
        for entry in fs::read_dir(&folder).map_err(disk("read", &folder))? {
            let path = entry.map_err(disk("read", &folder))?.path();
            if path.is_dir() && Some(&path) != kept.as_ref() {
                fs::remove_dir_all(&path).map_err(disk("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Writes the model that `recipe` gives, and its record, to `folder`.
    fn make(&self, recipe: &[Technique], folder: &Path) -> Result<Compressed, Failure> {
        // What is told of each technique would drown what is told of the recipes; training takes long.
        let trains = recipe.iter().any(|technique| technique.distill.is_some());
        let console = if trains { self.context.console.clone() } else { Console::silent() };
        let (model, record) = self.materials.compress(self.context, recipe, &console)?;
        convert::write(&model, &folder.join(MODEL_FILE))?;
        write_json(&folder.join(compress::RECORD), &record)?;
        Ok(record)
    }

    fn measure(&self, recipe: &[Technique], folder: &Path) -> Result<Measurement, Failure> {
        let record = self.make(recipe, folder)?;
        let path = folder.join(MODEL_FILE);
        let model = convert::read(&self.context.inputs.source.uri, &path)?;
        let candidates = engines::load_beside(&self.original, &path, record.fold_dequantize, &self.data.samples[0], self.context)?;
        evaluate::measure(self.context, &self.fetched, &path, &model, &candidates, &self.data, false)
    }

    /// Whether there is time for `recipe`, by what those before it took.
    fn has_time_for(&self, recipe: &[Technique]) -> bool {
        let judged = self.journal.judged();
        // The original alone is no result.
        if judged.len() < 2 {
            return true;
        }
        let training = recipe.iter().find_map(|technique| technique.distill.as_ref());
        let is_trained = |judged: &&Judged| judged.candidate.recipe.iter().any(|technique| technique.distill.is_some());
        let took = |trained: bool| {
            let alike = judged.iter().filter(move |judged| is_trained(judged) == trained);
            alike.map(|judged| judged.took_ms)
        };
        let expected_ms = match training {
            Some(_) if took(true).next().is_some() => mean(took(true)),
            Some(distill) => mean(took(false)) + self.training_ms(distill),
            None => mean(took(false)),
        };
        expected_ms <= self.clock.left_ms()
    }

    /// About the longest that a training takes.
    fn training_ms(&self, distill: &Distill) -> f64 {
        let inference_us = self.journal.judged()[0].candidate.latency.map_or(0.0, |latency| latency.before_us);
        let samples = self.materials.calibration.as_ref().map_or(0, |data| data.samples().samples());
        f64::from(distill.epochs) * samples as f64 * inference_us * TRAINING_COST / 1e3
    }

    fn of_measurement(&self, recipe: Vec<Technique>, measured: Result<Measurement, Failure>, took_ms: f64) -> Judged {
        let mut candidate = Candidate {
            recipe,
            size: None,
            size_layer: None,
            metric: None,
            fidelity: None,
            latency: None,
            latency_ratio: None,
            outcome: Outcome::Failed,
            why: None,
        };
        let (mut limits, mut engines, mut latency) = (vec![], vec![], None);
        match measured {
            Ok(measured) => {
                let Measurement { summary, ratio, gate, .. } = measured;
                let original = self
                    .journal
                    .judged()
                    .first()
                    .map_or(&measured.engines, |original| &original.engines);
                latency = ratio.map(|ratio| front::latency(summary.engine, ratio, original));
                engines = measured.engines.clone();
                candidate.size = Some(summary.size_after);
                candidate.size_layer = summary.size_layer_after;
                candidate.metric = summary.metric;
                candidate.fidelity = summary.fidelity;
                candidate.latency = summary.latency;
                candidate.latency_ratio = ratio;
                (candidate.outcome, candidate.why) = match gate.verdict {
                    Verdict::BudgetExceeded => (Outcome::BudgetExceeded, Some(front::exceeded(&gate.limits))),
                    Verdict::WithinBudget | Verdict::NotGated => (Outcome::OnFront, None),
                };
                limits = gate.limits;
            }
            Err(failure) => {
                if failure.reason == FailureReason::BudgetExceeded {
                    candidate.outcome = Outcome::BudgetExceeded;
                }
                candidate.why = Some(failure.message);
            }
        }
        Judged {
            candidate,
            limits,
            engines,
            latency,
            took_ms,
        }
    }

    fn say(&self, judged: &Judged) {
        let Candidate {
            recipe,
            size_layer,
            metric,
            fidelity,
            latency_ratio,
            outcome,
            why,
            ..
        } = &judged.candidate;
        let measured = [
            size_layer.map(display_size),
            metric.map(|metric| format!("{} {}", metric.name, metric.name.display(metric.after))),
            fidelity.map(|fidelity| format!("{} {fidelity:.5}", Metric::Fidelity)),
            latency_ratio.map(|ratio| format!("latency x {:.2}", ratio.median)),
        ];
        let came_of_it = match (outcome, why) {
            (Outcome::Failed, Some(why)) => format!("does not work: {why}"),
            (_, Some(why)) => format!("outside of the budget: {why}"),
            (_, None) => "within the budget".into(),
        };
        let words: Vec<String> = measured.into_iter().flatten().chain([came_of_it]).collect();
        let number = self.journal.judged().len();
        self.context
            .console
            .info(&format!("recipe {number}, {}: {}", front::words(recipe), words.join(", ")));
    }

    /// Puts the model of the best recipe into the place of the compressed model, with the front.
    pub(super) fn finish(self, complete: bool) -> Result<(), Failure> {
        let judged = self.journal.judged();
        // The original was judged first, so there is one.
        let kept = front::kept(judged).unwrap_or(0);
        let recipe = &judged[kept].candidate.recipe;
        let (folder, compressed) = (self.folder(kept), self.context.compressed());
        let record = folder.join(compress::RECORD);
        if !record.is_file() {
            self.make(recipe, &folder)?;
        }
        let mut record: Compressed = self.context.read(&format!("{FOLDER}/{kept}/{}", compress::RECORD))?;
        record.front = Some(Front {
            seed: SEED,
            took_ms: self.clock.spent_ms(),
            complete,
            candidates: front::candidates(judged),
            sensitivity: self.sensitivities(recipe),
        });
        let place = compressed.parent().unwrap_or(&compressed);
        if place.is_dir() {
            fs::remove_dir_all(place).map_err(disk("remove", place))?;
        }
        fs::rename(&folder, place).map_err(disk("write", place))?;
        self.context.write(compress::RECORD, &record)
    }

    /// What each layer loses by the scheme of `recipe`, or by the first one that was looked at.
    fn sensitivities(&self, recipe: &[Technique]) -> Vec<Sensitivity> {
        let swept = self.journal.swept();
        let of_recipe = recipe
            .iter()
            .filter_map(|technique| technique.quantize.as_ref())
            .find_map(|quantize| {
                let plain = Quantize {
                    exclude: vec![],
                    ..quantize.clone()
                };
                swept.iter().find(|swept| swept.quantize == plain)
            });
        let Some(first) = of_recipe.or(swept.first()) else {
            return vec![];
        };
        sorted(swept, &first.quantize).into_iter().map(|layer| layer.sensitivity).collect()
    }
}

/// What a search is of: all that its artifact's key covers but the time that it may take, so that one that ran out of time goes on with more.
fn key(context: &Context, fetched: &Fetched) -> String {
    let mut inputs = context.inputs.clone();
    if let Some(search) = &mut inputs.optimize.search {
        search.max_duration = None;
    }
    ArtifactKey::new(&inputs, &fetched.contents()).to_string()
}

/// The layers that `quantize` changes, the most sensitive first.
fn sorted(swept: &[Swept], quantize: &Quantize) -> Vec<Layer> {
    let of_scheme = swept.iter().filter(|swept| swept.quantize == *quantize);
    let mut layers: Vec<Layer> = of_scheme.filter_map(|swept| swept.layer.clone()).collect();
    layers.sort_by(Layer::by_loss);
    layers
}

impl Judge for Bench<'_> {
    fn judge(&mut self, recipe: Vec<Technique>) -> Result<Judged, Stop> {
        if let Some(known) = self.journal.find(&recipe) {
            return Ok(known.clone());
        }
        if !self.has_time_for(&recipe) {
            return Err(Stop::OutOfTime);
        }
        let begun = Instant::now();
        let index = self.journal.judged().len();
        let measured = self.measure(&recipe, &self.folder(index));
        let judged = match measured {
            // Where the original cannot be judged, nothing can.
            Err(failure) if recipe.is_empty() => return Err(failure.into()),
            measured => self.of_measurement(recipe, measured, elapsed_ms(begun)),
        };
        self.journal
            .add(judged.clone())
            .map_err(disk("write", &self.context.work.join(FOLDER)))?;
        self.remove_models_but(front::kept(self.journal.judged()))?;
        self.say(&judged);
        Ok(judged)
    }

    fn sensitivity(&mut self, quantize: &Quantize) -> Result<Option<Vec<Layer>>, Stop> {
        let units = Unit::of(&self.materials.original);
        let sweep = match self.sweep.take() {
            Some(sweep) => sweep,
            None => Sweep::new(self.context, &self.materials, &self.data, &*self.original[0])?,
        };
        let activity = self.context.console.activity("looking for sensitive layers", "layers");
        for (index, unit) in units.iter().enumerate() {
            activity.report(index as u64, Some(units.len() as u64));
            let swept = || self.journal.swept().iter().filter(|swept| swept.quantize == *quantize);
            if swept().any(|swept| swept.nodes == unit.nodes) {
                continue;
            }
            let expected_ms = mean(swept().map(|swept| swept.took_ms)) * (units.len() - index) as f64;
            if expected_ms > SWEEP_SHARE * self.clock.left_ms() || self.clock.left_ms() <= 0.0 {
                self.sweep = Some(sweep);
                return Ok(None);
            }
            let begun = Instant::now();
            let layer = sweep.alone(quantize, unit, &units, &self.materials, self.context)?;
            let swept = Swept {
                quantize: quantize.clone(),
                nodes: unit.nodes.clone(),
                layer,
                took_ms: elapsed_ms(begun),
            };
            self.journal
                .add_swept(swept)
                .map_err(disk("write", &self.context.work.join(FOLDER)))?;
        }
        self.sweep = Some(sweep);
        Ok(Some(sorted(self.journal.swept(), quantize)))
    }
}
