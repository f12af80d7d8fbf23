//! What a model is worth on labelled samples: one number, by the definitions of scikit-learn.

use std::collections::{BTreeMap, BTreeSet};

use plimsoll_package::manifest::{Datatype, TensorSpec};
use plimsoll_package::recipe::Metric;
use plimsoll_package::report::ClassChange;
use plimsoll_runtime::engine::Tensor;

/// Most classes whose accuracy is reported.
const CLASSES_MAX: usize = 1000;
/// How far the sum of probabilities is from 1 at most.
const PROBABILITY_TOLERANCE: f64 = 1e-3;

/// Takes a model's outputs batch by batch, and gives the metric in the end.
pub struct Meter {
    metric: Metric,
    /// The index of the output that is judged.
    pub output: usize,
    /// Of the token ids and of the attention mask among the inputs, for perplexity.
    tokens: Option<(usize, Option<usize>)>,
    kept: Kept,
}

/// What of the outputs is kept.
enum Kept {
    /// The class of each sample.
    Classes { predicted: Vec<i64>, classes: Option<usize> },
    /// Whether each sample's label is among so many of the largest scores.
    Hits { top: usize, hits: Vec<bool> },
    /// The values of each sample, the same number for each.
    Values { values: Vec<f64>, width: usize },
    /// Sum of the negative logarithms of the next tokens' probabilities, and the number of tokens.
    Surprise { nats: f64, tokens: u64 },
}

impl Meter {
    /// A meter of `metric` for a model of that signature. The judged output is the first one of numbers (for scores and values: of
    /// floats; for perplexity: with three dimensions).
    ///
    /// # Errors
    /// In words, where the metric cannot be measured on such a model.
    pub fn new(metric: Metric, inputs: &[TensorSpec], outputs: &[TensorSpec]) -> Result<Self, String> {
        let is_float = |spec: &TensorSpec| matches!(spec.datatype, Datatype::Fp16 | Datatype::Bf16 | Datatype::Fp32 | Datatype::Fp64);
        let is_number = |spec: &TensorSpec| spec.datatype != Datatype::Bytes;
        let values = || Kept::Values { values: vec![], width: 0 };
        let (output, kept) = match metric {
            Metric::Accuracy | Metric::F1 => (
                outputs.iter().position(is_number),
                Kept::Classes {
                    predicted: vec![],
                    classes: None,
                },
            ),
            Metric::TopAccuracy(top) => (
                outputs.iter().position(is_float),
                Kept::Hits {
                    top: top.into(),
                    hits: vec![],
                },
            ),
            Metric::Auroc | Metric::MeanAbsoluteError | Metric::RootMeanSquaredError | Metric::R2 => {
                (outputs.iter().position(is_float), values())
            }
            Metric::Perplexity => (
                outputs.iter().position(|spec| is_float(spec) && spec.shape.len() == 3),
                Kept::Surprise { nats: 0.0, tokens: 0 },
            ),
            Metric::Fidelity => return Err("Fidelity compares two models and needs no meter".into()),
        };
        let output = output.ok_or_else(|| match metric {
            Metric::Perplexity => {
                "the model has no output of logits [batch, sequence, vocabulary]; Perplexity is for language models".to_owned()
            }
            _ => format!("the model has no output of numbers that {metric} could be measured on; use the metric Fidelity"),
        })?;
        let tokens = match metric {
            Metric::Perplexity => Some(token_inputs(inputs)?),
            _ => None,
        };
        Ok(Self {
            metric,
            output,
            tokens,
            kept,
        })
    }

