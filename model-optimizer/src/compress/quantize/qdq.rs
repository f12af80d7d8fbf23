//! Static quantisation: `QuantizeLinear` and `DequantizeLinear` around the operators that are to be computed in integers, with ranges
//! taken from calibration data.
//!
//! Activations are unsigned and asymmetric with one scale, weights signed and symmetric with a scale for each output channel, biases
//! 32-bit integers of the product of both scales: the forms that ONNX Runtime fuses into integer kernels. It fuses a convolution only
//! where its result is quantised, too; matrix products give floats.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use plimsoll_package::recipe::{ActivationRange, Granularity};
use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, weights};

use super::bias::{self, Layout};
use super::int8::{Int8, Products, scale_tensor};
use super::{Exclusion, nothing_to_quantize, raise, skipped, smooth, unreadable};
use super::{integers, neighbours};
use crate::calibration::{Channels, Observed, Statistics};
use crate::compress::{Change, Setting, Technique};
use crate::failure::Failure;
use crate::graph::elements::element_types;
use crate::graph::weight::Operator;
use crate::graph::{Names, attribute, float_tensor, integer, is_standard, node, reads, simplify, tensor};

/// Operators with weights, computed in integers.
const LAYERS: [&str; 3] = ["Conv", "MatMul", "Gemm"];
/// Operators of which the weights alone are quantised.
const WEIGHT_ONLY: [&str; 2] = ["ConvTranspose", "Gather"];
/// Operators that give some of the values that they read, so that both have the same scale.
const MOVES: [&str; 6] = ["MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"];
/// Operators that compute new values.
const COMPUTES: [&str; 11] = [
    "Add",
    "Mul",
    "Concat",
    "Relu",
    "Clip",
    "LeakyRelu",
    "Sigmoid",
    "Softmax",
    "AveragePool",
    "GlobalAveragePool",
    "Resize",
];
/// Operators of which every input is an activation; of others the first is.
const ALL_INPUTS: [&str; 3] = ["Add", "Mul", "Concat"];

/// Share of the values that percentile ranges leave out.
const OUTER: f64 = 1e-5;
/// Integers that a quantised activation has.
const LEVELS: usize = 255;
/// Largest quantised bias: far from where a sum of 32 bits overflows.
const BIAS_MAX: f32 = (1 << 29) as f32;

/// Whether `operator` is quantised by this technique.
#[must_use]
pub fn supports(operator: &str) -> bool {
    supported().contains(&operator)
}

/// The operators that this technique quantises.
#[must_use]
pub fn supported() -> Vec<&'static str> {
    LAYERS.iter().chain(&WEIGHT_ONLY).chain(&COMPUTES).chain(&MOVES).copied().collect()
}

/// Static quantisation.
#[derive(Debug, Clone)]
pub struct Static {
    /// Whether each output channel of a weight has a scale of its own.
    pub granularity: Granularity,
    /// How ranges are taken from the calibration data.
    pub range: ActivationRange,
    /// SmoothQuant's alpha, `0.0..=1.0`; `None` moves nothing.
    pub smooth: Option<f64>,
    /// Whether biases make up for the mean error of their layer.
    pub bias_correction: bool,
    /// The types of operators that are quantised, of [`supported`].
    pub operators: Vec<String>,
    /// Names of nodes that stay as they are.
    pub exclude: Vec<String>,
}

