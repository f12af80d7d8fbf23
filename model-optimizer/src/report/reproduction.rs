//! How the result came about: the recipe's steps, the samples, the time, and the command that does it again.

use plimsoll_package::recipe::Inputs;
use plimsoll_package::report::{Report, SampleSource, Samples, TechniqueReport};
use plimsoll_package::units::display_size;
use strum::IntoEnumIterator as _;

use super::chart::bar;
use super::figure;
use super::html::{Html, labelled, numbers, section, table, text, words};
use crate::step::Step;

/// The recipe's file in the command.
const RECIPE_FILE: &str = "recipe.yaml";
/// The largest file that is fetched where the command does not say.
const FETCH_SIZE_DEFAULT: &str = "64Gi";

/// What each technique did.
pub(super) fn techniques(steps: &[TechniqueReport]) -> Option<Html> {
    if steps.is_empty() {
        return None;
    }
    let row = |(index, step): (usize, &TechniqueReport)| {
        vec![
            text(index + 1),
            text(figure::recipe(std::slice::from_ref(&step.technique))),
            text(step.changed.len()),
            text(display_size(step.size_after)),
            text(&step.buys),
        ]
    };
    let columns = [
        numbers("#"),
        words("technique"),
        numbers("weights changed"),
        numbers("size after"),
        words("buys"),
    ];
    let rows = steps.iter().enumerate().map(row).collect();
    Some(section(
        "What was done",
        "The techniques of the recipe, in order, and what each of them buys on ONNX Runtime and tract on a CPU; what it did buy here is in the \
         table before and after.",
        [table(&columns, rows, usize::MAX)],
    ))
}

/// The samples that the result was judged on.
pub(super) fn samples(samples: Option<Samples>) -> Option<Html> {
    let Samples { from, count, seed } = samples?;
    let origin = match from {
        SampleSource::Evaluation => "samples of the evaluation data",
        SampleSource::EvaluationPart => {
            "samples of the evaluation data, those that no technique has seen: calibration and evaluation share one dataset"
        }
        SampleSource::Calibration => "samples of the calibration data, for there are no evaluation data",
        SampleSource::Signature => "random samples of the model's signature, for there are no data; real ones say more",
    };
    let seed = seed.map(|seed| format!("; the seed is {seed}")).unwrap_or_default();
    Some(section("Samples", format!("Judged on {count} {origin}{seed}."), []))
}

/// The wall time of each step.
pub(super) fn times(report: &Report) -> Option<Html> {
    let all: f64 = report.step_ms.values().sum();
    let known = Step::iter().filter_map(|step| Some((step, *report.step_ms.get(&step.to_string())?)));
    let row = |(step, ms): (Step, f64)| vec![text(step), text(figure::time(ms * 1e3)), bar(ms / all, "after")];
    let rows: Vec<Vec<Html>> = known.map(row).collect();
    let says = format!("Wall time, {} in all.", figure::time(all * 1e3));
    (!rows.is_empty()).then(|| {
        section(
            "Time",
            says,
            [table(&[words("step"), numbers("took"), words("")], rows, usize::MAX)],
        )
    })
}

/// The command, the recipe and the digests.
pub(super) fn again(report: &Report) -> Html {
    let summary = &report.summary;
    let mut content = vec![labelled("pre", "code", command(&report.inputs))];
    if let Some(yaml) = recipe(&report.inputs) {
        content.push(labelled("h3", "part", RECIPE_FILE));
        content.push(labelled("pre", "code", yaml));
    }
    let mut rows = vec![
        ("source", report.inputs.source.uri.clone()),
        ("its digest", summary.source_digest.to_string()),
    ];
    rows.extend(
        summary
            .evaluation_digest
            .as_ref()
            .map(|digest| ("evaluation data's digest", digest.to_string())),
    );
    rows.extend(report.inputs.teacher.as_ref().map(|teacher| ("teacher", teacher.uri.clone())));
    rows.push(("optimiser", format!("plimsoll-optimizer {}", summary.toolchain)));
    let rows = rows
        .into_iter()
        .map(|(what, which)| vec![text(what), labelled("code", "name", which)])
        .collect();
    content.push(labelled("h3", "part", "Provenance"));
    content.push(table(&[words(""), words("")], rows, usize::MAX));
    section(
        "How to reproduce",
        "The same from the same source and data, by the same version of the optimiser.",
        content,
    )
}

/// The recipe's file; `None` where nothing is asked for.
fn recipe(inputs: &Inputs) -> Option<String> {
    let is_empty = inputs.optimize == Default::default();
    serde_yaml_ng::to_string(&inputs.optimize).ok().filter(|_| !is_empty)
}

/// The command line that gives a package of the same inputs.
fn command(inputs: &Inputs) -> String {
    let mut words = vec![inputs.source.uri.as_str(), "--output", "package"];
    if recipe(inputs).is_some() {
        words.extend(["--recipe", RECIPE_FILE]);
    }
    if let Some(teacher) = &inputs.teacher {
        words.extend(["--teacher", &teacher.uri]);
    }
    let engine = inputs.engine.map(|engine| engine.to_string().to_lowercase());
    if let Some(engine) = &engine {
        words.extend(["--engine", engine]);
    }
    for host in &inputs.plain_http_hosts {
        words.extend(["--plain-http", host]);
    }
    if inputs.max_fetch_size.as_str() != FETCH_SIZE_DEFAULT {
        words.extend(["--max-fetch-size", inputs.max_fetch_size.as_str()]);
    }
    if inputs.no_gate {
        words.push("--no-gate");
    }
    let quoted: Vec<String> = words.into_iter().map(quoted).collect();
    format!("plimsoll-optimizer optimize {}", quoted.join(" "))
}

/// A word as a shell takes it (POSIX.1-2017, "Single-Quotes").
fn quoted(word: &str) -> String {
    let is_plain = |character: char| character.is_ascii_alphanumeric() || "_-./:@%+=,".contains(character);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use plimsoll_package::manifest::Engine;
    use plimsoll_package::recipe::SourceLocation;

    use super::*;

    #[test]
    fn the_command_names_all_that_the_inputs_say_and_is_safe_to_paste() {
        let location = |uri: &str| SourceLocation {
            uri: uri.into(),
            digest: None,
            format: None,
        };
        let mut inputs = Inputs {
            source: location("https://models/it's here.onnx"),
            optimize: Default::default(),
            teacher: None,
            engine: None,
            toolchain: "0".into(),
            repository: String::new(),
            max_fetch_size: "64Gi".parse().unwrap(),
            plain_http_hosts: vec![],
            annotations: Default::default(),
            no_gate: false,
            run_tag: None,
        };
        assert_eq!(
            command(&inputs),
            "plimsoll-optimizer optimize 'https://models/it'\\''s here.onnx' --output package"
        );
        inputs.source = location("m.onnx");
        inputs.optimize = serde_yaml_ng::from_str("recipe: [{prune: {amount: 50%}}]").unwrap();
        inputs.teacher = Some(location("t.onnx"));
        inputs.engine = Some(Engine::OnnxRuntime);
        inputs.plain_http_hosts = vec!["localhost:5000".into()];
        inputs.max_fetch_size = "1Gi".parse().unwrap();
        inputs.no_gate = true;
        assert_eq!(
            command(&inputs),
            "plimsoll-optimizer optimize m.onnx --output package --recipe recipe.yaml --teacher t.onnx --engine onnxruntime --plain-http localhost:5000 \
             --max-fetch-size 1Gi --no-gate"
        );
        assert_eq!(recipe(&inputs).unwrap(), "recipe:\n- prune:\n    amount: 50%\n");
    }
}
