//! Raising a model's version of ONNX's operators, where what it means stays the same.

use std::collections::HashMap;

use plimsoll_runtime::onnx::attribute_proto::AttributeType;
use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto};

use super::elements::element_types;
use super::shape::Shapes;
use super::{Names, attribute, float_tensor, integer, integers, is_standard, subgraphs_mut, tensor};

/// The oldest version that is raised: from it on operands broadcast as they do today.
const RAISED_MIN: i64 = 7;
/// The version that has `DequantizeLinear` with an axis.
pub const QUANTIZED: i64 = 13;
/// The version of the format that goes with it.
const IR_VERSION: i64 = 7;

/// The version of the standard operators that `model` asks for.
#[must_use]
pub fn version(model: &ModelProto) -> i64 {
    let standard = model.opset_import.iter().find(|import| matches!(import.domain(), "" | "ai.onnx"));
    standard.map_or(1, OperatorSetIdProto::version)
}

/// Raises `model` to version 13 where it is of version 7 to 12; the bodies of branches and loops, too.
///
/// # Errors
/// In words, where an operator has no equal there, or the model is older or defines functions; the model is then unchanged.
pub fn raise(model: &mut ModelProto) -> Result<(), String> {
    let from = version(model);
    if from >= QUANTIZED {
        return Ok(());
    }
    let advice = format!("export it with opset {QUANTIZED} or later");
    if from < RAISED_MIN {
        return Err(format!(
            "the model is of opset {from}, and quantised weights need {QUANTIZED}; {advice}"
        ));
    }
    if !model.functions.is_empty() {
        return Err(format!(
            "the model is of opset {from} and has functions of other versions; {advice}"
        ));
    }
    let shapes = Shapes::of(model);
    let Some(graph) = &model.graph else { return Ok(()) };
    let mut raising = Raising {
        from,
        shapes,
        types: HashMap::new(),
        names: Names::of(graph),
    };
    let mut raised = graph.clone();
    raising
        .graph(&mut raised)
        .map_err(|why| format!("the model is of opset {from}, and its {why}; {advice}"))?;
    model.graph = Some(raised);
    for import in model
        .opset_import
        .iter_mut()
        .filter(|import| matches!(import.domain(), "" | "ai.onnx"))
    {
        import.version = Some(QUANTIZED);
    }
    model.ir_version = Some(model.ir_version().max(IR_VERSION));
    Ok(())
}

struct Raising {
    from: i64,
    /// Of the values of the model's graph itself.
    shapes: Shapes,
    /// Of the values of the graphs that are being raised.
    types: HashMap<String, DataType>,
    names: Names,
}

/// What takes the place of a node: nodes, and initialisers that they read.
#[derive(Default)]
struct Place {
    nodes: Vec<NodeProto>,
    initializers: Vec<TensorProto>,
}

impl Raising {
    fn graph(&mut self, graph: &mut GraphProto) -> Result<(), String> {
        self.types.extend(element_types(graph));
        for mut node in std::mem::take(&mut graph.node) {
            subgraphs_mut(&mut node).try_for_each(|body| self.graph(body))?;
            let mut place = Place::default();
            if is_standard(&node) {
                let shown = format!("node `{}` ({})", node.name(), node.op_type());
                self.node(node, &mut place).map_err(|why| format!("{shown} {why}"))?;
            } else {
                place.nodes.push(node);
            }
            graph.node.extend(place.nodes);
            graph.initializer.extend(place.initializers);
        }
        Ok(())
    }