impl Technique for Static {
    fn apply(&self, model: &mut ModelProto, setting: &Setting) -> Result<Change, Failure> {
        let calibration = setting.calibration("quantize with scheme Int8Static")?;
        raise(model)?;
        let Some(graph) = &model.graph else { return Ok(Change::default()) };
        let exclusion = Exclusion::of(&self.exclude, graph)?;
        if let Some(alpha) = self.smooth.filter(|_| self.operators.iter().any(|name| name != "Conv")) {
            smooth::apply(model, calibration, alpha, &exclusion)?;
        }
        let Some(graph) = &model.graph else { return Ok(Change::default()) };
        let plan = Plan::of(self, graph, &exclusion);
        let mut observed = plan.observed();
        let mut statistics: HashMap<String, Statistics> = HashMap::new();
        for constant in &graph.initializer {
            if let Some(position) = observed.iter().position(|observed| observed.name == constant.name()) {
                let values = weights::floats(constant).map_err(|error| unreadable(constant.name(), &error.to_string()))?;
                let known = statistics.entry(observed.swap_remove(position).name).or_default();
                known.histogram.add(&values);
            }
        }
        if !observed.is_empty() {
            let gathered = calibration.statistics(model, &observed)?;
            statistics.extend(observed.into_iter().map(|observed| observed.name).zip(gathered));
        }
        let Some(graph) = &mut model.graph else {
            return Ok(Change::default());
        };
        let mut change = Rewriting::new(self, graph, &plan, &statistics).apply(graph)?;
        let weight_only = Int8 {
            products: Products::WeightOnly,
            fold: false,
            granularity: self.granularity,
            in_floats: vec![],
            exclude: vec![],
        };
        let tables = weight_only.rewrite(graph, &exclusion, |operator| {
            let name = match operator {
                Operator::ConvTranspose => "ConvTranspose",
                Operator::Gather => "Gather",
                _ => return false,
            };
            self.operators.iter().any(|operator| operator == name)
        })?;
        change.changed.extend(tables.changed);
        change.skipped.extend(tables.skipped);
        if change.changed.is_empty() && plan.activations.is_empty() {
            return Err(nothing_to_quantize());
        }
        // The engine fuses what it finds in pairs; folded weights would leave it none.
        change.fold_dequantize = false;
        Ok(change)
    }
}

/// A convolution or matrix product that is computed in integers.
struct Layer {
    /// How its weight, the second input, maps the channels of the first.
    layout: Layout,
    /// The axis of output channels, where each has its own scale.
    axis: Option<usize>,
}

/// What is quantised.
#[derive(Default)]
struct Plan {
    /// By the index of the node.
    layers: BTreeMap<usize, Layer>,
    /// Inputs that are read quantised: index of the node, and of its input.
    reads: HashSet<(usize, usize)>,
    /// Values that are quantised where they are made, so that everyone reads them so.
    made: HashSet<String>,
    /// All values that are quantised.
    activations: BTreeSet<String>,
    /// Values that take their range from another one.
    moved: HashMap<String, String>,
    /// Channels to look at one by one.
    channels: HashMap<String, i64>,
    skipped: Vec<(String, &'static str)>,
}

impl Plan {
    fn of(technique: &Static, graph: &GraphProto, exclusion: &Exclusion) -> Self {
        let types = element_types(graph);
        let is_float = |name: &str| types.get(name) == Some(&DataType::Float);
        let read_counts = reads(graph);
        let constants: HashMap<&str, usize> = graph
            .initializer
            .iter()
            .enumerate()
            .map(|(index, tensor)| (tensor.name(), index))
            .collect();
        let outputs: HashSet<&str> = graph.output.iter().map(|output| output.name()).collect();
        let mut next: HashMap<&str, &NodeProto> = HashMap::new();
        for node in &graph.node {
            next.extend(node.input.iter().map(|input| (input.as_str(), node)));
        }
        let mut plan = Self::default();
        for (index, node) in graph.node.iter().enumerate() {
            let operator = node.op_type();
            if !is_standard(node) || !technique.operators.iter().any(|name| name == operator) || WEIGHT_ONLY.contains(&operator) {
                continue;
            }
            if exclusion.contains(node) {
                plan.skip_weights(node, &constants, "its node is excluded");
                continue;
            }
            if LAYERS.contains(&operator) {
                match Layer::of(technique, graph, node, &constants) {
                    Ok(Some(layer)) => {
                        let activation = node.input[0].as_str();
                        if technique.bias_correction {
                            let axis = if operator == "Conv" { 1 } else { -1 };
                            plan.channels.insert(activation.to_owned(), axis);
                        }
                        plan.read(index, 0, activation);
                        plan.layers.insert(index, layer);
                    }
                    Ok(None) => continue,
                    Err(why) => {
                        plan.skip_weights(node, &constants, why);
                        continue;
                    }
                }
                if operator == "Conv" {
                    // What cuts the convolution's result off at zero vanishes in the quantisation that follows it.
                    let result = node.output[0].as_str();
                    let cut = next
                        .get(result)
                        .filter(|next| matches!(next.op_type(), "Relu" | "Clip") && !exclusion.contains(next))
                        .filter(|_| read_counts.get(result) == Some(&1) && !outputs.contains(result));
                    plan.make(cut.map_or(result, |cut| cut.output[0].as_str()));
                }
                continue;
            }
            let (Some(input), Some(output)) = (node.input.first(), node.output.first()) else {
                continue;
            };
            if !is_float(input) || !is_float(output) {
                continue;
            }
            let inputs = if ALL_INPUTS.contains(&operator) { node.input.len() } else { 1 };
            for (position, name) in node.input.iter().enumerate().take(inputs) {
                plan.read(index, position, name);
            }
            plan.make(output);
            if MOVES.contains(&operator) {
                plan.moved.insert(output.clone(), input.clone());
            }
        }
        plan
    }

