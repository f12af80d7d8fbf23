//! 8-bit weights without calibration.
//!
//! Weight-only: the weight is stored in `int8` and a `DequantizeLinear` gives the floats, which engines fold at load. Dynamic: the
//! activations are quantised as they come (`DynamicQuantizeLinear`) and the product is taken in integers (`MatMulInteger`).
//! Convolutions are always weight-only, since dynamic quantisation makes them slower, as is what branches and loop bodies read. Of a table, rows are looked up as integers and
//! become floats afterwards, so that the table is never expanded.

use std::collections::{HashMap, HashSet};

use plimsoll_package::recipe::Granularity;
use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, mapping, weights};
use prost::Message as _;

use super::integers::{self, Float, NotFinite, Quantized, WEIGHT_MAX};
use super::{Exclusion, neighbours, nothing_to_quantize, raise, skipped, unreadable};
use crate::compress::{Change, Setting, Technique};
use crate::failure::Failure;
use crate::graph::weight::{Captured, Operator, Use, Weight};
use crate::graph::{Names, attribute, float_tensor, integer, node, reads, simplify, tensor, weight};

/// How matrix products with a constant weight are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Products {
    /// In integers, with activations quantised as they come.
    Dynamic,
    /// In floats.
    WeightOnly,
}

/// 8-bit weights without calibration.
#[derive(Debug, Clone)]
pub struct Int8 {
    /// How matrix products are computed.
    pub products: Products,
    /// Whether the engine makes floats of weights that are computed with in floats when it loads them, rather than at every inference. Where
    /// there is a convolution or a recurrence it does so anyway.
    pub fold: bool,
    /// What shares a scale.
    pub granularity: Granularity,
    /// Names of nodes whose products are computed in floats even where others are not.
    pub in_floats: Vec<String>,
    /// Names of nodes that stay as they are.
    pub exclude: Vec<String>,
}

impl Technique for Int8 {
    fn apply(&self, model: &mut ModelProto, _: &Setting) -> Result<Change, Failure> {
        raise(model)?;
        let Some(graph) = &mut model.graph else {
            return Ok(Change::default());
        };
        let exclusion = Exclusion::of(&self.exclude, graph)?;
        let mut change = Change::default();
        let mut rewriting = Rewriting::new(self, graph);
        let captured = weight::captured(graph);
        let is_captured = |name: &str| captured.iter().any(|captured| captured.name == name);
        let found = weight::find(graph).into_iter().filter(|found| !is_captured(&found.name));
        rewriting.weights(graph, &exclusion, found, &mut change)?;
        rewriting.captured(graph, &exclusion, &captured, &mut change)?;
        rewriting.finish(graph, &mut change);
        if change.changed.is_empty() {
            return Err(nothing_to_quantize());
        }
        Ok(change)
    }
}

impl Int8 {
    /// Quantises the weights of which every use is `wanted`.
    pub(super) fn rewrite(
        &self,
        graph: &mut GraphProto,
        exclusion: &Exclusion,
        wanted: impl Fn(Operator) -> bool,
    ) -> Result<Change, Failure> {
        let mut change = Change::default();
        let mut rewriting = Rewriting::new(self, graph);
        let found = weight::find(graph).into_iter();
        let found = found.filter(|found| found.uses.iter().all(|used| wanted(used.operator)));
        rewriting.weights(graph, exclusion, found, &mut change)?;
        rewriting.finish(graph, &mut change);
        Ok(change)
    }
}

/// What stands in a node's place.
struct Replacement {
    /// The activation that must be quantised before.
    activation: Option<String>,
    nodes: Vec<NodeProto>,
}

/// The names of what `DynamicQuantizeLinear` makes of an activation.
#[derive(Clone)]
struct Activation {
    quantized: String,
    step: String,
    zero: String,
}

