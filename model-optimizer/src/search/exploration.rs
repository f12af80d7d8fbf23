//! The order in which recipes are tried: each decides by what those before it measured, so that few are.

use plimsoll_package::recipe::{Distill, Prune, PruneCriterion, PruneStructure, Quantize, QuantizeScheme, Technique};
use plimsoll_package::report::front::Sensitivity;
use plimsoll_package::units::Percentage;

use super::front::{Judged, Standing};
use super::ladder::{Rung, Way};
use crate::failure::Failure;

/// Shares of single weights that may go, in percent.
const AMOUNTS: [u32; 19] = [5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 80, 85, 90, 95];
/// Shares of whole units that may go, in percent.
const UNIT_AMOUNTS: [u32; 8] = [5, 10, 15, 20, 25, 30, 40, 50];
/// The units that may go whole.
const STRUCTURES: [PruneStructure; 3] = [PruneStructure::Channels, PruneStructure::FeedForward, PruneStructure::Heads];
/// Most nodes that a recipe can exclude.
const EXCLUDED_MAX: usize = 256;

/// Why a search ends before it tried all that it meant to.
#[derive(Debug)]
pub enum Stop {
    /// Its time is up.
    OutOfTime,
    /// Something failed that is no recipe's fault.
    Failed(Failure),
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// A layer, and what it loses when it alone is quantised.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Layer {
    /// The nodes that use its weight.
    pub nodes: Vec<String>,
    /// What it loses.
    pub sensitivity: Sensitivity,
}

impl Layer {
    /// Orders layers by what they lose, the most first.
    #[must_use]
    pub fn by_loss(one: &Self, other: &Self) -> std::cmp::Ordering {
        let sqnr = |layer: &Self| layer.sensitivity.sqnr_db.unwrap_or(f64::INFINITY);
        let fidelity = one.sensitivity.fidelity.total_cmp(&other.sensitivity.fidelity);
        fidelity.then(sqnr(one).total_cmp(&sqnr(other)))
    }
}

/// What judges recipes.
pub trait Judge {
    /// Measures what `recipe` gives.
    ///
    /// # Errors
    /// [`Stop`]; a recipe that does not work on the model is judged as failed.
    fn judge(&mut self, recipe: Vec<Technique>) -> Result<Judged, Stop>;

    /// Measures what each layer that `quantize` changes loses alone, the most sensitive first; `None` where that would take too long.
    ///
    /// # Errors
    /// [`Stop`].
    fn sensitivity(&mut self, quantize: &Quantize) -> Result<Option<Vec<Layer>>, Stop>;
}

/// What is to be tried.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Plan {
    /// The ways of quantising.
    pub ladder: Vec<Rung>,
    /// Whether weights may be pruned.
    pub prunes: bool,
    /// Whether there are data that show which of them matter.
    pub calibrated: bool,
    /// The training that may follow.
    pub distill: Option<Distill>,
}

/// Tries what `plan` names; `true` where nothing of it was left out for want of time.
///
/// 1. The original, which shows that the model can be judged.
/// 2. Each rung of the ladder: a gentler way where the one before loses too much.
/// 3. Of ways that lose too much and would be the smallest: the same without their most sensitive layers, as few as bisection finds.
/// 4. The smallest so far, pruned: single weights, then whole units, as many as bisection finds.
/// 5. What lost too much, and more pruning than the budget allowed, each mended by training.
///
/// # Errors
/// [`Stop`] of the judge.
pub fn explore(judge: &mut impl Judge, plan: &Plan) -> Result<bool, Stop> {
    let mut exploration = Exploration {
        judge,
        base: None,
        complete: true,
    };
    exploration.attempt(vec![])?;
    let broken = exploration.quantize(&plan.ladder)?;
    if plan.prunes {
        exploration.prune(plan.calibrated)?;
    }
    if let Some(distill) = &plan.distill {
        exploration.mend(&broken, plan.prunes, distill)?;
    }
    Ok(exploration.complete)
}

struct Exploration<'a, J> {
    judge: &'a mut J,
    /// The best of what loses no more than it may.
    base: Option<Judged>,
    complete: bool,
}

