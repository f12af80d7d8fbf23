//! Structured pruning: whole channels, attention heads or feed-forward units go, with everything that depends on them.

use std::collections::{BTreeMap, HashMap, HashSet};

use plimsoll_package::recipe::{PruneScope, PruneStructure};
use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, mapping, weights};
use rayon::prelude::*;

use super::magnitude::to_raw;
use crate::compress::{Change, Setting, Technique, skipped};
use crate::failure::{Failure, FailureReason, failure};
use crate::graph::dependency::{self, Axis, Dependencies, Unit, touch};
use crate::graph::serialize::spilled;
use crate::graph::shape::{Dim, Shapes, axis_of};
use crate::graph::{Names, attribute, integers, is_standard, opset, reads, subgraphs, tensor, weight};

/// Structured pruning by magnitude.
///
/// What depends on each other goes together ([`Dependencies`]). A unit's importance is the sum of the L2 norms of what it has in
/// each weight (Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", section 3.3). Globally, the importance of a unit is
/// taken in proportion to the mean of its group: those units that lie in the same weights. Each group keeps at least one unit.
#[derive(Debug, Clone)]
pub struct Structured {
    /// [`PruneStructure::Channels`], [`PruneStructure::Heads`] or [`PruneStructure::FeedForward`].
    pub structure: PruneStructure,
    /// The share of units that go, `0.0..=1.0`.
    pub amount: f64,
    /// What units are ranked within.
    pub scope: PruneScope,
}

/// Most analyses that look for the axis of a `Reshape` that can get shorter.
const ATTEMPTS_MAX: usize = 128;

/// The axes of weights by what they are: output channels or input channels.
struct Roles {
    outputs: HashSet<Axis>,
    inputs: HashSet<Axis>,
}

impl Roles {
    fn of(graph: &GraphProto) -> Self {
        let (mut outputs, mut inputs) = (HashSet::new(), HashSet::new());
        for found in weight::find(graph) {
            let rank = graph.initializer[found.initializer].dims.len();
            for used in found.uses {
                if let Some(input) = used.operator.input_axis(rank) {
                    let axis = |axis| Axis {
                        value: found.name.clone(),
                        axis,
                    };
                    inputs.insert(axis(input));
                    outputs.insert(axis(used.operator.channel_axis(rank)));
                }
            }
        }
        Self { outputs, inputs }
    }
}

/// A unit that may go.
struct Candidate {
    root: u32,
    importance: f64,
}

impl Structured {
    fn is_eligible(&self, unit: &Unit, roles: &Roles) -> bool {
        let count = |axes: &HashSet<Axis>| unit.weights.iter().filter(|(axis, _)| axes.contains(axis)).count();
        let (outputs, inputs) = (count(&roles.outputs), count(&roles.inputs));
        let head = unit.touched & touch::HEAD != 0;
        match self.structure {
            PruneStructure::Heads => head && outputs > 0 && inputs > 0,
            PruneStructure::FeedForward => unit.touched == 0 && outputs > 0 && inputs == 1,
            _ => !head && outputs > 0,
        }
    }

    fn count_eligible(&self, model: &ModelProto, choices: &HashMap<usize, usize>, roles: &Roles) -> (Dependencies, usize) {
        let dependencies = Dependencies::of(model, choices);
        let units = model.graph.as_ref().map(|graph| dependencies.units(graph)).unwrap_or_default();
        let count = units.values().filter(|unit| self.is_eligible(unit, roles)).count();
        (dependencies, count)
    }

