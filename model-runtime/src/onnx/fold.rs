//! Folding of weight-only quantisation: `DequantizeLinear` over initialisers becomes the floats that it stands for.

use std::collections::{HashMap, HashSet};

use super::tensor_proto::DataType;
use super::weights::{channels, floats, shape};
use super::{AttributeProto, GraphProto, ModelProto, NodeProto, OnnxError, TensorProto, ValueInfoProto};

/// Replaces every `DequantizeLinear` whose inputs are all initialisers of its own graph by the float initialiser that it computes, and
/// drops the initialisers that nothing reads any more. Returns how many were replaced.
///
/// Per tensor and per axis (ONNX operator reference, `DequantizeLinear`, opset 10 to 25); blocked quantisation is left as it is.
///
/// # Errors
/// [`OnnxError::Weight`] where a quantised weight cannot be read; the model is then partly folded.
pub fn fold_dequantize(model: &mut ModelProto) -> Result<usize, OnnxError> {
    model.graph.as_mut().map_or(Ok(0), fold)
}

fn fold(graph: &mut GraphProto) -> Result<usize, OnnxError> {
    let mut folded = 0;
    for subgraph in graph
        .node
        .iter_mut()
        .flat_map(|node| &mut node.attribute)
        .filter_map(|attribute| attribute.g.as_mut())
    {
        folded += fold(subgraph)?;
    }
    let initializers: HashMap<&str, &TensorProto> = graph.initializer.iter().map(|tensor| (tensor.name(), tensor)).collect();
    let outputs: HashSet<&str> = graph.output.iter().map(ValueInfoProto::name).collect();
    let mut results: HashMap<usize, TensorProto> = HashMap::new();
    for (index, node) in graph.node.iter().enumerate() {
        // A graph output must be a node's, so such a node stays.
        if node.op_type() == "DequantizeLinear" && node.output.iter().all(|output| !outputs.contains(output.as_str())) {
            results.extend(dequantize(node, &initializers)?.map(|tensor| (index, tensor)));
        }
    }
    if results.is_empty() {
        return Ok(folded);
    }
    folded += results.len();
    let mut index = 0..;
    graph.node.retain(|_| !results.contains_key(&index.next().unwrap_or(usize::MAX)));
    let mut read = HashSet::new();
    reads(graph, &mut read);
    graph.initializer.retain(|tensor| read.contains(tensor.name()));
    let mut results: Vec<_> = results.into_iter().collect();
    results.sort_by_key(|(index, _)| *index);
    graph.initializer.extend(results.into_iter().map(|(_, tensor)| tensor));
    Ok(folded)
}

fn reads(graph: &GraphProto, read: &mut HashSet<String>) {
    read.extend(graph.node.iter().flat_map(|node| node.input.iter().cloned()));
    read.extend(graph.output.iter().map(|output| output.name().to_owned()));
    for attribute in graph.node.iter().flat_map(|node| &node.attribute) {
        attribute
            .g
            .iter()
            .chain(&attribute.graphs)
            .for_each(|subgraph| reads(subgraph, read));
    }
}

