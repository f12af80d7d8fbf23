//! What this version of the optimiser has, and what it refuses by name.

use plimsoll_package::recipe::{Budget, Inputs, Metric, ModelFormat};
use plimsoll_package::units::{Percentage, Ratio, Size};

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
    if let Some(metric) = optimize.evaluation.as_ref().and_then(|evaluation| evaluation.metric)
        && !matches!(metric, Metric::Accuracy | Metric::Fidelity)
    {
        return unsupported("optimize.evaluation.metric", &metric.to_string(), "use Accuracy or Fidelity");
    }
    let Some(budget) = &optimize.budget else { return Ok(()) };
    check_budget(budget, optimize.evaluation.as_ref().map(|evaluation| evaluation.metric))
}

fn check_budget(budget: &Budget, metric: Option<Option<Metric>>) -> Result<(), Failure> {
    let invalid = |message: String| Err(failure(FailureReason::InvalidInputs, message));
    if budget.max_latency.is_some() {
        return unsupported("optimize.budget.maxLatency", "a latency budget", "leave it out");
    }
    if budget.max_accuracy_drop.is_some() && matches!(metric, None | Some(Some(Metric::Fidelity))) {
        return invalid(
            "optimize.budget.maxAccuracyDrop needs labelled data in optimize.evaluation; without labels use minFidelity".into(),
        );
    }
    if let Some(Err(error)) = budget.max_accuracy_drop.as_ref().map(Percentage::value) {
        return invalid(format!("optimize.budget.maxAccuracyDrop: {error}"));
    }
    if let Some(Err(error)) = budget.min_fidelity.as_ref().map(Ratio::value) {
        return invalid(format!("optimize.budget.minFidelity: {error}"));
    }
    match budget.max_size.as_ref().map(Size::value) {
        Some(Err(error)) => invalid(format!("optimize.budget.maxSize: {error}")),
        _ => Ok(()),
    }
}

fn unsupported(field: &str, what: &str, advice: &str) -> Result<(), Failure> {
    let version = env!("CARGO_PKG_VERSION");
    Err(failure(
        FailureReason::Unsupported,
        format!("{field}: Plimsoll {version} does not have {what}; {advice}"),
    ))
}