    /// The dependencies, with the choice for each `Reshape` that lets most units go.
    fn dependencies(&self, model: &ModelProto, roles: &Roles) -> Dependencies {
        let mut choices = HashMap::new();
        let (mut best, mut most) = self.count_eligible(model, &choices, roles);
        let nodes = model.graph.iter().flat_map(|graph| &graph.node).enumerate();
        let reshapes: Vec<usize> = nodes
            .filter(|(_, node)| node.op_type() == "Reshape")
            .map(|(index, _)| index)
            .collect();
        let mut attempts = 0;
        for index in reshapes {
            for choice in 1..3 {
                let node = model.graph.as_ref().map(|graph| &graph.node[index]);
                let stuck = node.is_some_and(|node| is_stuck(&best, node));
                if !stuck || attempts == ATTEMPTS_MAX {
                    break;
                }
                attempts += 1;
                let before = choices.insert(index, choice);
                let (dependencies, count) = self.count_eligible(model, &choices, roles);
                if count > most {
                    (best, most) = (dependencies, count);
                } else {
                    match before {
                        Some(before) => choices.insert(index, before),
                        None => choices.remove(&index),
                    };
                }
            }
        }
        best
    }

    /// Which roots go.
    fn choose(&self, groups: Vec<Vec<Candidate>>) -> HashSet<u32> {
        let share = |length: usize| (self.amount * length as f64).round_ties_even() as usize;
        let mut gone = HashSet::new();
        let total: usize = groups.iter().map(Vec::len).sum();
        let mut ranked: Vec<(f64, u32, usize)> = Vec::with_capacity(total);
        for (index, mut group) in groups.into_iter().enumerate() {
            group.sort_by(|a, b| a.importance.total_cmp(&b.importance).then(a.root.cmp(&b.root)));
            // The most important one stays.
            let last = group.len() - 1;
            match self.scope {
                PruneScope::PerLayer => gone.extend(group[..share(group.len()).min(last)].iter().map(|unit| unit.root)),
                PruneScope::Global => {
                    let mean = group.iter().map(|unit| unit.importance).sum::<f64>() / group.len() as f64;
                    let mean = if mean > 0.0 { mean } else { 1.0 };
                    ranked.extend(group[..last].iter().map(|unit| (unit.importance / mean, unit.root, index)));
                }
            }
        }
        ranked.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        if self.scope == PruneScope::Global {
            gone.extend(ranked.iter().take(share(total)).map(|(_, root, _)| *root));
        }
        gone
    }

    fn nothing(&self) -> Failure {
        let what = match self.structure {
            PruneStructure::Heads => {
                "no attention heads that can go whole: products of two activations between matrix products with constant weights"
            }
            PruneStructure::FeedForward => {
                "no two matrix products with constant weights in FP32 and only operators in between that work element by element"
            }
            _ => "no channels that can go: all depend on the model's inputs or outputs, or on operators that fix their number",
        };
        let message = format!(
            "optimize.recipe: nothing to prune by structure {}: the model has {what}",
            self.structure
        );
        failure(FailureReason::Unsupported, message)
    }
}

/// Whether a `Reshape` that splits or merges axes lets none of them get shorter.
fn is_stuck(dependencies: &Dependencies, node: &NodeProto) -> bool {
    let names = node.input.first().into_iter().chain(node.output.first());
    let ranks: Vec<usize> = names
        .clone()
        .map(|name| dependencies.shapes().get(name).map_or(0, <[Dim]>::len))
        .collect();
    let axes = names
        .zip(ranks)
        .flat_map(|(name, rank)| (0..rank).map(|axis| Axis { value: name.clone(), axis }));
    let mut roots = axes.filter_map(|axis| dependencies.roots(&axis)).flatten();
    roots.all(|root| dependencies.pinned(root).is_some())
}