    /// Takes the outputs of a batch, whose samples begin with number `first` and have `labels`, the same number each.
    ///
    /// # Errors
    /// In words, where outputs or labels are not such as the metric is defined on.
    pub fn add(
        &mut self,
        inputs: &[Tensor],
        outputs: &[Tensor],
        labels: Option<&[f64]>,
        first: usize,
        samples: usize,
    ) -> Result<(), String> {
        let output = &outputs[self.output];
        let values = output.data().to_f64().unwrap_or_default();
        let width = values.len() / samples.max(1);
        if width == 0 || width * samples != values.len() {
            return Err("the judged output does not hold the same number of values for each sample".into());
        }
        let label_of = |sample: usize| -> Result<i64, String> {
            match labels.map(|labels| (labels.len() / samples, labels)) {
                Some((1, labels)) => class_of(labels[sample], first + sample),
                _ => Err("the labels are not one class number for each sample".into()),
            }
        };
        match &mut self.kept {
            Kept::Classes { predicted, classes } => {
                let is_integer = matches!(
                    output.datatype(),
                    Datatype::Bool
                        | Datatype::Uint8
                        | Datatype::Uint16
                        | Datatype::Uint32
                        | Datatype::Uint64
                        | Datatype::Int8
                        | Datatype::Int16
                        | Datatype::Int32
                        | Datatype::Int64
                );
                match (width, is_integer) {
                    (1, true) => predicted.extend(values.iter().map(|value| *value as i64)),
                    (1, false) => {
                        return Err(format!(
                            "the judged output is one number for each sample, which names no class for {}; use Auroc or Fidelity",
                            self.metric
                        ));
                    }
                    _ => {
                        *classes = Some(width);
                        for (sample, scores) in values.chunks_exact(width).enumerate() {
                            label_within(label_of(sample)?, width, first + sample)?;
                            predicted.push(largest(scores) as i64);
                        }
                    }
                }
            }
            Kept::Hits { top, hits } => {
                if width == 1 {
                    return Err("the judged output is one number for each sample, which ranks no classes".into());
                }
                for (sample, scores) in values.chunks_exact(width).enumerate() {
                    let label = label_within(label_of(sample)?, width, first + sample)?;
                    hits.push(is_among_largest(scores, label, *top));
                }
            }
            Kept::Values {
                values: kept,
                width: known,
            } => {
                *known = width;
                if let Some(place) = values.iter().position(|value| !value.is_finite()) {
                    return Err(format!(
                        "the output holds {} for sample {}",
                        values[place],
                        first + place / width + 1
                    ));
                }
                kept.extend(values);
            }
            Kept::Surprise { nats, tokens } => {
                let (ids, mask) = self.tokens.ok_or("the model takes no token ids")?;
                surprise(
                    &values,
                    output.shape(),
                    &inputs[ids],
                    mask.map(|mask| &inputs[mask]),
                    first,
                    nats,
                    tokens,
                )?;
            }
        }
        Ok(())
    }

    /// The metric over all samples that were added, in the order of their `labels`.
    ///
    /// # Errors
    /// In words, where the metric is not defined on them.
    pub fn value(&self, labels: &[f64]) -> Result<f64, String> {
        let classes = || {
            let labels = labels.iter().enumerate();
            labels
                .map(|(sample, label)| class_of(*label, sample))
                .collect::<Result<Vec<i64>, _>>()
        };
        let value = match &self.kept {
            Kept::Classes { predicted, .. } if self.metric == Metric::F1 => f1(predicted, &classes()?),
            Kept::Classes { .. } | Kept::Hits { .. } => {
                let right = self.right(&classes()?).unwrap_or_default();
                right.iter().filter(|right| **right).count() as f64 / right.len().max(1) as f64
            }
            Kept::Values { values, width } if self.metric == Metric::Auroc => auroc(values, *width, &classes()?)?,
            Kept::Values { values, width } => regression(self.metric, values, labels, *width)?,
            Kept::Surprise { nats, tokens } => {
                if *tokens == 0 {
                    return Err("no sample holds two tokens, so there is no next token to predict".into());
                }
                (nats / *tokens as f64).exp()
            }
        };
        if value.is_finite() {
            Ok(value)
        } else {
            Err(format!("it comes out as {value}"))
        }
    }

