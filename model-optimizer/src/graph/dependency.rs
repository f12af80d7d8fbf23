//! Which channels go together: the dependency analysis of structured pruning.
//!
//! Every index along every axis of every value (weights included) is a slot. An operator couples slots: an addition those of its two
//! operands, a convolution each input channel with the weight's, and so on. The sets of coupled slots are the smallest things that can be
//! removed from a graph whole. Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", find the same groups by layers; here
//! they follow from the operators' definitions alone.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::rc::Rc;

use plimsoll_runtime::onnx::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto};

use super::shape::{Dim, Integer, Shapes, axis_of, is_broadcasting, permutation};
use super::{attribute, is_standard, reads, subgraphs};

/// What touches a set of slots, as bits.
pub mod touch {
    /// A batch axis of a product of two activations: the heads of attention.
    pub const HEAD: u8 = 1;
    /// Anything but a matrix product, a transposition and operators that work element by element.
    pub const OTHER: u8 = 2;
}

/// An axis of a value whose indices are slots.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Axis {
    /// The value.
    pub value: String,
    /// The axis.
    pub axis: usize,
}

/// Slots that go together.
#[derive(Debug, Clone, Default)]
pub struct Unit {
    /// Axes of initialisers, each with the indices that belong to the unit.
    pub weights: Vec<(Axis, Vec<usize>)>,
    /// What touches it; bits of [`touch`].
    pub touched: u8,
}

/// The coupled slots of a graph.
pub struct Dependencies {
    shapes: Shapes,
    /// Of each axis of each value that has slots.
    slots: HashMap<Axis, Range<u32>>,
    parents: Vec<u32>,
    /// Why the slots of a root stay.
    pins: HashMap<u32, Rc<str>>,
    touched: Vec<u8>,
}

/// Most elements along one axis that get slots, and most elements of a `Reshape` that are followed.
const SLOTS_MAX: usize = 1 << 20;

/// Operators that work element by element on one input.
const POINTWISE: [&str; 41] = [
    "Abs",
    "Acos",
    "Acosh",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "Cast",
    "Ceil",
    "Celu",
    "Clip",
    "Cos",
    "Cosh",
    "Dropout",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "IsInf",
    "IsNaN",
    "LeakyRelu",
    "Log",
    "Mish",
    "Neg",
    "Not",
    "Reciprocal",
    "Relu",
    "Round",
    "Selu",
    "Sigmoid",
    "Sign",
    "Sin",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Tanh",
    "ThresholdedRelu",
];

impl Dependencies {
    /// Of the graph of `model`.
    ///
    /// Where a `Reshape` splits one axis into several, one of those can get shorter: `choices` says which, by the index of the node, counted
    /// among those that are longer than 1; the first by default.
    #[must_use]
    pub fn of(model: &ModelProto, choices: &HashMap<usize, usize>) -> Self {
        let mut dependencies = Self {
            shapes: Shapes::of(model),
            slots: HashMap::new(),
            parents: Vec::new(),
            pins: HashMap::new(),
            touched: Vec::new(),
        };
        let Some(graph) = &model.graph else { return dependencies };
        let names = graph.initializer.iter().map(TensorProto::name);
        let names = names.chain(graph.input.iter().map(ValueInfoProto::name));
        for name in names.chain(graph.node.iter().flat_map(|node| node.output.iter().map(String::as_str))) {
            dependencies.allocate(name);
        }
        for value in graph.input.iter().chain(&graph.output) {
            dependencies.pin(value.name(), "it is an input or an output of the model");
        }
        for name in graph
            .node
            .iter()
            .flat_map(subgraphs)
            .flat_map(|subgraph| reads(subgraph).into_keys())
        {
            dependencies.pin(name, "a branch or a loop reads it");
        }
        let constants: HashSet<&str> = graph.initializer.iter().map(TensorProto::name).collect();
        for (index, node) in graph.node.iter().enumerate() {
            let choice = choices.get(&index).copied().unwrap_or(0);
            if let Err(why) = dependencies.couple(node, &constants, choice) {
                let why = format!("the operator {} (node `{}`): {why}", node.op_type(), node.name());
                for name in node.input.iter().chain(&node.output) {
                    dependencies.pin(name, &why);
                }
            }
        }
        for slot in 0..dependencies.parents.len() as u32 {
            dependencies.parents[slot as usize] = dependencies.root(slot);
        }
        dependencies
    }