impl Technique for Structured {
    fn apply(&self, model: &mut ModelProto, _: &Setting) -> Result<Change, Failure> {
        let version = opset::version(model);
        let Some(graph) = &mut model.graph else {
            return Err(self.nothing());
        };
        unshare_vectors(graph);
        let roles = Roles::of(graph);
        let dependencies = self.dependencies(model, &roles);
        let Some(graph) = &mut model.graph else {
            return Err(self.nothing());
        };
        let mut units: Vec<(u32, Unit)> = dependencies
            .units(graph)
            .into_iter()
            .filter(|(_, unit)| self.is_eligible(unit, &roles))
            .collect();
        units.sort_by_key(|(root, _)| *root);
        if units.is_empty() {
            return Err(self.nothing());
        }
        let importance = importance(graph, &units, &roles)?;
        // Units that lie in the same axes of the same weights are of one group.
        let mut groups: BTreeMap<Vec<&Axis>, Vec<Candidate>> = BTreeMap::new();
        for ((root, unit), importance) in units.iter().zip(importance) {
            let axes = unit.weights.iter().map(|(axis, _)| axis).collect();
            groups.entry(axes).or_default().push(Candidate { root: *root, importance });
        }
        let gone = self.choose(groups.into_values().collect());
        let mut change = Change::default();
        if self.structure == PruneStructure::Channels {
            change.skipped = stuck_weights(graph, &dependencies, &roles);
        }
        if gone.is_empty() {
            return Ok(change);
        }
        let removal = Removal::of(&dependencies, &gone);
        change.changed = removal.slice_initializers(graph)?;
        removal.adjust_nodes(graph, version)?;
        graph.value_info.clear();
        removal.check(model)?;
        Ok(change)
    }
}

/// Gives each reader of a constant that is no weight of a product a copy of its own: that two layers have equal biases makes them no
/// one layer.
fn unshare_vectors(graph: &mut GraphProto) {
    let weights: HashSet<String> = weight::find(graph).into_iter().map(|weight| weight.name).collect();
    let inner: HashSet<String> = graph
        .node
        .iter()
        .flat_map(subgraphs)
        .flat_map(|subgraph| reads(subgraph).into_keys().map(str::to_owned))
        .collect();
    let shared: HashMap<String, TensorProto> = graph
        .initializer
        .iter()
        .filter(|tensor| tensor.dims.iter().any(|size| *size > 1) && !weights.contains(tensor.name()) && !inner.contains(tensor.name()))
        .map(|tensor| (tensor.name().to_owned(), tensor.clone()))
        .collect();
    let mut names = Names::of(graph);
    let mut seen = HashSet::new();
    let mut copies = Vec::new();
    for input in graph.node.iter_mut().flat_map(|node| &mut node.input) {
        let Some(original) = shared.get(input) else { continue };
        if !seen.insert(input.clone()) {
            let mut copy = original.clone();
            *input = names.fresh(input);
            copy.name = Some(input.clone());
            copies.push(copy);
        }
    }
    graph.initializer.extend(copies);
}

/// The weights whose output channels all have to stay, and why.
fn stuck_weights(graph: &GraphProto, dependencies: &Dependencies, roles: &Roles) -> Vec<plimsoll_package::report::Skipped> {
    let mut stuck = Vec::new();
    for tensor in &graph.initializer {
        for axis in 0..tensor.dims.len() {
            let axis = Axis {
                value: tensor.name().to_owned(),
                axis,
            };
            if !roles.outputs.contains(&axis) {
                continue;
            }
            let Some(roots) = dependencies.roots(&axis) else { continue };
            let reasons: Vec<&str> = roots.iter().filter_map(|root| dependencies.pinned(*root)).collect();
            if reasons.len() == roots.len() {
                stuck.push(skipped(tensor.name(), format!("its channels stay: {}", reasons[0])));
            } else if roots.iter().all(|root| *root == roots[0]) {
                stuck.push(skipped(tensor.name(), "all of its channels depend on each other"));
            }
        }
    }
    stuck
}