struct Rewriting<'a> {
    technique: &'a Int8,
    names: Names,
    /// By the activation's name.
    activations: HashMap<String, Activation>,
    /// What becomes of the nodes, by their index.
    replaced: HashMap<usize, Replacement>,
    added: Vec<TensorProto>,
    /// Nodes that come before all others.
    first: Vec<NodeProto>,
    /// Initialisers that nodes make now.
    made: HashSet<String>,
    /// Whether a `DequantizeLinear` is to be folded.
    expands: bool,
}

/// A weight's tensors: the integers, and their scales.
struct Stored<'a> {
    found: &'a Weight,
    shape: &'a [usize],
    axis: usize,
    quantized: Quantized,
}

impl<'a> Rewriting<'a> {
    fn new(technique: &'a Int8, graph: &GraphProto) -> Self {
        Self {
            technique,
            names: Names::of(graph),
            activations: HashMap::new(),
            replaced: HashMap::new(),
            added: Vec::new(),
            first: Vec::new(),
            made: HashSet::new(),
            expands: false,
        }
    }

    /// Quantises what is `found` in the graph itself.
    fn weights(
        &mut self,
        graph: &GraphProto,
        exclusion: &Exclusion,
        found: impl Iterator<Item = Weight>,
        change: &mut Change,
    ) -> Result<(), Failure> {
        let read_counts = reads(graph);
        for found in found {
            let nodes = found.uses.iter().map(|used| &graph.node[used.node]);
            let excluded = nodes.map(NodeProto::name).find(|name| exclusion.contains_name(name));
            let refused = if let Some(name) = excluded {
                Some(format!("its node `{name}` is excluded"))
            } else if read_counts.get(found.name.as_str()) == Some(&found.uses.len()) {
                self.weight(graph, &found)?.err().map(str::to_owned)
            } else {
                Some("something else reads this weight, too".to_owned())
            };
            note(change, found.name, refused);
        }
        Ok(())
    }

    /// Quantises what branches and loop bodies read. The floats that are made of it have the weight's own name, so that nothing within a body
    /// changes, and a loop makes them once.
    fn captured(&mut self, graph: &GraphProto, exclusion: &Exclusion, captured: &[Captured], change: &mut Change) -> Result<(), Failure> {
        for captured in captured {
            let excluded = captured.nodes.iter().find(|name| exclusion.contains_name(name));
            let refused = match (excluded, &captured.operators) {
                (Some(name), _) => Some(format!("its node `{name}` is excluded")),
                (None, Some(operators)) => self.under_its_name(graph, captured, operators)?.err().map(str::to_owned),
                (None, None) => Some("something else reads this weight, too".to_owned()),
            };
            note(change, captured.name.clone(), refused);
        }
        Ok(())
    }

