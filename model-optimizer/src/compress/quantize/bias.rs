//! Bias correction: what the rounding of weights adds to a layer's outputs on average goes out of its bias again.

use crate::graph::weight::Operator;

/// How a weight maps input channels to output channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// A convolution's: output channels, input channels of a group, kernel.
    Convolution {
        /// Number of groups, 1 or more.
        groups: usize,
    },
    /// Input features, output features.
    Columns,
    /// Output features, input features.
    Rows,
}

impl Layout {
    /// An operator whose weight lies so.
    #[must_use]
    pub fn operator(self) -> Operator {
        match self {
            Self::Convolution { .. } => Operator::Conv,
            Self::Columns => Operator::MatMul,
            Self::Rows => Operator::Gemm { transposed: true },
        }
    }
}

/// The mean error of each output channel when a weight of `shape` becomes `quantized` from `weight` and the channels of its input
/// have these `means`: the sum of the weights' errors times the means. A convolution's padding is neglected.
///
/// Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2, with the expected input
/// measured on the calibration data.
#[must_use]
pub fn mean_errors(weight: &[f32], quantized: &[f32], shape: &[usize], layout: Layout, means: &[f64]) -> Vec<f64> {
    let mut errors = vec![0.0; if layout == Layout::Columns { shape[1] } else { shape[0] }];
    let kernel: usize = shape[2..].iter().product();
    for (index, (weight, quantized)) in weight.iter().zip(quantized).enumerate() {
        let (first, second) = (index / kernel / shape[1], index / kernel % shape[1]);
        let (input, output) = match layout {
            Layout::Columns => (first, second),
            Layout::Rows => (second, first),
            Layout::Convolution { groups } => (first / (shape[0] / groups).max(1) * shape[1] + second, first),
        };
        errors[output] += f64::from(quantized - weight) * means.get(input).copied().unwrap_or_default();
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_weighted_by_the_mean_input() {
        let (weight, quantized) = ([1.0, 2.0, 3.0, 4.0], [1.5, 2.0, 3.0, 3.0]);
        let means = [10.0, 100.0];
        assert_eq!(mean_errors(&weight, &quantized, &[2, 2], Layout::Rows, &means), [5.0, -100.0]);
        assert_eq!(mean_errors(&weight, &quantized, &[2, 2], Layout::Columns, &means), [5.0, -100.0]);
        let errors = mean_errors(&weight, &[2.0, 2.0, 3.0, 4.0], &[2, 2], Layout::Columns, &means);
        assert_eq!(errors, [10.0, 0.0]);
    }

    #[test]
    fn each_group_of_a_convolution_has_its_own_inputs() {
        let layout = Layout::Convolution { groups: 2 };
        let errors = mean_errors(&[0.0; 4], &[1.0, 1.0, 1.0, 2.0], &[2, 1, 2], layout, &[1.0, 10.0]);
        assert_eq!(errors, [2.0, 30.0]);
    }
}