/// The importance of each unit.
fn importance(graph: &GraphProto, units: &[(u32, Unit)], roles: &Roles) -> Result<Vec<f64>, Failure> {
    let axes: HashSet<&Axis> = units
        .iter()
        .flat_map(|(_, unit)| unit.weights.iter().map(|(axis, _)| axis))
        .filter(|axis| roles.outputs.contains(axis) || roles.inputs.contains(axis))
        .collect();
    let tensors: HashMap<&str, &TensorProto> = graph.initializer.iter().map(|tensor| (tensor.name(), tensor)).collect();
    let squares: HashMap<&Axis, Vec<f64>> = axes
        .into_par_iter()
        .map(|axis| {
            let tensor = tensors.get(axis.value.as_str()).ok_or_else(|| unreadable(&axis.value, "is gone"))?;
            let squares = squares(tensor, axis.axis)?;
            if squares.iter().all(|square| square.is_finite()) {
                Ok((axis, squares))
            } else {
                Err(super::not_finite(tensor.name()))
            }
        })
        .collect::<Result<_, Failure>>()?;
    let of = |unit: &Unit| {
        let parts = unit.weights.iter().filter_map(|(axis, indices)| {
            let squares = squares.get(axis)?;
            Some(indices.iter().map(|index| squares[*index]).sum::<f64>().sqrt())
        });
        parts.sum()
    };
    Ok(units.iter().map(|(_, unit)| of(unit)).collect())
}

fn unreadable(name: &str, why: &str) -> Failure {
    failure(FailureReason::UnreadableModel, format!("tensor `{name}` {why}"))
}

/// The sum of the squares of what lies at each index along `axis`.
fn squares(tensor: &TensorProto, axis: usize) -> Result<Vec<f64>, Failure> {
    let refuse = |error: &dyn std::fmt::Display| failure(FailureReason::UnreadableModel, error.to_string());
    let shape = weights::shape(tensor).map_err(|error| refuse(&error))?;
    let values = weights::floats(tensor).map_err(|error| refuse(&error))?;
    mapping::release(tensor.raw_data());
    let inner = shape[axis + 1..].iter().product::<usize>().max(1);
    let mut squares = vec![0.0; shape[axis]];
    for (run, values) in values.chunks_exact(inner).enumerate() {
        squares[run % shape[axis]] += values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
    }
    Ok(squares)
}

/// What goes from each axis.
struct Removal<'a> {
    shapes: &'a Shapes,
    /// The indices that stay, ascending, of the axes that get shorter.
    kept: HashMap<Axis, Vec<usize>>,
}

impl<'a> Removal<'a> {
    fn of(dependencies: &'a Dependencies, gone: &HashSet<u32>) -> Self {
        let mut kept = HashMap::new();
        for axis in dependencies.axes() {
            let roots = dependencies.roots(axis).unwrap_or_default();
            let stay: Vec<usize> = (0..roots.len()).filter(|index| !gone.contains(&roots[*index])).collect();
            if stay.len() < roots.len() {
                kept.insert(axis.clone(), stay);
            }
        }
        Self {
            shapes: dependencies.shapes(),
            kept,
        }
    }

    fn kept(&self, value: &str, axis: usize) -> Option<&[usize]> {
        let axis = Axis {
            value: value.to_owned(),
            axis,
        };
        self.kept.get(&axis).map(Vec::as_slice)
    }

    /// The length of each axis after the removal; `None` where it is known when the model runs alone.
    fn sizes(&self, value: &str) -> Vec<Option<usize>> {
        let shape = self.shapes.get(value).unwrap_or_default();
        let size = |(axis, dim): (usize, &Dim)| self.kept(value, axis).map(<[usize]>::len).or_else(|| dim.size());
        shape.iter().enumerate().map(size).collect()
    }

    fn shortens(&self, value: &str) -> bool {
        (0..self.shapes.get(value).map_or(0, <[Dim]>::len)).any(|axis| self.kept(value, axis).is_some())
    }

    /// The names of the weights that were changed.
    fn slice_initializers(&self, graph: &mut GraphProto) -> Result<Vec<String>, Failure> {
        let sliced = graph.initializer.par_iter_mut().map(|tensor| {
            let name = tensor.name().to_owned();
            let mut changed = false;
            for axis in 0..tensor.dims.len() {
                if let Some(kept) = self.kept(&name, axis) {
                    slice(tensor, axis, kept)?;
                    changed = tensor.dims.len() >= 2;
                }
            }
            Ok(changed.then_some(name))
        });
        let sliced: Vec<Option<String>> = sliced.collect::<Result<_, Failure>>()?;
        Ok(sliced.into_iter().flatten().collect())
    }