    fn read(&mut self, node: usize, input: usize, name: &str) {
        self.reads.insert((node, input));
        self.activations.insert(name.to_owned());
    }

    fn make(&mut self, name: &str) {
        self.made.insert(name.to_owned());
        self.activations.insert(name.to_owned());
    }

    fn skip_weights(&mut self, node: &NodeProto, constants: &HashMap<&str, usize>, why: &'static str) {
        let weight = node.input.iter().take(2).find(|input| constants.contains_key(input.as_str()));
        self.skipped.extend(weight.map(|weight| (weight.clone(), why)));
    }

    /// The value whose range `name` takes.
    fn origin<'a>(&'a self, name: &'a str) -> &'a str {
        let mut origin = name;
        while let Some(earlier) = self.moved.get(origin) {
            origin = earlier;
        }
        origin
    }

    fn observed(&self) -> Vec<Observed> {
        let origins: BTreeSet<&str> = self.activations.iter().map(|name| self.origin(name)).collect();
        let named = origins.iter().copied().chain(self.channels.keys().map(String::as_str));
        let names: BTreeSet<&str> = named.collect();
        let observed = names.into_iter().map(|name| Observed {
            name: name.to_owned(),
            channel_axis: self.channels.get(name).copied(),
        });
        observed.collect()
    }
}

impl Layer {
    /// How `node` is computed in integers; `None` where it has no constant weight, or in words why it stays as it is.
    fn of(
        technique: &Static,
        graph: &GraphProto,
        node: &NodeProto,
        constants: &HashMap<&str, usize>,
    ) -> Result<Option<Self>, &'static str> {
        let constant = |input: usize| {
            let tensor = &graph.initializer[*constants.get(node.input.get(input)?.as_str())?];
            (tensor.data_type() == DataType::Float as i32).then_some(tensor)
        };
        let flag = |name: &str| attribute(node, name).is_some_and(|attribute| attribute.i() != 0);
        let float = |name: &str| attribute(node, name).map_or(1.0, AttributeProto::f);
        let Some(weight) = constant(1) else {
            return if node.op_type() == "MatMul" && constant(0).is_some_and(|weight| weight.dims.len() >= 2) {
                Err("its product is from the left")
            } else {
                Ok(None)
            };
        };
        if constants.contains_key(node.input[0].as_str()) {
            return Ok(None);
        }
        if weight.dims.len() < 2 || weight.dims.contains(&0) {
            return Ok(None);
        }
        let (layout, axis) = match node.op_type() {
            "Conv" => {
                let groups = attribute(node, "group").map_or(1, AttributeProto::i).max(1) as usize;
                (Layout::Convolution { groups }, 0)
            }
            "Gemm" if flag("transA") || float("alpha") != 1.0 || float("beta") != 1.0 => {
                return Err("its product is scaled, or of a transposed activation");
            }
            "Gemm" if flag("transB") => (Layout::Rows, 0),
            _ => (Layout::Columns, 1),
        };
        let bias = node.input.get(2).filter(|name| !name.is_empty());
        if bias.is_some() {
            let fits = constant(2).is_some_and(|bias| bias.dims.iter().product::<i64>() == weight.dims[axis]);
            if !fits {
                return Err("its bias is no constant with a value for each output");
            }
        }
        // One scale is all that a stack of matrices has.
        let by_channel = technique.granularity == Granularity::PerChannel && (weight.dims.len() == 2 || node.op_type() == "Conv");
        if weight.dims.len() > 2 && technique.bias_correction && node.op_type() == "MatMul" {
            return Err("biases of a stack of matrices are not corrected");
        }
        Ok(Some(Self {
            layout,
            axis: by_channel.then_some(axis),
        }))
    }
}

/// The scale and zero point of a quantised activation.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Parameters {
    scale: f32,
    zero_point: u8,
}