    /// Whether each sample is right, where the metric knows that.
    #[must_use]
    pub fn right(&self, labels: &[i64]) -> Option<Vec<bool>> {
        match &self.kept {
            Kept::Classes { predicted, .. } => Some(predicted.iter().zip(labels).map(|(predicted, label)| predicted == label).collect()),
            Kept::Hits { hits, .. } => Some(hits.clone()),
            Kept::Values { .. } | Kept::Surprise { .. } => None,
        }
    }
}

/// The class that a label names; `sample` counts from 0.
///
/// # Errors
/// In words, where it is no whole number.
pub fn class_of(label: f64, sample: usize) -> Result<i64, String> {
    if label.fract() == 0.0 && label.abs() < 9e15 {
        return Ok(label as i64);
    }
    Err(format!("the label of sample {} is {label}, which is no class number", sample + 1))
}

fn label_within(label: i64, classes: usize, sample: usize) -> Result<usize, String> {
    let within = usize::try_from(label).ok().filter(|label| *label < classes);
    within.ok_or_else(|| {
        format!(
            "the label of sample {} is {label}, the model knows the {classes} classes 0 to {}",
            sample + 1,
            classes - 1
        )
    })
}

/// The index of the first largest value; NaN is never the largest.
fn largest(scores: &[f64]) -> usize {
    let mut best = 0;
    for (index, score) in scores.iter().enumerate() {
        if *score > scores[best] || scores[best].is_nan() {
            best = index;
        }
    }
    best
}

/// Whether fewer than `top` classes come before `label`: those of larger scores, and of equal scores the earlier ones.
fn is_among_largest(scores: &[f64], label: usize, top: usize) -> bool {
    let own = scores[label];
    let before = scores
        .iter()
        .enumerate()
        .filter(|(index, score)| **score > own || **score == own && *index < label);
    !own.is_nan() && before.count() < top
}

/// F1 averaged over the classes that labels or predictions name, a class without either counting 0 (`average="macro"`).
fn f1(predicted: &[i64], labels: &[i64]) -> f64 {
    let mut counts: BTreeMap<i64, (u64, u64)> = BTreeMap::new();
    for (predicted, label) in predicted.iter().zip(labels) {
        // Of each class the true positives, and the sum of its labels and predictions.
        counts.entry(*label).or_default().1 += 1;
        let entry = counts.entry(*predicted).or_default();
        entry.1 += 1;
        entry.0 += u64::from(predicted == label);
    }
    let scores = counts.values().map(|(right, named)| 2.0 * *right as f64 / *named as f64);
    scores.sum::<f64>() / counts.len().max(1) as f64
}

/// Area under the receiver operating characteristic. One score is of class 1; of two the difference counts; of more the mean over the
/// classes that occur, each against the rest, of probabilities (logits go through a softmax first).
fn auroc(values: &[f64], width: usize, labels: &[i64]) -> Result<f64, String> {
    let named: BTreeSet<i64> = labels.iter().copied().collect();
    if named.len() < 2 {
        return Err("Auroc needs samples of two classes or more".into());
    }
    if width <= 2 {
        if let Some(other) = named.iter().find(|class| !(0..=1).contains(*class)) {
            return Err(format!("there is a label {other}, and the model tells the classes 0 and 1 apart"));
        }
        let scores: Vec<f64> = match width {
            1 => values.to_vec(),
            _ => values.chunks_exact(2).map(|pair| pair[1] - pair[0]).collect(),
        };
        return Ok(area(&scores, &labels.iter().map(|label| *label == 1).collect::<Vec<_>>()));
    }
    for (sample, label) in labels.iter().enumerate() {
        label_within(*label, width, sample)?;
    }
    let is_distribution =
        |row: &[f64]| row.iter().all(|value| *value >= 0.0) && (row.iter().sum::<f64>() - 1.0).abs() <= PROBABILITY_TOLERANCE;
    let mut probabilities = values.to_vec();
    if !values.chunks_exact(width).all(is_distribution) {
        for row in probabilities.chunks_exact_mut(width) {
            let largest = row.iter().fold(f64::NEG_INFINITY, |largest, value| largest.max(*value));
            row.iter_mut().for_each(|value| *value = (*value - largest).exp());
            let sum: f64 = row.iter().sum();
            row.iter_mut().for_each(|value| *value /= sum);
        }
    }
    let areas = named.iter().map(|class| {
        let scores: Vec<f64> = probabilities.iter().skip(*class as usize).step_by(width).copied().collect();
        area(&scores, &labels.iter().map(|label| label == class).collect::<Vec<_>>())
    });
    Ok(areas.sum::<f64>() / named.len() as f64)
}