    /// Tells nodes the new numbers that they hold themselves.
    fn adjust_nodes(&self, graph: &mut GraphProto, version: i64) -> Result<(), Failure> {
        let mut names = Names::of(graph);
        let mut constants = Vec::new();
        let mut constant = |stem: &str, values: &[i64]| {
            let name = names.fresh(stem);
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            constants.push(tensor(&name, DataType::Int64, &[values.len()], bytes));
            name
        };
        for node in graph.node.iter_mut().filter(|node| is_standard(node)) {
            let input = node.input.first().cloned().unwrap_or_default();
            let output = node.output.first().cloned().unwrap_or_default();
            match node.op_type() {
                "Conv" | "ConvTranspose" => {
                    let groups = attribute(node, "group").map_or(1, AttributeProto::i);
                    let before = self.shapes.get(&output).and_then(|shape| shape.get(1)).and_then(Dim::size);
                    if let (Some(before), Some(kept)) = (before, self.kept(&output, 1))
                        && groups > 1
                    {
                        let groups = groups * kept.len() as i64 / before as i64;
                        let held = node.attribute.iter_mut().filter(|attribute| attribute.name() == "group");
                        held.for_each(|attribute| attribute.i = Some(groups));
                    }
                }
                "Reshape" | "Expand" if self.shortens(&input) || self.shortens(&output) => {
                    let shape = |name: &str| self.shapes.get(name).unwrap_or_default();
                    let told = dependency::told(node, shape(&input), shape(&output), &self.sizes(&output));
                    let told = told.map_err(|why| failure(FailureReason::Internal, format!("node `{}`: {why}", node.name())))?;
                    node.input[1] = constant(&format!("{output}_shape"), &told);
                    node.attribute.retain(|attribute| attribute.name() != "allowzero");
                }
                "Split" => {
                    let axis = attribute(node, "axis").map_or(0, AttributeProto::i);
                    let rank = self.shapes.get(&input).map_or(0, <[Dim]>::len);
                    let Ok(axis) = axis_of(axis, rank) else { continue };
                    if self.kept(&input, axis).is_none() {
                        continue;
                    }
                    let size = |part: &String| self.sizes(part).get(axis).copied().flatten().map(|size| size as i64);
                    let Some(sizes) = node.output.iter().map(size).collect::<Option<Vec<_>>>() else {
                        continue;
                    };
                    node.attribute
                        .retain(|attribute| !matches!(attribute.name(), "split" | "num_outputs"));
                    if version < opset::QUANTIZED {
                        node.attribute.push(integers("split", &sizes));
                    } else {
                        node.input.truncate(1);
                        node.input.push(constant(&format!("{output}_split"), &sizes));
                    }
                }
                _ => {}
            }
        }
        graph.initializer.extend(constants);
        crate::graph::simplify::remove_dead(graph);
        Ok(())
    }

    /// Sees that the shapes of the changed model are what they should be.
    fn check(&self, model: &ModelProto) -> Result<(), Failure> {
        let after = Shapes::of(model);
        let outputs = model.graph.iter().flat_map(|graph| &graph.node).flat_map(|node| &node.output);
        for name in outputs.filter(|name| self.shapes.get(name).is_some()) {
            let expected = self.sizes(name);
            let fits = after.get(name).is_some_and(|shape| {
                shape.len() == expected.len() && shape.iter().zip(&expected).all(|(dim, size)| size.is_none() || dim.size() == *size)
            });
            if !fits {
                let message = format!(
                    "structured pruning does not fit the model: `{name}` would have to have shape {expected:?} and has {:?}",
                    after.get(name)
                );
                return Err(failure(FailureReason::Unsupported, message));
            }
        }
        Ok(())
    }
}