    fn under_its_name(
        &mut self,
        graph: &GraphProto,
        captured: &Captured,
        operators: &[Operator],
    ) -> Result<Result<(), &'static str>, Failure> {
        let original = &graph.initializer[captured.initializer];
        let (shape, axis) = match layout(original, operators.iter().copied())? {
            Ok(layout) => layout,
            Err(why) => return Ok(Err(why)),
        };
        let quantized = self.quantized(original, &shape, axis, None)?;
        let stem = &captured.name;
        let (name, scale) = (
            self.names.fresh(&format!("{stem}_int8")),
            self.names.fresh(&format!("{stem}_scale")),
        );
        let scales = scale_tensor(&scale, &quantized.scales);
        let dequantize = dequantize(&name, &scale, stem, axis, &quantized.scales);
        let tensors = [tensor(&name, DataType::Int8, &shape, quantized.into_bytes()), scales];
        let after = tensors.iter().map(TensorProto::encoded_len).sum::<usize>() + dequantize.encoded_len();
        if after >= original.encoded_len() {
            return Ok(Err(TOO_SMALL));
        }
        self.added.extend(tensors);
        self.first.push(dequantize);
        self.made.insert(captured.name.clone());
        self.expands = true;
        Ok(Ok(()))
    }

    /// The integers of a weight whose channels lie along `axis`, of a product in integers those that `product` takes.
    fn quantized(&self, original: &TensorProto, shape: &[usize], axis: usize, product: Option<Operator>) -> Result<Quantized, Failure> {
        let channels = (self.technique.granularity == Granularity::PerChannel).then_some(axis);
        // The bytes of a file are floats wherever they lie; a copy would take as much memory again.
        let bytes = original.raw_data().as_chunks::<4>().0;
        let in_place = original.data_type() == DataType::Float as i32 && bytes.len() == shape.iter().product::<usize>();
        let quantized = if in_place {
            quantize(bytes, shape, channels, product)
        } else {
            let values = weights::floats(original).map_err(|error| unreadable(original.name(), &error.to_string()))?;
            quantize(&values, shape, channels, product)
        };
        mapping::release(original.raw_data());
        quantized.map_err(|_| unreadable(original.name(), "it holds NaN or infinity"))
    }

    /// Quantises one weight with all its uses; or says why it is left alone.
    fn weight(&mut self, graph: &GraphProto, found: &Weight) -> Result<Result<(), &'static str>, Failure> {
        let original = &graph.initializer[found.initializer];
        let (shape, axis) = match layout(original, found.uses.iter().map(|used| used.operator))? {
            Ok(layout) => layout,
            Err(why) => return Ok(Err(why)),
        };
        // A node of which both operands are weights is rewritten for one of them.
        let taken = |used: &Use| used.operator != Operator::Recurrent && self.replaced.contains_key(&used.node);
        if found.uses.iter().any(taken) {
            return Ok(Err("the other operand of its product is quantised"));
        }
        let products = || -> Option<Vec<Product>> {
            let of = |used: &Use| Product::of(&graph.node[used.node], used, &shape);
            found.uses.iter().map(of).collect()
        };
        let in_floats = |used: &Use| self.technique.in_floats.iter().any(|name| name == graph.node[used.node].name());
        let is_dynamic = self.technique.products == Products::Dynamic && !found.uses.iter().any(in_floats);
        let products = is_dynamic.then(products).flatten();
        // All uses sum over the axis that is not the channels'.
        let product = products.is_some().then_some(found.uses[0].operator);
        let quantized = self.quantized(original, &shape, axis, product)?;
        let stored = Stored {
            found,
            shape: &shape,
            axis,
            quantized,
        };
        let (tensors, replacements) = match &products {
            Some(products) => self.dynamic(stored, products),
            None => self.weight_only(graph, stored),
        };
        if !smaller(graph, original, &tensors, &replacements) {
            return Ok(Err(TOO_SMALL));
        }
        let in_floats = |used: &Use| used.operator != Operator::Gather;
        self.expands |= products.is_none() && found.uses.iter().any(in_floats) && self.folds(found);
        self.added.extend(tensors);
        self.replaced.extend(replacements);
        Ok(Ok(()))
    }

    fn folds(&self, found: &Weight) -> bool {
        let by_floats = |used: &Use| matches!(used.operator, Operator::Conv | Operator::ConvTranspose | Operator::Recurrent);
        self.technique.fold || found.uses.iter().any(by_floats)
    }

    fn dynamic(&mut self, stored: Stored, products: &[Product]) -> (Vec<TensorProto>, Vec<(usize, Replacement)>) {
        let stem = &stored.found.name;
        let (name, scale) = (
            self.names.fresh(&format!("{stem}_int8")),
            self.names.fresh(&format!("{stem}_scale")),
        );
        let scales = stored.quantized.scales.clone();
        let mut tensors = vec![scale_tensor(&scale, &scales), columns_last(&name, stored)];
        let replacements = products.iter().map(|product| {
            let nodes = self.product(product, &name, &scale, &scales, &mut tensors);
            let activation = Some(product.activation.clone());
            (product.node, Replacement { activation, nodes })
        });
        let replacements = replacements.collect();
        (tensors, replacements)
    }

    /// The nodes of a matrix product in integers.
    fn product(&mut self, product: &Product, weight: &str, scale: &str, scales: &[f32], tensors: &mut Vec<TensorProto>) -> Vec<NodeProto> {
        let output = product.output.as_str();
        let names = &mut self.names;
        let activation = self
            .activations
            .entry(product.activation.clone())
            .or_insert_with_key(|input| Activation {
                quantized: names.fresh(&format!("{input}_uint8")),
                step: names.fresh(&format!("{input}_step")),
                zero: names.fresh(&format!("{input}_zero")),
            });
        let mut fresh = |suffix: &str| names.fresh(&format!("{output}_{suffix}"));
        let (integers, floats, both, scaled) = (fresh("int32"), fresh("float"), fresh("scale"), fresh("scaled"));
        let scale = if product.alpha == 1.0 {
            scale.to_owned()
        } else {
            let name = fresh("alpha_scale");
            let scales: Vec<f32> = scales.iter().map(|scale| scale * product.alpha).collect();
            tensors.push(scale_tensor(&name, &scales));
            name
        };
        let last = if product.bias.is_some() { scaled.as_str() } else { output };
        let mut nodes = vec![
            node(
                "MatMulInteger",
                &[&activation.quantized, weight, &activation.zero],
                &integers,
                vec![],
            ),
            node("Cast", &[&integers], &floats, vec![integer("to", DataType::Float as i64)]),
            node("Mul", &[&activation.step, &scale], &both, vec![]),
            node("Mul", &[&floats, &both], last, vec![]),
        ];
        nodes.extend(product.bias.as_ref().map(|bias| node("Add", &[&scaled, bias], output, vec![])));
        nodes
    }

    fn weight_only(&mut self, graph: &GraphProto, stored: Stored) -> (Vec<TensorProto>, Vec<(usize, Replacement)>) {
        let stem = &stored.found.name;
        let (name, scale) = (
            self.names.fresh(&format!("{stem}_int8")),
            self.names.fresh(&format!("{stem}_scale")),
        );
        let floats = self.names.fresh(&format!("{stem}_float"));
        let scales = stored.quantized.scales.clone();
        let (gathers, others): (Vec<&Use>, Vec<&Use>) = stored.found.uses.iter().partition(|used| used.operator == Operator::Gather);
        let mut tensors = vec![tensor(&name, DataType::Int8, stored.shape, stored.quantized.into_bytes())];
        let mut replacements: Vec<(usize, Replacement)> = Vec::new();
        if !others.is_empty() {
            tensors.push(scale_tensor(&scale, &scales));
            let mut dequantize = Some(dequantize(&name, &scale, &floats, stored.axis, &scales));
            for used in others {
                // A recurrence has two weights: what stands in its place for the first is changed again for the second.
                let replaced = self.replaced.get(&used.node).map(|replacement| replacement.nodes.clone());
                let mut nodes = replaced.unwrap_or_else(|| vec![graph.node[used.node].clone()]);
                if let Some(user) = nodes.last_mut() {
                    user.input[used.input].clone_from(&floats);
                }
                nodes.splice(0..0, dequantize.take());
                replacements.push((used.node, Replacement { activation: None, nodes }));
            }
        }
        if !gathers.is_empty() {
            let rows = self.names.fresh(&format!("{stem}_row_scale"));
            tensors.push(if scales.len() > 1 {
                let mut dims = vec![1; stored.shape.len()];
                dims[0] = scales.len();
                float_tensor(&rows, &dims, &scales)
            } else {
                scale_tensor(&rows, &scales)
            });
            for used in gathers {
                let nodes = self.lookup(&graph.node[used.node], &name, &rows, scales.len() > 1);
                replacements.push((used.node, Replacement { activation: None, nodes }));
            }
        }
        (tensors, replacements)
    }

    /// The nodes that look rows up as integers, with each row's scale or one for all.
    fn lookup(&mut self, gather: &NodeProto, table: &str, scale: &str, by_row: bool) -> Vec<NodeProto> {
        let output = gather.output[0].as_str();
        let mut fresh = |suffix: &str| self.names.fresh(&format!("{output}_{suffix}"));
        let (row, floats, row_scale) = (fresh("int8"), fresh("float"), fresh("scale"));
        let look_up = |table: &str, output: &str| {
            let mut look_up = gather.clone();
            look_up.input[0] = table.to_owned();
            look_up.output[0] = output.to_owned();
            // An engine that names nodes without a name by their neighbours would find the name taken.
            look_up.name = None;
            look_up
        };
        let mut nodes = vec![
            look_up(table, &row),
            node("Cast", &[&row], &floats, vec![integer("to", DataType::Float as i64)]),
        ];
        if by_row {
            nodes.push(look_up(scale, &row_scale));
        }
        nodes.push(node("Mul", &[&floats, if by_row { &row_scale } else { scale }], output, vec![]));
        nodes
    }

    fn finish(mut self, graph: &mut GraphProto, change: &mut Change) {
        // An engine that shall fold does not fuse a static graph.
        let is_static = graph.node.iter().any(|node| node.op_type() == "QuantizeLinear");
        change.fold_dequantize = self.expands && !is_static;
        let nodes = std::mem::replace(&mut graph.node, self.first);
        graph.initializer.retain(|tensor| !self.made.contains(tensor.name()));
        let mut quantized = HashSet::new();
        for (index, original) in nodes.into_iter().enumerate() {
            let Some(Replacement { activation, nodes }) = self.replaced.remove(&index) else {
                graph.node.push(original);
                continue;
            };
            // Nodes are in order, so what the first product quantises is there for the others.
            if let Some(input) = activation
                && let Some(names) = self.activations.get(&input)
                && quantized.insert(input.clone())
            {
                let mut quantize = node("DynamicQuantizeLinear", &[&input], &names.quantized, vec![]);
                quantize.output.extend([names.step.clone(), names.zero.clone()]);
                graph.node.push(quantize);
            }
            graph.node.extend(nodes);
        }
        graph.initializer.extend(self.added);
        simplify::remove_dead(graph);
    }
}