    /// The shapes that the analysis works on.
    #[must_use]
    pub fn shapes(&self) -> &Shapes {
        &self.shapes
    }

    /// The axes that have slots, in order.
    #[must_use]
    pub fn axes(&self) -> Vec<&Axis> {
        let mut axes: Vec<&Axis> = self.slots.keys().collect();
        axes.sort();
        axes
    }

    /// The root of every slot along an axis; the slots of one root go together. `None` where the axis has no slots.
    #[must_use]
    pub fn roots(&self, axis: &Axis) -> Option<Vec<u32>> {
        Some(self.slots.get(axis)?.clone().map(|slot| self.root(slot)).collect())
    }

    /// Why the slots of a root cannot go, where they cannot.
    #[must_use]
    pub fn pinned(&self, root: u32) -> Option<&str> {
        self.pins.get(&root).map(|why| &**why)
    }

    /// The units that can go, by their roots, with those axes of initialisers that they reach.
    #[must_use]
    pub fn units(&self, graph: &GraphProto) -> HashMap<u32, Unit> {
        let mut units: HashMap<u32, Unit> = HashMap::new();
        for tensor in &graph.initializer {
            for axis in 0..tensor.dims.len() {
                let axis = axis_named(tensor.name(), axis);
                for (index, root) in self.roots(&axis).into_iter().flatten().enumerate() {
                    if self.pins.contains_key(&root) {
                        continue;
                    }
                    let weights = &mut units.entry(root).or_default().weights;
                    match weights.last_mut() {
                        Some((last, indices)) if *last == axis => indices.push(index),
                        _ => weights.push((axis.clone(), vec![index])),
                    }
                }
            }
        }
        for (slot, touched) in self.touched.iter().enumerate() {
            if let Some(unit) = units.get_mut(&self.root(slot as u32)) {
                unit.touched |= touched;
            }
        }
        units
    }

    fn allocate(&mut self, name: &str) {
        let Some(shape) = self.shapes.get(name) else { return };
        for (axis, dim) in shape.iter().enumerate() {
            // What has length 1 is broadcast.
            let Some(size) = dim.size().filter(|size| (2..=SLOTS_MAX).contains(size)) else {
                continue;
            };
            let start = self.parents.len() as u32;
            self.parents.extend(start..start + size as u32);
            self.touched.resize(self.parents.len(), 0);
            self.slots.insert(axis_named(name, axis), start..start + size as u32);
        }
    }

    fn root(&self, slot: u32) -> u32 {
        let mut root = slot;
        while self.parents[root as usize] != root {
            root = self.parents[root as usize];
        }
        root
    }

    fn tie_slots(&mut self, a: u32, b: u32) {
        let (a, b) = (self.root(a), self.root(b));
        if a == b {
            return;
        }
        // The smaller is the root, so that the result does not depend on the order.
        let (root, child) = (a.min(b), a.max(b));
        self.parents[child as usize] = root;
        if let Some(why) = self.pins.remove(&child) {
            self.pins.entry(root).or_insert(why);
        }
    }

    fn range(&self, name: &str, axis: usize) -> Option<Range<u32>> {
        self.slots.get(&axis_named(name, axis)).cloned()
    }

    /// Couples two axes of equal length; where one has no slots, the other stays.
    fn tie(&mut self, a: (&str, usize), b: (&str, usize)) {
        match (self.range(a.0, a.1), self.range(b.0, b.1)) {
            (Some(a), Some(b)) if a.len() == b.len() => self.tie_ranges(a, b),
            (a, b) => a
                .into_iter()
                .chain(b)
                .for_each(|range| self.pin_range(range, "its length is not known before it runs")),
        }
    }

