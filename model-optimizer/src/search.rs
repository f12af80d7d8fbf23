//! The search: from a budget to a recipe. It finds the smallest model within the budget, by measurement alone, in a bounded time.
//!
//! Every recipe that is tried is judged as the result will be: on the same samples, on the engines that serve, against the same limits.
//! Nothing is drawn at random but the samples on which layers are compared, and these by a constant seed. What was measured is written
//! down at once, so that a search that was cut off goes on where it was.

use std::time::Duration;

use plimsoll_package::recipe::{Distill, Search, SearchTechnique};

use crate::failure::{Failure, FailureReason, failure};
use crate::step::Context;
use crate::step::compress::Materials;
use bench::Bench;
use exploration::{Plan, Stop, explore};
use ladder::{Mix, ladder};

mod bench;
pub mod exploration;
pub mod front;
pub mod journal;
pub mod ladder;
pub(crate) mod sensitivity;

/// The folder of what is measured, in the folder of the work.
const FOLDER: &str = "search";
/// The seed of the samples on which layers are compared.
const SEED: u64 = 0x5ea2;
/// The time that a search may take where nobody says.
pub const DURATION_DEFAULT: Duration = Duration::from_secs(600);
/// Passes over the calibration data by which a candidate is trained.
const EPOCHS: u32 = 6;
/// The step size of that training.
const RATE: &str = "0.001";

/// Finds the recipe and leaves its model where the compressed model is expected. Where no recipe is within the budget it is the nearest one's:
/// the gate says what it misses.
///
/// # Errors
/// Where the original cannot be judged, or the disk fails. A recipe that does not work on the model is a candidate that failed.
pub(crate) fn run(context: &Context, search: &Search, materials: Materials) -> Result<(), Failure> {
    let limit = limit(search)?;
    let mut bench = Bench::open(context, materials, limit)?;
    let plan = plan(search, bench.materials());
    let complete = match explore(&mut bench, &plan) {
        Ok(complete) => complete,
        Err(Stop::OutOfTime) => false,
        Err(Stop::Failed(failure)) => return Err(failure),
    };
    if !complete {
        context
            .console
            .warn("the search ran out of time before it tried all that it meant to; a longer one may find a smaller model");
    }
    bench.finish(complete)
}

/// The time that `search` may take.
///
/// # Errors
/// [`FailureReason::InvalidInputs`] where it does not parse.
pub fn limit(search: &Search) -> Result<Duration, Failure> {
    let Some(duration) = &search.max_duration else {
        return Ok(DURATION_DEFAULT);
    };
    duration
        .value()
        .map_err(|error| failure(FailureReason::InvalidInputs, format!("optimize.search.maxDuration: {error}")))
}

/// Whether `search` may try `technique`.
#[must_use]
pub fn allows(search: &Search, technique: SearchTechnique) -> bool {
    search.techniques.is_empty() || search.techniques.contains(&technique)
}

fn plan(search: &Search, materials: &Materials) -> Plan {
    let calibrated = materials.calibration.is_some();
    let graph = materials.original.graph.as_ref();
    let mix = graph.map(Mix::of).unwrap_or_default();
    let distill = Distill {
        learning_rate: RATE.parse().ok(),
        ..Distill::of(EPOCHS)
    };
    Plan {
        ladder: match allows(search, SearchTechnique::Quantize) {
            true => ladder(mix, calibrated),
            false => vec![],
        },
        prunes: allows(search, SearchTechnique::Prune) && mix != Mix::default(),
        calibrated,
        distill: (allows(search, SearchTechnique::Distill) && calibrated).then_some(distill),
    }
}