/// Why a weight stays as it is.
const TOO_SMALL: &str = "it is so small that quantisation would make the file larger";

fn note(change: &mut Change, name: String, refused: Option<String>) {
    match refused {
        None => change.changed.push(name),
        Some(why) => change.skipped.push(skipped(&name, why)),
    }
}

/// The shape of a weight, and the axis of its channels, on which all that use it must agree.
fn layout(original: &TensorProto, operators: impl Iterator<Item = Operator>) -> Result<Result<(Vec<usize>, usize), &'static str>, Failure> {
    let shape = weights::shape(original).map_err(|error| unreadable(original.name(), &error.to_string()))?;
    if shape.contains(&0) {
        return Ok(Err("it is empty"));
    }
    let mut axes = operators.map(|operator| operator.channel_axis(shape.len()));
    Ok(match axes.next() {
        Some(axis) if axes.all(|other| other == axis) => Ok((shape, axis)),
        _ => Err("its uses disagree about which axis its channels are"),
    })
}

/// The node that makes the floats called `output` of integers.
fn dequantize(integers: &str, scale: &str, output: &str, axis: usize, scales: &[f32]) -> NodeProto {
    let axis = (scales.len() > 1).then(|| integer("axis", axis as i64));
    node("DequantizeLinear", &[integers, scale], output, axis.into_iter().collect())
}

