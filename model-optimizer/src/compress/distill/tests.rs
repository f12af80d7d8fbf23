use plimsoll_package::recipe::HiddenState;
use plimsoll_runtime::onnx::signature;

use super::*;
use crate::calibration::Calibration;
use crate::compress::prune;
use crate::graph::generator::{self, Builder};
use crate::progress::Console;

fn distill(change: impl FnOnce(&mut Distill)) -> Result<Distillation, Failure> {
    let mut distill = Distill::of(3);
    change(&mut distill);
    Distillation::new(&distill)
}

#[test]
fn defaults_are_those_that_the_recipe_documents() {
    let expected = Distillation {
        epochs: 3,
        loss: None,
        temperature: 2.0,
        batch: 32,
        rate: 1e-4,
        prune_to: None,
        hidden_states: None,
        hidden_weight: 1.0,
        device: DistillDevice::Auto,
    };
    assert_eq!(distill(|_| {}).unwrap(), expected);
}

#[test]
fn what_is_out_of_range_is_refused_by_its_name() {
    let refusal = |change: fn(&mut Distill)| {
        let refused = distill(change).unwrap_err();
        assert_eq!(refused.reason, FailureReason::InvalidInputs);
        refused.message
    };
    assert!(refusal(|distill| distill.epochs = 0).contains("epochs is 0; write a number from 1 to 1000"));
    assert!(refusal(|distill| distill.temperature = Some(101)).contains("temperature is 101"));
    assert!(refusal(|distill| distill.batch_size = Some(0)).contains("batchSize is 0"));
    assert!(refusal(|distill| distill.learning_rate = Some("0".parse().unwrap())).contains("learningRate is 0"));
}

/// A perceptron, what the layers behind the first one read, and the same with most of its weights gone.
fn pruned_perceptron() -> (ModelProto, Vec<String>, ModelProto) {
    let (mut builder, x) = Builder::new(11, &[6]);
    let hidden = builder.product(&x, 16, true);
    let first = builder.unary("Tanh", &hidden);
    let hidden = builder.product(&first, 12, true);
    let second = builder.unary("Sigmoid", &hidden);
    let y = builder.product(&second, 4, true);
    let names = vec![first.name, second.name];
    let teacher = builder.finish(&y);
    let mut student = teacher.clone();
    let entry = serde_json::from_value(serde_json::json!({"amount": "60%"})).unwrap();
    let setting = Setting {
        calibration: None,
        original: &teacher,
        threads: 1,
        engine: None,
        console: &Console::silent(),
    };
    prune::technique(&entry).unwrap().apply(&mut student, &setting).unwrap();
    (teacher, names, student)
}

/// Samples of one input, some more of them than are drawn of a signature.
fn samples(model: &ModelProto, count: usize) -> Dataset {
    let (specs, _) = signature(model).unwrap();
    let mut order: Vec<usize> = (0..count * 6).collect();
    samples::shuffle(&mut order, 5);
    let values: Vec<f32> = order.iter().map(|place| 3.0 * *place as f32 / order.len() as f32 - 1.5).collect();
    let tensor = plimsoll_runtime::engine::Tensor::new(vec![count, 6], values).unwrap();
    Dataset::of_tensors(vec![tensor], &specs, None).unwrap()
}

fn setting<'a>(calibration: Option<&'a Calibration>, original: &'a ModelProto, console: &'a Console) -> Setting<'a> {
    Setting {
        calibration,
        original,
        threads: 1,
        engine: None,
        console,
    }
}