    /// What changed from version 7 to 13 in ONNX's operator changelog: attributes became inputs, `Upsample` became `Resize` and `Scatter`
    /// `ScatterElements`, and the softmax family works along one axis instead of on a matrix.
    fn node(&mut self, mut node: NodeProto, place: &mut Place) -> Result<(), String> {
        match node.op_type() {
            "Squeeze" | "Unsqueeze" | "ReduceSum" => self.take_integers(&mut node, "axes", 1, place),
            "Split" => self.take_integers(&mut node, "split", 1, place),
            "Slice" if self.from < 10 => {
                let axes = attribute(&node, "starts").map_or(0, |starts| starts.ints.len());
                if attribute(&node, "axes").is_none() {
                    node.attribute.push(integers("axes", &(0..axes as i64).collect::<Vec<_>>()));
                }
                self.take_integers(&mut node, "starts", 1, place);
                self.take_integers(&mut node, "ends", 2, place);
                self.take_integers(&mut node, "axes", 3, place);
            }
            "TopK" if self.from < 10 => {
                let k = attribute(&node, "k").map_or(0, AttributeProto::i);
                node.attribute.retain(|attribute| attribute.name() != "k");
                self.give_integers(&mut node, "k", 1, &[k], place);
            }
            "Pad" if self.from < 11 => {
                let value = attribute(&node, "value").map_or(0.0, AttributeProto::f);
                self.take_integers(&mut node, "pads", 1, place);
                node.attribute.retain(|attribute| attribute.name() != "value");
                if value != 0.0 {
                    self.give_float(&mut node, "value", 2, value, place)?;
                }
            }
            "Clip" if self.from < 11 => {
                for (name, position) in [("min", 1), ("max", 2)] {
                    if let Some(bound) = attribute(&node, name).map(AttributeProto::f) {
                        self.give_float(&mut node, name, position, bound, place)?;
                    }
                }
                node.attribute.clear();
            }
            "Dropout" if self.from < 12 => {
                if self.from < 10 && node.output.len() > 1 {
                    return Err("gives a mask of floats, which later versions do not".into());
                }
                // In inference it passes its input on, whatever its ratio.
                node.attribute.clear();
            }
            "BatchNormalization" if self.from < 9 => {
                if attribute(&node, "spatial").is_some_and(|spatial| spatial.i() == 0) {
                    return Err("normalises each place of a channel by itself, which later versions do not".into());
                }
                node.attribute.retain(|attribute| attribute.name() != "spatial");
            }
            "Scatter" => node.op_type = Some("ScatterElements".into()),
            "Upsample" => self.resize(&mut node, place)?,
            "Resize" if self.from < 11 => self.resize(&mut node, place)?,
            "Resize" => {
                let way = attribute(&node, "coordinate_transformation_mode").map_or(&b""[..], |mode| mode.s());
                if way == b"tf_half_pixel_for_nn" {
                    return Err("resizes as by tf_half_pixel_for_nn, which version 13 does not have".into());
                }
            }
            "Softmax" | "LogSoftmax" | "Hardmax" => return self.softmax(node, place),
            "Scan" if self.from < 9 => return Err("is a Scan with a batch, which later versions do not have".into()),
            _ => {}
        }
        place.nodes.push(node);
        Ok(())
    }

    /// Moves an attribute of integers to the input at `position`; where it is missing the operator's default holds in all versions.
    fn take_integers(&mut self, node: &mut NodeProto, name: &str, position: usize, place: &mut Place) {
        if let Some(index) = node.attribute.iter().position(|attribute| attribute.name() == name) {
            let values = node.attribute.remove(index).ints;
            self.give_integers(node, name, position, &values, place);
        }
    }

    fn give_integers(&mut self, node: &mut NodeProto, name: &str, position: usize, values: &[i64], place: &mut Place) {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let input = self.fresh(node, name);
        place.initializers.push(tensor(&input, DataType::Int64, &[values.len()], bytes));
        give(node, position, input);
    }

    /// Gives a number of the type of the node's first input.
    fn give_float(&mut self, node: &mut NodeProto, name: &str, position: usize, value: f32, place: &mut Place) -> Result<(), String> {
        let kind = node.input.first().and_then(|input| self.types.get(input));
        let (kind, bytes) = match kind {
            Some(DataType::Float) => (DataType::Float, value.to_le_bytes().to_vec()),
            Some(DataType::Float16) => (DataType::Float16, half::f16::from_f32(value).to_le_bytes().to_vec()),
            Some(DataType::Double) => (DataType::Double, f64::from(value).to_le_bytes().to_vec()),
            _ => return Err("works on a value whose type of floats is not known".into()),
        };
        let input = self.fresh(node, name);
        place.initializers.push(tensor(&input, kind, &[], bytes));
        give(node, position, input);
        Ok(())
    }

    fn fresh(&mut self, node: &NodeProto, name: &str) -> String {
        self.names
            .fresh(&format!("{}_{name}", node.output.first().map_or("", String::as_str)))
    }

    /// `Upsample` and the first `Resize` take a place's value from the place divided by the scale, rounded down.
    fn resize(&mut self, node: &mut NodeProto, place: &mut Place) -> Result<(), String> {
        let mode = attribute(node, "mode").map_or(&b"nearest"[..], |mode| mode.s());
        let mode = match mode {
            b"nearest" => "nearest",
            b"linear" | b"bilinear" => "linear",
            _ => return Err("resizes in a way that later versions do not have".into()),
        };
        let scales = match attribute(node, "scales") {
            Some(scales) => {
                let (input, values) = (self.fresh(node, "scales"), scales.floats.clone());
                place.initializers.push(float_tensor(&input, &[values.len()], &values));
                input
            }
            None => node.input.get(1).cloned().ok_or("has no scales")?,
        };
        node.op_type = Some("Resize".into());
        node.input.truncate(1);
        node.input.extend([String::new(), scales]);
        node.attribute = [
            ("mode", mode),
            ("coordinate_transformation_mode", "asymmetric"),
            ("nearest_mode", "floor"),
        ]
        .map(|(name, value)| text(name, value))
        .to_vec();
        Ok(())
    }