/// A product that can be taken in integers: of an activation with a weight of two axes.
pub(super) struct Product {
    node: usize,
    pub(super) activation: String,
    pub(super) output: String,
    bias: Option<String>,
    alpha: f32,
}

impl Product {
    pub(super) fn of(node: &NodeProto, used: &Use, shape: &[usize]) -> Option<Self> {
        let product = |bias, alpha| Self {
            node: used.node,
            activation: node.input[0].clone(),
            output: node.output[0].clone(),
            bias,
            alpha,
        };
        match used.operator {
            _ if shape.len() != 2 => None,
            Operator::MatMul => Some(product(None, 1.0)),
            Operator::Gemm { .. } => {
                let float = |name: &str| attribute(node, name).map_or(1.0, AttributeProto::f);
                let bias = node.input.get(2).filter(|name| !name.is_empty()).cloned();
                let plain =
                    attribute(node, "transA").is_none_or(|attribute| attribute.i() == 0) && (bias.is_none() || float("beta") == 1.0);
                plain.then(|| product(bias, float("alpha")))
            }
            _ => None,
        }
    }
}

fn quantize<T: Float>(values: &[T], shape: &[usize], axis: Option<usize>, product: Option<Operator>) -> Result<Quantized, NotFinite> {
    match product {
        Some(operator) => neighbours::quantize(values, shape, axis, operator),
        None => integers::quantize(values, shape, axis, WEIGHT_MAX),
    }
}

