//! Any model survives any recipe: it loads, runs, and keeps its inputs and outputs, or the recipe is refused in a sentence.

use plimsoll_optimizer::compress::quantize::qdq;
use plimsoll_optimizer::compress::{self, Setting};
use plimsoll_optimizer::evaluate::dataset::Dataset;
use plimsoll_optimizer::failure::FailureReason;
use plimsoll_optimizer::graph::simplify::simplify;
use plimsoll_optimizer::graph::{Names, node};
use plimsoll_optimizer::progress::Console;
use plimsoll_optimizer::{calibration::Calibration, convert};
use plimsoll_package::manifest::Engine as EngineKind;
use plimsoll_package::recipe::Technique;
use plimsoll_runtime::engine::{self, Engine, LoadOptions, Tensor};
use plimsoll_runtime::onnx::{self, ModelProto, NodeProto};
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use proptest::test_runner::FileFailurePersistence;
use serde_json::{Value, json};

use super::{generator, onnxruntime};

/// An entry of a recipe with any of its parameters; a combination may contradict itself.
fn technique() -> impl Strategy<Value = Value> {
    let optional = |values: &'static [&'static str]| prop::option::of(select(values));
    let share = || select(&["0%", "10%", "50%", "90%", "100%"][..]);
    let criterion = || optional(&["Magnitude", "Wanda", "SparseGpt"]);
    let unstructured = (share(), optional(&["Global", "PerLayer"]), criterion())
        .prop_map(|(amount, scope, criterion)| json!({"prune": {"amount": amount, "scope": scope, "criterion": criterion}}));
    let structured = (
        share(),
        optional(&["Global", "PerLayer"]),
        select(&["Channels", "Heads", "FeedForward"][..]),
    )
        .prop_map(|(amount, scope, structure)| json!({"prune": {"amount": amount, "scope": scope, "structure": structure}}));
    let pattern = (select(&["2:4", "1:4", "4:8"][..]), criterion())
        .prop_map(|(pattern, criterion)| json!({"prune": {"structure": "SemiStructured", "pattern": pattern, "criterion": criterion}}));
    let granularity = || optional(&["PerChannel", "PerTensor"]);
    // By their places, for the names are the model's.
    let exclude = || prop::option::weighted(0.3, prop::collection::vec(0_usize..64, 1..4));
    let weights = (select(&["Int8", "Int8Dynamic", "Int8Weights"][..]), granularity(), exclude())
        .prop_map(|(scheme, granularity, exclude)| json!({"quantize": {"scheme": scheme, "granularity": granularity, "exclude": exclude}}));
    let whole = (
        granularity(),
        optional(&["MinMax", "Percentile", "Entropy"]),
        optional(&["0", "0.5", "1"]),
        prop::option::of(any::<bool>()),
        prop::option::of(subsequence(qdq::supported(), 1..5)),
        exclude(),
    )
        .prop_map(|(granularity, range, smooth, corrected, operators, exclude)| {
            json!({"quantize": {
                "scheme": "Int8Static", "granularity": granularity, "range": range, "smooth": smooth, "biasCorrection": corrected,
                "operators": operators, "exclude": exclude
            }})
        });
    let blocks = (
        select(&["Int4", "Int8Blocks"][..]),
        prop::option::of(select(&[16, 32, 256][..])),
        optional(&["Nearest", "Gptq"]),
        exclude(),
    )
        .prop_map(|(scheme, size, rounding, exclude)| {
            json!({"quantize": {"scheme": scheme, "blockSize": size, "rounding": rounding, "exclude": exclude}})
        });
    let half = exclude().prop_map(|exclude| json!({"quantize": {"scheme": "Float16", "exclude": exclude}}));
    let distill = (
        optional(&["SoftTargets", "MeanSquaredError"]),
        prop::option::of(share()),
        prop::option::of(Just(json!({}))),
    )
        .prop_map(|(loss, prune_to, hidden)| {
            json!({"distill": {"epochs": 1, "batchSize": 4, "loss": loss, "pruneTo": prune_to, "hiddenStates": hidden}})
        });
    prop_oneof![unstructured, structured, pattern, weights, whole, blocks, half, distill]
}

/// The entry as a user would have written it for `model`, without what was left out.
fn parsed(mut entry: Value, model: &ModelProto) -> Technique {
    let named: Vec<&str> = model.graph.iter().flat_map(|graph| &graph.node).map(NodeProto::name).collect();
    let named: Vec<&str> = named.into_iter().filter(|name| !name.is_empty()).collect();
    for parameters in entry.as_object_mut().unwrap().values_mut() {
        let parameters = parameters.as_object_mut().unwrap();
        parameters.retain(|_, value| !value.is_null());
        if let Some(exclude) = parameters.get_mut("exclude") {
            let places = exclude.as_array().unwrap().iter().filter_map(Value::as_u64);
            *exclude = places
                .filter_map(|place| named.get(place as usize % named.len().max(1)))
                .copied()
                .collect();
        }
    }
    serde_json::from_value(entry).unwrap()
}

