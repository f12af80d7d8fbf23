//! Structured pruning: whole channels, attention heads or feed-forward units go, with everything that depends on them.

use std::collections::{BTreeMap, HashMap, HashSet};

use plimsoll_package::recipe::{PruneScope, PruneStructure};
use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, weights};
use rayon::prelude::*;

use super::magnitude::to_raw;
use crate::compress::{Change, Setting, Technique, skipped};
use crate::failure::{Failure, FailureReason, failure};
use crate::graph::dependency::{self, Axis, Dependencies, Unit, touch};
use crate::graph::shape::{Dim, Shapes, axis_of};
use crate::graph::{Names, attribute, is_standard, opset, reads, subgraphs, tensor, weight};

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
                        node.attribute.push(AttributeProto {
                            name: Some("split".into()),
                            r#type: Some(plimsoll_runtime::onnx::attribute_proto::AttributeType::Ints as i32),
                            ints: sizes,
                            ..AttributeProto::default()
                        });
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
        tensor.raw_data = Some(keep(raw, length, inner * width, kept).into());
    } else {
        tensor.int32_data = keep(&tensor.int32_data, length, inner, kept);
        tensor.int64_data = keep(&tensor.int64_data, length, inner, kept);
        tensor.double_data = keep(&tensor.double_data, length, inner, kept);
        tensor.uint64_data = keep(&tensor.uint64_data, length, inner, kept);
    }
    tensor.dims[axis] = kept.len() as i64;
    Ok(())
}