    /// Before version 13 the axes from `axis` on are taken for one.
    fn softmax(&mut self, mut node: NodeProto, place: &mut Place) -> Result<(), String> {
        let axis = attribute(&node, "axis").map_or(1, AttributeProto::i);
        let (Some(input), Some(output)) = (node.input.first().cloned(), node.output.first().cloned()) else {
            return Err("has no input or no output".into());
        };
        let shape = self.shapes.get(&input);
        let counted = shape.map_or(axis, |shape| if axis < 0 { axis + shape.len() as i64 } else { axis });
        let behind = shape.and_then(|shape| shape.get(usize::try_from(counted).ok()? + 1..));
        node.attribute.retain(|attribute| attribute.name() != "axis");
        if axis == -1 || behind.is_some_and(|behind| behind.iter().all(|size| size.size() == Some(1))) {
            node.attribute.push(integer(
                "axis",
                if behind.is_some_and(|behind| !behind.is_empty()) {
                    counted
                } else {
                    -1
                },
            ));
            place.nodes.push(node);
            return Ok(());
        }
        let [flat, result, sizes] = ["flat", "result", "shape"].map(|name| self.fresh(&node, name));
        node.input = vec![flat.clone()];
        node.output = vec![result.clone()];
        node.attribute.push(integer("axis", -1));
        place.nodes.push(super::node("Shape", &[&input], &sizes, vec![]));
        place
            .nodes
            .push(super::node("Flatten", &[&input], &flat, vec![integer("axis", axis)]));
        place.nodes.push(node);
        place.nodes.push(super::node("Reshape", &[&result, &sizes], &output, vec![]));
        Ok(())
    }
}

/// Puts `name` at the input of that position.
fn give(node: &mut NodeProto, position: usize, name: String) {
    if node.input.len() <= position {
        node.input.resize(position + 1, String::new());
    }
    node.input[position] = name;
}