impl Parameters {
    /// Of values in `low..=high`. Zero is always among them and exact, since it is what padding adds.
    ///
    /// Jacob et al. 2018, section 3.
    fn of((low, high): (f32, f32)) -> Self {
        let (low, high) = (low.min(0.0), high.max(0.0));
        let scale = integers::scale_of(high - low, LEVELS as f32);
        Self {
            scale,
            zero_point: (-low / scale).round_ties_even().clamp(0.0, 255.0) as u8,
        }
    }
}

struct Rewriting<'a> {
    technique: &'a Static,
    plan: &'a Plan,
    names: Names,
    parameters: HashMap<&'a str, Parameters>,
    channels: HashMap<&'a str, &'a Channels>,
    initializers: HashMap<String, usize>,
    read_counts: HashMap<String, usize>,
    /// Weights that are quantised: by their name and the axis of their channels, the floats that stand for them, and their scales.
    weights: HashMap<(String, Option<usize>), (String, Vec<f32>)>,
    added: Vec<TensorProto>,
    change: Change,
}

impl<'a> Rewriting<'a> {
    fn new(technique: &'a Static, graph: &GraphProto, plan: &'a Plan, statistics: &'a HashMap<String, Statistics>) -> Self {
        let range = |statistics: &Statistics| match technique.range {
            ActivationRange::MinMax => statistics.histogram.min_max(),
            ActivationRange::Percentile => statistics.histogram.percentile(OUTER),
            ActivationRange::Entropy => statistics.histogram.entropy(LEVELS),
        };
        let parameters = plan.activations.iter().filter_map(|name| {
            let statistics = statistics.get(plan.origin(name))?;
            Some((name.as_str(), Parameters::of(range(statistics))))
        });
        Self {
            technique,
            plan,
            names: Names::of(graph),
            parameters: parameters.collect(),
            channels: statistics
                .iter()
                .map(|(name, statistics)| (name.as_str(), &statistics.channels))
                .collect(),
            initializers: graph
                .initializer
                .iter()
                .enumerate()
                .map(|(index, tensor)| (tensor.name().to_owned(), index))
                .collect(),
            read_counts: reads(graph).into_iter().map(|(name, count)| (name.to_owned(), count)).collect(),
            weights: HashMap::new(),
            added: Vec::new(),
            change: Change::default(),
        }
    }

    fn apply(mut self, graph: &mut GraphProto) -> Result<Change, Failure> {
        let nodes = std::mem::take(&mut graph.node);
        let mut rewritten = Vec::with_capacity(3 * nodes.len());
        // What a layer reads is quantised before the first that does; what is quantised where it is made has its name afterwards.
        let mut dequantized: HashMap<String, String> = HashMap::new();
        for (index, mut node) in nodes.into_iter().enumerate() {
            let mut read: Vec<(usize, String)> = Vec::new();
            for (position, input) in node.input.iter().enumerate() {
                if !self.plan.reads.contains(&(index, position)) || self.plan.made.contains(input) {
                    continue;
                }
                let name = match dequantized.get(input) {
                    Some(name) => name.clone(),
                    None => {
                        let name = self.names.fresh(&format!("{input}_dequantized"));
                        rewritten.extend(self.pair(input, &name));
                        dequantized.insert(input.clone(), name.clone());
                        name
                    }
                };
                read.push((position, name));
            }
            let activation = node.input.first().cloned().unwrap_or_default();
            for (position, name) in read {
                node.input[position] = name;
            }
            if let Some(layer) = self.plan.layers.get(&index) {
                self.layer(graph, &mut node, layer, &activation, &mut rewritten)?;
            }
            let mut pairs = Vec::new();
            for output in &mut node.output {
                if self.plan.made.contains(output) {
                    let raw = self.names.fresh(&format!("{output}_raw"));
                    let name = std::mem::replace(output, raw.clone());
                    pairs.extend(self.pair_of(&name, &raw, &name));
                }
            }
            rewritten.push(node);
            rewritten.extend(pairs);
        }
        graph.node = rewritten;
        graph.initializer.append(&mut self.added);
        simplify::remove_dead(graph);
        for (weight, why) in &self.plan.skipped {
            self.change.skipped.push(skipped(weight, *why));
        }
        Ok(self.change)
    }

    fn pair(&mut self, value: &str, dequantized: &str) -> Vec<NodeProto> {
        self.pair_of(value, value, dequantized)
    }

