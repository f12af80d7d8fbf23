//! What a product's rows of weights meet: its activations as rows of as many values as a row of weights has.

use plimsoll_runtime::engine::{Data, Tensor};
use plimsoll_runtime::onnx::{AttributeProto, NodeProto};

use crate::graph::attribute;
use crate::graph::weight::Operator;

/// Most positions of a sample that a convolution is looked at, evenly spaced over the output.
const POSITIONS_MAX: usize = 1024;
/// Most values that are laid out as rows at a time.
const VALUES_MAX: usize = 1 << 22;

/// How rows lie in the activations of a product.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Layout {
    /// Along the last axis.
    Last,
    /// Along the axis before the last.
    BeforeLast,
    /// The windows of a convolution.
    Windows(Windows),
}

/// The windows of a convolution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Windows {
    groups: usize,
    kernel: Vec<usize>,
    strides: Vec<usize>,
    dilations: Vec<usize>,
    pads: Vec<usize>,
    auto_pad: String,
}

impl Layout {
    /// Of a node whose weight has shape `dims`.
    ///
    /// # Errors
    /// In words, where its activations are not laid out.
    pub(super) fn of(node: &NodeProto, operator: Operator, dims: &[usize]) -> Result<Self, &'static str> {
        let transposed = attribute(node, "transA").is_some_and(|flag| flag.i() != 0);
        match operator {
            Operator::MatMul if dims.len() == 2 => Ok(Self::Last),
            Operator::MatMulLeft if dims.len() == 2 => Ok(Self::BeforeLast),
            Operator::MatMul | Operator::MatMulLeft => Err("it is a stack of matrices"),
            Operator::Gemm { .. } if transposed => Ok(Self::BeforeLast),
            Operator::Gemm { .. } => Ok(Self::Last),
            Operator::Conv => {
                let spatial = dims.len() - 2;
                let sizes = |name: &str, default: Vec<usize>| {
                    attribute(node, name).map_or(default, |values| {
                        values.ints.iter().map(|value| usize::try_from(*value).unwrap_or(0)).collect()
                    })
                };
                let windows = Windows {
                    groups: attribute(node, "group").map_or(1, |groups| usize::try_from(groups.i()).unwrap_or(1).max(1)),
                    kernel: dims[2..].to_vec(),
                    strides: sizes("strides", vec![1; spatial]),
                    dilations: sizes("dilations", vec![1; spatial]),
                    pads: sizes("pads", vec![0; 2 * spatial]),
                    auto_pad: attribute(node, "auto_pad")
                        .map(AttributeProto::s)
                        .map_or_else(|| "NOTSET".into(), |name| String::from_utf8_lossy(name).into_owned()),
                };
                let fits = windows.strides.len() == spatial && windows.dilations.len() == spatial && windows.pads.len() == 2 * spatial;
                if fits {
                    Ok(Self::Windows(windows))
                } else {
                    Err("its window does not fit its weight")
                }
            }
            Operator::ConvTranspose => Err("it is of a transposed convolution, whose windows overlap in the output"),
            Operator::Gather => Err("it is a table that is looked up"),
        }
    }

    /// How many groups of rows there are, each of which meets weights of its own.
    pub(super) fn groups(&self) -> usize {
        match self {
            Self::Windows(windows) => windows.groups,
            _ => 1,
        }
    }

    /// Gives `visit` the number of a group and some of its rows of `length` values, one after another, until all were given.
    pub(super) fn rows(&self, tensor: &Tensor, length: usize, mut visit: impl FnMut(usize, &[f32])) {
        let (Data::Fp32(values), shape) = (tensor.data(), tensor.shape()) else {
            return;
        };
        match self {
            Self::Last if shape.last() == Some(&length) => visit(0, values),
            Self::BeforeLast if shape.len() >= 2 && shape[shape.len() - 2] == length => {
                let columns = shape[shape.len() - 1];
                for matrix in values.chunks_exact((length * columns).max(1)) {
                    let rows: Vec<f32> = (0..columns)
                        .flat_map(|column| (0..length).map(move |row| matrix[row * columns + column]))
                        .collect();
                    visit(0, &rows);
                }
            }
            Self::Windows(windows) => windows.rows(values, shape, length, visit),
            _ => {}
        }
    }
}

