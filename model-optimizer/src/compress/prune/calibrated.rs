//! Pruning that looks at calibration data: Wanda and SparseGPT.

use std::collections::HashMap;

use plimsoll_runtime::engine::{Data, Tensor};
use plimsoll_runtime::onnx::{GraphProto, ModelProto, weights};

use super::activation::Layout;
use super::{Share, not_finite, nothing_to_prune, sparsegpt, wanda};
use crate::calibration::Calibration;
use crate::compress::hessian::Hessian;
use crate::compress::{Change, Setting, Technique, skipped};
use crate::failure::{Failure, FailureReason, failure};
use crate::graph::weight::{self, Rows};
use crate::graph::{Names, float_tensor, node};

/// Pruning of single weights by what they do on calibration data, each layer for itself. Layers are taken in the graph's order, some
/// at a time; later ones are looked at with the earlier ones pruned.
#[derive(Debug, Clone)]
pub struct Calibrated {
    /// How weights are ranked.
    pub ranking: Ranking,
    /// How many go.
    pub share: Share,
}

/// How weights are ranked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ranking {
    /// By [`wanda::prune`].
    Wanda,
    /// By [`sparsegpt::prune`].
    SparseGpt,
}

/// Most bytes of what is gathered of the layers that are looked at together.
const STATISTICS_BYTES_MAX: usize = 1 << 30;
/// Most layers that are looked at together: their activations of one batch are held.
const LAYERS_MAX: usize = 32;

/// A weight with the activations that it meets.
struct Layer {
    initializer: usize,
    name: String,
    rows: Rows,
    /// Of each use, which must meet rows in the same way.
    uses: Vec<(String, Layout)>,
    groups: usize,
}

/// What is gathered of a layer, for each of its groups.
enum Statistics {
    /// The sum of the squares of each input.
    Squares(Vec<Vec<f64>>),
    Hessians(Vec<Hessian>),
}

impl Layer {
    fn of(graph: &GraphProto, found: &weight::Weight) -> Result<Result<Self, &'static str>, Failure> {
        let dims = weights::shape(&graph.initializer[found.initializer])
            .map_err(|error| failure(FailureReason::UnreadableModel, error.to_string()))?;
        let mut uses = Vec::new();
        let mut rows = None;
        for used in found.uses.iter().filter(|used| used.operator != weight::Operator::Gather) {
            let node = &graph.node[used.node];
            let layout = match Layout::of(node, used.operator, &dims) {
                Ok(layout) => layout,
                Err(why) => return Ok(Err(why)),
            };
            if *rows.get_or_insert(used.operator.rows(&dims)) != used.operator.rows(&dims) {
                return Ok(Err("its uses disagree about which axis is summed over"));
            }
            // A product has two operands, and the weight is one of them.
            uses.push((node.input[usize::from(used.input == 0)].clone(), layout));
        }
        let (Some(rows), Some((_, layout))) = (rows, uses.first()) else {
            return Ok(Err("it is a table that is looked up"));
        };
        let groups = layout.groups();
        if rows.length == 0 || !(rows.outer * rows.inner).is_multiple_of(groups) || uses.iter().any(|(_, layout)| layout.groups() != groups)
        {
            return Ok(Err("its groups do not fit its channels"));
        }
        Ok(Ok(Self {
            initializer: found.initializer,
            name: found.name.clone(),
            rows,
            uses,
            groups,
        }))
    }

    fn statistics(&self, ranking: Ranking) -> Statistics {
        match ranking {
            Ranking::Wanda => Statistics::Squares(vec![vec![0.0; self.rows.length]; self.groups]),
            Ranking::SparseGpt => Statistics::Hessians(vec![Hessian::new(self.rows.length); self.groups]),
        }
    }

    fn statistics_bytes(&self, ranking: Ranking) -> usize {
        self.groups * self.rows.length * if ranking == Ranking::Wanda { 8 } else { 4 * self.rows.length }
    }
}

impl Statistics {
    fn add(&mut self, group: usize, rows: &[f32], length: usize) {
        match self {
            Self::Squares(squares) => {
                for row in rows.chunks_exact(length) {
                    let sums = squares[group].iter_mut().zip(row);
                    sums.for_each(|(sum, value)| *sum += f64::from(*value) * f64::from(*value));
                }
            }
            Self::Hessians(hessians) => hessians[group].add(rows),
        }
    }
}

