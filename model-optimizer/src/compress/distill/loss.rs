//! How far the outputs of the model in training are from those of its teacher.

use candle_core::{Result, Tensor, bail};
use plimsoll_package::recipe::DistillLoss;
use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{AttributeProto, GraphProto, ValueInfoProto, type_proto};

use super::operators::{axis_of, log_softmax};
use crate::graph::attribute;

/// Scores are held above this, so that those of what is ruled out (minus infinity) stay numbers.
const SCORE_MIN: f64 = -1e4;
/// Probabilities are held above this before their logarithm is taken.
const PROBABILITY_MIN: f64 = 1e-12;

/// An output that is trained.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Target {
    /// The value of the trained graph that is compared: the output itself or, of class scores that end in a softmax, the softmax's input.
    pub(super) value: String,
    /// Which of the teacher's outputs it is compared with.
    pub(super) output: usize,
    pub(super) measure: Measure,
}

/// How an output is compared.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Measure {
    /// The relative entropy of class scores, which the teacher gives as probabilities or as logarithms (up to a constant).
    Entropy { probabilities: bool, axis: i64 },
    /// The mean squared difference.
    Square,
}

/// What an output is made by.
enum Ending<'a> {
    Softmax {
        input: &'a str,
        axis: Option<i64>,
        logarithm: bool,
    },
    /// A matrix product.
    Linear,
    Other,
}

/// The outputs of `student` that can be trained, which `teacher` gives under the same names; `loss` decides how, or each output's kind.
///
/// # Errors
/// In words, where there is none.
pub(super) fn targets(
    student: &GraphProto,
    teacher: &GraphProto,
    opset: i64,
    loss: Option<DistillLoss>,
) -> std::result::Result<Vec<Target>, String> {
    let mut targets = Vec::new();
    for output in student.output.iter().filter(|output| is_float(output)) {
        let name = output.name();
        let Some(position) = teacher.output.iter().position(|given| given.name() == name) else {
            return Err(format!("the teacher has no output `{name}`"));
        };
        let entropy = |value: &str, axis: Option<i64>, probabilities: bool| Target {
            value: value.to_owned(),
            output: position,
            measure: Measure::Entropy {
                probabilities,
                axis: axis.unwrap_or_else(|| class_axis(output)),
            },
        };
        let square = Target {
            value: name.to_owned(),
            output: position,
            measure: Measure::Square,
        };
        let probabilities = matches!(ending(teacher, name), Ending::Softmax { logarithm: false, .. });
        targets.push(match (ending(student, name), loss) {
            (_, Some(DistillLoss::MeanSquaredError)) => square,
            (Ending::Softmax { input, axis, .. }, _) => entropy(input, axis.or((opset < 13).then_some(1)), probabilities),
            (_, Some(DistillLoss::SoftTargets)) => entropy(name, None, probabilities),
            (_, None) if probabilities || is_scores(teacher, output) => entropy(name, None, probabilities),
            (_, None) => square,
        });
    }
    if targets.is_empty() {
        return Err("the model has no output of floats to train".into());
    }
    Ok(targets)
}

fn is_float(output: &ValueInfoProto) -> bool {
    let kind = match output.r#type.as_ref().and_then(|kind| kind.value.as_ref()) {
        Some(type_proto::Value::TensorType(tensor)) => tensor.elem_type(),
        _ => return false,
    };
    let floats = [DataType::Float, DataType::Float16, DataType::Bfloat16, DataType::Double];
    floats.iter().any(|float| *float as i32 == kind)
}

fn rank(output: &ValueInfoProto) -> Option<usize> {
    match output.r#type.as_ref()?.value.as_ref()? {
        type_proto::Value::TensorType(tensor) => Some(tensor.shape.as_ref()?.dim.len()),
        _ => None,
    }
}

/// Images of scores hold the classes as channels, all else in the last axis.
fn class_axis(output: &ValueInfoProto) -> i64 {
    if rank(output).is_some_and(|rank| rank >= 4) { 1 } else { -1 }
}

/// Whether an output holds class scores: several numbers made by a matrix product, and no embedding by its name.
fn is_scores(graph: &GraphProto, output: &ValueInfoProto) -> bool {
    let embedding = output.name().to_ascii_lowercase().contains("embed");
    let single = match output.r#type.as_ref().and_then(|kind| kind.value.as_ref()) {
        Some(type_proto::Value::TensorType(tensor)) => tensor.shape.as_ref().and_then(|shape| shape.dim.last()).is_some_and(|last| {
            matches!(
                last.value,
                Some(plimsoll_runtime::onnx::tensor_shape_proto::dimension::Value::DimValue(1))
            )
        }),
        _ => false,
    };
    !embedding && !single && matches!(ending(graph, output.name()), Ending::Linear)
}