impl Windows {
    fn rows(&self, values: &[f32], shape: &[usize], length: usize, mut visit: impl FnMut(usize, &[f32])) {
        let spatial = self.kernel.len();
        if shape.len() != spatial + 2 || !shape[1].is_multiple_of(self.groups) {
            return;
        }
        let (channels, sizes) = (shape[1] / self.groups, &shape[2..]);
        let area: usize = sizes.iter().product();
        let window: usize = self.kernel.iter().product();
        if channels * window != length || area == 0 {
            return;
        }
        let Some((outputs, before)) = self.geometry(sizes) else { return };
        let positions: usize = outputs.iter().product();
        let step = positions.div_ceil(POSITIONS_MAX).max(1);
        let capacity = (VALUES_MAX / length).max(1) * length;
        let mut rows: Vec<f32> = Vec::with_capacity(capacity.min(positions.div_ceil(step) * length));
        for group in 0..self.groups {
            for sample in values.chunks_exact(shape[1] * area) {
                let planes = &sample[group * channels * area..(group + 1) * channels * area];
                for position in (0..positions).step_by(step) {
                    // Where each element of the window lies in a plane.
                    let origin = unravel(position, &outputs);
                    let place = |element: usize| {
                        let offsets = unravel(element, &self.kernel);
                        (0..spatial).try_fold(0, |flat, axis| {
                            let at =
                                (origin[axis] * self.strides[axis] + offsets[axis] * self.dilations[axis]).checked_sub(before[axis])?;
                            (at < sizes[axis]).then_some(flat * sizes[axis] + at)
                        })
                    };
                    let places: Vec<Option<usize>> = (0..window).map(place).collect();
                    for plane in planes.chunks_exact(area) {
                        rows.extend(places.iter().map(|place| place.map_or(0.0, |place| plane[place])));
                    }
                    if rows.len() >= capacity {
                        visit(group, &rows);
                        rows.clear();
                    }
                }
            }
            visit(group, &rows);
            rows.clear();
        }
    }

    /// The output's sizes, and the padding before each axis.
    fn geometry(&self, sizes: &[usize]) -> Option<(Vec<usize>, Vec<usize>)> {
        let spatial = sizes.len();
        (0..spatial)
            .map(|axis| {
                let (stride, reach) = (self.strides[axis].max(1), self.dilations[axis] * (self.kernel[axis].max(1) - 1));
                match self.auto_pad.as_str() {
                    "SAME_UPPER" | "SAME_LOWER" => {
                        let output = sizes[axis].div_ceil(stride);
                        let padding = ((output - 1) * stride + reach + 1).saturating_sub(sizes[axis]);
                        let before = if self.auto_pad == "SAME_LOWER" {
                            padding.div_ceil(2)
                        } else {
                            padding / 2
                        };
                        Some((output, before))
                    }
                    name => {
                        let (before, after) = if name == "VALID" {
                            (0, 0)
                        } else {
                            (self.pads[axis], self.pads[axis + spatial])
                        };
                        Some(((sizes[axis] + before + after).checked_sub(reach + 1)? / stride + 1, before))
                    }
                }
            })
            .collect()
    }
}

fn unravel(mut flat: usize, sizes: &[usize]) -> Vec<usize> {
    let mut indices = vec![0; sizes.len()];
    for (index, size) in indices.iter_mut().zip(sizes).rev() {
        *index = flat % size;
        flat /= size;
    }
    indices
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{integers, node};

    #[test]
    fn the_rows_of_a_convolution_are_its_windows() {
        let attributes = vec![integers("strides", &[2, 1]), integers("pads", &[1, 0, 0, 1])];
        let convolution = node("Conv", &["x", "w"], "y", attributes);
        let layout = Layout::of(&convolution, Operator::Conv, &[1, 2, 2, 2]).unwrap();
        let values: Vec<f32> = (1..=12_u8).map(f32::from).collect();
        let tensor = Tensor::new(vec![1, 2, 3, 2], values).unwrap();
        let mut rows = Vec::new();
        layout.rows(&tensor, 8, |_, more| rows.extend_from_slice(more));
        let expected = [
            [0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 7.0, 8.0],
            [0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 8.0, 0.0],
            [3.0, 4.0, 5.0, 6.0, 9.0, 10.0, 11.0, 12.0],
            [4.0, 0.0, 6.0, 0.0, 10.0, 0.0, 12.0, 0.0],
        ];
        assert_eq!(rows, expected.concat());
    }

    #[test]
    fn a_group_meets_its_own_channels() {
        let convolution = node("Conv", &["x", "w"], "y", vec![crate::graph::integer("group", 2)]);
        let layout = Layout::of(&convolution, Operator::Conv, &[2, 1, 1]).unwrap();
        let tensor = Tensor::new(vec![1, 2, 3], vec![1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        let mut seen = Vec::new();
        layout.rows(&tensor, 1, |group, rows| seen.push((group, rows.to_vec())));
        assert_eq!(seen, [(0, vec![1.0, 2.0, 3.0]), (1, vec![4.0, 5.0, 6.0])]);
    }

    #[test]
    fn a_weight_from_the_left_meets_columns() {
        let tensor = Tensor::new(vec![2, 2], vec![1.0_f32, 2.0, 3.0, 4.0]).unwrap();
        let mut seen = Vec::new();
        Layout::BeforeLast.rows(&tensor, 2, |_, rows| seen.extend_from_slice(rows));
        assert_eq!(seen, [1.0, 3.0, 2.0, 4.0]);
    }
}