#[test]
fn the_gradient_of_the_whole_loss_hidden_states_included_is_that_of_finite_differences() {
    let (teacher, names, student) = pruned_perceptron();
    let data = samples(&teacher, 20);
    for loss in [DistillLoss::SoftTargets, DistillLoss::MeanSquaredError] {
        let distillation = distill(|distill| {
            distill.loss = Some(loss);
            distill.hidden_states = Some(HiddenStates {
                pairs: vec![],
                weight: Some("0.7".parse().unwrap()),
            });
        })
        .unwrap();
        let place = Place {
            device: Device::Cpu,
            dtype: DType::F64,
        };
        let console = Console::silent();
        let mut training = distillation
            .training(&student, &data, &setting(None, &teacher, &console), place)
            .unwrap();
        let followed: Vec<&str> = training.hidden.iter().map(|hidden| hidden.value.as_str()).collect();
        assert_eq!(followed, names);
        let batch: Vec<usize> = (0..10).collect();
        training.balance(&batch, 10).unwrap();
        let gradients = training.loss(&batch).unwrap().backward().unwrap();
        let value = || number(&training.loss(&batch).unwrap()).unwrap();
        let mut checked = 0;
        for var in training.parameters.vars() {
            let gradient = gradients
                .get(var.as_tensor())
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f64>()
                .unwrap();
            let whole = var.as_tensor().detach().copy().unwrap();
            let flat = whole.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            for place in (0..flat.len()).step_by(5) {
                let moved = |by: f64| {
                    let mut moved = flat.clone();
                    moved[place] += by;
                    var.set(&Tensor::from_vec(moved, whole.dims(), &Device::Cpu).unwrap()).unwrap();
                    value()
                };
                let by = 1e-5;
                let slope = (moved(by) - moved(-by)) / (2.0 * by);
                let given = gradient[place];
                assert!((slope - given).abs() < 1e-6 + 1e-5 * slope.abs(), "{loss:?}: {given}, not {slope}");
                checked += usize::from(slope.abs() > 1e-4);
            }
            var.set(&whole).unwrap();
        }
        assert!(checked > 30, "{checked} slopes tell anything");
    }
}

/// The squared difference of the named values of two models, relative to the teacher's.
fn distance(teacher: &ModelProto, student: &ModelProto, names: &[String], data: &Dataset) -> f64 {
    let seen = |model: &ModelProto| {
        let mut seen = Vec::new();
        let calibration = Calibration::new(data.clone(), 1);
        let mut add = |tensors: &[plimsoll_runtime::engine::Tensor]| {
            tensors.iter().for_each(|tensor| seen.extend_from_slice(tensor.as_f32().unwrap()));
            Ok(())
        };
        calibration.observe(model, names, &mut add).unwrap();
        seen
    };
    let (wanted, given) = (seen(teacher), seen(student));
    let difference: f32 = wanted.iter().zip(&given).map(|(one, other)| (one - other).powi(2)).sum();
    f64::from(difference / wanted.iter().map(|value| value.powi(2)).sum::<f32>())
}

#[test]
fn hidden_states_bring_what_lies_inside_nearer_to_the_teacher() {
    let (teacher, names, student) = pruned_perceptron();
    let data = samples(&teacher, 128);
    let calibration = Calibration::new(data.clone(), 1);
    let console = Console::silent();
    let trained = |hidden_states: Option<HiddenStates>| {
        let distillation = distill(|distill| {
            distill.epochs = 40;
            distill.loss = Some(DistillLoss::MeanSquaredError);
            distill.learning_rate = Some("0.01".parse().unwrap());
            distill.hidden_states = hidden_states;
        })
        .unwrap();
        let mut model = student.clone();
        distillation
            .apply(&mut model, &setting(Some(&calibration), &teacher, &console))
            .unwrap();
        generator::agreement::try_run(plimsoll_package::manifest::Engine::Tract, &model, &data.first().unwrap()).unwrap();
        model
    };
    let before = distance(&teacher, &student, &names, &data);
    let without = distance(&teacher, &trained(None), &names, &data);
    let with = trained(Some(HiddenStates::default()));
    let inside = distance(&teacher, &with, &names, &data);
    assert!(
        inside < without / 2.0 && inside < before,
        "{before} before, {without} without, {inside} with"
    );
    // The outputs are learnt as well.
    let outputs = vec![teacher.graph.as_ref().unwrap().output[0].name().to_owned()];
    let (before, after) = (
        distance(&teacher, &student, &outputs, &data),
        distance(&teacher, &with, &outputs, &data),
    );
    assert!(after < before, "{before} before, {after} after");
}

#[test]
fn a_pair_of_unlike_shapes_is_refused_by_its_names() {
    let (teacher, names, student) = pruned_perceptron();
    let calibration = Calibration::new(samples(&teacher, 20), 1);
    let distillation = distill(|distill| {
        distill.hidden_states = Some(HiddenStates {
            pairs: vec![HiddenState {
                value: names[0].clone(),
                teacher: Some(names[1].clone()),
            }],
            weight: None,
        });
    })
    .unwrap();
    let console = Console::silent();
    let refused = distillation
        .apply(&mut student.clone(), &setting(Some(&calibration), &teacher, &console))
        .unwrap_err();
    assert_eq!(refused.reason, FailureReason::InvalidInputs);
    let expected = format!(
        "cannot distil: hiddenStates: `{}` has the shape [2, 16] where the teacher's `{}` has [2, 12]; pair values of one shape",
        names[0], names[1]
    );
    assert_eq!(refused.message, expected);
}
