//! A recipe's file: the YAML of `spec.optimize`, in which every key must be known.

use plimsoll_package::recipe::{Budget, Dataset, Evaluation, Optimization, Search, Technique};
use serde::Deserialize;
use serde::de::IgnoredAny;

/// Most letters by which a key may differ from the one that was meant: a third of them.
const DISTANCE_SHARE: usize = 3;

/// [`Optimization`], and what `spec.optimize` holds beside it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    #[serde(default)]
    recipe: Vec<Technique>,
    search: Option<Search>,
    calibration: Option<Dataset>,
    evaluation: Option<Evaluation>,
    budget: Option<Budget>,
    /// What a Job may use means nothing without one.
    #[serde(default, rename = "job")]
    _job: Option<IgnoredAny>,
}

/// Reads the text of a recipe's file.
///
/// # Errors
/// In words, where it does not parse: with the path of what is wrong and, of an unknown key, the known one that is nearest.
pub fn read(text: &str) -> Result<Optimization, String> {
    // A file that holds nothing, or comments alone, is a mapping without keys.
    let file: Option<File> = serde_yaml_ng::from_str(text).map_err(|error| with_suggestion(error.to_string()))?;
    let Some(File {
        recipe,
        search,
        calibration,
        evaluation,
        budget,
        _job,
    }) = file
    else {
        return Ok(Optimization::default());
    };
    Ok(Optimization {
        recipe,
        search,
        calibration,
        evaluation,
        budget,
    })
}

/// Adds to what serde says of an unknown key or value which of the known ones may be meant.
fn with_suggestion(message: String) -> String {
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    match quoted.split_first() {
        Some((unknown, known)) if message.contains("unknown ") => match nearest(unknown, known) {
            Some(nearest) => format!("{message}; did you mean `{nearest}`?"),
            None => message,
        },
        _ => message,
    }
}

/// The one of `known` that `word` differs least from, where that is little.
fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let distances = known
        .iter()
        .map(|candidate| (distance(&word.to_lowercase(), &candidate.to_lowercase()), *candidate));
    let (distance, nearest) = distances.min_by_key(|(distance, _)| *distance)?;
    (distance * DISTANCE_SHARE <= word.chars().count().max(DISTANCE_SHARE)).then_some(nearest)
}

/// How many letters are to be put in, taken out or replaced to make one word of the other (Levenshtein 1966).
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (index, letter) in one.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], index + 1);
        for (place, known) in other.iter().enumerate() {
            let replaced = diagonal + usize::from(letter != *known);
            diagonal = row[place + 1];
            row[place + 1] = replaced.min(diagonal + 1).min(row[place] + 1);
        }
    }
    row[other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_spec_optimize_is_read() {
        let text = "recipe:\n- prune: {amount: 50%}\ncalibration: {uri: c.npz}\nevaluation: {dataset: {uri: e.npz}}\n\
                    budget: {maxSize: 1Mi}\njob: {deadline: 10m, resources: {limits: {cpu: 2}}}\n";
        let read = read(text).unwrap();
        assert!(read.recipe.len() == 1 && read.calibration.is_some() && read.evaluation.is_some() && read.budget.is_some());
        assert!(super::read("search: {}").unwrap().search.is_some());
        assert_eq!(super::read("# nothing\n").unwrap(), Optimization::default());
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_path_and_the_nearest_known_one() {
        for (text, path, meant) in [
            ("recipes: [{prune: {amount: 5%}}]", "unknown field `recipes`", "recipe"),
            ("recipe: []\nbudgte: {maxSize: 1Mi}", "unknown field `budgte`", "budget"),
            (
                "budget: {maxAcuracyDrop: 1%}",
                "budget: unknown field `maxAcuracyDrop`",
                "maxAccuracyDrop",
            ),
            (
                "recipe: [{prune: {amount: 5%}}, {qantize: {scheme: Int8}}]",
                "recipe[1]: unknown field `qantize`",
                "quantize",
            ),
            (
                "recipe: [{quantize: {scheme: int8dynamic}}]",
                "unknown variant `int8dynamic`",
                "Int8Dynamic",
            ),
        ] {
            let refused = read(text).unwrap_err();
            assert!(
                refused.contains(path) && refused.ends_with(&format!("did you mean `{meant}`?")),
                "{refused}"
            );
        }
        let far = read("colour: red").unwrap_err();
        assert!(
            far.contains("expected one of `recipe`, `search`") && !far.contains("did you mean"),
            "{far}"
        );
        assert!(!read("recipe: 5").unwrap_err().contains("did you mean"));
    }
}