    /// Quantises `input`, by the parameters of `value`, and gives `output` in floats.
    fn pair_of(&mut self, value: &str, input: &str, output: &str) -> Vec<NodeProto> {
        let parameters = self.parameters.get(value).copied().unwrap_or_else(|| Parameters::of((0.0, 0.0)));
        let quantized = self.names.fresh(&format!("{value}_uint8"));
        let (scale, zero) = (
            self.names.fresh(&format!("{value}_scale")),
            self.names.fresh(&format!("{value}_zero")),
        );
        self.added.push(float_tensor(&scale, &[], &[parameters.scale]));
        self.added.push(tensor(&zero, DataType::Uint8, &[], vec![parameters.zero_point]));
        let mut back = node("DequantizeLinear", &[&quantized, &scale, &zero], output, vec![]);
        // Without a name tract calls it by its output, as exporters call the node that made that before.
        back.name = Some(self.names.fresh(&format!("{value}_dequantize")));
        vec![node("QuantizeLinear", &[input, &scale, &zero], &quantized, vec![]), back]
    }

    /// Puts `DequantizeLinear` of integers in the place of a layer's weight and bias.
    fn layer(
        &mut self,
        graph: &GraphProto,
        node: &mut NodeProto,
        layer: &Layer,
        activation: &str,
        before: &mut Vec<NodeProto>,
    ) -> Result<(), Failure> {
        let step = self.parameters.get(activation).map_or(1.0, |parameters| parameters.scale);
        let name = node.input[1].clone();
        let original = &graph.initializer[self.initializers[&name]];
        let read = |tensor: &TensorProto| weights::floats(tensor).map_err(|error| unreadable(tensor.name(), &error.to_string()));
        let bias = node.input.get(2).filter(|name| !name.is_empty()).cloned();
        let bias_values = bias
            .as_ref()
            .map(|name| read(&graph.initializer[self.initializers[name]]))
            .transpose()?;
        let alone = self.read_counts.get(&name) == Some(&1);
        let key = (name.clone(), layer.axis);
        let shape = weights::shape(original).map_err(|error| unreadable(&name, &error.to_string()))?;
        let corrects = self.technique.bias_correction;
        let mut errors = None;
        let (floats, scales) = match self.weights.get(&key) {
            Some(known) if !corrects => known.clone(),
            _ => {
                let values = read(original)?;
                let operator = layer.layout.operator();
                let mut quantized = neighbours::quantize(&values, &shape, layer.axis, operator)
                    .map_err(|_| unreadable(&name, "it holds NaN or infinity"))?;
                let inner = layer.axis.map_or(values.len(), |axis| shape[axis + 1..].iter().product());
                if let (Some(bias), true) = (&bias_values, alone)
                    && widen(&mut quantized.scales, bias, step)
                {
                    quantized.values = neighbours::with_scales(&values, &shape, layer.axis, operator, &quantized.scales);
                }
                if corrects {
                    let back: Vec<f32> = quantized
                        .values
                        .iter()
                        .enumerate()
                        .map(|(index, value)| f32::from(*value) * quantized.scales[index / inner % quantized.scales.len()])
                        .collect();
                    let means = self.channels.get(activation).map(|channels| channels.means());
                    errors = Some(bias::mean_errors(&values, &back, &shape, layer.layout, &means.unwrap_or_default()));
                }
                let known = self.weights.get(&key).cloned();
                known.unwrap_or_else(|| self.weight(&name, layer.axis, &shape, quantized, before))
            }
        };
        node.input[1] = floats;
        let corrected = match (bias_values, errors) {
            (bias, None) => bias,
            (bias, Some(errors)) => {
                let bias = bias.unwrap_or_else(|| vec![0.0; errors.len()]);
                let corrected = bias.iter().zip(&errors).map(|(bias, error)| (f64::from(*bias) - error) as f32);
                Some(corrected.collect())
            }
        };
        if let Some(corrected) = corrected {
            let stem = bias.unwrap_or_else(|| format!("{name}_bias"));
            let products: Vec<f32> = scales.iter().map(|scale| scale * step).collect();
            self.bias(node, &stem, &corrected, &products, before);
        }
        Ok(())
    }

