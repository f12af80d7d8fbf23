//! What this version of the optimiser has, and what it refuses by name.

use plimsoll_package::recipe::{Budget, Inputs, Metric, ModelFormat};
use plimsoll_package::units::UnitError;

use crate::compress;
use crate::failure::{Failure, FailureReason, failure};

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
    if !optimize.recipe.is_empty() && optimize.search.is_some() {
        return invalid("optimize: set either recipe or search, not both".into());
    }
    if optimize.search.is_some() {
        return unsupported("optimize.search", "a search", "name the techniques in optimize.recipe");
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
    if inputs.teacher.is_some() && optimize.recipe.iter().all(|technique| technique.distill.is_none()) {
        return invalid("a teacher is named, and nothing in optimize.recipe distils; add distill (on the command line --epochs)".into());
    }
    if inputs.no_gate && (optimize.budget.is_some() || optimize.evaluation.is_some()) {
        return invalid("--no-gate leaves nothing to measure; leave it out, or optimize.budget and optimize.evaluation".into());
    }
    let Some(budget) = &optimize.budget else { return Ok(()) };
    check_budget(budget, optimize.evaluation.as_ref().map(|evaluation| evaluation.metric))
}

fn check_budget(budget: &Budget, metric: Option<Option<Metric>>) -> Result<(), Failure> {
    let invalid = |message: String| Err(failure(FailureReason::InvalidInputs, message));
    if budget.max_accuracy_drop.is_some() && matches!(metric, None | Some(Some(Metric::Fidelity))) {
        return invalid(
            "optimize.budget.maxAccuracyDrop needs labelled data in optimize.evaluation; without labels use minFidelity".into(),
        );
    }
    let knows_classes = matches!(metric, Some(None | Some(Metric::Accuracy | Metric::Top5Accuracy | Metric::F1)));
    if budget.max_class_accuracy_drop.is_some() && !knows_classes {
        return invalid(
            "optimize.budget.maxClassAccuracyDrop needs labelled data in optimize.evaluation and the metric Accuracy, Top5Accuracy or F1; without them use minFidelity".into(),
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