fn text(name: &str, value: &str) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(AttributeType::String as i32),
        s: Some(value.as_bytes().to_vec()),
        ..AttributeProto::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::generator::{Builder, Value, assert_same, declared, float};

    fn floats(name: &str, values: &[f32]) -> AttributeProto {
        AttributeProto {
            name: Some(name.into()),
            r#type: Some(AttributeType::Floats as i32),
            floats: values.to_vec(),
            ..AttributeProto::default()
        }
    }

    /// A model of that version of one node over an input of shape [batch, 4, 6], whose output has `shape` behind the batch.
    fn model(version: i64, op_type: &str, attributes: Vec<AttributeProto>, shape: &[usize]) -> ModelProto {
        let (mut builder, x) = Builder::new(11, &[4, 6]);
        let value = builder.push(op_type, &[&x.name], attributes, shape);
        of_version(version, builder, &value)
    }

    fn of_version(version: i64, builder: Builder, value: &Value) -> ModelProto {
        let mut model = builder.finish(value);
        model.opset_import[0].version = Some(version);
        // Initialisers were inputs, too, before.
        model.ir_version = Some(4);
        model
    }

    #[test]
    fn every_operator_gives_the_same_in_the_later_version() {
        let cases = [
            model(11, "Unsqueeze", vec![integers("axes", &[1, 4])], &[1, 4, 6, 1]),
            model(8, "ReduceSum", vec![integers("axes", &[-1]), integer("keepdims", 0)], &[4]),
            model(12, "ReduceSum", vec![integers("axes", &[2])], &[4, 1]),
            model(
                7,
                "Slice",
                vec![
                    integers("starts", &[1, -3]),
                    integers("ends", &[3, 1000]),
                    integers("axes", &[1, 2]),
                ],
                &[2, 3],
            ),
            model(9, "Slice", vec![integers("starts", &[0, 1]), integers("ends", &[1000, 3])], &[2, 6]),
            model(9, "Pad", vec![integers("pads", &[0, 1, 0, 0, 0, 2]), float("value", 1.5)], &[5, 8]),
            model(
                10,
                "Pad",
                vec![integers("pads", &[0, 1, 0, 0, 0, 2]), text("mode", "edge")],
                &[5, 8],
            ),
            model(9, "Clip", vec![float("min", -0.5), float("max", 0.25)], &[4, 6]),
            model(10, "Clip", vec![float("max", 0.25)], &[4, 6]),
            model(9, "Dropout", vec![float("ratio", 0.25)], &[4, 6]),
            model(11, "Dropout", vec![float("ratio", 0.25)], &[4, 6]),
            model(11, "Softmax", vec![], &[4, 6]),
            model(9, "LogSoftmax", vec![integer("axis", 2)], &[4, 6]),
            model(12, "Softmax", vec![integer("axis", -1)], &[4, 6]),
            model(12, "Softmax", vec![integer("axis", 0)], &[4, 6]),
            model(12, "Hardmax", vec![integer("axis", 1)], &[4, 6]),
        ];
        for before in cases {
            let name = before.graph.as_ref().unwrap().node[0].op_type().to_owned();
            let mut after = before.clone();
            raise(&mut after).unwrap_or_else(|why| panic!("{name}: {why}"));
            assert_eq!(version(&after), QUANTIZED);
            assert_same(&before, &after, 1e-6);
        }
    }

    #[test]
    fn pictures_are_enlarged_as_before() {
        for (version, mode, as_attribute) in [
            (7, "nearest", true),
            (8, "linear", true),
            (9, "nearest", false),
            (10, "linear", false),
        ] {
            let (mut builder, x) = Builder::new(12, &[2, 3, 4]);
            let scales = [1.0, 1.0, 2.0, 2.0];
            let op_type = if version == 10 { "Resize" } else { "Upsample" };
            let value = if as_attribute {
                builder.push(op_type, &[&x.name], vec![text("mode", mode), floats("scales", &scales)], &[2, 6, 8])
            } else {
                let scales = builder.floats(&scales);
                builder.push(op_type, &[&x.name, &scales], vec![text("mode", mode)], &[2, 6, 8])
            };
            let before = of_version(version, builder, &value);
            let mut after = before.clone();
            raise(&mut after).unwrap();
            assert_eq!(after.graph.as_ref().unwrap().node[0].op_type(), "Resize");
            assert_same(&before, &after, 1e-6);
        }
    }

    #[test]
    fn a_normalisation_and_a_split_of_old_are_raised() {
        let (mut builder, x) = Builder::new(13, &[4, 6]);
        let parts = builder.push("Split", &[&x.name], vec![integer("axis", 1), integers("split", &[1, 3])], &[1, 6]);
        let normal = {
            let constants = [1.0, 0.5, 0.25, 2.0].map(|value| builder.filled(1, value));
            let inputs: Vec<&str> = std::iter::once(&parts.name).chain(&constants).map(String::as_str).collect();
            builder.push("BatchNormalization", &inputs, vec![integer("spatial", 1)], &[1, 6])
        };
        let mut before = of_version(8, builder, &normal);
        let graph = before.graph.as_mut().unwrap();
        graph.node[0].output.push("rest".into());
        graph.output.push(declared("rest", &[3, 6]));
        let mut after = before.clone();
        raise(&mut after).unwrap();
        assert_same(&before, &after, 1e-6);
    }

    #[test]
    fn bodies_are_raised_too() {
        let body = |name: &str, axis: i64| {
            let body = GraphProto {
                name: Some(name.into()),
                node: vec![super::super::node("Unsqueeze", &["x"], name, vec![integers("axes", &[axis])])],
                output: vec![declared(name, &[1, 4, 6])],
                ..GraphProto::default()
            };
            AttributeProto {
                name: Some(name.into()),
                r#type: Some(AttributeType::Graph as i32),
                g: Some(body),
                ..AttributeProto::default()
            }
        };
        let (mut builder, _) = Builder::new(14, &[4, 6]);
        let condition = builder.flag(true);
        let value = builder.push(
            "If",
            &[&condition],
            vec![body("then_branch", 1), body("else_branch", 1)],
            &[1, 4, 6],
        );
        let before = of_version(11, builder, &value);
        let mut after = before.clone();
        raise(&mut after).unwrap();
        assert_same(&before, &after, 0.0);
    }

    #[test]
    fn what_has_no_equal_is_refused_and_the_model_left_alone() {
        for (version, op_type, attributes, words) in [
            (
                6,
                "Relu",
                vec![],
                "the model is of opset 6, and quantised weights need 13; export it with opset 13 or later",
            ),
            (
                8,
                "BatchNormalization",
                vec![integer("spatial", 0)],
                "its node `v1/BatchNormalization` (BatchNormalization) normalises each place",
            ),
            (
                11,
                "Resize",
                vec![text("coordinate_transformation_mode", "tf_half_pixel_for_nn")],
                "(Resize) resizes as by tf_half_pixel_for_nn",
            ),
        ] {
            let before = model(version, op_type, attributes, &[4, 6]);
            let mut after = before.clone();
            let said = raise(&mut after).unwrap_err();
            assert!(said.contains(words), "{said}");
            assert_eq!(before, after);
        }
    }
}