    fn tie_ranges(&mut self, a: Range<u32>, b: Range<u32>) {
        for (a, b) in a.zip(b) {
            self.tie_slots(a, b);
        }
    }

    fn tie_all(&mut self, a: &str, b: &str, except: &[usize]) {
        let rank = self.rank(a).max(self.rank(b));
        for axis in (0..rank).filter(|axis| !except.contains(axis)) {
            self.tie((a, axis), (b, axis));
        }
    }

    fn pin(&mut self, name: &str, why: &str) {
        for axis in 0..self.rank(name) {
            self.pin_axis(name, axis, why);
        }
    }

    fn pin_axis(&mut self, name: &str, axis: usize, why: &str) {
        if let Some(range) = self.range(name, axis) {
            self.pin_range(range, why);
        }
    }

    fn pin_range(&mut self, range: Range<u32>, why: &str) {
        let why: Rc<str> = why.into();
        for slot in range {
            self.pins.entry(self.root(slot)).or_insert_with(|| why.clone());
        }
    }

    fn touch(&mut self, name: &str, axis: usize, bits: u8) {
        for slot in self.range(name, axis).unwrap_or_default() {
            self.touched[slot as usize] |= bits;
        }
    }

    fn rank(&self, name: &str) -> usize {
        self.shapes.get(name).map_or(0, <[Dim]>::len)
    }