impl Technique for Calibrated {
    fn apply(&self, model: &mut ModelProto, setting: &Setting) -> Result<Change, Failure> {
        let calibration = setting.calibration(match self.ranking {
            Ranking::Wanda => "pruning by Wanda",
            Ranking::SparseGpt => "pruning by SparseGpt",
        })?;
        let mut change = Change::default();
        let mut layers = Vec::new();
        let Some(graph) = &mut model.graph else {
            return Err(nothing_to_prune());
        };
        let found = weight::find(graph);
        for found in &found {
            match Layer::of(graph, found)? {
                Ok(layer) => layers.push(layer),
                Err(why) => change.skipped.push(skipped(&found.name, why)),
            }
        }
        for inner in weight::of_products(graph) {
            if !found.iter().any(|found| found.name == inner.tensor.name()) {
                let why = "it is of a branch or a loop, within which values are not looked at";
                change.skipped.push(skipped(inner.tensor.name(), why));
            }
        }
        if layers.is_empty() {
            return Err(nothing_to_prune());
        }
        let mut rest = layers.as_slice();
        while !rest.is_empty() {
            let mut bytes = 0;
            let within = rest.iter().take(LAYERS_MAX).take_while(|layer| {
                bytes += layer.statistics_bytes(self.ranking);
                bytes <= STATISTICS_BYTES_MAX
            });
            let (together, later) = rest.split_at(within.count().max(1));
            rest = later;
            let statistics = observe(model, calibration, together, self.ranking)?;
            let Some(graph) = &mut model.graph else { continue };
            for (layer, statistics) in together.iter().zip(statistics) {
                match self.prune(graph, layer, &statistics)? {
                    Ok(()) => change.changed.push(layer.name.clone()),
                    Err(why) => change.skipped.push(skipped(&layer.name, why)),
                }
            }
        }
        Ok(change)
    }
}

impl Calibrated {
    fn prune(&self, graph: &mut GraphProto, layer: &Layer, statistics: &Statistics) -> Result<Result<(), &'static str>, Failure> {
        let tensor = &mut graph.initializer[layer.initializer];
        let values = weights::floats(tensor).map_err(|error| failure(FailureReason::UnreadableModel, error.to_string()))?;
        if values.iter().any(|value| !value.is_finite()) {
            return Err(not_finite(&layer.name));
        }
        let Rows { outer, length, inner } = layer.rows;
        if let Share::Pattern(pattern) = self.share
            && length < pattern.of
        {
            return Ok(Err("its rows have fewer weights than the pattern's groups"));
        }
        let mut rows = transpose_blocks(&values, outer, length, inner);
        let part = (outer * inner / layer.groups * length).max(1);
        for (group, rows) in rows.chunks_exact_mut(part).enumerate() {
            match statistics {
                Statistics::Squares(squares) => {
                    let norms: Vec<f32> = squares[group].iter().map(|square| square.sqrt() as f32).collect();
                    wanda::prune(rows, &norms, self.share);
                }
                Statistics::Hessians(hessians) => {
                    if let Err(why) = sparsegpt::prune(rows, &hessians[group], self.share) {
                        return Ok(Err(why));
                    }
                }
            }
        }
        let dims: Vec<usize> = tensor.dims.iter().map(|&size| size as usize).collect();
        *tensor = float_tensor(&layer.name, &dims, &transpose_blocks(&rows, outer, inner, length));
        Ok(Ok(()))
    }
}

/// Each of `outer` blocks of `rows` times `columns` values with its rows and columns exchanged.
fn transpose_blocks(values: &[f32], outer: usize, rows: usize, columns: usize) -> Vec<f32> {
    if rows == 1 || columns == 1 {
        return values.to_vec();
    }
    let block = |block: usize| {
        let values = &values[block * rows * columns..(block + 1) * rows * columns];
        (0..columns).flat_map(move |column| (0..rows).map(move |row| values[row * columns + column]))
    };
    (0..outer).flat_map(block).collect()
}

/// What the activations of `layers` are on the calibration data.
fn observe(model: &ModelProto, calibration: &Calibration, layers: &[Layer], ranking: Ranking) -> Result<Vec<Statistics>, Failure> {
    let mut statistics: Vec<Statistics> = layers.iter().map(|layer| layer.statistics(ranking)).collect();
    // Copies, since neither an input nor an output of the model can be another output of it.
    let mut tapped = model.clone();
    let graph = tapped.graph.get_or_insert_default();
    let mut names = Names::of(graph);
    let mut copies: HashMap<&str, usize> = HashMap::new();
    let mut values = Vec::new();
    for (value, _) in layers.iter().flat_map(|layer| &layer.uses) {
        copies.entry(value).or_insert_with(|| {
            let name = names.fresh(&format!("{value}_observed"));
            graph.node.push(node("Identity", &[value], &name, vec![]));
            values.push(name);
            values.len() - 1
        });
    }
    calibration.observe(&tapped, &values, |tensors| {
        for (layer, statistics) in layers.iter().zip(&mut statistics) {
            for (value, layout) in &layer.uses {
                let tensor = &tensors[copies[value.as_str()]];
                check_finite(value, tensor)?;
                layout.rows(tensor, layer.rows.length, |group, rows| {
                    statistics.add(group, rows, layer.rows.length)
                });
            }
        }
        Ok(())
    })?;
    Ok(statistics)
}

fn check_finite(value: &str, tensor: &Tensor) -> Result<(), Failure> {
    match tensor.data() {
        Data::Fp32(values) if values.iter().all(|value| value.is_finite()) => Ok(()),
        _ => Err(failure(
            FailureReason::InvalidDataset,
            format!("on the calibration data `{value}` is NaN, infinite or not in FP32, so weights cannot be ranked by it"),
        )),
    }
}