/// A scale for each channel, or one for all.
pub(super) fn scale_tensor(name: &str, scales: &[f32]) -> TensorProto {
    if scales.len() == 1 {
        float_tensor(name, &[], scales)
    } else {
        float_tensor(name, &[scales.len()], scales)
    }
}

/// The integers with the channels as columns, as `MatMulInteger` takes them.
fn columns_last(name: &str, stored: Stored) -> TensorProto {
    let (rows, columns) = (stored.shape[0], stored.shape[1]);
    if stored.axis == 1 {
        return tensor(name, DataType::Int8, stored.shape, stored.quantized.into_bytes());
    }
    let transposed = integers::transposed(&stored.quantized.values, rows, columns);
    let bytes = transposed.into_iter().map(i8::cast_unsigned).collect();
    tensor(name, DataType::Int8, &[columns, rows], bytes)
}

fn smaller(graph: &GraphProto, original: &TensorProto, tensors: &[TensorProto], replacements: &[(usize, Replacement)]) -> bool {
    let nodes = replacements
        .iter()
        .flat_map(|(_, replacement)| &replacement.nodes)
        .map(NodeProto::encoded_len);
    let after = tensors.iter().map(TensorProto::encoded_len).sum::<usize>() + nodes.sum::<usize>();
    let before = original.encoded_len()
        + replacements
            .iter()
            .map(|(index, _)| graph.node[*index].encoded_len())
            .sum::<usize>();
    after < before
}

#[cfg(test)]
mod tests {
    use plimsoll_package::manifest::Engine as EngineKind;
    use plimsoll_package::recipe::{Quantize, QuantizeScheme};
    use plimsoll_runtime::engine::Tensor;

    use super::super::fixture::{apply, model, named, numbers, operators, run, sqnr, value};
    use super::*;
    use crate::failure::FailureReason;
    use crate::graph::generator;

    /// Two rows of a table of 40, a matrix product, and a product with a bias, transposed.
    fn tables_and_products() -> ModelProto {
        let gemm = node("Gemm", &["h", "b", "c"], "y", vec![integer("transB", 1)]);
        model(
            vec![value("ids", DataType::Int64, &[])],
            vec![
                named("look up", node("Gather", &["table", "ids"], "e", vec![])),
                named("product", node("MatMul", &["e", "a"], "h", vec![])),
                named("gemm", gemm),
            ],
            vec![
                float_tensor("table", &[40, 24], &numbers(960, 1)),
                float_tensor("a", &[24, 32], &numbers(768, 2)),
                float_tensor("b", &[16, 32], &numbers(512, 3)),
                float_tensor("c", &[16], &numbers(16, 4)),
            ],
            vec![value("y", DataType::Float, &[16])],
        )
    }