fn ending<'a>(graph: &'a GraphProto, output: &'a str) -> Ending<'a> {
    let maker = |value: &str| graph.node.iter().find(|node| node.output.iter().any(|output| output == value));
    let (mut value, mut moved) = (output, false);
    // Past what changes no score: types, shapes, a bias.
    loop {
        let Some(node) = maker(value) else { return Ending::Other };
        let input = |index: usize| node.input.get(index).map_or("", String::as_str);
        match node.op_type() {
            "Softmax" | "LogSoftmax" => {
                // Its axis is not known any more after a change of shape.
                if moved {
                    return Ending::Other;
                }
                return Ending::Softmax {
                    input: node.input.first().map_or("", String::as_str),
                    axis: attribute(node, "axis").map(AttributeProto::i),
                    logarithm: node.op_type() == "LogSoftmax",
                };
            }
            "Gemm" | "MatMul" | "MatMulInteger" => return Ending::Linear,
            "Identity" | "Cast" => value = input(0),
            "Reshape" | "Squeeze" | "Flatten" => (value, moved) = (input(0), true),
            "Add" => {
                moved = true;
                let made = |index: usize| maker(input(index)).is_some();
                match (made(0), made(1)) {
                    (true, false) => value = input(0),
                    (false, true) => value = input(1),
                    _ => return Ending::Other,
                }
            }
            _ => return Ending::Other,
        }
    }
}

