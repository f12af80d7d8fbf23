use std::path::PathBuf;

use plimsoll_package::manifest::Probe;

use super::*;

const ENGINES: [EngineKind; 2] = [EngineKind::Tract, EngineKind::OnnxRuntime];

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/models")
        .join(format!("{name}.onnx"))
}

fn recorded(name: &str) -> Probe {
    let path = model(name).with_extension("probe.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// What `cargo xtask onnxruntime` installs, where the environment names none.
fn library() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache"));
    let pin = include_str!("../../../xtask/onnxruntime.txt");
    let version = pin
        .lines()
        .find_map(|line| line.strip_prefix("onnxruntime=="))
        .unwrap()
        .split(' ')
        .next()
        .unwrap();
    let path = default_library().unwrap_or_else(|| cache.join("plimsoll/onnxruntime").join(version).join("libonnxruntime.so"));
    assert!(path.is_file(), "{} is missing: run `cargo xtask onnxruntime`", path.display());
    path
}

/// ONNX Runtime computes on the device that `PLIMSOLL_DEVICE` names, the processor by default; tract knows no other.
fn options(kind: EngineKind) -> LoadOptions {
    let device = std::env::var("PLIMSOLL_DEVICE").ok().filter(|_| kind == EngineKind::OnnxRuntime);
    LoadOptions {
        library: Some(library()),
        device: device.map_or(Device::Cpu, |device| device.parse().unwrap()),
        ..LoadOptions::default()
    }
}

fn engine(kind: EngineKind, name: &str) -> Box<dyn Engine> {
    load(kind, &model(name), &options(kind)).unwrap_or_else(|error| panic!("{kind}: {error}"))
}

fn matrix(rows: usize, columns: usize) -> Tensor {
    Tensor::new(
        vec![rows, columns],
        (0..rows * columns).map(|i| (i % 7) as f32 - 3.0).collect::<Vec<_>>(),
    )
    .unwrap()
}

#[test]
fn tract_gives_an_inference_up_that_takes_too_long_and_runs_the_next() {
    let engine = engine(EngineKind::Tract, "mlp");
    let inputs = [matrix(2, 4)];
    let late = engine.run_within(&inputs, Duration::ZERO).unwrap_err();
    assert_eq!(late.to_string(), "Tract was not done after 0 ms");
    assert_eq!(engine.run_within(&inputs, Duration::MAX).unwrap(), engine.run(&inputs).unwrap());
}

#[test]
fn every_engine_gives_the_outputs_of_the_reference() {
    for kind in ENGINES {
        for name in ["mlp", "convolution", "weight-only", "weight-only-product"] {
            let engine = engine(kind, name);
            probe::check(&*engine, &recorded(name)).unwrap_or_else(|error| panic!("{kind}, {name}: {error}"));
        }
        let mut of_every_type = recorded("every-type");
        let tensors = of_every_type.inputs.iter_mut().chain(&mut of_every_type.outputs);
        for tensor in tensors.filter(|tensor| tensor.datatype == Datatype::Int64) {
            let narrow = |value: &mut f64| *value = value.clamp(i32::MIN.into(), i32::MAX.into());
            tensor.data.iter_mut().for_each(narrow);
        }
        probe::check(&*engine(kind, "every-type"), &of_every_type).unwrap_or_else(|error| panic!("{kind}: {error}"));
    }
}

#[test]
fn integers_of_more_than_32_bits_are_exact_or_refused() {
    for kind in ENGINES {
        for name in ["two-inputs", "every-type"] {
            match (probe::check(&*engine(kind, name), &recorded(name)), options(kind).device) {
                (Err(error), Device::OpenVino) => {
                    let text = error.to_string();
                    assert!(text.ends_with("and OpenVINO computes integers in 32 bits"), "{name}: {text}");
                }
                (Ok(()), Device::OpenVino) => panic!("{name} was computed on OpenVINO"),
                (checked, _) => checked.unwrap_or_else(|error| panic!("{kind}, {name}: {error}")),
            }
        }
    }
}

#[test]
fn unfolded_weights_give_the_same_outputs() {
    for kind in ENGINES {
        let options = LoadOptions {
            fold_dequantize: false,
            ..options(kind)
        };
        let engine = load(kind, &model("weight-only"), &options).unwrap();
        probe::check(&*engine, &recorded("weight-only")).unwrap_or_else(|error| panic!("{kind}: {error}"));
    }
}

#[test]
fn openvino_rounds_nothing_that_is_multiplied_with_8_bit_weights() {
    let kind = EngineKind::OnnxRuntime;
    let options = LoadOptions {
        fold_dequantize: false,
        ..options(kind)
    };
    // ONNX Runtime's own product does so, and the optimiser measures that it does.
    if options.device == Device::OpenVino {
        let engine = load(kind, &model("weight-only-product"), &options).unwrap();
        probe::check(&*engine, &recorded("weight-only-product")).unwrap();
    }
}

#[test]
fn several_threads_give_the_same_outputs() {
    for kind in ENGINES {
        let engine = load(
            kind,
            &model("mlp"),
            &LoadOptions {
                threads: 3,
                ..options(kind)
            },
        )
        .unwrap();
        probe::check(&*engine, &recorded("mlp")).unwrap_or_else(|error| panic!("{kind}: {error}"));
    }
}

#[test]
fn a_bound_of_a_gpus_memory_is_no_bound_of_the_processors() {
    for kind in ENGINES {
        let options = LoadOptions {
            device: Device::Cpu,
            device_bytes_max: Some(1 << 30),
            ..options(kind)
        };
        let refused = load(kind, &model("mlp"), &options).err().unwrap().to_string();
        assert!(
            refused.contains("the memory of a GPU is bounded, and the device is cpu"),
            "{refused}"
        );
    }
}

#[test]
fn a_wrong_record_is_told_apart() {
    for kind in ENGINES {
        let engine = engine(kind, "mlp");
        let mut probe = recorded("mlp");
        probe.outputs[0].data[0] += 0.01;
        assert!(matches!(probe::check(&*engine, &probe), Err(probe::ProbeError::Differs { output, .. }) if output == "y"));
        probe.outputs[0].data[0] = f64::NAN;
        assert!(matches!(probe::check(&*engine, &probe), Err(probe::ProbeError::Differs { .. })));
        probe.outputs[0].name = "z".into();
        assert!(matches!(probe::check(&*engine, &probe), Err(probe::ProbeError::Mismatch(_))));
    }
}

#[test]
fn any_batch_runs_and_a_row_does_not_depend_on_its_neighbours() {
    for kind in ENGINES {
        let engine = engine(kind, "mlp");
        assert_eq!(engine.inputs()[0].shape, [-1, 4]);
        let alone = engine.run(&[matrix(1, 4)]).unwrap().remove(0);
        // More batch sizes than plans are kept.
        for rows in [1, 2, 3, 5, 8, 13, 1] {
            let outputs = engine.run(&[matrix(rows, 4)]).unwrap();
            assert_eq!(outputs[0].shape(), [rows, 3], "{kind}");
            let (row, alone) = (&outputs[0].as_f32().unwrap()[..3], alone.as_f32().unwrap());
            assert!(
                row.iter().zip(alone).all(|(a, b)| (a - b).abs() < 1e-6),
                "{kind}: {row:?} {alone:?}"
            );
        }
    }
}

#[test]
fn inputs_that_do_not_fit_are_refused_by_name() {
    for kind in ENGINES {
        let engine = engine(kind, "mlp");
        let refusal = |inputs: &[Tensor]| engine.run(inputs).unwrap_err().to_string();
        assert_eq!(refusal(&[]), "the model takes 1 inputs, 0 were given");
        assert_eq!(
            refusal(&[matrix(1, 5)]),
            "input `x` takes shape [-1, 4] (-1 is any size), [1, 5] was given"
        );
        assert_eq!(
            refusal(&[Tensor::zeros(Datatype::Int64, vec![1, 4]).unwrap()]),
            "input `x` takes FP32, INT64 was given"
        );
        engine.run(&[matrix(1, 4)]).expect("the engine runs on after a refusal");
    }
}

#[test]
fn inputs_of_different_batches_fail_and_the_engine_runs_on() {
    for kind in ENGINES {
        let engine = engine(kind, "two-inputs");
        let zeros = |rows| Tensor::zeros(Datatype::Int64, vec![rows, 2]).unwrap();
        for _ in 0..2 {
            engine.run(&[zeros(2), zeros(2)]).unwrap();
            assert!(matches!(engine.run(&[zeros(2), zeros(3)]), Err(EngineError::Run { .. })), "{kind}");
        }
        engine.run(&[zeros(2), zeros(2)]).unwrap();
    }
}

#[test]
fn threads_share_an_engine() {
    for kind in ENGINES {
        let engine = engine(kind, "mlp");
        let expected = engine.run(&[matrix(2, 4)]).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..20).for_each(|_| assert_eq!(engine.run(&[matrix(2, 4)]).unwrap(), expected)));
            }
        });
    }
}