    /// Stores a weight, and names the floats that stand for it.
    fn weight(
        &mut self,
        name: &str,
        axis: Option<usize>,
        shape: &[usize],
        quantized: integers::Quantized,
        before: &mut Vec<NodeProto>,
    ) -> (String, Vec<f32>) {
        let scales = quantized.scales.clone();
        let values = tensor(
            &self.names.fresh(&format!("{name}_int8")),
            DataType::Int8,
            shape,
            quantized.into_bytes(),
        );
        let floats = self.dequantize(name, values, DataType::Int8, &scales, axis, before);
        self.change.changed.push(name.to_owned());
        self.weights.insert((name.to_owned(), axis), (floats.clone(), scales.clone()));
        (floats, scales)
    }

    fn dequantize(
        &mut self,
        stem: &str,
        values: TensorProto,
        kind: DataType,
        scales: &[f32],
        axis: Option<usize>,
        before: &mut Vec<NodeProto>,
    ) -> String {
        let mut fresh = |suffix: &str| self.names.fresh(&format!("{stem}_{suffix}"));
        let (scale, zero, floats) = (fresh("scale"), fresh("zero"), fresh("float"));
        let dims: Vec<usize> = if scales.len() == 1 { vec![] } else { vec![scales.len()] };
        let width = if kind == DataType::Int8 { 1 } else { 4 };
        let axis = axis.filter(|_| scales.len() > 1).map(|axis| integer("axis", axis as i64));
        before.push(node(
            "DequantizeLinear",
            &[values.name(), &scale, &zero],
            &floats,
            axis.into_iter().collect(),
        ));
        self.added.extend([
            values,
            scale_tensor(&scale, scales),
            tensor(&zero, kind, &dims, vec![0; width * scales.len()]),
        ]);
        floats
    }

    /// Gives a layer its bias, in integers of `scales`; a matrix product takes none, so there it is added afterwards.
    fn bias(&mut self, layer: &mut NodeProto, stem: &str, bias: &[f32], scales: &[f32], before: &mut Vec<NodeProto>) {
        if layer.op_type() == "MatMul" {
            let result = layer.output[0].clone();
            let (product, correction) = (self.names.fresh(&format!("{result}_product")), self.names.fresh(stem));
            self.added.push(float_tensor(&correction, &[bias.len()], bias));
            before.push(NodeProto {
                output: vec![product.clone()],
                ..layer.clone()
            });
            *layer = node("Add", &[&product, &correction], &result, vec![]);
            return;
        }
        let integers = bias
            .iter()
            .zip(scales.iter().cycle())
            .flat_map(|(bias, scale)| ((bias / scale).round_ties_even() as i32).to_le_bytes());
        let name = self.names.fresh(&format!("{stem}_int32"));
        let values = tensor(&name, DataType::Int32, &[bias.len()], integers.collect());
        let floats = self.dequantize(stem, values, DataType::Int32, scales, Some(0), before);
        layer.input.resize(3, String::new());
        layer.input[2] = floats;
    }
}

/// Raises each channel's scale until its bias is an integer that leaves room for the sum; says whether any was.
fn widen(scales: &mut [f32], bias: &[f32], step: f32) -> bool {
    let mut widened = false;
    let count = scales.len();
    for (channel, bias) in bias.iter().enumerate() {
        let scale = &mut scales[if count == 1 { 0 } else { channel }];
        let least = bias.abs() / (step * BIAS_MAX);
        if *scale < least {
            *scale = least;
            widened = true;
        }
    }
    widened
}

#[cfg(test)]
mod tests {
    use plimsoll_package::manifest::Engine as EngineKind;
    use plimsoll_package::recipe::{Quantize, QuantizeScheme};
    use plimsoll_runtime::engine::Tensor;

    use super::super::fixture::{apply, model, named, numbers, operators, run, sqnr, value};
    use super::*;
    use crate::failure::FailureReason;

    fn of(quantize: Quantize) -> Quantize {
        Quantize {
            scheme: QuantizeScheme::Int8Static,
            ..quantize
        }
    }

    fn plain() -> Quantize {
        Quantize::of(QuantizeScheme::Int8Static)
    }