    /// Couples the slots that `node` couples.
    ///
    /// # Errors
    /// In words, where nothing is known of it: all that it touches has to stay.
    #[allow(clippy::too_many_lines)]
    fn couple(&mut self, node: &NodeProto, constants: &HashSet<&str>, choice: usize) -> Result<(), String> {
        let given = |index: usize| node.input.get(index).map(String::as_str).filter(|name| !name.is_empty());
        let output = node.output.first().map(String::as_str).unwrap_or_default();
        let Some(input) = given(0) else { return Ok(()) };
        let used_outputs = node.output.iter().filter(|name| !name.is_empty()).count();
        for name in [input, output] {
            if self.shapes.get(name).is_none() {
                return Err(self.shapes.refusal(name));
            }
        }
        if !is_standard(node) {
            return Err(format!("it is of the domain `{}`", node.domain()));
        }
        let op_type = node.op_type();
        let rank = self.rank(input);
        let axis = |default: i64| axis_of(attribute(node, "axis").map_or(default, AttributeProto::i), rank);
        let is_product = matches!(op_type, "MatMul" | "Gemm");
        if !is_product && !is_broadcasting(op_type) && !POINTWISE.contains(&op_type) && op_type != "Transpose" {
            for name in node.input.iter().chain(&node.output) {
                (0..self.rank(name)).for_each(|axis| self.touch(name, axis, touch::OTHER));
            }
        }
        if POINTWISE.contains(&op_type) {
            if used_outputs > 1 {
                return Err("its further outputs are used".into());
            }
            self.tie_all(input, output, &[]);
            return Ok(());
        }
        if is_broadcasting(op_type) {
            for name in node.input.iter().filter(|name| !name.is_empty()) {
                if self.shapes.get(name).is_none() {
                    return Err(self.shapes.refusal(name));
                }
                self.tie_broadcast(name, output, 0);
            }
            return Ok(());
        }
        if op_type.starts_with("Reduce") {
            let axes = self.shapes.reduced_axes(node, rank)?;
            let keep = attribute(node, "keepdims").is_none_or(|keep| keep.i() != 0);
            let kept: Vec<usize> = (0..rank).filter(|axis| !axes.contains(axis)).collect();
            for (position, axis) in kept.into_iter().enumerate() {
                self.tie((input, axis), (output, if keep { axis } else { position }));
            }
            return Ok(());
        }
        match op_type {
            "Conv" => self.couple_convolution(node, 0, 1),
            "ConvTranspose" => self.couple_convolution(node, 1, 0),
            "BatchNormalization" => {
                if used_outputs > 1 {
                    return Err("it is in training mode".into());
                }
                self.tie_all(input, output, &[]);
                (1..5).filter_map(given).for_each(|name| self.tie((name, 0), (input, 1)));
                Ok(())
            }
            "InstanceNormalization" => {
                self.tie_all(input, output, &[]);
                (1..3).filter_map(given).for_each(|name| self.tie((name, 0), (input, 1)));
                Ok(())
            }
            "LayerNormalization" | "RMSNormalization" | "SimplifiedLayerNormalization" => {
                if used_outputs > 1 {
                    return Err("its further outputs are used".into());
                }
                self.tie_all(input, output, &[]);
                (1..3).filter_map(given).for_each(|name| self.tie_broadcast(name, output, 0));
                Ok(())
            }
            "Softmax" | "LogSoftmax" | "Hardmax" | "LpNormalization" | "CumSum" => {
                self.tie_all(input, output, &[]);
                if op_type == "CumSum" {
                    return Err("what it adds up depends on every index".into());
                }
                // Up to version 12 it works on all axes from this one on.
                for axis in axis(-1)?..rank {
                    self.pin_axis(input, axis, "a softmax or norm is taken along it");
                }
                Ok(())
            }
            "LRN" => {
                self.tie_all(input, output, &[1]);
                self.pin_axis(input, 1, "a norm is taken across neighbouring channels");
                self.pin_axis(output, 1, "a norm is taken across neighbouring channels");
                Ok(())
            }
            "MaxPool" | "AveragePool" | "LpPool" | "GlobalAveragePool" | "GlobalMaxPool" | "GlobalLpPool" => {
                if used_outputs > 1 {
                    return Err("its further outputs are used".into());
                }
                self.tie((input, 0), (output, 0));
                self.tie((input, 1), (output, 1));
                self.pin_spatial(input);
                self.pin_spatial(output);
                Ok(())
            }
            "Gemm" => {
                let weight = given(1).ok_or("it has one operand")?;
                let flag = |name: &str| usize::from(attribute(node, name).is_some_and(|flag| flag.i() != 0));
                let (rows, inner) = (flag("transA"), 1 - flag("transA"));
                let (inner_b, columns) = (flag("transB"), 1 - flag("transB"));
                self.tie((input, rows), (output, 0));
                self.tie((input, inner), (weight, inner_b));
                self.tie((weight, columns), (output, 1));
                if let Some(bias) = given(2) {
                    self.tie_broadcast(bias, output, 0);
                }
                Ok(())
            }
            "MatMul" => {
                let right = given(1).ok_or("it has one operand")?;
                let (rank_a, rank_b) = (rank, self.rank(right));
                if rank_a < 2 || rank_b < 2 {
                    return Err("an operand of it has one axis".into());
                }
                let rank_out = self.rank(output);
                self.tie((input, rank_a - 1), (right, rank_b - 2));
                self.tie((input, rank_a - 2), (output, rank_out - 2));
                self.tie((right, rank_b - 1), (output, rank_out - 1));
                self.tie_broadcast(input, output, 2);
                self.tie_broadcast(right, output, 2);
                if !constants.contains(right) && !constants.contains(input) {
                    (1..rank_out - 2).for_each(|axis| self.touch(output, axis, touch::HEAD));
                }
                Ok(())
            }
            "Transpose" => {
                for (to, from) in permutation(node, rank)?.into_iter().enumerate() {
                    self.tie((input, from), (output, to));
                }
                Ok(())
            }
            "Reshape" => {
                told_by_constants(&self.shapes, node)?;
                self.couple_reshape(input, output, choice)
            }
            "Flatten" | "Squeeze" | "Unsqueeze" => self.couple_reshape(input, output, choice),
            "Concat" => {
                let axis = axis(0)?;
                self.couple_parts(output, node.input.iter().map(String::as_str), axis)
            }
            "Split" => {
                let axis = axis(0)?;
                self.couple_parts(input, node.output.iter().map(String::as_str), axis)
            }
            "Slice" => {
                let ranges = self.shapes.slices(node, rank).ok_or("its ranges are known when it runs alone")?;
                let cut: Vec<usize> = ranges.iter().filter(|range| !range.is_whole()).map(|range| range.axis).collect();
                self.tie_all(input, output, &cut);
                for axis in cut {
                    self.pin_axis(input, axis, "a part of it is cut out");
                    self.pin_axis(output, axis, "it is a part cut out");
                }
                Ok(())
            }
            "Gather" => {
                let indices = given(1).ok_or("it has no indices")?;
                let (axis, depth) = (axis(0)?, self.rank(indices));
                self.pin_axis(input, axis, "its indices are looked up");
                (0..axis).for_each(|axis| self.tie((input, axis), (output, axis)));
                (axis + 1..rank).for_each(|axis| self.tie((input, axis), (output, axis + depth - 1)));
                (0..depth).for_each(|index| self.tie((indices, index), (output, axis + index)));
                Ok(())
            }
            "Expand" => {
                told_by_constants(&self.shapes, node)?;
                let (rank_out, one) = (self.rank(output), Dim::of(1));
                let pad = rank_out - rank;
                for axis in 0..rank_out {
                    let dim = axis
                        .checked_sub(pad)
                        .and_then(|axis| self.shapes.get(input)?.get(axis))
                        .unwrap_or(&one);
                    if dim.size() == Some(1) {
                        self.pin_axis(output, axis, "it is expanded to this length");
                    } else {
                        self.tie((input, axis - pad), (output, axis));
                    }
                }
                Ok(())
            }
            "Pad" => {
                let padding = self.shapes.padding(node, rank).ok_or("its padding is known when it runs alone")?;
                for (axis, padding) in padding.into_iter().enumerate() {
                    if padding == (0, 0) {
                        self.tie((input, axis), (output, axis));
                    } else {
                        self.pin_axis(input, axis, "it is padded");
                        self.pin_axis(output, axis, "it is padded");
                    }
                }
                Ok(())
            }
            "Resize" | "Upsample" if given(3).is_none() && attribute(node, "axes").is_none() => {
                self.tie((input, 0), (output, 0));
                self.tie((input, 1), (output, 1));
                self.pin_spatial(input);
                self.pin_spatial(output);
                Ok(())
            }
            "Shape" | "Size" | "ConstantOfShape" | "Range" => Ok(()),
            _ => Err("nothing is known of how its channels depend on each other".into()),
        }
    }

