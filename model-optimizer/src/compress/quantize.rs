//! Quantisation: weights, and by scheme activations, in fewer bits. One file a technique.

use std::collections::HashSet;

use plimsoll_package::recipe::{ActivationRange, BlockSize, Granularity, Quantize, QuantizeScheme, Rounding};
use plimsoll_package::units::Ratio;
use plimsoll_runtime::onnx::{GraphProto, ModelProto, NodeProto};

use super::{Technique, skipped};
use crate::failure::{Failure, FailureReason, failure};
use crate::graph::{opset, subgraphs};

pub mod bias;
pub mod blocks;
mod faithful;
pub mod fastest;
#[cfg(test)]
mod fixture;
pub mod float16;
pub mod gptq;
pub mod int8;
pub mod integers;
pub mod neighbours;
pub(crate) mod product;
pub mod qdq;
pub mod smooth;
mod timing;

/// The operators that [`QuantizeScheme::Int8Static`] quantises by default.
const STATIC_OPERATORS: [&str; 5] = ["Conv", "MatMul", "Gemm", "ConvTranspose", "Gather"];

/// The quantisation that `quantize` asks for.
///
/// # Errors
/// [`FailureReason::InvalidInputs`] where a field is out of its range or belongs to another scheme.
pub fn technique(quantize: &Quantize) -> Result<Box<dyn Technique>, Failure> {
    // Destructured, so that a new field cannot be forgotten.
    let Quantize {
        scheme,
        granularity,
        range,
        smooth,
        bias_correction,
        operators,
        block_size,
        rounding,
        exclude,
    } = quantize;
    let is_static = *scheme == QuantizeScheme::Int8Static;
    let is_blocks = matches!(scheme, QuantizeScheme::Int4 | QuantizeScheme::Int8Blocks);
    let of_static = range.is_some() || smooth.is_some() || bias_correction.is_some() || !operators.is_empty();
    if of_static && !is_static {
        return Err(invalid("range, smooth, biasCorrection and operators belong to scheme Int8Static"));
    }
    if (block_size.is_some() || rounding.is_some()) && !is_blocks {
        return Err(invalid("blockSize and rounding belong to the schemes Int4 and Int8Blocks"));
    }
    if granularity.is_some() && (is_blocks || *scheme == QuantizeScheme::Float16) {
        return Err(invalid(
            "granularity belongs to the schemes Int8, Int8Dynamic, Int8Weights and Int8Static",
        ));
    }
    let granularity = granularity.unwrap_or(Granularity::PerChannel);
    let exclude = exclude.clone();
    let int8 = |products| int8::Int8 {
        products,
        fold: true,
        granularity,
        in_floats: vec![],
        exclude: exclude.clone(),
    };
    Ok(match scheme {
        QuantizeScheme::Int8 => Box::new(fastest::Fastest { granularity, exclude }),
        QuantizeScheme::Int8Dynamic => Box::new(int8(int8::Products::Dynamic)),
        QuantizeScheme::Int8Weights => Box::new(int8(int8::Products::WeightOnly)),
        QuantizeScheme::Int8Static => Box::new(qdq::Static {
            granularity,
            range: range.unwrap_or(ActivationRange::Percentile),
            smooth: smooth
                .as_ref()
                .map(Ratio::value)
                .transpose()
                .map_err(|error| invalid(&format!("smooth: {error}")))?,
            bias_correction: bias_correction.unwrap_or(false),
            operators: static_operators(operators)?,
            exclude,
        }),
        QuantizeScheme::Int4 | QuantizeScheme::Int8Blocks => Box::new(blocks::Blocks {
            bits: if *scheme == QuantizeScheme::Int4 { 4 } else { 8 },
            block_size: checked_block_size(*block_size)?,
            rounding: rounding.unwrap_or(Rounding::Nearest),
            exclude,
        }),
        QuantizeScheme::Float16 => Box::new(float16::Float16 { exclude }),
    })
}

fn invalid(message: &str) -> Failure {
    failure(FailureReason::InvalidInputs, format!("optimize.recipe: quantize: {message}"))
}

fn static_operators(operators: &[String]) -> Result<Vec<String>, Failure> {
    if operators.is_empty() {
        return Ok(STATIC_OPERATORS.map(str::to_owned).to_vec());
    }
    match operators.iter().find(|name| !qdq::supports(name)) {
        Some(unknown) => Err(invalid(&format!(
            "operators: scheme Int8Static does not quantise `{unknown}`; it quantises {}",
            qdq::supported().join(", ")
        ))),
        None => Ok(operators.to_vec()),
    }
}

fn checked_block_size(size: Option<BlockSize>) -> Result<usize, Failure> {
    match size.map_or(32, |BlockSize(size)| size) {
        size @ (16 | 32 | 64 | 128 | 256) => Ok(usize::from(size)),
        size => Err(invalid(&format!("blockSize is {size}; write 16, 32, 64, 128 or 256"))),
    }
}

/// The nodes that a recipe's `exclude` names.
struct Exclusion<'a>(HashSet<&'a str>);

impl<'a> Exclusion<'a> {
    /// # Errors
    /// [`FailureReason::InvalidInputs`] where no node of `graph` has one of the `names`.
    fn of(names: &'a [String], graph: &GraphProto) -> Result<Self, Failure> {
        let mut unknown: HashSet<&str> = names.iter().map(String::as_str).collect();
        forget_known(graph, &mut unknown);
        match names.iter().find(|name| unknown.contains(name.as_str())) {
            Some(name) => Err(invalid(&format!(
                "exclude: no node of the model has the name `{name}`; look its name up in a viewer such as Netron"
            ))),
            None => Ok(Self(names.iter().map(String::as_str).collect())),
        }
    }

    fn contains(&self, node: &NodeProto) -> bool {
        self.contains_name(node.name())
    }

    fn contains_name(&self, name: &str) -> bool {
        self.0.contains(name)
    }
}

fn forget_known(graph: &GraphProto, names: &mut HashSet<&str>) {
    for node in &graph.node {
        names.remove(node.name());
        subgraphs(node).for_each(|subgraph| forget_known(subgraph, names));
    }
}

/// Raises the model to the operators that quantised graphs are written in.
fn raise(model: &mut ModelProto) -> Result<(), Failure> {
    opset::raise(model).map_err(|why| failure(FailureReason::Unsupported, format!("cannot quantise: {why}")))
}

fn nothing_to_quantize() -> Failure {
    let message = "optimize.recipe: nothing to quantise: the model has no convolution, matrix product or table with constant weights in FP32 that is worth it";
    failure(FailureReason::Unsupported, message)
}

fn unreadable(weight: &str, why: &str) -> Failure {
    failure(
        FailureReason::UnreadableModel,
        format!("cannot quantise the weight `{weight}`: {why}"),
    )
}