    /// Two convolutions with a cut between them, and a classifier.
    fn convolutions() -> ModelProto {
        let flat = named("flat", node("Flatten", &["pool"], "features", vec![]));
        model(
            vec![value("x", DataType::Float, &[3, 8, 8])],
            vec![
                named("first", node("Conv", &["x", "w1", "b1"], "c1", vec![])),
                node("Relu", &["c1"], "r1", vec![]),
                named("second", node("Conv", &["r1", "w2"], "c2", vec![])),
                node("GlobalAveragePool", &["c2"], "pool", vec![]),
                flat,
                named("classify", node("Gemm", &["features", "w3", "b3"], "y", vec![integer("transB", 1)])),
            ],
            vec![
                float_tensor("w1", &[16, 3, 3, 3], &numbers(432, 1)),
                float_tensor("b1", &[16], &numbers(16, 2)),
                float_tensor("w2", &[16, 16, 3, 3], &numbers(2304, 3)),
                float_tensor("w3", &[10, 16], &numbers(160, 4)),
                float_tensor("b3", &[10], &numbers(10, 5)),
            ],
            vec![value("y", DataType::Float, &[10])],
        )
    }

    fn pictures(count: usize, seed: u64) -> Vec<Tensor> {
        vec![Tensor::new(vec![count, 3, 8, 8], numbers(count * 192, seed)).unwrap()]
    }

    /// A product of inputs of which the channel 5 is a hundred times as large as the others.
    fn outlying() -> (ModelProto, Vec<Tensor>) {
        let weights = float_tensor("w", &[32, 32], &numbers(1024, 1));
        let product = node("MatMul", &["x", "w"], "y", vec![]);
        let model = model(
            vec![value("x", DataType::Float, &[32])],
            vec![named("product", product)],
            vec![weights],
            vec![value("y", DataType::Float, &[32])],
        );
        let mut values = numbers(64 * 32, 9);
        values.iter_mut().skip(5).step_by(32).for_each(|value| *value *= 100.0);
        (model, vec![Tensor::new(vec![64, 32], values).unwrap()])
    }

    #[test]
    fn convolutions_and_products_become_pairs_that_both_engines_run() {
        let original = convolutions();
        let samples = pictures(16, 11);
        let before = run(EngineKind::OnnxRuntime, &original, true, &samples);
        for range in [ActivationRange::MinMax, ActivationRange::Percentile, ActivationRange::Entropy] {
            for granularity in [Granularity::PerChannel, Granularity::PerTensor] {
                let quantize = of(Quantize {
                    range: Some(range),
                    granularity: Some(granularity),
                    ..plain()
                });
                let (model, change) = apply(&original, &quantize, Some(samples.clone())).unwrap();
                assert_eq!(change.changed, ["w1", "w2", "w3"]);
                assert!(!change.fold_dequantize, "an engine that folds does not fuse");
                let graph = model.graph.as_ref().unwrap();
                let floats = graph
                    .initializer
                    .iter()
                    .filter(|tensor| tensor.data_type() == DataType::Float as i32);
                assert!(
                    floats.map(|tensor| tensor.dims.len()).max() <= Some(1),
                    "no weight is left in floats"
                );
                for kind in [EngineKind::Tract, EngineKind::OnnxRuntime] {
                    let sqnr = sqnr(&before, &run(kind, &model, false, &samples));
                    assert!(sqnr > 20.0, "{range} {granularity} on {kind}: {sqnr:.1} dB");
                }
            }
        }
    }

    #[test]
    fn the_result_of_a_convolution_is_quantised_after_its_cut_off() {
        let (model, _) = apply(&convolutions(), &plain(), Some(pictures(4, 1))).unwrap();
        let graph = model.graph.unwrap();
        let relu = graph.node.iter().find(|node| node.op_type() == "Relu").unwrap();
        let conv = graph.node.iter().find(|node| node.name() == "first").unwrap();
        assert_eq!(relu.input, conv.output);
        let quantizer = graph.node.iter().find(|node| node.input.first() == relu.output.first()).unwrap();
        assert_eq!(quantizer.op_type(), "QuantizeLinear");
        let zero = graph.initializer.iter().find(|tensor| tensor.name() == quantizer.input[2]).unwrap();
        assert_eq!(zero.raw_data(), [0], "what a cut leaves begins at zero");
    }

