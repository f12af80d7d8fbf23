//! What this version of the optimiser has, and what it refuses by name.

use plimsoll_package::manifest::Engine;
use plimsoll_package::recipe::{Budget, Inputs, Metric, ModelFormat, Search, SearchTechnique};
use plimsoll_package::units::UnitError;
use plimsoll_runtime::engine::{LIBRARY_VARIABLE, default_library};

use crate::failure::{Failure, FailureReason, failure};
use crate::{compress, search};

/// Refuses inputs that ask for what this version does not have, or that contradict themselves.
///
/// # Errors
/// [`FailureReason::Unsupported`] or [`FailureReason::InvalidInputs`], with the field.
pub fn check(inputs: &Inputs) -> Result<(), Failure> {
    let optimize = &inputs.optimize;
    let invalid = |message: String| Err(failure(FailureReason::InvalidInputs, message));
    if let Some(format) = inputs.source.format.filter(|format| *format != ModelFormat::Onnx) {
        return unsupported("source.format", &format!("{format}"), "export the model to ONNX");
    }
    if inputs.engine == Some(Engine::OnnxRuntime) && default_library().is_none() {
        let message = format!(
            "the engine OnnxRuntime is asked for, and its library is not here; name libonnxruntime.so in {LIBRARY_VARIABLE}, or leave the choice of an engine to what is measured"
        );
        return Err(failure(FailureReason::Unsupported, message));
    }
    if !optimize.recipe.is_empty() && optimize.search.is_some() {
        return invalid("optimize: set either recipe or search, not both".into());
    }
    if let Some(search) = &optimize.search {
        check_search(search, inputs)?;
    }
    for (index, technique) in optimize.recipe.iter().enumerate() {
        let field = format!("optimize.recipe[{index}]");
        match (&technique.prune, &technique.quantize, &technique.distill) {
            (Some(prune), None, None) => {
                compress::prune::technique(prune)?;
            }
            (None, Some(quantize), None) => {
                compress::quantize::technique(quantize)?;
            }
            (None, None, Some(distill)) => {
                compress::distill::technique(distill)?;
                if distill.data.is_none() && optimize.calibration.is_none() {
                    return invalid(format!(
                        "{field}.distill needs samples to train on: name them in its data, or in optimize.calibration"
                    ));
                }
            }
            _ => return invalid(format!("{field} has not exactly one key; write one list entry per technique")),
        }
    }
    let distils = optimize.recipe.iter().any(|technique| technique.distill.is_some()) || optimize.search.is_some();
    if inputs.teacher.is_some() && !distils {
        return invalid("a teacher is named, and nothing in optimize.recipe distils; add distill (on the command line --epochs)".into());
    }
    if inputs.no_gate && (optimize.budget.is_some() || optimize.evaluation.is_some()) {
        return invalid("--no-gate leaves nothing to measure; leave it out, or optimize.budget and optimize.evaluation".into());
    }
    let Some(budget) = &optimize.budget else { return Ok(()) };
    check_budget(budget, optimize.evaluation.as_ref().map(|evaluation| evaluation.metric))
}

fn check_search(search: &Search, inputs: &Inputs) -> Result<(), Failure> {
    let invalid = |message: &str| Err(failure(FailureReason::InvalidInputs, message));
    search::limit(search)?;
    if inputs.no_gate {
        return invalid("a search goes by what is measured, and --no-gate measures nothing; leave one of them out");
    }
    let distils = search::allows(search, SearchTechnique::Distill);
    if search.techniques.iter().all(|technique| *technique == SearchTechnique::Distill) && !search.techniques.is_empty() {
        return invalid("optimize.search.techniques: Distill alone makes nothing smaller; add Prune or Quantize");
    }
    let calibrated = inputs.optimize.calibration.is_some();
    if distils && !search.techniques.is_empty() && !calibrated {
        return invalid(
            "optimize.search.techniques names Distill, which needs samples to train on: name them in optimize.calibration, or leave Distill out",
        );
    }
    if inputs.teacher.is_some() && !(distils && calibrated) {
        return invalid(
            "a teacher is named, and the search cannot distil: add Distill to optimize.search.techniques, and samples to train on in optimize.calibration (on the command line --calibration)",
        );
    }
    Ok(())
}

fn check_budget(budget: &Budget, metric: Option<Option<Metric>>) -> Result<(), Failure> {
    let invalid = |message: String| Err(failure(FailureReason::InvalidInputs, message));
    if budget.max_accuracy_drop.is_some() && matches!(metric, None | Some(Some(Metric::Fidelity))) {
        return invalid(
            "optimize.budget.maxAccuracyDrop needs labelled data in optimize.evaluation; without labels use minFidelity".into(),
        );
    }
    let knows_classes = matches!(metric, Some(None | Some(Metric::Accuracy | Metric::TopAccuracy(_) | Metric::F1)));
    if budget.max_class_accuracy_drop.is_some() && !knows_classes {
        return invalid(
            "optimize.budget.maxClassAccuracyDrop needs labelled data in optimize.evaluation and the metric Accuracy, TopKAccuracy or F1; without them use minFidelity".into(),
        );
    }
    let field = |name: &'static str, error: Option<UnitError>| error.map(|error| format!("optimize.budget.{name}: {error}"));
    let unreadable = [
        field(
            "maxAccuracyDrop",
            budget.max_accuracy_drop.as_ref().and_then(|limit| limit.value().err()),
        ),
        field(
            "maxClassAccuracyDrop",
            budget.max_class_accuracy_drop.as_ref().and_then(|limit| limit.value().err()),
        ),
        field("minFidelity", budget.min_fidelity.as_ref().and_then(|limit| limit.value().err())),
        field("maxSize", budget.max_size.as_ref().and_then(|limit| limit.value().err())),
        field("maxLatency", budget.max_latency.as_ref().and_then(|limit| limit.value().err())),
    ];
    match unreadable.into_iter().flatten().next() {
        Some(message) => invalid(message),
        None => Ok(()),
    }
}

fn unsupported(field: &str, what: &str, advice: &str) -> Result<(), Failure> {
    let version = env!("CARGO_PKG_VERSION");
    Err(failure(
        FailureReason::Unsupported,
        format!("{field}: Plimsoll {version} does not have {what}; {advice}"),
    ))
}
