//! Gradient descent: AdamW, and how its step size falls.

use candle_core::{Result, Tensor};

use super::parameters::Parameters;

/// How much of the mean gradient of the step before is kept.
const MOMENTUM: f64 = 0.9;
/// How much of the mean squared gradient of the step before is kept.
const SQUARE_MOMENTUM: f64 = 0.999;
/// Keeps the division from zero.
const EPSILON: f64 = 1e-8;
/// How much of a weight is taken off at each step, times the step size.
const DECAY: f64 = 0.01;

/// AdamW (Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2) with the constants of
/// `torch.optim.AdamW`; biases, norms and tables do not decay, and what is masked does not move.
pub(super) struct AdamW {
    /// The mean and the mean squared gradient of each parameter.
    moments: Vec<Option<(Tensor, Tensor)>>,
    steps: i32,
}

impl AdamW {
    /// For `count` parameters.
    pub(super) fn new(count: usize) -> Self {
        Self {
            moments: vec![None; count],
            steps: 0,
        }
    }

    /// Takes a step of size `rate` against `gradients`, one for each parameter that has one.
    pub(super) fn step(&mut self, parameters: &Parameters, gradients: &[Option<Tensor>], rate: f64) -> Result<()> {
        self.steps += 1;
        let unbiased = 1.0 - MOMENTUM.powi(self.steps);
        let unbiased_square = 1.0 - SQUARE_MOMENTUM.powi(self.steps);
        for (((var, mask, decays), gradient), moments) in parameters.trained().zip(gradients).zip(&mut self.moments) {
            let Some(gradient) = gradient else { continue };
            let (mean, square) = match moments.take() {
                Some((mean, square)) => (
                    ((mean * MOMENTUM)? + (gradient * (1.0 - MOMENTUM))?)?,
                    ((square * SQUARE_MOMENTUM)? + (gradient.sqr()? * (1.0 - SQUARE_MOMENTUM))?)?,
                ),
                None => ((gradient * (1.0 - MOMENTUM))?, (gradient.sqr()? * (1.0 - SQUARE_MOMENTUM))?),
            };
            let deviation = ((&square / unbiased_square)?.sqrt()? + EPSILON)?;
            let change = ((&mean / unbiased)?.div(&deviation)? * rate)?;
            let value = var.as_tensor().detach();
            let kept = if decays { (value * (1.0 - rate * DECAY))? } else { value };
            let mut value = (kept - change)?;
            if let Some(mask) = mask {
                value = value.mul(mask)?;
            }
            var.set(&value)?;
            *moments = Some((mean, square));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use candle_core::{DType, Device};
    use plimsoll_runtime::onnx::GraphProto;

    use super::*;
    use crate::compress::distill::forward::Place;
    use crate::graph::{float_tensor, node};

    #[test]
    fn two_steps_are_those_of_torch() {
        // torch.optim.AdamW([w], lr=0.1) on w = [[1, -2]] with the gradients [[0.5, -1]] and [[0.2, 0.3]]; the bias b = [1] gets the same
        // gradients as w's first element, with weight_decay=0.
        let graph = GraphProto {
            node: vec![node("Gemm", &["x", "w", "b"], "y", vec![])],
            initializer: vec![float_tensor("w", &[1, 2], &[1.0, -2.0]), float_tensor("b", &[1], &[1.0])],
            ..GraphProto::default()
        };
        let place = Place {
            device: Device::Cpu,
            dtype: DType::F64,
        };
        let parameters = Parameters::find(&graph, &["y".to_owned()], &place).unwrap();
        assert_eq!(parameters.names(), HashSet::from(["w".to_owned(), "b".to_owned()]));
        let mut optimizer = AdamW::new(2);
        for gradient in [[0.5, -1.0], [0.2, 0.3]] {
            let of_weight = Tensor::new(&[gradient], &Device::Cpu).unwrap();
            let of_bias = Tensor::new(&[gradient[0]], &Device::Cpu).unwrap();
            optimizer.step(&parameters, &[Some(of_weight), Some(of_bias)], 0.1).unwrap();
        }
        let values = parameters.values().unwrap();
        let flat = |name: &str| values[name].flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let expected = [0.808243483901, -1.853317142428, 0.810142483903];
        for (value, expected) in flat("w").into_iter().chain(flat("b")).zip(expected) {
            assert!((value - expected).abs() < 1e-9, "{value}, not {expected}");
        }
    }
}