/// Keeps those indices of an axis.
fn slice(tensor: &mut TensorProto, axis: usize, kept: &[usize]) -> Result<(), Failure> {
    let name = tensor.name().to_owned();
    let shape = weights::shape(tensor).map_err(|error| unreadable(&name, &error.to_string()))?;
    let count: usize = shape.iter().product();
    let inner: usize = shape[axis + 1..].iter().product();
    if tensor.data_type() == DataType::Float as i32 {
        to_raw(tensor)?;
    }
    fn keep<T: Copy>(values: &[T], length: usize, inner: usize, kept: &[usize]) -> Vec<T> {
        let blocks = values.chunks_exact(length * inner);
        blocks
            .flat_map(|block| kept.iter().flat_map(move |index| &block[index * inner..(index + 1) * inner]))
            .copied()
            .collect()
    }
    let length = shape[axis];
    let raw = tensor.raw_data();
    if !raw.is_empty() {
        if count == 0 || !raw.len().is_multiple_of(count) {
            return Err(unreadable(&name, "does not hold as many values as its shape says"));
        }
        let width = raw.len() / count;
        let stays = keep(raw, length, inner * width, kept);
        mapping::release(raw);
        tensor.raw_data = Some(spilled(stays));
    } else {
        tensor.int32_data = keep(&tensor.int32_data, length, inner, kept);
        tensor.int64_data = keep(&tensor.int64_data, length, inner, kept);
        tensor.double_data = keep(&tensor.double_data, length, inner, kept);
        tensor.uint64_data = keep(&tensor.uint64_data, length, inner, kept);
    }
    tensor.dims[axis] = kept.len() as i64;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::generator::{self, Builder, Value, assert_same};
    use crate::progress::Console;
    use proptest::prelude::*;

    fn apply(structured: &Structured, model: &ModelProto) -> Result<(ModelProto, Change), Failure> {
        let mut pruned = model.clone();
        let console = Console::silent();
        let setting = Setting {
            calibration: None,
            original: model,
            threads: 1,
            engine: None,
            console: &console,
        };
        let change = structured.apply(&mut pruned, &setting)?;
        Ok((pruned, change))
    }

    fn by_layer(structure: PruneStructure, amount: f64) -> Structured {
        Structured {
            structure,
            amount,
            scope: PruneScope::PerLayer,
        }
    }

    fn dims(model: &ModelProto, name: &str) -> Vec<i64> {
        let found = model
            .graph
            .as_ref()
            .unwrap()
            .initializer
            .iter()
            .find(|tensor| tensor.name() == name);
        found.unwrap().dims.clone()
    }

    /// Zeroes all weights of as many units of each group as `structured` removes, so that nothing else can be chosen, and nothing is lost.
    fn zeroed(structured: &Structured, model: &ModelProto) -> Option<ModelProto> {
        let mut model = model.clone();
        unshare_vectors(model.graph.as_mut().unwrap());
        let roles = Roles::of(model.graph.as_ref().unwrap());
        let dependencies = structured.dependencies(&model, &roles);
        let graph = model.graph.as_mut().unwrap();
        let mut groups: BTreeMap<Vec<Axis>, Vec<Unit>> = BTreeMap::new();
        for unit in dependencies
            .units(graph)
            .into_values()
            .filter(|unit| structured.is_eligible(unit, &roles))
        {
            let axes = unit.weights.iter().map(|(axis, _)| axis.clone()).collect();
            groups.entry(axes).or_default().push(unit);
        }
        let mut any = false;
        for units in groups.values() {
            let count = ((structured.amount * units.len() as f64).round_ties_even() as usize).min(units.len() - 1);
            for (axis, indices) in units[..count].iter().flat_map(|unit| &unit.weights) {
                any = true;
                let tensor = graph.initializer.iter_mut().find(|tensor| tensor.name() == axis.value).unwrap();
                let shape = weights::shape(tensor).unwrap();
                let mut values = weights::floats(tensor).unwrap();
                let inner: usize = shape[axis.axis + 1..].iter().product();
                for (position, value) in values.iter_mut().enumerate() {
                    if indices.contains(&(position / inner % shape[axis.axis])) {
                        *value = 0.0;
                    }
                }
                *tensor = crate::graph::float_tensor(&axis.value, &shape, &values);
            }
        }
        any.then_some(model)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn units_that_are_zero_throughout_go_and_nothing_changes(seed in any::<u64>(), amount in 0.2_f64..0.9) {
            // A normalisation over features depends on how many there are, whatever they are.
            for (structure, seed) in [
                (PruneStructure::Channels, seed / 3 * 3),
                (PruneStructure::FeedForward, seed / 3 * 3 + 1),
                (PruneStructure::FeedForward, seed / 3 * 3 + 2),
                (PruneStructure::Heads, seed / 3 * 3 + 2),
            ] {
                let structured = by_layer(structure, amount);
                let Some(model) = zeroed(&structured, &generator::model(seed)) else { continue };
                let (pruned, change) = apply(&structured, &model).unwrap();
                prop_assert!(!change.changed.is_empty());
                assert_same(&model, &pruned, 1e-4);
            }
        }
    }

    #[test]
    fn a_residual_block_loses_the_same_channels_everywhere() {
        let (mut builder, input) = Builder::new(1, &[3, 8, 8]);
        let stem = builder.convolution(&input, 8, 1);
        let depthwise = builder.convolution(&stem, 8, 8);
        let wide = builder.convolution(&depthwise, 12, 1);
        let narrow = builder.convolution(&wide, 8, 1);
        let sum = builder.add(&narrow, &stem);
        let joined = builder.push(
            "Concat",
            &[&sum.name, &wide.name],
            vec![crate::graph::integer("axis", 1)],
            &[20, 8, 8],
        );
        let flat = builder.push("Flatten", &[&joined.name], vec![], &[20 * 64]);
        let weight = builder.constant(&[5, 20 * 64], 0.0);
        let output = builder.push("Gemm", &[&flat.name, &weight], vec![crate::graph::integer("transB", 1)], &[5]);
        let model = builder.finish(&output);
        let (pruned, _) = apply(&by_layer(PruneStructure::Channels, 0.25), &model).unwrap();
        let names: Vec<String> = weight::find(model.graph.as_ref().unwrap())
            .into_iter()
            .map(|weight| weight.name)
            .collect();
        let shapes: Vec<Vec<i64>> = names.iter().map(|name| dims(&pruned, name)).collect();
        assert_eq!(
            shapes,
            [
                vec![6, 3, 3, 3],
                vec![6, 1, 3, 3],
                vec![9, 6, 3, 3],
                vec![6, 9, 3, 3],
                vec![5, 15 * 64]
            ]
        );
        let inputs = generator::agreement::inputs(&model);
        for (kind, outputs) in generator::agreement::run(&pruned, &inputs) {
            assert_eq!(outputs[0].shape(), [8, 5], "{kind}");
        }
    }

    /// Attention whose query, key and value come from one product, and whose shapes are computed when it runs.
    fn fused_attention(builder: &mut Builder, input: &Value, heads: usize) -> Value {
        let (length, features) = (input.shape[0], input.shape[1]);
        let depth = features / heads;
        let fused = builder.product(input, 3 * features, true);
        let shape = builder.push("Shape", &[&fused.name], vec![], &[]);
        let first = builder.numbers(&[0]);
        let batch = builder.push("Gather", &[&shape.name, &first], vec![crate::graph::integer("axis", 0)], &[]);
        let rest = builder.numbers(&[length as i64, 3, heads as i64, depth as i64]);
        let told = builder.push("Concat", &[&batch.name, &rest], vec![crate::graph::integer("axis", 0)], &[]);
        let split = builder.push("Reshape", &[&fused.name, &told.name], vec![], &[length, 3, heads, depth]);
        let order = vec![crate::graph::integers("perm", &[2, 0, 3, 1, 4])];
        let parts = builder.push("Transpose", &[&split.name], order, &[]);
        let mut part = |index: i64| {
            let index = builder.numbers(&[index]);
            let part = builder.push("Gather", &[&parts.name, &index], vec![crate::graph::integer("axis", 0)], &[]);
            let axes = builder.numbers(&[0]);
            builder.push("Squeeze", &[&part.name, &axes], vec![], &[heads, length, depth])
        };
        let (query, key, value) = (part(0), part(1), part(2));
        let key = builder.push("Transpose", &[&key.name], vec![crate::graph::integers("perm", &[0, 1, 3, 2])], &[]);
        let scores = builder.push("MatMul", &[&query.name, &key.name], vec![], &[heads, length, length]);
        let scores = builder.push("Softmax", &[&scores.name], vec![crate::graph::integer("axis", -1)], &[]);
        let mixed = builder.push("MatMul", &[&scores.name, &value.name], vec![], &[]);
        let mixed = builder.push(
            "Transpose",
            &[&mixed.name],
            vec![crate::graph::integers("perm", &[0, 2, 1, 3])],
            &[],
        );
        let merged = builder.numbers(&[0, 0, features as i64]);
        let mixed = builder.push("Reshape", &[&mixed.name, &merged], vec![], &[length, features]);
        builder.product(&mixed, features, true)
    }

    #[test]
    fn heads_go_from_a_fused_product_whose_shapes_are_computed() {
        let (mut builder, input) = Builder::new(3, &[5, 16]);
        let attended = fused_attention(&mut builder, &input, 4);
        let output = builder.add(&attended, &input);
        let model = builder.finish(&output);
        let structured = by_layer(PruneStructure::Heads, 0.5);
        let model = zeroed(&structured, &model).unwrap();
        let (pruned, change) = apply(&structured, &model).unwrap();
        assert_eq!(change.changed.len(), 2, "{change:?}");
        assert_eq!(dims(&pruned, &change.changed[0]), [16, 24]);
        assert_eq!(dims(&pruned, &change.changed[1]), [8, 16]);
        assert_same(&model, &pruned, 1e-5);
    }

    #[test]
    fn what_cannot_go_is_listed_with_its_reason() {
        let (mut builder, input) = Builder::new(5, &[6]);
        let hidden = builder.product(&input, 8, true);
        let output = builder.product(&hidden, 4, true);
        let model = builder.finish(&output);
        let (_, change) = apply(&by_layer(PruneStructure::Channels, 0.5), &model).unwrap();
        assert_eq!(change.skipped.len(), 1);
        assert_eq!(
            change.skipped[0].reason,
            "its channels stay: it is an input or an output of the model"
        );
        let refusal = apply(&by_layer(PruneStructure::Heads, 0.5), &model).unwrap_err();
        assert_eq!(refusal.reason, FailureReason::Unsupported);
        assert!(refusal.message.contains("no attention heads"), "{refusal}");
    }

    #[test]
    fn globally_the_units_that_matter_least_in_their_group_go_first() {
        let structured = Structured {
            structure: PruneStructure::Channels,
            amount: 0.5,
            scope: PruneScope::Global,
        };
        let unit = |root, importance| Candidate { root, importance };
        // The second group's weights are a hundred times as large.
        let groups = vec![
            vec![unit(1, 1.0), unit(2, 1.1), unit(3, 0.9)],
            vec![unit(4, 10.0), unit(5, 200.0), unit(6, 30.0)],
        ];
        assert_eq!(structured.choose(groups), HashSet::from([3, 4, 6]));
        let all = Structured { amount: 1.0, ..structured };
        assert_eq!(all.choose(vec![vec![unit(1, 1.0), unit(2, 2.0)]]), HashSet::from([1]), "one stays");
    }
}