/// The Mann-Whitney statistic: the share of pairs of a positive and a negative whose scores stand in that order, ties counting half.
fn area(scores: &[f64], positive: &[bool]) -> f64 {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
    let (mut rank_sum, mut rank) = (0.0, 0.0);
    for equal in order.chunk_by(|a, b| scores[*a] == scores[*b]) {
        let middle = rank + (equal.len() as f64 + 1.0) / 2.0;
        rank_sum += middle * equal.iter().filter(|index| positive[**index]).count() as f64;
        rank += equal.len() as f64;
    }
    let positives = positive.iter().filter(|positive| **positive).count() as f64;
    let negatives = positive.len() as f64 - positives;
    (rank_sum - positives * (positives + 1.0) / 2.0) / (positives * negatives)
}

/// An error of values, of several for each sample the mean over each of them (`multioutput="uniform_average"`).
fn regression(metric: Metric, values: &[f64], labels: &[f64], width: usize) -> Result<f64, String> {
    if labels.len() != values.len() {
        return Err(format!(
            "there are {} labels for {} values of the model; give as many labels for each sample as the output has values",
            labels.len(),
            values.len()
        ));
    }
    let samples = (values.len() / width.max(1)) as f64;
    let mut sum = 0.0;
    for place in 0..width {
        let of = |values: &[f64]| values.iter().skip(place).step_by(width).copied().collect::<Vec<f64>>();
        let (values, labels) = (of(values), of(labels));
        let errors = values.iter().zip(&labels).map(|(value, label)| value - label);
        let squares = errors.clone().map(|error| error * error).sum::<f64>();
        sum += match metric {
            Metric::MeanAbsoluteError => errors.map(f64::abs).sum::<f64>() / samples,
            Metric::RootMeanSquaredError => (squares / samples).sqrt(),
            _ => {
                let mean = labels.iter().sum::<f64>() / samples;
                let spread: f64 = labels.iter().map(|label| (label - mean) * (label - mean)).sum();
                if spread == 0.0 {
                    return Err("R2 is not defined where all labels are equal".into());
                }
                1.0 - squares / spread
            }
        };
    }
    Ok(sum / width as f64)
}

/// The inputs that hold token ids and the attention mask.
fn token_inputs(inputs: &[TensorSpec]) -> Result<(usize, Option<usize>), String> {
    let is_tokens = |spec: &TensorSpec| matches!(spec.datatype, Datatype::Int32 | Datatype::Int64) && spec.shape.len() == 2;
    let named = |name: &str| inputs.iter().position(|spec| spec.name == name && is_tokens(spec));
    let ids = named("input_ids").or_else(|| inputs.iter().position(is_tokens));
    let ids = ids.ok_or("the model takes no token ids [batch, sequence]; Perplexity is for language models")?;
    Ok((ids, named("attention_mask").filter(|mask| *mask != ids)))
}