    /// Aligned at the last axes, of which `but_last` are left out.
    fn tie_broadcast(&mut self, name: &str, output: &str, but_last: usize) {
        let (rank, rank_out) = (self.rank(name), self.rank(output));
        for axis in 0..rank.saturating_sub(but_last) {
            let dim = |name: &str, axis: usize| self.shapes.get(name).and_then(|shape| shape.get(axis)).and_then(Dim::size);
            // What has length 1 is broadcast, however long the other is.
            if dim(name, axis) != Some(1) {
                self.tie((name, axis), (output, axis + rank_out - rank));
            }
        }
    }

    fn pin_spatial(&mut self, name: &str) {
        for axis in 2..self.rank(name) {
            self.pin_axis(name, axis, "a window slides along it");
        }
    }

    /// `output_axis` and `input_axis` are those of the weight.
    fn couple_convolution(&mut self, node: &NodeProto, output_axis: usize, input_axis: usize) -> Result<(), String> {
        let (input, weight, output) = (&node.input[0], node.input.get(1).ok_or("it has no weight")?, &node.output[0]);
        let groups = attribute(node, "group").map_or(1, AttributeProto::i);
        self.tie((input, 0), (output, 0));
        for name in [input, weight, output] {
            self.pin_spatial(name);
        }
        if let Some(bias) = node.input.get(2).filter(|name| !name.is_empty()) {
            self.tie((bias, 0), (output, 1));
        }
        if groups == 1 {
            self.tie((weight, output_axis), (output, 1));
            self.tie((weight, input_axis), (input, 1));
            return Ok(());
        }
        // Groups go whole. The weight's second axis is within a group, its first one across them.
        self.pin_axis(weight, 1, "it is a channel within a group");
        let Some(whole) = self.range(weight, 0) else {
            return Err("its groups are not known".into());
        };
        let groups = groups as usize;
        for range in [Some(whole.clone()), self.range(input, 1), self.range(output, 1)] {
            let range = range.filter(|range| range.len().is_multiple_of(groups));
            let range = range.ok_or("its channels are not a multiple of its groups")?;
            let part = range.len() / groups;
            for (index, slot) in range.enumerate() {
                let first = whole.start + (index / part * (whole.len() / groups)) as u32;
                self.tie_slots(first, slot);
            }
        }
        Ok(())
    }

