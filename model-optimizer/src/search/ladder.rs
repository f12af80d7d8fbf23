//! The ways of quantising that a search tries, in an order by what the model computes with.

use plimsoll_package::recipe::{BlockSize, Quantize, QuantizeScheme, Rounding, Technique};
use plimsoll_runtime::onnx::GraphProto;

use crate::graph::weight::{self, Operator};

/// What a model's weights are to its operators.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Mix {
    /// Convolutions.
    pub convolutions: usize,
    /// Matrix products.
    pub products: usize,
    /// Tables of rows that are looked up.
    pub tables: usize,
    /// Weights of recurrences.
    pub recurrences: usize,
}

impl Mix {
    /// Of the uses of weights in `graph`.
    #[must_use]
    pub fn of(graph: &GraphProto) -> Self {
        let mut mix = Self::default();
        for used in weight::find(graph).iter().flat_map(|weight| &weight.uses) {
            match used.operator {
                Operator::Conv | Operator::ConvTranspose => mix.convolutions += 1,
                Operator::Gemm { .. } | Operator::MatMul | Operator::MatMulLeft => mix.products += 1,
                Operator::Gather => mix.tables += 1,
                Operator::Recurrent => mix.recurrences += 1,
            }
        }
        mix
    }
}

/// A way of quantising: a scheme, whose layers can be left out one by one, and what becomes of those that it leaves.
#[derive(Debug, Clone, PartialEq)]
pub struct Way {
    /// The scheme with its parameters.
    pub quantize: Quantize,
    /// The scheme for what the first one leaves; without it that stays in floats.
    pub rest: Option<QuantizeScheme>,
    /// Whether the first one leaves something even if nothing is left out.
    pub leaves: bool,
}

impl Way {
    fn of(scheme: QuantizeScheme) -> Self {
        Self {
            quantize: Quantize::of(scheme),
            rest: None,
            leaves: false,
        }
    }

    /// The recipe that quantises all but the nodes `left_out`.
    #[must_use]
    pub fn recipe(&self, left_out: Vec<String>) -> Vec<Technique> {
        let rest = self.rest.filter(|_| self.leaves || !left_out.is_empty());
        let first = Quantize {
            exclude: left_out,
            ..self.quantize.clone()
        };
        let techniques = [first].into_iter().chain(rest.map(Quantize::of));
        techniques
            .map(|quantize| Technique {
                quantize: Some(quantize),
                ..Technique::default()
            })
            .collect()
    }
}

/// Ways of about one size, the rougher ones first: a gentler one is tried where the one before loses too much.
#[derive(Debug, Clone, PartialEq)]
pub struct Rung {
    /// The ways; at least one.
    pub ways: Vec<Way>,
    /// Whether it is worth trying only while nothing but the original is within the budget.
    pub last_resort: bool,
}

