//! Operators of other domains, which nobody here knows, pass through every technique as they are.

use plimsoll_optimizer::compress::{self, Setting};
use plimsoll_optimizer::convert;
use plimsoll_optimizer::graph::simplify::simplify;
use plimsoll_optimizer::progress::Console;
use plimsoll_package::report::Report;
use plimsoll_runtime::onnx::{self, AttributeProto, ModelProto, NodeProto, OperatorSetIdProto, attribute_proto::AttributeType};
use serde_json::json;

use super::generator::Builder;
use super::program;

const DOMAIN: &str = "com.example.birds";

/// Two blocks of a perceptron with a node of a domain of its own in between.
fn flock() -> (ModelProto, NodeProto) {
    let (mut builder, x) = Builder::new(15, &[32]);
    let before = builder.feed_forward(&x, 48);
    let made = builder.push("Murmurate", &[&before.name], vec![], &[32]);
    let after = builder.feed_forward(&made, 48);
    let mut model = builder.finish(&after);
    model.opset_import.push(OperatorSetIdProto {
        domain: Some(DOMAIN.into()),
        version: Some(1),
    });
    let graph = model.graph.as_mut().unwrap();
    let custom = graph.node.iter_mut().find(|node| node.op_type() == "Murmurate").unwrap();
    custom.domain = Some(DOMAIN.into());
    custom.attribute = vec![AttributeProto {
        name: Some("strength".into()),
        r#type: Some(AttributeType::Float as i32),
        f: Some(0.5),
        ..AttributeProto::default()
    }];
    let custom = custom.clone();
    (model, custom)
}

/// The node of the domain, which must be as it was; only of 16-bit floats its value may come by way of a cast.
fn assert_untouched(model: &ModelProto, custom: &NodeProto, what: &str) {
    let nodes = &model.graph.as_ref().unwrap().node;
    let found = nodes.iter().find(|node| node.domain() == DOMAIN).unwrap();
    assert_eq!(found.op_type(), custom.op_type(), "{what}");
    assert_eq!(found.attribute, custom.attribute, "{what}");
    assert_eq!(found.name(), custom.name(), "{what}");
    let maker = |value: &str| nodes.iter().find(|node| node.output.iter().any(|output| output == value)).unwrap();
    if found.input != custom.input {
        let cast = maker(&found.input[0]);
        assert_eq!(cast.op_type(), "Cast", "{what}");
    }
    assert!(
        model
            .opset_import
            .iter()
            .any(|import| import.domain() == DOMAIN && import.version() == 1)
    );
}

#[test]
fn a_node_of_another_domain_is_left_as_it_is_by_every_technique() {
    let (mut model, custom) = flock();
    simplify(&mut model).unwrap();
    assert_untouched(&model, &custom, "tidying");
    let read = |model: &ModelProto| {
        // The weights on either side of the node, whose sizes it may depend on.
        let graph = model.graph.clone().unwrap();
        graph.initializer.iter().map(|tensor| tensor.dims.clone()).collect::<Vec<_>>()
    };
    for entry in [
        json!({"prune": {"amount": "50%"}}),
        json!({"prune": {"structure": "SemiStructured", "pattern": "2:4"}}),
        json!({"prune": {"amount": "50%", "structure": "Channels"}}),
        json!({"prune": {"amount": "50%", "structure": "FeedForward"}}),
        json!({"quantize": {"scheme": "Int8Dynamic"}}),
        json!({"quantize": {"scheme": "Int8Weights"}}),
        json!({"quantize": {"scheme": "Int8Blocks"}}),
        json!({"quantize": {"scheme": "Int4"}}),
        json!({"quantize": {"scheme": "Float16"}}),
    ] {
        let mut changed = model.clone();
        let setting = Setting {
            calibration: None,
            original: &model,
            threads: 1,
            engine: None,
            console: &Console::silent(),
        };
        let technique = compress::technique(&serde_json::from_value(entry.clone()).unwrap()).unwrap();
        let change = technique.apply(&mut changed, &setting).unwrap();
        assert!(!change.changed.is_empty(), "{entry}");
        assert_untouched(&changed, &custom, &entry.to_string());
        if entry["prune"]["structure"] == "Channels" {
            let told = change
                .skipped
                .iter()
                .find(|skipped| skipped.reason.contains("Murmurate"))
                .unwrap_or_else(|| panic!("what is left alone names the node: {:?}", change.skipped));
            assert!(told.reason.contains(DOMAIN), "{told:?}");
            let dims = read(&changed);
            assert!(
                dims.iter().any(|dims| dims.contains(&24)),
                "the layers within each block are narrower: {dims:?}"
            );
            let graph = changed.graph.as_ref().unwrap();
            let weight = |value: &str| graph.initializer.iter().find(|tensor| tensor.name() == value);
            let next = graph.node.iter().find(|node| node.input.first() == custom.output.first()).unwrap();
            assert_eq!(
                weight(&next.input[1]).unwrap().dims[0],
                32,
                "what the node gives is as wide as before"
            );
        }
    }
}

#[test]
fn a_model_with_such_a_node_is_handed_out_without_the_gate() {
    let (model, custom) = flock();
    let folder = tempfile::tempdir().unwrap();
    let (source, package) = (folder.path().join("flock.onnx"), folder.path().join("package"));
    convert::write(&model, &source).unwrap();
    let mut command = program();
    command.arg("optimize").arg(&source).arg("--output").arg(&package);
    let output = command
        .args(["--quantize", "int8-weights", "--no-gate", "--json"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Report = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report.summary.size_after * 3 < report.summary.size_before);
    assert_untouched(&onnx::read(&package.join("model.onnx")).unwrap(), &custom, "the package");
}