#[test]
fn a_panic_costs_one_call() {
    struct Fragile;
    impl Engine for Fragile {
        fn kind(&self) -> EngineKind {
            EngineKind::Tract
        }
        fn inputs(&self) -> &[TensorSpec] {
            &[]
        }
        fn outputs(&self) -> &[TensorSpec] {
            &[]
        }
        fn infer(&self, _: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
            panic!("index out of bounds")
        }
    }
    assert_eq!(
        Fragile.run(&[]).unwrap_err().to_string(),
        "the engine panicked: index out of bounds"
    );
}

#[test]
fn strings_and_bfloat16_run_where_the_engine_has_them_and_are_refused_by_name_where_not() {
    let refusal = |name| {
        load(EngineKind::Tract, &model(name), &options(EngineKind::Tract))
            .err()
            .unwrap()
            .to_string()
    };
    assert!(refusal("strings").ends_with("`text` is of type BYTES, which tract does not run"));
    assert!(refusal("bfloat16").ends_with("`x` is of type BF16, which tract does not run"));

    let texts = Tensor::new(vec![2], vec!["grüß".as_bytes().to_vec(), vec![]]).unwrap();
    assert_eq!(
        engine(EngineKind::OnnxRuntime, "strings")
            .run(std::slice::from_ref(&texts))
            .unwrap(),
        [texts]
    );
    let invalid = Tensor::new(vec![1], vec![vec![0xff_u8]]).unwrap();
    let refusal = engine(EngineKind::OnnxRuntime, "strings").run(&[invalid]).unwrap_err().to_string();
    assert!(refusal.contains("not UTF-8"), "{refusal}");
    let halves = Tensor::new(vec![2], vec![half::bf16::from_f32(1.5), half::bf16::from_f32(-2.0)]).unwrap();
    assert_eq!(
        engine(EngineKind::OnnxRuntime, "bfloat16")
            .run(std::slice::from_ref(&halves))
            .unwrap(),
        [halves]
    );
}

