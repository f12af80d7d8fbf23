//! The search by the program, on a real model.

use std::fs;
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use plimsoll_package::recipe::{Budget, Dataset, Evaluation, Search, SearchTechnique, Technique};
use plimsoll_package::report::front::{Candidate, Front, Outcome};
use plimsoll_package::report::{Report, Verdict, exit_code};

use super::chain::start;
use super::{inputs, model, program};

fn data(name: &str) -> String {
    model(&format!("digits/digits-{name}.npz")).to_str().unwrap().to_owned()
}

fn search(package: &Path, flags: &[&str]) -> Output {
    let mut command = program();
    command
        .arg("optimize")
        .arg(model("digits/digits-v1.onnx"))
        .arg("--output")
        .arg(package);
    command.args(["--search", "--json"]).args(flags).output().unwrap()
}

fn report(output: &Output) -> Report {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn chosen(front: &Front) -> &Candidate {
    let mut chosen = front.candidates.iter().filter(|candidate| candidate.outcome == Outcome::Chosen);
    let first = chosen.next().expect("one is chosen");
    assert!(chosen.next().is_none(), "one alone is chosen");
    first
}

/// A file with `search` and nothing else of `spec.optimize`.
fn recipe(folder: &Path, search: &str) -> String {
    let path = folder.join("optimize.yaml");
    fs::write(&path, format!("search: {search}\n")).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn the_smallest_within_the_budget_is_found_and_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let package = dir.path().join("package");
    let flags = ["--evaluation", &data("heldout"), "--max-accuracy-drop", "1%"];
    let first = report(&search(&package, &flags));
    let summary = &first.summary;
    assert_eq!(first.gate.verdict, Verdict::WithinBudget);
    let metric = summary.metric.unwrap();
    assert!(metric.after >= metric.before - 0.01, "{metric:?}");
    let ratio = summary.size_before as f64 / summary.size_after as f64;
    assert!(ratio >= 3.5, "{ratio:.2} times smaller");
    let shipped = |layer: Option<u64>| layer.unwrap() as f64;
    assert!(
        shipped(summary.size_layer_before) / shipped(summary.size_layer_after) >= 6.0,
        "{summary:?}"
    );

    let front = first.front.as_ref().unwrap();
    assert!(front.complete);
    let best = chosen(front);
    let applied: Vec<Technique> = first.steps.iter().map(|step| step.technique.clone()).collect();
    assert_eq!(best.recipe, applied);
    assert_eq!(best.size_layer, summary.size_layer_after);
    for candidate in &front.candidates {
        let within = matches!(candidate.outcome, Outcome::OnFront | Outcome::Dominated);
        assert_eq!(candidate.outcome == Outcome::Chosen, candidate.why.is_none(), "{candidate:?}");
        assert!(
            !within || candidate.size_layer.unwrap() as f64 >= 0.98 * best.size_layer.unwrap() as f64,
            "{candidate:?}"
        );
    }
    assert!(front.candidates[0].recipe.is_empty(), "the original is judged, too");

    let second = report(&search(&dir.path().join("again"), &flags));
    assert_eq!(chosen(second.front.as_ref().unwrap()).recipe, best.recipe);
    // What was found is a recipe like any other.
    let file = dir.path().join("found.yaml");
    let found = plimsoll_package::recipe::Optimization {
        recipe: best.recipe.clone(),
        ..Default::default()
    };
    fs::write(&file, serde_yaml_ng::to_string(&found).unwrap()).unwrap();
    let again = program()
        .arg("optimize")
        .arg(model("digits/digits-v1.onnx"))
        .arg("--output")
        .arg(dir.path().join("by-recipe"))
        .args(["--json", "--recipe", file.to_str().unwrap()])
        .args(flags)
        .output()
        .unwrap();
    assert_eq!(report(&again).summary.size_after, summary.size_after);
    assert_eq!(
        fs::read(package.join("model.onnx")).unwrap(),
        fs::read(dir.path().join("by-recipe/model.onnx")).unwrap()
    );
}

#[test]
fn sensitive_layers_stay_wider_where_all_in_four_bits_lose_too_much() {
    let dir = tempfile::tempdir().unwrap();
    let file = recipe(dir.path(), "{techniques: [Quantize]}");
    let flags = ["--recipe", &file, "--calibration", &data("heldout"), "--min-fidelity", "0.99993"];
    let report = report(&search(&dir.path().join("package"), &flags));
    let front = report.front.unwrap();
    let sensitivity: Vec<f64> = front.sensitivity.iter().map(|layer| layer.fidelity).collect();
    assert!(sensitivity.len() >= 2 && sensitivity.is_sorted(), "{:?}", front.sensitivity);
    assert!(front.sensitivity.iter().all(|layer| layer.saved > 0));
    let best = chosen(&front);
    assert!(best.fidelity.unwrap() >= 0.99993);
    let excluded = &best.recipe[0].quantize.as_ref().unwrap().exclude;
    assert_eq!(
        excluded[0], front.sensitivity[0].node,
        "the most sensitive layer is left out: {best:?}"
    );
}

#[test]
fn without_time_there_is_a_result_all_the_same_and_the_front_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let report = report(&search(&dir.path().join("package"), &["--search-time", "1ms"]));
    let front = report.front.unwrap();
    assert!(!front.complete);
    assert_eq!(front.candidates.len(), 2, "the original, and what is most promising");
    assert_eq!(chosen(&front).recipe.len(), 1);
    assert!(report.summary.size_after * 3 < report.summary.size_before);
}