/// Adds the negative log-probability of each next token that the attention mask does not hide.
fn surprise(
    logits: &[f64],
    shape: &[usize],
    ids: &Tensor,
    mask: Option<&Tensor>,
    first: usize,
    nats: &mut f64,
    tokens: &mut u64,
) -> Result<(), String> {
    let &[batch, sequence, vocabulary] = shape else {
        return Err(format!(
            "the logits have shape {shape:?}, which is not [batch, sequence, vocabulary]"
        ));
    };
    if ids.shape() != [batch, sequence] {
        return Err(format!("the logits have shape {shape:?} for token ids of shape {:?}", ids.shape()));
    }
    let whole = |tensor: &Tensor| tensor.data().to_f64().unwrap_or_default();
    let (ids, mask) = (whole(ids), mask.map(whole));
    for place in (0..batch * sequence).filter(|place| place % sequence + 1 < sequence) {
        if mask.as_ref().is_some_and(|mask| mask[place] == 0.0 || mask[place + 1] == 0.0) {
            continue;
        }
        let next = ids[place + 1];
        let token = (next >= 0.0 && next < vocabulary as f64).then_some(next as usize);
        let token = token.ok_or_else(|| {
            let sample = first + place / sequence + 1;
            format!("sample {sample} holds the token {next}, the vocabulary has {vocabulary}")
        })?;
        let row = &logits[place * vocabulary..][..vocabulary];
        let largest = row.iter().fold(f64::NEG_INFINITY, |largest, value| largest.max(*value));
        let sum: f64 = row.iter().map(|value| (value - largest).exp()).sum();
        *nats += sum.ln() + largest - row[token];
        *tokens += 1;
    }
    Ok(())
}