    fn ids() -> Vec<Tensor> {
        vec![Tensor::new(vec![6], vec![0_i64, 39, 7, 7, 21, 3]).unwrap()]
    }

    #[test]
    fn the_weights_of_a_recurrence_are_stored_in_integers_and_computed_in_floats() {
        let (inputs, hidden) = (24, 16);
        let original = model(
            vec![value("x", DataType::Float, &[2, inputs as i64])],
            vec![named(
                "recurrence",
                node("LSTM", &["x", "w", "r"], "y", vec![integer("hidden_size", hidden as i64)]),
            )],
            vec![
                float_tensor("w", &[1, 4 * hidden, inputs], &numbers(4 * hidden * inputs, 1)),
                float_tensor("r", &[1, 4 * hidden, hidden], &numbers(4 * hidden * hidden, 2)),
            ],
            vec![value("y", DataType::Float, &[1, 2, hidden as i64])],
        );
        let sample = [Tensor::new(vec![7, 2, inputs], numbers(14 * inputs, 3)).unwrap()];
        let before = run(EngineKind::OnnxRuntime, &original, true, &sample);
        let (model, change) = apply(&original, &Quantize::of(QuantizeScheme::Int8Dynamic), None).unwrap();
        assert_eq!(
            (change.changed.as_slice(), change.fold_dequantize),
            (&["w".to_owned(), "r".to_owned()][..], true)
        );
        assert!(model.encoded_len() * 3 < original.encoded_len());
        for kind in [EngineKind::Tract, EngineKind::OnnxRuntime] {
            let sqnr = sqnr(&before, &run(kind, &model, true, &sample));
            assert!(sqnr > 30.0, "{kind}: {sqnr:.1} dB");
        }
    }

    #[test]
    fn every_scheme_and_granularity_agrees_with_the_original_on_both_engines() {
        let original = tables_and_products();
        let before = run(EngineKind::OnnxRuntime, &original, true, &ids());
        for scheme in [QuantizeScheme::Int8Dynamic, QuantizeScheme::Int8Weights, QuantizeScheme::Int8] {
            for (granularity, floor) in [(Granularity::PerChannel, 32.0), (Granularity::PerTensor, 30.0)] {
                let quantize = Quantize {
                    granularity: Some(granularity),
                    ..Quantize::of(scheme)
                };
                let (model, change) = apply(&original, &quantize, None).unwrap();
                assert_eq!(change.changed, ["table", "a", "b"], "{scheme}: {:?}", change.skipped);
                assert!(model.encoded_len() * 2 < original.encoded_len(), "{scheme}");
                for kind in [EngineKind::Tract, EngineKind::OnnxRuntime] {
                    let after = run(kind, &model, change.fold_dequantize, &ids());
                    let sqnr = sqnr(&before, &after);
                    assert!(sqnr > floor, "{scheme} {granularity} on {kind}: {sqnr:.1} dB");
                }
            }
        }
    }

    #[test]
    fn a_table_stays_in_integers_until_its_rows_are_looked_up() {
        let quantize = Quantize::of(QuantizeScheme::Int8Weights);
        let (model, change) = apply(&tables_and_products(), &quantize, None).unwrap();
        assert!(change.fold_dequantize);
        assert_eq!(
            operators(&model),
            [
                "Gather",
                "Cast",
                "Gather",
                "Mul",
                "DequantizeLinear",
                "MatMul",
                "DequantizeLinear",
                "Gemm"
            ]
        );
        let only_table = Quantize {
            exclude: vec!["product".into(), "gemm".into()],
            ..quantize
        };
        let (model, change) = apply(&tables_and_products(), &only_table, None).unwrap();
        assert_eq!(operators(&model), ["Gather", "Cast", "Gather", "Mul", "MatMul", "Gemm"]);
        assert!(!change.fold_dequantize, "nothing is there to fold");
        assert_eq!(change.skipped[0], skipped("a", "its node `product` is excluded"));
    }