#[test]
fn a_search_goes_on_in_the_folder_that_it_was_told_to_keep() {
    let dir = tempfile::tempdir().unwrap();
    let (package, work) = (dir.path().join("package"), dir.path().join("work"));
    let work_flag = work.to_str().unwrap().to_owned();
    let recipe = recipe(dir.path(), "{techniques: [Quantize]}");
    let run = |flags: &[&str]| {
        let output = search(&package, &[&["--recipe", &recipe, "--work", &work_flag], flags].concat());
        let front = report(&output).front.unwrap();
        (front, String::from_utf8(output.stderr).unwrap())
    };
    let (cut_off, said) = run(&["--search-time", "1ms"]);
    assert!(!cut_off.complete && !said.contains("the search goes on"), "{said}");
    assert_eq!(cut_off.candidates.len(), 2);
    let (whole, said) = run(&["--search-time", "5m"]);
    assert!(said.contains("the search goes on: 2 recipes were judged before"), "{said}");
    assert!(whole.complete && whole.candidates.len() > 2);
    // What is measured anew would differ; what is read back differs by a rounding at most.
    let latencies = |front: &Front| {
        let latencies = front.candidates[..2].iter().map(|candidate| candidate.latency.unwrap());
        latencies
            .map(|latency| format!("{:.6} {:.6}", latency.before_us, latency.after_us))
            .collect::<Vec<_>>()
    };
    assert_eq!(latencies(&cut_off), latencies(&whole));
    let (again, _) = run(&["--search-time", "5m"]);
    assert_eq!(latencies(&again), latencies(&whole));
    assert_eq!(again.candidates.len(), whole.candidates.len());
    // Of another budget nothing is known.
    let (_, said) = run(&["--search-time", "1ms", "--min-fidelity", "0.9"]);
    assert!(!said.contains("the search goes on"), "{said}");
}