    #[test]
    fn only_the_operators_that_are_named_are_quantised_and_unknown_ones_are_refused() {
        let quantize = |operators: &[&str]| {
            of(Quantize {
                operators: operators.iter().map(|name| (*name).to_owned()).collect(),
                ..plain()
            })
        };
        let (model, change) = apply(&convolutions(), &quantize(&["Gemm"]), Some(pictures(4, 1))).unwrap();
        assert_eq!(change.changed, ["w3"]);
        assert_eq!(operators(&model).iter().filter(|name| **name == "QuantizeLinear").count(), 1);
        let all = quantize(&["Conv", "Gemm", "Relu", "GlobalAveragePool", "Flatten"]);
        let (model, _) = apply(&convolutions(), &all, Some(pictures(4, 1))).unwrap();
        assert_eq!(operators(&model).iter().filter(|name| **name == "QuantizeLinear").count(), 6);
        let before = run(EngineKind::OnnxRuntime, &convolutions(), true, &pictures(4, 1));
        assert!(sqnr(&before, &run(EngineKind::OnnxRuntime, &model, false, &pictures(4, 1))) > 20.0);
        let failed = apply(&convolutions(), &quantize(&["Conv", "Loop"]), Some(pictures(4, 1))).unwrap_err();
        assert_eq!(failed.reason, FailureReason::InvalidInputs);
        assert!(failed.message.contains("does not quantise `Loop`"), "{failed}");
    }

    #[test]
    fn without_samples_or_with_all_excluded_it_says_so() {
        let failed = apply(&convolutions(), &plain(), None).unwrap_err();
        assert!(failed.message.contains("needs samples"), "{failed}");
        let none = of(Quantize {
            exclude: ["first", "second", "classify"].map(str::to_owned).to_vec(),
            ..plain()
        });
        let failed = apply(&convolutions(), &none, Some(pictures(4, 1))).unwrap_err();
        assert!(failed.message.contains("nothing to quantise"), "{failed}");
    }

    #[test]
    fn smoothing_moves_an_outlying_channel_into_the_weights() {
        let (original, samples) = outlying();
        let before = run(EngineKind::OnnxRuntime, &original, true, &samples);
        let quality = |smooth: Option<&str>| {
            let quantize = of(Quantize {
                smooth: smooth.map(|alpha| alpha.parse().unwrap()),
                ..plain()
            });
            let (model, _) = apply(&original, &quantize, Some(samples.clone())).unwrap();
            // The error in what the other channels give, which the large one drowns.
            let after = run(EngineKind::OnnxRuntime, &model, false, &samples);
            sqnr(&before, &after)
        };
        assert!(
            quality(Some("0.5")) > quality(None) + 6.0,
            "{} {}",
            quality(Some("0.5")),
            quality(None)
        );
    }

    #[test]
    fn a_corrected_bias_takes_the_mean_error_away() {
        let (original, _) = outlying();
        let shifted: Vec<f32> = numbers(64 * 32, 9).iter().map(|value| value + 4.0).collect();
        let samples = vec![Tensor::new(vec![64, 32], shifted).unwrap()];
        let before = run(EngineKind::OnnxRuntime, &original, true, &samples);
        let mean_error = |bias_correction: bool| {
            let quantize = of(Quantize {
                bias_correction: Some(bias_correction),
                ..plain()
            });
            let (model, _) = apply(&original, &quantize, Some(samples.clone())).unwrap();
            let after = run(EngineKind::OnnxRuntime, &model, false, &samples);
            let mean = |output: usize| {
                (output..before.len())
                    .step_by(32)
                    .map(|index| after[index] - before[index])
                    .sum::<f32>()
                    / 64.0
            };
            (0..32).map(|output| mean(output).abs()).fold(0.0, f32::max)
        };
        let (corrected, plain) = (mean_error(true), mean_error(false));
        assert!(corrected < 0.2 * plain, "{corrected} is not well below {plain}");
    }

    #[test]
    fn zero_is_exact_whatever_the_range() {
        for range in [(0.5, 2.0), (-3.0, -1.0), (-1.0, 2.0), (0.0, 0.0)] {
            let Parameters { scale, zero_point } = Parameters::of(range);
            assert!(scale > 0.0);
            let lowest = -f32::from(zero_point) * scale;
            assert!((lowest - range.0.min(0.0)).abs() <= scale / 2.0, "{range:?}: {lowest}");
        }
    }

    #[test]
    fn a_bias_that_32_bits_do_not_hold_widens_its_channels_scale() {
        let mut scales = [1e-9, 1.0];
        assert!(widen(&mut scales, &[100.0, 1.0], 1e-3));
        assert!((100.0 / (scales[0] * 1e-3)) <= BIAS_MAX * 1.001);
        assert_eq!(scales[1], 1.0);
    }
}