    #[test]
    fn an_excluded_name_that_no_node_has_is_refused() {
        let quantize = Quantize {
            exclude: vec!["gemm".into(), "prodct".into()],
            ..Quantize::of(QuantizeScheme::Int8Dynamic)
        };
        let failed = apply(&tables_and_products(), &quantize, None).unwrap_err();
        assert_eq!(failed.reason, FailureReason::InvalidInputs);
        assert!(failed.message.contains("no node of the model has the name `prodct`"), "{failed}");
    }

    #[test]
    fn the_weights_of_branches_and_loops_are_stored_in_integers_and_computed_in_floats() {
        for (mut original, weights) in [(generator::branching(), vec!["w_2", "w_3"]), (generator::looping(), vec!["w"])] {
            simplify::simplify(&mut original).unwrap();
            for scheme in [QuantizeScheme::Int8Dynamic, QuantizeScheme::Int8Weights, QuantizeScheme::Int8] {
                let (model, change) = apply(&original, &Quantize::of(scheme), None).unwrap();
                assert_eq!(change.changed, weights);
                assert!(change.fold_dequantize && model.encoded_len() < original.encoded_len());
                let inputs = generator::agreement::inputs(&original);
                for kind in [EngineKind::Tract, EngineKind::OnnxRuntime] {
                    let Ok(before) = generator::agreement::try_run(kind, &original, &inputs) else {
                        continue;
                    };
                    let after =
                        generator::agreement::try_run(kind, &model, &inputs).unwrap_or_else(|why| panic!("{scheme} on {kind}: {why}"));
                    let sqnr = sqnr(before[0].as_f32().unwrap(), after[0].as_f32().unwrap());
                    assert!(sqnr > 30.0, "{scheme} on {kind}: {sqnr:.1} dB");
                }
            }
        }
    }

    #[test]
    fn an_activation_that_several_products_read_is_quantised_once() {
        let weights = |name: &str, seed| float_tensor(name, &[32, 32], &numbers(1024, seed));
        let twice = model(
            vec![value("x", DataType::Float, &[32])],
            vec![
                node("MatMul", &["x", "q"], "a", vec![]),
                node("MatMul", &["x", "k"], "b", vec![]),
                node("Add", &["a", "b"], "y", vec![]),
            ],
            vec![weights("q", 1), weights("k", 2)],
            vec![value("y", DataType::Float, &[32])],
        );
        let (model, _) = apply(&twice, &Quantize::of(QuantizeScheme::Int8Dynamic), None).unwrap();
        let quantizers = operators(&model).iter().filter(|name| **name == "DynamicQuantizeLinear").count();
        assert_eq!(quantizers, 1);
    }

    #[test]
    fn a_table_that_is_a_weight_as_well_is_stored_once() {
        let tied = model(
            vec![value("ids", DataType::Int64, &[])],
            vec![
                node("Gather", &["table", "ids"], "e", vec![]),
                node("Gemm", &["e", "table"], "y", vec![integer("transB", 1)]),
            ],
            vec![float_tensor("table", &[40, 24], &numbers(960, 1))],
            vec![value("y", DataType::Float, &[40])],
        );
        let (model, change) = apply(&tied, &Quantize::of(QuantizeScheme::Int8Dynamic), None).unwrap();
        assert!(change.fold_dequantize);
        let before = run(EngineKind::OnnxRuntime, &tied, true, &ids());
        for kind in [EngineKind::Tract, EngineKind::OnnxRuntime] {
            assert!(sqnr(&before, &run(kind, &model, true, &ids())) > 35.0);
        }
        let graph = model.graph.unwrap();
        let integers = graph
            .initializer
            .iter()
            .filter(|tensor| tensor.data_type() == DataType::Int8 as i32);
        assert_eq!(integers.count(), 1);
    }
}