/// The accuracy of each class before and after, of at most 1000 classes.
#[must_use]
pub fn by_class(before: &[bool], after: &[bool], labels: &[i64]) -> Vec<ClassChange> {
    let mut classes: BTreeMap<i64, (u64, u64, u64)> = BTreeMap::new();
    for ((label, before), after) in labels.iter().zip(before).zip(after) {
        let (samples, right_before, right_after) = classes.entry(*label).or_default();
        *samples += 1;
        *right_before += u64::from(*before);
        *right_after += u64::from(*after);
    }
    let share = |right: u64, samples: u64| right as f64 / samples as f64;
    let changes = classes.into_iter().map(|(class, (samples, before, after))| ClassChange {
        class,
        samples,
        before: share(before, samples),
        after: share(after, samples),
    });
    changes.take(CLASSES_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_runtime::engine::Data;
    use serde::Deserialize;

    fn spec(name: &str, datatype: Datatype, shape: &[i64]) -> TensorSpec {
        TensorSpec {
            name: name.into(),
            datatype,
            shape: shape.to_vec(),
        }
    }

    /// The metric of one output of floats, given in batches of 3.
    fn measure_of(metric: Metric, values: &[f64], labels: &[f64], samples: usize) -> Result<f64, String> {
        let (width, label_width) = (values.len() / samples, labels.len() / samples);
        let output = [spec("y", Datatype::Fp64, &[-1, -1])];
        let mut meter = Meter::new(metric, &[], &output)?;
        for first in (0..samples).step_by(3) {
            let count = (samples - first).min(3);
            let part = values[first * width..][..count * width].to_vec();
            let labels = &labels[first * label_width..][..count * label_width];
            meter.add(&[], &[Tensor::new(vec![count, width], part).unwrap()], Some(labels), first, count)?;
        }
        meter.value(labels)
    }

    fn measure(metric: Metric, values: &[f64], labels: &[f64]) -> Result<f64, String> {
        measure_of(metric, values, labels, labels.len())
    }

    #[derive(Deserialize)]
    struct Case {
        name: String,
        metric: Metric,
        samples: usize,
        labels: Vec<f64>,
        values: Vec<f64>,
        expected: f64,
    }

    #[test]
    fn every_metric_is_scikit_learns() {
        let recorded = include_str!("../../tests/parity/metrics.json");
        let cases: Vec<Case> = serde_json::from_str(recorded).unwrap();
        assert!(cases.len() >= 12);
        for case in cases {
            let measured = measure_of(case.metric, &case.values, &case.labels, case.samples).unwrap();
            assert!(
                (measured - case.expected).abs() < 1e-9,
                "{}: {measured}, expected {}",
                case.name,
                case.expected
            );
        }
    }

    #[test]
    fn the_largest_score_or_the_number_itself_is_the_class() {
        assert_eq!(measure(Metric::Accuracy, &[0.1, 0.9, f64::NAN, -1.0], &[1.0, 1.0]), Ok(1.0));
        let mut meter = Meter::new(Metric::Accuracy, &[], &[spec("label", Datatype::Int64, &[-1])]).unwrap();
        let output = Tensor::new(vec![2], Data::Int64(vec![3, 7])).unwrap();
        meter.add(&[], &[output], Some(&[3.0, 8.0]), 0, 2).unwrap();
        assert_eq!(meter.value(&[3.0, 8.0]), Ok(0.5));
    }

    #[test]
    fn what_a_metric_is_not_defined_on_is_said() {
        let refusal = |metric, values: &[f64], labels: &[f64]| measure(metric, values, labels).unwrap_err();
        assert!(refusal(Metric::Accuracy, &[0.3, 0.7], &[0.0, 1.0]).contains("use Auroc or Fidelity"));
        let out_of_range = refusal(Metric::TopAccuracy(5), &[0.3, 0.7, 0.2, 0.8], &[0.0, 2.0]);
        assert_eq!(out_of_range, "the label of sample 2 is 2, the model knows the 2 classes 0 to 1");
        assert!(refusal(Metric::F1, &[0.3, 0.7], &[0.5]).contains("the label of sample 1 is 0.5"));
        assert!(refusal(Metric::MeanAbsoluteError, &[0.3, f64::NAN], &[0.0, 1.0]).contains("holds NaN for sample 2"));
        assert!(refusal(Metric::R2, &[0.3, 0.7], &[1.0, 1.0]).contains("all labels are equal"));
        assert!(refusal(Metric::Auroc, &[0.3, 0.7], &[1.0, 1.0]).contains("two classes"));
        assert!(refusal(Metric::Perplexity, &[0.3], &[1.0]).contains("for language models"));
    }

    #[test]
    fn perplexity_is_of_next_tokens_that_the_mask_shows() {
        let inputs = [
            spec("input_ids", Datatype::Int64, &[-1, -1]),
            spec("attention_mask", Datatype::Int64, &[-1, -1]),
        ];
        let mut meter = Meter::new(Metric::Perplexity, &inputs, &[spec("logits", Datatype::Fp32, &[-1, -1, 2])]).unwrap();
        let ids = Tensor::new(vec![1, 4], vec![0_i64, 1, 0, 1]).unwrap();
        let mask = Tensor::new(vec![1, 4], vec![1_i64, 1, 1, 0]).unwrap();
        // The next tokens 1 and 0 have probability 3/4 and 1/2; the third is hidden.
        let three = 3.0_f32.ln();
        let logits = Tensor::new(vec![1, 4, 2], vec![0.0, three, 5.0, 5.0, 100.0, 0.0, 0.0, 0.0]).unwrap();
        meter.add(&[ids, mask], &[logits], None, 0, 1).unwrap();
        let expected = (-(0.75_f64.ln() + 0.5_f64.ln()) / 2.0).exp();
        assert!((meter.value(&[]).unwrap() - expected).abs() < 1e-6);
        let ids = Tensor::new(vec![1, 2], vec![0_i64, 2]).unwrap();
        let mask = Tensor::new(vec![1, 2], vec![1_i64, 1]).unwrap();
        let logits = Tensor::new(vec![1, 2, 2], vec![0.0_f32; 4]).unwrap();
        let refusal = meter.add(&[ids, mask], &[logits], None, 0, 1).unwrap_err();
        assert_eq!(refusal, "sample 1 holds the token 2, the vocabulary has 2");
    }

    #[test]
    fn each_class_is_counted_by_itself() {
        let changes = by_class(&[true, true, true], &[true, false, false], &[0, 0, 1]);
        assert_eq!((changes[0].samples, changes[0].before, changes[0].after), (2, 1.0, 0.5));
        assert_eq!((changes[1].class, changes[1].before, changes[1].after), (1, 1.0, 0.0));
    }
}