/// What comes of an attempt within a bisection.
enum Step {
    Passed,
    Broke,
    /// No further one can pass and be of use.
    GaveUp,
}

impl<J: Judge> Exploration<'_, J> {
    fn attempt(&mut self, recipe: Vec<Technique>) -> Result<Judged, Stop> {
        let judged = self.judge.judge(recipe)?;
        if judged.loses_little() {
            let held = self.base.as_ref();
            let is_better = held.is_none_or(|held| match (judged.standing(), held.standing()) {
                (Standing::Within, Standing::TooCostly) => true,
                (Standing::TooCostly, Standing::Within) => false,
                _ => judged.is_better_than(held),
            });
            if is_better {
                self.base = Some(judged.clone());
            }
        }
        Ok(judged)
    }

    fn base_recipe(&self) -> Vec<Technique> {
        self.base.as_ref().map_or_else(Vec::new, |base| base.candidate.recipe.clone())
    }

    /// Whether one of that size would be chosen, were it within the budget.
    fn would_be_smaller(&self, judged: &Judged) -> bool {
        self.base
            .as_ref()
            .is_none_or(|base| base.standing() != Standing::Within || judged.size() < base.size())
    }

    /// Tries the rungs; returns the recipes that lose too much, the smallest first.
    fn quantize(&mut self, ladder: &[Rung]) -> Result<Vec<Judged>, Stop> {
        let mut broken: Vec<(&Way, Judged)> = Vec::new();
        for rung in ladder {
            if rung.last_resort && !self.base_recipe().is_empty() {
                continue;
            }
            let mut last = None;
            for way in &rung.ways {
                let judged = self.attempt(way.recipe(vec![]))?;
                match judged.standing() {
                    Standing::TooLossy => last = Some((way, judged)),
                    Standing::Failed => {}
                    Standing::Within | Standing::TooCostly => {
                        last = None;
                        break;
                    }
                }
            }
            broken.extend(last);
        }
        broken.sort_by(|one, other| one.1.size().total_cmp(&other.1.size()));
        for (way, judged) in &broken {
            if self.would_be_smaller(judged) {
                self.leave_out(way)?;
            }
        }
        Ok(broken.into_iter().map(|(_, judged)| judged).collect())
    }

    /// Leaves out the most sensitive layers, as few as make `way` lose no more than it may.
    fn leave_out(&mut self, way: &Way) -> Result<(), Stop> {
        let Some(layers) = self.judge.sensitivity(&way.quantize)? else {
            self.complete = false;
            return Ok(());
        };
        let nodes = |count: usize| -> Vec<String> { layers[..count].iter().flat_map(|layer| layer.nodes.clone()).collect() };
        let mut most = layers.len().saturating_sub(1);
        while nodes(most).len() > EXCLUDED_MAX {
            most -= 1;
        }
        self.last_passing(most, |exploration, index| {
            let judged = exploration.attempt(way.recipe(nodes(most - index)))?;
            Ok(match judged.standing() {
                Standing::Within | Standing::TooCostly => Step::Passed,
                // With more layers left out it is still larger.
                Standing::TooLossy if !exploration.would_be_smaller(&judged) => Step::GaveUp,
                Standing::TooLossy | Standing::Failed => Step::Broke,
            })
        })
    }

    /// Prunes the best so far: single weights, then whole units.
    fn prune(&mut self, calibrated: bool) -> Result<(), Stop> {
        let single = PruneStructure::Unstructured;
        self.prune_further(single, PruneCriterion::Magnitude, None)?;
        if calibrated {
            self.prune_further(single, PruneCriterion::SparseGpt, None)?;
        }
        for structure in STRUCTURES {
            self.prune_further(structure, PruneCriterion::Magnitude, None)?;
        }
        Ok(())
    }

    /// Prunes the best so far further than it is pruned, and trains it where `distill` says how.
    fn prune_further(&mut self, structure: PruneStructure, criterion: PruneCriterion, distill: Option<&Distill>) -> Result<(), Stop> {
        let amounts = match structure {
            PruneStructure::Unstructured => AMOUNTS.as_slice(),
            _ => UNIT_AMOUNTS.as_slice(),
        };
        let best = self.base_recipe();
        let is_alike = |prune: &Prune| prune.structure == structure;
        let pruned = |technique: &Technique| technique.prune.clone().filter(is_alike).and_then(|prune| prune.amount);
        let reached = best.iter().find_map(pruned);
        let first = amounts
            .iter()
            .position(|percent| reached == Some(share(*percent)))
            .map_or(0, |index| index + 1);
        let is_kept = |technique: &&Technique| technique.distill.is_none() && !technique.prune.as_ref().is_some_and(is_alike);
        let base: Vec<Technique> = best.iter().filter(is_kept).cloned().collect();
        // Of what is left of narrower layers, single weights go.
        let place = match structure {
            PruneStructure::Unstructured => base.iter().take_while(|technique| technique.prune.is_some()).count(),
            _ => 0,
        };
        self.last_passing(amounts.len() - first, |exploration, index| {
            let prune = Prune {
                amount: Some(share(amounts[first + index])),
                structure,
                criterion,
                ..Prune::default()
            };
            let mut recipe = base.clone();
            recipe.insert(
                place,
                Technique {
                    prune: Some(prune),
                    ..Technique::default()
                },
            );
            if let Some(recipe_trained) = distill.and_then(|distill| trained(&recipe, distill)) {
                recipe = recipe_trained;
            }
            let judged = exploration.attempt(recipe)?;
            Ok(match judged.standing() {
                Standing::Within | Standing::TooCostly => Step::Passed,
                Standing::TooLossy => Step::Broke,
                // Whether the model has such units, or can be trained, is no matter of the amount.
                Standing::Failed => Step::GaveUp,
            })
        })
    }

    /// Trains what lost too much, and what is pruned further than the budget allowed without training.
    fn mend(&mut self, broken: &[Judged], prunes: bool, distill: &Distill) -> Result<(), Stop> {
        for judged in broken {
            if !self.would_be_smaller(judged) {
                continue;
            }
            let mended = trained(&judged.candidate.recipe, distill);
            if let Some(recipe) = mended
                && self.attempt(recipe)?.standing() == Standing::Failed
            {
                // What has no gradient here has none in the others.
                return Ok(());
            }
        }
        if !prunes {
            return Ok(());
        }
        for structure in [PruneStructure::Unstructured, PruneStructure::Channels] {
            self.prune_further(structure, PruneCriterion::Magnitude, Some(distill))?;
        }
        Ok(())
    }

    /// Looks for the largest index below `count` that passes, taking it that all below it do: by bisection, in about log2(count) tries.
    fn last_passing(&mut self, count: usize, mut passes: impl FnMut(&mut Self, usize) -> Result<Step, Stop>) -> Result<(), Stop> {
        let (mut low, mut high) = (0, count);
        while low < high {
            let middle = low + (high - low) / 2;
            match passes(self, middle)? {
                Step::Passed => low = middle + 1,
                Step::Broke => high = middle,
                Step::GaveUp => break,
            }
        }
        Ok(())
    }
}