#[test]
fn what_is_no_model_is_refused_by_both() {
    for kind in ENGINES {
        let missing = load(kind, Path::new("/nowhere/model.onnx"), &options(kind)).err().unwrap();
        assert_eq!(missing.to_string(), "cannot read /nowhere/model.onnx");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models/make.py");
        assert!(
            load(kind, &script, &options(kind))
                .err()
                .unwrap()
                .to_string()
                .contains("is not an ONNX model"),
            "{kind}"
        );
    }
}

#[test]
fn zeros_run_through_every_model() {
    for kind in ENGINES {
        for name in ["mlp", "convolution", "weight-only", "two-inputs", "every-type"] {
            probe::check_zeros(&*engine(kind, name)).unwrap_or_else(|error| panic!("{kind}, {name}: {error}"));
        }
    }
}

#[test]
fn the_engines_know_neither_tokio_nor_http() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = vec![folder.join("engine.rs"), folder.join("onnx.rs")];
    let mut folders = vec![folder.join("engine"), folder.join("onnx")];
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        for line in text
            .lines()
            .filter(|line| line.trim_start().starts_with("use ") || line.trim_start().starts_with("pub use "))
        {
            for forbidden in ["tokio", "axum", "hyper", "http", "async", "futures", "crate::server"] {
                assert!(!line.contains(forbidden), "{}: {line}", file.display());
            }
        }
    }
}