/// What exporters leave in a model: nodes that pass their input on, and weights that are transposed as the model runs.
fn exported(mut model: ModelProto, seed: u64) -> ModelProto {
    let graph = model.graph.as_mut().unwrap();
    let mut names = Names::of(graph);
    for (index, mut old) in std::mem::take(&mut graph.node).into_iter().enumerate() {
        let dice = (seed >> (index % 56)) & 0xf;
        if dice & 3 == 3 {
            let passed = names.fresh("passed");
            // A condition and a number of rounds are no floats.
            let op_type = if dice & 4 == 0 || matches!(old.op_type(), "If" | "Loop") {
                "Identity"
            } else {
                "Dropout"
            };
            graph.node.push(node(op_type, &[&old.input[0]], &passed, vec![]));
            old.input[0] = passed;
        }
        if dice & 8 == 8 && old.op_type() == "MatMul" {
            let weight = graph.initializer.iter_mut().find(|tensor| tensor.name() == old.input[1]);
            let declared = graph.input.iter().any(|input| *input.name() == old.input[1]);
            if let Some(weight) = weight.filter(|weight| weight.dims.len() == 2 && !declared) {
                let (rows, columns) = (weight.dims[0] as usize, weight.dims[1] as usize);
                let words = weight.raw_data().as_chunks::<4>().0.to_vec();
                let transposed = (0..rows * columns).flat_map(|place| words[place % rows * columns + place / rows]);
                weight.raw_data = Some(transposed.collect::<Vec<u8>>().into());
                weight.dims.reverse();
                let name = names.fresh("transposed");
                graph.node.push(node("Transpose", &[&old.input[1]], &name, vec![]));
                old.input[1] = name;
            }
        }
        graph.node.push(old);
    }
    model
}

fn load(kind: EngineKind, model: &ModelProto, fold_dequantize: bool) -> Result<Box<dyn Engine>, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    convert::write(model, &path).unwrap();
    let options = LoadOptions {
        fold_dequantize,
        library: Some(onnxruntime()),
        ..LoadOptions::default()
    };
    engine::load(kind, &path, &options).map_err(|error| error.to_string())
}

fn shapes(outputs: &[Tensor]) -> Vec<&[usize]> {
    outputs.iter().map(Tensor::shape).collect()
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 64,
        max_shrink_iters: 64,
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("seeds"))),
        ..ProptestConfig::default()
    })]
    #[test]
    fn any_model_survives_any_recipe(seed in any::<u64>(), recipe in prop::collection::vec(technique(), 1..4)) {
        let source = exported(generator::any_model(seed), seed);
        let mut model = source.clone();
        prop_assert_eq!(simplify(&mut model), Ok(()));
        let signature = onnx::signature(&model).unwrap();
        prop_assert_eq!(&onnx::signature(&source).unwrap(), &signature);
        let samples = Dataset::drawn(&signature.0, 8, false).unwrap();
        let inputs = samples.batch(0..4).unwrap();
        let calibration = Calibration::new(samples, 1);
        let expected = load(EngineKind::OnnxRuntime, &source, false).unwrap().run(&inputs).unwrap();
        let original = model.clone();
        let mut fold_dequantize = false;
        for entry in recipe {
            let setting = Setting {
                calibration: Some(&calibration),
                original: &original,
                threads: 1,
                engine: None,
                console: &Console::silent(),
            };
            let applied = compress::technique(&parsed(entry, &model)).and_then(|technique| technique.apply(&mut model, &setting));
            match applied {
                Ok(change) => fold_dequantize |= change.fold_dequantize,
                Err(refused) => {
                    prop_assert!(
                        matches!(
                            refused.reason,
                            FailureReason::Unsupported | FailureReason::UnsupportedOperator | FailureReason::InvalidInputs
                        ),
                        "{:?}: {refused}", refused.reason
                    );
                    prop_assert!(refused.message.len() > 20 && !refused.message.contains('\n'), "{refused}");
                    return Ok(());
                }
            }
            prop_assert_eq!(&onnx::signature(&model).unwrap(), &signature);
            let outputs = load(EngineKind::OnnxRuntime, &model, fold_dequantize)
                .and_then(|engine| engine.run(&inputs).map_err(|error| error.to_string()));
            let outputs = outputs.map_err(TestCaseError::fail)?;
            prop_assert_eq!(shapes(&outputs), shapes(&expected));
            prop_assert!(outputs.iter().all(|output| output.data().to_f64().unwrap().iter().all(|value| value.is_finite())));
            // What tract takes it runs; it may lack an operator.
            if let Ok(engine) = load(EngineKind::Tract, &model, fold_dequantize)
                && let Ok(outputs) = engine.run(&inputs)
            {
                prop_assert_eq!(shapes(&outputs), shapes(&expected));
            }
        }
    }

    #[test]
    fn tidying_changes_no_result(seed in any::<u64>()) {
        let source = exported(generator::any_model(seed), seed);
        let mut tidy = source.clone();
        prop_assert_eq!(simplify(&mut tidy), Ok(()));
        generator::assert_same(&source, &tidy, 1e-4);
        let mut again = tidy.clone();
        prop_assert_eq!(simplify(&mut again), Ok(()));
        prop_assert_eq!(again, tidy, "what is tidy stays");
    }
}
