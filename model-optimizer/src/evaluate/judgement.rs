//! The judgement of a compressed model: its metric and its fidelity, on the engine that will serve.

use plimsoll_package::recipe::Metric;
use plimsoll_package::report::{ClassChange, MetricChange, OutputFidelity};

use super::dataset::Dataset;
use super::engines::Pair;
use super::fidelity::Comparison;
use super::metric::{self, Meter};
use super::reference::Recorder;
use crate::failure::{Failure, FailureReason, chain, failure};
use crate::progress::Activity;

/// What a compressed model is worth beside the original.
#[derive(Debug, Clone, PartialEq)]
pub struct Judgement {
    /// Absent without a metric but fidelity.
    pub metric: Option<MetricChange>,
    /// The name of the output that the metric judges.
    pub judged: Option<String>,
    /// Of each output but strings.
    pub outputs: Vec<OutputFidelity>,
    /// Accuracy by class, where the metric knows classes.
    pub classes: Vec<ClassChange>,
    /// How many samples were run.
    pub samples: u64,
}

/// Runs both models on every sample, batch by batch, and gives `recorder` what the compressed one takes and gives; memory holds one batch.
///
/// # Errors
/// [`FailureReason::InvalidDataset`] where the models do not run on the samples, or the metric is not defined on them;
/// [`FailureReason::BudgetExceeded`] where the metric is defined on the original's outputs and not on the compressed model's.
pub fn judge(
    pair: &Pair,
    data: &Dataset,
    metric: Metric,
    mut recorder: Option<&mut Recorder>,
    activity: &Activity,
) -> Result<Judgement, Failure> {
    let invalid = |why: String| failure(FailureReason::InvalidDataset, format!("{metric} cannot be measured: {why}"));
    let broken = |why: String| {
        let message = format!("{metric} cannot be measured on the compressed model: {why}; compress less, or use a gentler scheme");
        failure(FailureReason::BudgetExceeded, message)
    };
    let meter = || Meter::new(metric, pair.after.inputs(), pair.after.outputs()).map_err(invalid);
    let mut meters = match metric {
        Metric::Fidelity => None,
        _ => Some((meter()?, meter()?)),
    };
    let labels = data.labels().filter(|_| metric.needs_labels()).unwrap_or_default();
    let label_width = labels.len() / data.samples().max(1);
    let mut outputs: Vec<Comparison> = pair.after.outputs().iter().map(|spec| Comparison::new(&spec.name)).collect();
    let mut samples = 0;
    for range in data.batches() {
        let inputs = data.batch(range.clone())?;
        let unfit = |error| {
            let words = format!(
                "the model does not run on the samples: {}; name fitting data in optimize.evaluation",
                chain(&error)
            );
            failure(FailureReason::InvalidDataset, words)
        };
        let before = pair.before.run(&inputs).map_err(unfit)?;
        let after = pair.after.run(&inputs).map_err(unfit)?;
        for (comparison, (before, after)) in outputs.iter_mut().zip(before.iter().zip(&after)) {
            comparison.add(before, after);
        }
        if let Some((of_before, of_after)) = &mut meters {
            let labels = (label_width > 0).then(|| &labels[range.start * label_width..range.end * label_width]);
            of_before.add(&inputs, &before, labels, range.start, range.len()).map_err(invalid)?;
            of_after.add(&inputs, &after, labels, range.start, range.len()).map_err(broken)?;
        }
        if let Some(recorder) = &mut recorder {
            recorder.add(pair.after.inputs(), &inputs, &after, range.len());
        }
        samples = range.end;
        activity.report(samples as u64, Some(data.samples() as u64));
    }
    let mut judgement = Judgement {
        metric: None,
        judged: None,
        outputs: outputs.into_iter().filter_map(Comparison::finish).collect(),
        classes: vec![],
        samples: samples as u64,
    };
    if let Some((of_before, of_after)) = meters {
        let labels = &labels[..samples * label_width];
        judgement.metric = Some(MetricChange {
            name: metric,
            before: of_before.value(labels).map_err(invalid)?,
            after: of_after.value(labels).map_err(broken)?,
            samples: samples as u64,
        });
        judgement.judged = Some(pair.after.outputs()[of_before.output].name.clone());
        let classes: Result<Vec<i64>, _> = labels
            .iter()
            .enumerate()
            .map(|(sample, label)| metric::class_of(*label, sample))
            .collect();
        if let Ok(classes) = classes
            && let (Some(before), Some(after)) = (of_before.right(&classes), of_after.right(&classes))
        {
            judgement.classes = metric::by_class(&before, &after, &classes);
        }
    }
    Ok(judgement)
}