fn dequantize(node: &NodeProto, initializers: &HashMap<&str, &TensorProto>) -> Result<Option<TensorProto>, OnnxError> {
    let input = |index: usize| node.input.get(index).filter(|name| !name.is_empty());
    let initializer = |index: usize| input(index).and_then(|name| initializers.get(name.as_str()).copied());
    let (Some(weight), Some(scale)) = (initializer(0), initializer(1)) else {
        return Ok(None);
    };
    let zero_point = match (input(2), initializer(2)) {
        (Some(_), None) => return Ok(None),
        (_, zero_point) => zero_point,
    };
    let attribute = |name: &str| {
        node.attribute
            .iter()
            .find(|attribute| attribute.name() == name)
            .map(AttributeProto::i)
    };
    let narrow = [DataType::Int8, DataType::Uint8, DataType::Int16, DataType::Uint16, DataType::Int32];
    if attribute("block_size").unwrap_or(0) != 0
        || scale.data_type() != DataType::Float as i32
        || !narrow.iter().any(|&kind| kind as i32 == weight.data_type())
    {
        return Ok(None);
    }
    let refuse = |reason: &str| OnnxError::Weight {
        name: weight.name().to_owned(),
        reason: reason.to_owned(),
    };
    let dims = shape(weight)?;
    let scales = floats(scale)?;
    let zeros = match zero_point {
        Some(tensor) => floats(tensor)?,
        None => vec![0.0; scales.len()],
    };
    if zeros.len() != scales.len() {
        return Err(refuse("has scales and zero points of different sizes"));
    }
    let mut values = floats(weight)?;
    if let ([scale], [zero]) = (&scales[..], &zeros[..]) {
        values.iter_mut().for_each(|value| *value = (*value - zero) * scale);
    } else {
        let axis = attribute("axis").unwrap_or(1);
        let axis = usize::try_from(if axis < 0 { axis + dims.len() as i64 } else { axis }).unwrap_or(usize::MAX);
        if dims.get(axis) != Some(&scales.len()) {
            return Err(refuse("has not one scale for each channel of its axis"));
        }
        channels(&dims, axis, |channel, range| {
            values[range]
                .iter_mut()
                .for_each(|value| *value = (*value - zeros[channel]) * scales[channel]);
        });
    }
    Ok(Some(TensorProto {
        name: Some(node.output[0].clone()),
        dims: weight.dims.clone(),
        data_type: Some(DataType::Float as i32),
        raw_data: Some(values.iter().flat_map(|value| value.to_le_bytes()).collect()),
        ..TensorProto::default()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, kind: DataType, dims: &[i64], raw: impl IntoIterator<Item = u8>) -> TensorProto {
        TensorProto {
            name: Some(name.into()),
            data_type: Some(kind as i32),
            dims: dims.to_vec(),
            raw_data: Some(raw.into_iter().collect()),
            ..Default::default()
        }
    }

    fn model(axis: i64) -> ModelProto {
        let dequantize = NodeProto {
            op_type: Some("DequantizeLinear".into()),
            input: vec!["q".into(), "scale".into(), "zero".into()],
            output: vec!["w".into()],
            attribute: vec![AttributeProto {
                name: Some("axis".into()),
                i: Some(axis),
                ..Default::default()
            }],
            ..Default::default()
        };
        let add = NodeProto {
            op_type: Some("Add".into()),
            input: vec!["x".into(), "w".into()],
            output: vec!["y".into()],
            ..Default::default()
        };
        let graph = GraphProto {
            node: vec![dequantize, add],
            initializer: vec![
                tensor("q", DataType::Int8, &[2, 2], [1_i8, 2, -3, 4].map(|value| value as u8)),
                tensor(
                    "scale",
                    DataType::Float,
                    &[2],
                    [0.5_f32, 2.0].into_iter().flat_map(f32::to_le_bytes),
                ),
                tensor("zero", DataType::Int8, &[2], [0, 1]),
            ],
            output: vec![ValueInfoProto {
                name: Some("y".into()),
                ..Default::default()
            }],
            ..Default::default()
        };
        ModelProto {
            graph: Some(graph),
            ..Default::default()
        }
    }

    #[test]
    fn each_channel_is_scaled_by_its_own() {
        for (axis, expected) in [(0, [0.5, 1.0, -8.0, 6.0]), (1, [0.5, 2.0, -1.5, 6.0]), (-1, [0.5, 2.0, -1.5, 6.0])] {
            let mut model = model(axis);
            assert_eq!(fold_dequantize(&mut model).unwrap(), 1);
            let graph = model.graph.unwrap();
            assert_eq!(graph.node.len(), 1);
            assert_eq!(
                graph.initializer.iter().map(TensorProto::name).collect::<Vec<_>>(),
                ["w"],
                "what is unread goes"
            );
            assert_eq!(floats(&graph.initializer[0]).unwrap(), expected);
        }
    }

    #[test]
    fn an_activation_is_not_folded() {
        let mut model = model(0);
        model.graph.as_mut().unwrap().initializer.remove(0);
        assert_eq!(fold_dequantize(&mut model).unwrap(), 0);
        assert_eq!(model.graph.unwrap().node.len(), 2);
    }

    #[test]
    fn scales_that_do_not_fit_are_refused() {
        let mut model = model(7);
        assert_eq!(
            fold_dequantize(&mut model).unwrap_err().to_string(),
            "tensor `q` has not one scale for each channel of its axis"
        );
    }
}