    fn couple_parts<'a>(&mut self, whole: &str, parts: impl Iterator<Item = &'a str>, axis: usize) -> Result<(), String> {
        let range = self.range(whole, axis).ok_or("its length is not known before it runs")?;
        let mut start = range.start;
        for part in parts {
            let size = self.shapes.get(part).and_then(|shape| shape.get(axis)).and_then(Dim::size);
            let size = size.ok_or_else(|| format!("the length of `{part}` is not known"))?;
            self.tie_all(whole, part, &[axis]);
            let end = start + size as u32;
            match self.range(part, axis) {
                Some(slots) => self.tie_ranges(slots, start..end),
                // A part of length 1 has no slot of its own, and can get no shorter.
                None => self.pin_range(start..end, "it is a part of length 1"),
            }
            start = end;
        }
        Ok(())
    }

    /// Finds which axes of two shapes of the same elements correspond, and couples them.
    fn couple_reshape(&mut self, input: &str, output: &str, choice: usize) -> Result<(), String> {
        let dims = |name: &str| self.shapes.get(name).map(<[Dim]>::to_vec).unwrap_or_default();
        for group in correspond(&dims(input), &dims(output))? {
            match (group.before.as_slice(), group.after.as_slice()) {
                ([before], [after]) => self.tie((input, *before), (output, *after)),
                (before, after) => {
                    let before = self.side(input, before, choice);
                    let after = self.side(output, after, choice);
                    match (before, after) {
                        (Some(before), Some(after)) if before.size == after.size && before.size <= SLOTS_MAX => {
                            for flat in 0..before.size {
                                self.tie_slots(before.slot(flat), after.slot(flat));
                            }
                        }
                        _ => {
                            let axes = group.before.iter().map(|axis| (input, *axis));
                            for (name, axis) in axes.chain(group.after.iter().map(|axis| (output, *axis))) {
                                self.pin_axis(name, axis, "it is reshaped together with a length that is known when it runs alone");
                            }
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Of several axes that become or come from others, the one that can get shorter; the others are pinned.
    fn side(&mut self, name: &str, axes: &[usize], choice: usize) -> Option<Side> {
        let ranges = axes.iter().map(|axis| self.range(name, *axis)).collect::<Option<Vec<_>>>()?;
        let chosen = choice % ranges.len();
        for (index, range) in ranges.iter().enumerate() {
            if index != chosen {
                self.pin_range(range.clone(), "it is merged with other axes by a Reshape");
            }
        }
        Some(Side {
            start: ranges[chosen].start,
            length: ranges[chosen].len(),
            stride: ranges[chosen + 1..].iter().map(ExactSizeIterator::len).product(),
            size: ranges.iter().map(ExactSizeIterator::len).product(),
        })
    }
}

/// One axis of several that are flattened.
struct Side {
    start: u32,
    length: usize,
    stride: usize,
    size: usize,
}

impl Side {
    fn slot(&self, flat: usize) -> u32 {
        self.start + (flat / self.stride % self.length) as u32
    }
}

/// Axes of two shapes that hold the same elements; those of length 1 are in none.
struct Correspondence {
    before: Vec<usize>,
    after: Vec<usize>,
}

fn correspond(before: &[Dim], after: &[Dim]) -> Result<Vec<Correspondence>, String> {
    let longer = |dims: &[Dim]| (0..dims.len()).filter(|axis| dims[*axis].size() != Some(1)).collect::<Vec<_>>();
    let (mut left, mut right) = (longer(before).into_iter().peekable(), longer(after).into_iter().peekable());
    let mut groups = Vec::new();
    let unclear = || "which of its axes correspond is known when it runs alone".to_owned();
    while left.peek().is_some() || right.peek().is_some() {
        let (Some(a), Some(b)) = (left.next(), right.next()) else {
            return Err(unclear());
        };
        let mut group = Correspondence {
            before: vec![a],
            after: vec![b],
        };
        let (mut product_a, mut product_b) = (before[a].clone(), after[b].clone());
        while product_a != product_b {
            if product_b.divided_by(&product_a).is_some() {
                let next = left.next().ok_or_else(unclear)?;
                product_a = product_a.times(&before[next]).ok_or_else(unclear)?;
                group.before.push(next);
            } else if product_a.divided_by(&product_b).is_some() || product_a.size() > product_b.size() {
                let next = right.next().ok_or_else(unclear)?;
                product_b = product_b.times(&after[next]).ok_or_else(unclear)?;
                group.after.push(next);
            } else {
                let next = left.next().ok_or_else(unclear)?;
                product_a = product_a.times(&before[next]).ok_or_else(unclear)?;
                group.before.push(next);
            }
        }
        groups.push(group);
    }
    Ok(groups)
}

/// What a `Reshape` or `Expand` is to be told, as constants, so that its output has the lengths `sizes` where those are known: a length
/// that is known when it runs alone is copied from the input, or is the one that follows from the others.
///
/// # Errors
/// Where there is no way to say that.
pub(crate) fn told(node: &NodeProto, input: &[Dim], output: &[Dim], sizes: &[Option<usize>]) -> Result<Vec<i64>, String> {
    let expands = node.op_type() == "Expand";
    let mut open = false;
    let entry = |(axis, dim): (usize, &Dim)| {
        if let Some(size) = sizes[axis] {
            return i64::try_from(size).ok();
        }
        let from = if expands {
            (axis + input.len()).checked_sub(output.len())
        } else {
            Some(axis)
        };
        if from.and_then(|from| input.get(from)) == Some(dim) {
            // 1 expands nothing, and 0 copies.
            return Some(i64::from(expands));
        }
        (!expands && !std::mem::replace(&mut open, true)).then_some(-1)
    };
    let entries: Option<Vec<i64>> = output.iter().enumerate().map(entry).collect();
    entries.ok_or_else(|| "its shape is computed when it runs".to_owned())
}

fn told_by_constants(shapes: &Shapes, node: &NodeProto) -> Result<(), String> {
    let shape = |name: Option<&String>| name.and_then(|name| shapes.get(name)).unwrap_or_default();
    let output = shape(node.output.first());
    let known = node.input.get(1).and_then(|name| shapes.integers(name));
    let known = known.ok_or("its shape is computed when it runs")?;
    if known.contains(&Integer::Known(0)) && attribute(node, "allowzero").is_some_and(|zero| zero.i() != 0) {
        return Err("it makes an empty tensor".into());
    }
    let sizes: Vec<Option<usize>> = output.iter().map(Dim::size).collect();
    told(node, shape(node.input.first()), output, &sizes).map(drop)
}

fn axis_named(value: &str, axis: usize) -> Axis {
    Axis {
        value: value.to_owned(),
        axis,
    }
}