/// `recipe` with training at its end or, where it quantises in blocks, whose operators have no gradient, before that; `None` where nothing comes
/// before.
fn trained(recipe: &[Technique], distill: &Distill) -> Option<Vec<Technique>> {
    let in_blocks = |technique: &Technique| {
        let scheme = technique.quantize.as_ref().map(|quantize| quantize.scheme);
        matches!(scheme, Some(QuantizeScheme::Int4 | QuantizeScheme::Int8Blocks))
    };
    let place = recipe.iter().position(in_blocks).unwrap_or(recipe.len());
    let mut trained = recipe.to_vec();
    trained.insert(
        place,
        Technique {
            distill: Some(distill.clone()),
            ..Technique::default()
        },
    );
    (place > 0).then_some(trained)
}

fn share(percent: u32) -> Percentage {
    format!("{percent}%")
        .parse()
        .unwrap_or_else(|_| unreachable!("a share below 100 percent"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::front::tests::limit;
    use crate::search::front::{chosen, words};
    use crate::search::ladder::{Mix, ladder};
    use plimsoll_package::report::front::{Candidate, Outcome};

    /// A model of ten layers of 1000 bytes, of which layer `i` loses `i + 1` when it is quantised, and as much again in 4 bits.
    struct Model {
        /// Most that it may lose.
        loss_max: f64,
        size_max: Option<f64>,
        judged: Vec<Judged>,
        swept: usize,
        tries_max: usize,
    }

    impl Model {
        fn new(loss_max: f64) -> Self {
            Self {
                loss_max,
                size_max: None,
                judged: vec![],
                swept: 0,
                tries_max: usize::MAX,
            }
        }

        fn measure(recipe: &[Technique]) -> Option<(f64, f64)> {
            let mut bytes = [1000.0_f64; 10];
            let mut losses = [0.0_f64; 10];
            let mut pruned = 0.0;
            let mut trained = false;
            for technique in recipe {
                if let Some(prune) = &technique.prune {
                    if prune.structure != PruneStructure::Unstructured {
                        return None;
                    }
                    pruned = prune.amount.as_ref().unwrap().value().unwrap();
                }
                if let Some(quantize) = &technique.quantize {
                    let (share, cost) = match quantize.scheme {
                        QuantizeScheme::Int4 => (0.125, 2.0),
                        QuantizeScheme::Float16 => (0.5, 0.01),
                        _ => (0.25, 1.0),
                    };
                    for (layer, (bytes, loss)) in bytes.iter_mut().zip(&mut losses).enumerate() {
                        if *bytes == 1000.0 && !quantize.exclude.contains(&layer.to_string()) {
                            *bytes *= share;
                            *loss = cost * (layer + 1) as f64;
                        }
                    }
                }
                trained |= technique.distill.is_some();
            }
            let loss = losses.iter().sum::<f64>() + 100.0 * pruned * pruned;
            Some((bytes.iter().sum::<f64>() * (1.0 - pruned), if trained { loss / 2.0 } else { loss }))
        }
    }

    impl Judge for Model {
        fn judge(&mut self, recipe: Vec<Technique>) -> Result<Judged, Stop> {
            if self.judged.len() == self.tries_max {
                return Err(Stop::OutOfTime);
            }
            let measured = Self::measure(&recipe);
            let mut limits = Vec::new();
            if let Some((size, loss)) = measured {
                limits.push(limit("maxAccuracyDrop", self.loss_max, loss, loss <= self.loss_max));
                limits.extend(self.size_max.map(|most| limit("maxSize", most, size, size <= most)));
            }
            let judged = Judged {
                candidate: Candidate {
                    recipe,
                    size: measured.map(|(size, _)| size as u64),
                    size_layer: measured.map(|(size, _)| size as u64),
                    metric: None,
                    fidelity: measured.map(|(_, loss)| 1.0 - loss / 1000.0),
                    latency: None,
                    latency_ratio: None,
                    outcome: match measured {
                        None => Outcome::Failed,
                        Some(_) if limits.iter().all(|limit| limit.passed) => Outcome::OnFront,
                        Some(_) => Outcome::BudgetExceeded,
                    },
                    why: None,
                },
                limits,
                engines: vec![],
                latency: None,
                took_ms: 1.0,
            };
            self.judged.push(judged.clone());
            Ok(judged)
        }

        fn sensitivity(&mut self, _: &Quantize) -> Result<Option<Vec<Layer>>, Stop> {
            self.swept += 1;
            let layer = |index: usize| Layer {
                nodes: vec![index.to_string()],
                sensitivity: Sensitivity {
                    node: index.to_string(),
                    operator: "MatMul".into(),
                    fidelity: 1.0 - index as f64 / 100.0,
                    sqnr_db: None,
                    saved: 750,
                },
            };
            Ok(Some((0..10).rev().map(layer).collect()))
        }
    }

    fn plan(prunes: bool, distills: bool) -> Plan {
        let mix = Mix {
            products: 10,
            ..Mix::default()
        };
        let distill = Distill::of(2);
        Plan {
            ladder: ladder(mix, false),
            prunes,
            calibrated: false,
            distill: distills.then_some(distill),
        }
    }

    fn best(model: &Model) -> (String, f64) {
        let best = &model.judged[chosen(&model.judged).unwrap()];
        (words(&best.candidate.recipe), best.size())
    }

    #[test]
    fn the_fewest_of_the_most_sensitive_layers_stay_wider() {
        // In 4 bits all lose 110, in 8 bits 55; with the three most sensitive ones in 8 bits it is 83.
        let mut model = Model::new(83.0);
        assert!(explore(&mut model, &plan(false, false)).unwrap());
        let recipe = &model.judged[chosen(&model.judged).unwrap()].candidate.recipe;
        assert_eq!(recipe[0].quantize.as_ref().unwrap().exclude, ["9", "8", "7"]);
        assert_eq!(best(&model).1, 7.0 * 125.0 + 3.0 * 250.0);
        assert_eq!(model.swept, 1);
        assert!(model.judged.len() <= 10, "{} tries", model.judged.len());
    }

    #[test]
    fn nothing_is_left_out_where_all_layers_fit() {
        let mut model = Model::new(200.0);
        assert!(explore(&mut model, &plan(false, false)).unwrap());
        assert_eq!(best(&model), ("Int4 in blocks of 128".into(), 1250.0));
        assert_eq!(model.swept, 0);
        let tried: Vec<String> = model.judged.iter().map(|judged| words(&judged.candidate.recipe)).collect();
        assert_eq!(tried, ["the original", "Int8Dynamic", "Int8Weights", "Int4 in blocks of 128"]);
    }

    #[test]
    fn as_much_is_pruned_as_the_budget_allows_and_more_where_training_mends_it() {
        // 4 bits lose 110, 50% more pruned 25.
        let mut model = Model::new(136.0);
        assert!(explore(&mut model, &plan(true, false)).unwrap());
        assert_eq!(best(&model).0, "prune 50% + Int4 in blocks of 128");
        let narrower = model.judged.iter().filter(|judged| judged.standing() == Standing::Failed).count();
        assert_eq!(narrower, 3, "each structure that the model does not have is tried once");

        let mut model = Model::new(66.0);
        assert!(explore(&mut model, &plan(true, true)).unwrap());
        // 4 bits but for six layers lose 65, and training halves the loss: (65 + 100 * 0.8^2) / 2 = 64.5.
        assert_eq!(
            best(&model).0,
            "prune 80% + distil 2 epochs + Int4 in blocks of 32 but for 6 nodes + Int8Dynamic"
        );
    }

    #[test]
    fn what_lost_too_much_is_trained() {
        let mut model = Model::new(30.0);
        assert!(explore(&mut model, &plan(false, false)).unwrap());
        assert_eq!(best(&model), ("Int8Dynamic but for 3 nodes".into(), 4750.0));
        let mut model = Model::new(30.0);
        assert!(explore(&mut model, &plan(false, true)).unwrap());
        assert_eq!(best(&model), ("Int8Dynamic + distil 2 epochs".into(), 2500.0));
    }

    #[test]
    fn half_precision_is_the_last_resort() {
        let mut model = Model::new(0.9);
        assert!(explore(&mut model, &plan(false, false)).unwrap());
        assert_eq!(best(&model), ("Float16".into(), 5000.0));
    }

    #[test]
    fn what_is_too_large_is_pruned_further() {
        let mut model = Model::new(200.0);
        model.size_max = Some(700.0);
        assert!(explore(&mut model, &plan(true, false)).unwrap());
        let (recipe, size) = best(&model);
        assert!(size <= 700.0, "{recipe} has {size}");
    }

    #[test]
    fn without_time_the_best_so_far_is_what_there_is() {
        let mut model = Model::new(200.0);
        model.tries_max = 2;
        assert!(matches!(explore(&mut model, &plan(true, true)), Err(Stop::OutOfTime)));
        assert_eq!(best(&model).0, "Int8Dynamic");
    }
}