/// The loss of one output for a batch, for each of its samples in the mean.
///
/// Entropy: the relative entropy of the scores softened by `temperature` T to the teacher's, times T² (Hinton, Vinyals and Dean 2015,
/// "Distilling the Knowledge in a Neural Network", section 2). Square: the mean squared difference.
pub(super) fn loss(measure: Measure, student: &Tensor, teacher: &Tensor, temperature: f64) -> Result<Tensor> {
    if student.dims() != teacher.dims() {
        bail!(
            "the teacher gives the shape {:?} where the model gives {:?}",
            teacher.dims(),
            student.dims()
        );
    }
    match measure {
        Measure::Square => (student - teacher)?.sqr()?.mean_all(),
        Measure::Entropy { probabilities, axis } => {
            let axis = axis_of(axis, student.rank())?;
            let classes = student.dim(axis)?;
            if classes < 2 {
                bail!("soft targets of one score are the same for every model; use the loss MeanSquaredError");
            }
            let teacher = if probabilities {
                teacher.maximum(PROBABILITY_MIN)?.log()?
            } else {
                teacher.maximum(SCORE_MIN)?
            };
            let softened = |scores: &Tensor| log_softmax(&(scores / temperature)?, axis);
            let (wanted, given) = (softened(&teacher)?, softened(&student.maximum(SCORE_MIN)?)?);
            let entropy = wanted.exp()?.mul(&(&wanted - given)?)?.sum_all()?;
            entropy * (temperature * temperature * classes as f64 / student.elem_count() as f64)
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::graph::{float_tensor, integer, node, value_info};

    fn graph(nodes: Vec<plimsoll_runtime::onnx::NodeProto>, output: &str) -> GraphProto {
        GraphProto {
            node: nodes,
            initializer: vec![float_tensor("w", &[2, 3], &[0.0; 6])],
            output: vec![value_info(output, DataType::Float, None)],
            ..GraphProto::default()
        }
    }

    fn target(nodes: Vec<plimsoll_runtime::onnx::NodeProto>, output: &str, loss: Option<DistillLoss>) -> Target {
        let graph = graph(nodes, output);
        targets(&graph, &graph, 17, loss).unwrap().remove(0)
    }

    #[test]
    fn what_ends_in_a_softmax_is_compared_before_it() {
        let nodes = || {
            vec![
                node("Gemm", &["x", "w"], "z", vec![]),
                node("Softmax", &["z"], "p", vec![integer("axis", 1)]),
            ]
        };
        let found = target(nodes(), "p", None);
        assert_eq!(found.value, "z");
        assert_eq!(
            found.measure,
            Measure::Entropy {
                probabilities: true,
                axis: 1
            }
        );
        let squared = target(nodes(), "p", Some(DistillLoss::MeanSquaredError));
        assert_eq!((squared.value.as_str(), squared.measure), ("p", Measure::Square));
    }

    #[test]
    fn logits_are_scores_and_embeddings_and_activations_are_not() {
        let linear = || vec![node("MatMul", &["x", "w"], "m", vec![]), node("Add", &["m", "b"], "logits", vec![])];
        assert_eq!(
            target(linear(), "logits", None).measure,
            Measure::Entropy {
                probabilities: false,
                axis: -1
            }
        );
        let embedding = vec![node("Gemm", &["x", "w"], "image_embeds", vec![])];
        assert_eq!(target(embedding, "image_embeds", None).measure, Measure::Square);
        let activation = vec![node("Gemm", &["x", "w"], "z", vec![]), node("Tanh", &["z"], "y", vec![])];
        assert_eq!(target(activation, "y", None).measure, Measure::Square);
    }

    fn value(measure: Measure, student: &[[f32; 2]], teacher: &[[f32; 2]], temperature: f64) -> f32 {
        let tensor = |values: &[[f32; 2]]| Tensor::from_vec(values.concat(), (values.len(), 2), &Device::Cpu).unwrap();
        loss(measure, &tensor(student), &tensor(teacher), temperature)
            .unwrap()
            .to_scalar()
            .unwrap()
    }

    #[test]
    fn soft_targets_are_the_relative_entropy_times_the_squared_temperature() {
        let logits = Measure::Entropy {
            probabilities: false,
            axis: -1,
        };
        // Scores 0 and 2 ln 3 at temperature 2 are the probabilities 1/4 and 3/4, to the student's 1/2 and 1/2:
        // 4 * (1/4 ln 1/2 + 3/4 ln 3/2).
        let score = 2.0 * 3.0_f32.ln();
        let expected = 4.0 * (0.25 * 0.5_f32.ln() + 0.75 * 1.5_f32.ln());
        let one = value(logits, &[[7.0, 7.0]], &[[0.0, score]], 2.0);
        assert!((one - expected).abs() < 1e-5, "{one}, not {expected}");
        // The mean over samples, of which the second one is learnt.
        let two = value(logits, &[[7.0, 7.0], [1.0, 2.0]], &[[0.0, score], [3.0, 4.0]], 2.0);
        assert!((two - expected / 2.0).abs() < 1e-5);
        // A teacher that gives probabilities (1/10 and 9/10, softened 1/4 and 3/4) says the same.
        let probabilities = Measure::Entropy {
            probabilities: true,
            axis: -1,
        };
        assert!((value(probabilities, &[[7.0, 7.0]], &[[0.1, 0.9]], 2.0) - expected).abs() < 1e-5);
        // What is ruled out costs nothing where both rule it out.
        assert_eq!(value(logits, &[[1.0, f32::NEG_INFINITY]], &[[5.0, f32::NEG_INFINITY]], 1.0), 0.0);
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let draw = |seed: usize| -> Vec<f64> {
            let at = |place: usize| ((place * 7919 + seed * 104_729) % 1009) as f64 / 1009.0;
            (0..24).map(at).collect()
        };
        let (student, scores) = (draw(1), draw(2));
        // Of each sample the probabilities of classes, along either axis.
        let shape = (2, 4, 3);
        let tensor = |values: &[f64]| Tensor::from_vec(values.to_vec(), shape, &Device::Cpu).unwrap();
        let measures = [1, -1].into_iter().flat_map(|axis| {
            [false, true].map(|probabilities| {
                let scores = (tensor(&scores) * 4.0).unwrap();
                let teacher = match probabilities {
                    true => log_softmax(&scores, axis_of(axis, 3).unwrap()).unwrap().exp().unwrap(),
                    false => scores,
                };
                (Measure::Entropy { probabilities, axis }, teacher)
            })
        });
        for (measure, teacher) in measures.chain([(Measure::Square, tensor(&scores))]) {
            for temperature in [1.0, 3.0] {
                let of = |values: &[f64]| {
                    let loss = loss(measure, &(tensor(values) * 5.0).unwrap(), &teacher, temperature).unwrap();
                    loss.to_scalar::<f64>().unwrap()
                };
                let var = candle_core::Var::from_tensor(&tensor(&student)).unwrap();
                let scaled = (var.as_tensor() * 5.0).unwrap();
                let gradients = loss(measure, &scaled, &teacher, temperature).unwrap().backward().unwrap();
                let gradient = gradients.get(var.as_tensor()).unwrap().flatten_all().unwrap();
                let gradient = gradient.to_vec1::<f64>().unwrap();
                for place in 0..student.len() {
                    let moved = |by: f64| {
                        let mut moved = student.clone();
                        moved[place] += by;
                        of(&moved)
                    };
                    let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                    let given = gradient[place];
                    assert!(
                        (given - slope).abs() < 1e-7 + 1e-6 * slope.abs(),
                        "{measure:?} at {temperature}: {given}, not {slope}"
                    );
                }
                assert!(gradient.iter().any(|slope| slope.abs() > 1e-2), "{measure:?}: it is flat");
            }
        }
    }

    #[test]
    fn one_score_has_no_soft_targets() {
        let one = Tensor::new(&[[1.0_f32]], &Device::Cpu).unwrap();
        let logits = Measure::Entropy {
            probabilities: false,
            axis: -1,
        };
        assert!(loss(logits, &one, &one, 2.0).unwrap_err().to_string().contains("MeanSquaredError"));
        assert_eq!(value(Measure::Square, &[[1.0, 2.0]], &[[1.0, 4.0]], 9.0), 2.0);
    }
}