/// The rungs for a model of that `mix`, the most promising first: dynamic quantisation where matrix products prevail; where convolutions do,
/// static quantisation if there are data to calibrate on (`calibrated`), else weights alone. None for a model without weights.
#[must_use]
pub fn ladder(mix: Mix, calibrated: bool) -> Vec<Rung> {
    let rung = |ways: Vec<Way>| Rung { ways, last_resort: false };
    let convolves = mix.convolutions > mix.products;
    let rest = if convolves || mix.products == 0 {
        QuantizeScheme::Int8Weights
    } else {
        QuantizeScheme::Int8Dynamic
    };
    let blocks = |scheme, size, rounding| Way {
        quantize: Quantize {
            block_size: Some(BlockSize(size)),
            rounding,
            ..Quantize::of(scheme)
        },
        rest: Some(rest),
        leaves: mix.convolutions + mix.recurrences > 0,
    };
    let has_products = mix.products > 0;

    let dynamic = has_products.then(|| rung(vec![Way::of(QuantizeScheme::Int8Dynamic)]));
    let mut weights = vec![Way::of(QuantizeScheme::Int8Weights)];
    weights.extend(has_products.then(|| blocks(QuantizeScheme::Int8Blocks, 32, None)));
    let computed = mix.convolutions + mix.products > 0;
    let fixed = (calibrated && computed).then(|| {
        let way = |quantize| Way {
            quantize,
            rest: Some(QuantizeScheme::Int8Weights),
            leaves: mix.recurrences > 0,
        };
        let plain = Quantize::of(QuantizeScheme::Int8Static);
        let corrected = Quantize {
            bias_correction: Some(true),
            smooth: has_products.then(|| "0.5".parse().ok()).flatten(),
            ..plain.clone()
        };
        rung(vec![way(plain), way(corrected)])
    });
    let four_bits = has_products.then(|| {
        let by_data = calibrated.then_some(Rounding::Gptq);
        let mut ways = vec![blocks(QuantizeScheme::Int4, 128, None)];
        ways.extend(by_data.map(|rounding| blocks(QuantizeScheme::Int4, 128, Some(rounding))));
        ways.push(blocks(QuantizeScheme::Int4, 32, by_data));
        rung(ways)
    });
    let half = Rung {
        ways: vec![Way::of(QuantizeScheme::Float16)],
        last_resort: true,
    };

    let weights = (computed || mix.tables + mix.recurrences > 0).then(|| rung(weights));
    let half = weights.is_some().then_some(half);
    let rungs = if convolves {
        [fixed, weights, dynamic, four_bits, half]
    } else {
        [dynamic, weights, fixed, four_bits, half]
    };
    rungs.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use QuantizeScheme::{Float16, Int4, Int8Blocks, Int8Dynamic, Int8Static, Int8Weights};

    fn schemes(mix: Mix, calibrated: bool) -> Vec<Vec<QuantizeScheme>> {
        let of_rung = |rung: Rung| rung.ways.iter().map(|way| way.quantize.scheme).collect();
        ladder(mix, calibrated).into_iter().map(of_rung).collect()
    }

    #[test]
    fn the_operators_decide_what_is_tried_first() {
        let encoder = Mix {
            convolutions: 1,
            products: 48,
            tables: 2,
            ..Mix::default()
        };
        assert_eq!(
            schemes(encoder, false),
            [vec![Int8Dynamic], vec![Int8Weights, Int8Blocks], vec![Int4, Int4], vec![Float16]]
        );
        let detector = Mix {
            convolutions: 60,
            ..Mix::default()
        };
        assert_eq!(
            schemes(detector, true),
            [vec![Int8Static, Int8Static], vec![Int8Weights], vec![Float16]]
        );
        assert_eq!(
            schemes(detector, false),
            [vec![Int8Weights], vec![Float16]],
            "convolutions are never quantised dynamically"
        );
        assert!(schemes(Mix::default(), true).is_empty());
    }

    #[test]
    fn what_a_way_leaves_is_quantised_by_the_other_scheme() {
        let mix = Mix {
            products: 4,
            ..Mix::default()
        };
        let way = ladder(mix, false)[2].ways[0].clone();
        let of = |recipe: Vec<Technique>| recipe.into_iter().map(|technique| technique.quantize.unwrap()).collect::<Vec<_>>();
        let whole = of(way.recipe(vec![]));
        assert_eq!(whole.len(), 1);
        let partly = of(way.recipe(vec!["head".into()]));
        assert_eq!((partly[0].scheme, partly[1].scheme), (Int4, Int8Dynamic));
        assert_eq!(
            (partly[0].exclude.as_slice(), partly[1].exclude.len()),
            (["head".to_owned()].as_slice(), 0)
        );
    }

    #[test]
    fn every_way_is_one_that_a_recipe_may_name() {
        let mix = Mix {
            convolutions: 3,
            products: 3,
            tables: 1,
            recurrences: 1,
        };
        for technique in ladder(mix, true)
            .iter()
            .flat_map(|rung| &rung.ways)
            .flat_map(|way| way.recipe(vec![]))
        {
            assert!(crate::compress::technique(&technique).is_ok(), "{technique:?}");
        }
    }
}