#[test]
fn a_folder_to_work_in_is_nobody_elses() {
    let dir = tempfile::tempdir().unwrap();
    let mine = dir.path().join("mine");
    fs::create_dir_all(mine.join("package")).unwrap();
    let refusal = |work: &Path| {
        let output = search(&dir.path().join("out"), &["--work", work.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(i32::from(exit_code::USAGE)));
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(refusal(&mine).contains("it is not empty and was not worked in before"));
    assert!(mine.join("package").is_dir());
    let taken = dir.path().join("taken");
    fs::create_dir(&taken).unwrap();
    let lock = fs::File::create(taken.join(".plimsoll-work")).unwrap();
    lock.lock().unwrap();
    assert!(refusal(&taken).contains("another run is at work there"));
}

#[test]
fn an_impossible_budget_names_the_recipe_that_comes_nearest() {
    let dir = tempfile::tempdir().unwrap();
    let package = dir.path().join("package");
    let file = recipe(dir.path(), "{techniques: [Quantize]}");
    let output = search(&package, &["--recipe", &file, "--max-size", "10Ki"]);
    assert_eq!(output.status.code(), Some(i32::from(exit_code::BUDGET_EXCEEDED)));
    let said = String::from_utf8(output.stderr).unwrap();
    let last = said.lines().last().unwrap();
    assert!(
        last.starts_with("error: none of the ")
            && last.contains("the nearest is Int4 in blocks of 128")
            && last.contains("maxSize allows 10Ki"),
        "{last}"
    );
    let written: Report = serde_json::from_slice(&fs::read(package.join("report.json")).unwrap()).unwrap();
    assert_eq!(written.gate.verdict, Verdict::BudgetExceeded);
    let front = written.front.unwrap();
    assert!(
        front
            .candidates
            .iter()
            .all(|candidate| candidate.outcome == Outcome::BudgetExceeded)
    );
    assert!(!package.join("model.onnx").exists());
}

#[test]
fn what_contradicts_a_search_is_refused_before_anything_is_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |flags: &[&str], says: &str| {
        let output = search(&dir.path().join("package"), flags);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(i32::from(exit_code::USAGE)), "{said}");
        assert!(said.contains(says), "`{says}` is not in: {said}");
    };
    refused(&["--quantize", "int8"], "cannot be used with");
    refused(&["--no-gate"], "cannot be used with");
    refused(&["--search-time", "5 minutes"], "a duration above zero");
    refused(&["--teacher", "larger.onnx"], "on the command line --calibration");
    let both = dir.path().join("both.yaml");
    fs::write(&both, "recipe: [{quantize: {scheme: Int8}}]\n").unwrap();
    refused(&["--recipe", both.to_str().unwrap()], "set either recipe or search, not both");
    let trained = recipe(dir.path(), "{techniques: [Prune, Distill]}");
    refused(&["--recipe", &trained], "names Distill, which needs samples to train on");
    let alone = recipe(dir.path(), "{techniques: [Distill]}");
    refused(&["--recipe", &alone], "makes nothing smaller; add Prune or Quantize");
}

/// The whole lines of a journal.
fn lines(journal: &Path) -> Vec<String> {
    let text = fs::read_to_string(journal).unwrap_or_default();
    let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    whole.map(str::to_owned).collect()
}

#[test]
fn a_search_that_was_killed_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let mut inputs = inputs(model("digits/digits-v1.onnx").to_str().unwrap(), "127.0.0.1:9/models");
    inputs.optimize.search = Some(Search {
        techniques: vec![SearchTechnique::Quantize],
        max_duration: Some("5m".parse().unwrap()),
    });
    inputs.optimize.evaluation = Some(Evaluation {
        dataset: Dataset {
            uri: data("heldout"),
            digest: None,
            credentials_secret: None,
        },
        metric: None,
        labels: None,
    });
    inputs.optimize.budget = Some(Budget {
        max_accuracy_drop: Some("1%".parse().unwrap()),
        ..Budget::default()
    });
    for step in ["fetch", "convert"] {
        assert!(start(step, dir.path(), &inputs).wait().unwrap().success(), "{step}");
    }
    let journal = dir.path().join("work/search/journal.jsonl");
    let mut compress = start("compress", dir.path(), &inputs);
    let begun = Instant::now();
    // What the search is of, the original, and one recipe.
    while lines(&journal).len() < 3 {
        assert!(begun.elapsed() < Duration::from_secs(60) && compress.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(2));
    }
    compress.kill().unwrap();
    compress.wait().unwrap();
    let before = lines(&journal);

    assert!(start("compress", dir.path(), &inputs).wait().unwrap().success());
    let after = lines(&journal);
    assert_eq!(after[..before.len()], before, "nothing is judged again");
    let log = fs::read_to_string(dir.path().join("compress.log")).unwrap();
    assert!(
        log.contains(&format!("the search goes on: {} recipes were judged before", before.len() - 1)),
        "{log}"
    );
    assert!(start("evaluate", dir.path(), &inputs).wait().unwrap().success());
    let report: Report = serde_json::from_slice(&fs::read(dir.path().join("work/package/report.json")).unwrap()).unwrap();
    let front = report.front.unwrap();
    assert!(front.complete && front.candidates.len() == after.len() - 1);
    let judged: Vec<&Candidate> = front.candidates.iter().collect();
    for (index, candidate) in judged.iter().enumerate() {
        let again = judged[..index].iter().any(|earlier| earlier.recipe == candidate.recipe);
        assert!(!again, "{candidate:?} was judged twice");
    }
    assert_eq!(report.steps.len(), chosen(&front).recipe.len());
}
