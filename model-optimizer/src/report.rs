//! `report.html`: the report as a page for people, in one file that asks nothing of the network and runs nothing.

use plimsoll_package::report::Report;

use html::{Html, element, labelled, text};

mod chart;
mod figure;
mod front;
mod html;
mod measured;
mod reproduction;
mod verdict;
mod weights;

const STYLE: &str = include_str!("report/style.css");

/// The page of a report, as HTML in UTF-8: the verdict first, then what was measured, then how it came about. What is absent of the report
/// is absent of the page.
#[must_use]
pub fn page(report: &Report) -> String {
    let name = report
        .inputs
        .source
        .uri
        .trim_end_matches('/')
        .rsplit('/')
        .next()
        .unwrap_or_default();
    let head = [
        Html::own("<meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">"),
        // Whatever gets into the page, nothing runs and nothing is fetched.
        Html::own("<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"),
        element("title", &[], [text(format_args!("{name}: what compression cost"))]),
        element("style", &[], [Html::own(STYLE)]),
    ];
    let title = [
        element("h1", &[], [text(name)]),
        labelled(
            "p",
            "faint",
            format_args!("What compression by {} cost", figure::recipe(&report.inputs.optimize.recipe)),
        ),
    ];
    let searched = report.front.as_ref();
    let parts = [
        Some(verdict::banner(report)),
        verdict::limits(report),
        Some(measured::change(report)),
        searched.map(|front| front::candidates(report, front)),
        searched.and_then(|front| front::sensitivity(&front.sensitivity, None)),
        report.sensitivity.as_ref().and_then(front::sweep),
        weights::layers(&report.layers),
        weights::distributions(&report.layers),
        measured::outputs(&report.outputs),
        measured::classes(&report.classes),
        weights::skipped(&report.skipped),
        reproduction::techniques(&report.steps),
        reproduction::samples(report.samples),
        reproduction::times(report),
        Some(reproduction::again(report)),
    ];
    let main = element("main", &[], title.into_iter().chain(parts.into_iter().flatten()));
    let page = element(
        "html",
        &[("lang", &"en")],
        [element("head", &[], head), element("body", &[], [main])],
    );
    format!("<!doctype html>\n{}\n", page.as_str())
}

#[cfg(test)]
mod tests {
    use plimsoll_package::digest::Digest;
    use plimsoll_package::manifest::Engine;
    use plimsoll_package::recipe::{Inputs, Metric, SourceLocation, Technique};
    use plimsoll_package::report::front::{Candidate, Front, Outcome, Sensitivity, Sweep};
    use plimsoll_package::report::layer::{Distribution, LayerChange, LayerState};
    use plimsoll_package::report::{
        ClassChange, EngineReport, Gate, LatencyChange, LimitCheck, MemoryChange, MetricChange, OutputFidelity, SampleSource, Samples,
        Skipped, SliceFidelity, Spread, Summary, TechniqueReport, Verdict,
    };

    use super::*;

    /// What a run without the gate knows.
    fn bare() -> Report {
        Report {
            schema_version: 1,
            summary: Summary {
                artifact: None,
                reused: false,
                source_digest: Digest::of(b"model"),
                evaluation_digest: None,
                size_before: 4 << 20,
                size_after: 1 << 20,
                size_layer_before: None,
                size_layer_after: None,
                sparsity: 0.25,
                metric: None,
                fidelity: None,
                latency: None,
                engine: Engine::Tract,
                toolchain: "0.1.0".into(),
            },
            inputs: Inputs {
                source: SourceLocation {
                    uri: "models/digits.onnx".into(),
                    digest: None,
                    format: None,
                },
                optimize: serde_yaml_ng::from_str("recipe: [{quantize: {scheme: Int8}}]").unwrap(),
                teacher: None,
                engine: None,
                toolchain: "0.1.0".into(),
                repository: String::new(),
                max_fetch_size: "64Gi".parse().unwrap(),
                plain_http_hosts: vec![],
                annotations: Default::default(),
                no_gate: true,
                run_tag: None,
            },
            gate: Gate {
                verdict: Verdict::NotGated,
                limits: vec![],
            },
            samples: None,
            steps: vec![],
            outputs: vec![],
            classes: vec![],
            engines: vec![],
            skipped: vec![],
            layers: vec![],
            sensitivity: None,
            front: None,
            step_ms: Default::default(),
        }
    }

    /// A report of which every part is there.
    fn full() -> Report {
        let latency = LatencyChange {
            before_us: 120.0,
            after_us: 90.0,
        };
        let ratio = Spread {
            median: 0.75,
            p10: 0.7,
            p90: 0.8,
        };
        let metric = MetricChange {
            name: Metric::Accuracy,
            before: 0.984,
            after: 0.97,
            samples: 450,
        };
        let state = |kind: &str, bytes, counts: &[u64]| LayerState {
            element_type: kind.into(),
            shape: vec![64, 32],
            bytes,
            sparsity: 0.5,
            distribution: Some(Distribution {
                low: -1.0,
                high: 1.0,
                counts: counts.to_vec(),
            }),
        };
        let recipe: Vec<Technique> = serde_yaml_ng::from_str("[{quantize: {scheme: Int8}}]").unwrap();
        let candidate = |outcome, size, fidelity| Candidate {
            recipe: recipe.clone(),
            size,
            size_layer: size,
            metric: None,
            fidelity,
            latency: Some(latency),
            latency_ratio: Some(ratio),
            outcome,
            why: Some("it is larger than the first".into()),
        };
        let limit = |of: &str, measured, passed| LimitCheck {
            limit: "minFidelity".into(),
            default: true,
            of: of.into(),
            allowed: 0.99,
            measured,
            passed,
            message: (!passed).then(|| "output `y` has fidelity 0.9000 to the original".to_owned()),
        };
        Report {
            summary: Summary {
                metric: Some(metric),
                fidelity: Some(0.9),
                latency: Some(latency),
                size_layer_before: Some(4 << 20),
                size_layer_after: Some(1 << 19),
                evaluation_digest: Some(Digest::of(b"data")),
                ..bare().summary
            },
            gate: Gate {
                verdict: Verdict::BudgetExceeded,
                limits: vec![limit("output x", 0.999, true), limit("output y", 0.9, false)],
            },
            samples: Some(Samples {
                from: SampleSource::EvaluationPart,
                count: 338,
                seed: Some(7),
            }),
            steps: vec![TechniqueReport {
                technique: recipe[0].clone(),
                buys: recipe[0].buys().to_owned(),
                changed: vec!["w".into()],
                size_after: 1 << 20,
            }],
            outputs: vec![OutputFidelity {
                name: "y".into(),
                cosine: 0.9,
                sqnr_db: Some(12.0),
                max_abs_error: 0.5,
                agreement: Some(0.98),
                slices: 10,
                silent_slices: 2,
                worst_slices: vec![SliceFidelity {
                    axis: 1,
                    index: 4,
                    cosine: 0.8,
                    sqnr_db: None,
                }],
            }],
            classes: vec![ClassChange {
                class: 3,
                samples: 45,
                before: 1.0,
                after: 0.9,
            }],
            engines: vec![
                EngineReport {
                    engine: Engine::OnnxRuntime,
                    latency: Some(latency),
                    latency_ratio: Some(ratio),
                    memory: Some(MemoryChange {
                        before_bytes: 8 << 20,
                        after_bytes: 3 << 20,
                    }),
                    memory_ratio: None,
                    refused: None,
                },
                EngineReport {
                    engine: Engine::Tract,
                    latency: None,
                    latency_ratio: None,
                    memory: None,
                    memory_ratio: None,
                    refused: Some("it lacks an operator".into()),
                },
            ],
            skipped: vec![Skipped {
                name: "head".into(),
                reason: "its node is excluded".into(),
            }],
            layers: vec![LayerChange {
                weight: "w".into(),
                operator: "MatMul".into(),
                before: state("FLOAT", 8192, &[1, 2, 1]),
                after: Some(state("INT8", 2304, &[2, 1, 1])),
            }],
            front: Some(Front {
                seed: 11,
                took_ms: 2500.0,
                complete: false,
                candidates: vec![
                    candidate(Outcome::Chosen, Some(1 << 20), Some(0.999)),
                    candidate(Outcome::Dominated, Some(2 << 20), Some(0.99)),
                    candidate(Outcome::Failed, None, None),
                ],
                sensitivity: vec![Sensitivity {
                    node: "first layer".into(),
                    operator: "MatMul".into(),
                    fidelity: 0.97,
                    sqnr_db: Some(9.5),
                    saved: 6000,
                }],
            }),
            step_ms: [("compress".to_owned(), 12.0), ("evaluate".to_owned(), 250.0)].into(),
            ..bare()
        }
    }

    fn headings(page: &str) -> Vec<&str> {
        page.split("<h2>").skip(1).filter_map(|rest| rest.split("</h2>").next()).collect()
    }

    #[test]
    fn the_verdict_comes_first_and_every_part_in_its_order() {
        let page = page(&full());
        let verdict = page.find("Outside of the budget").unwrap();
        assert!(verdict < page.find("<h2>").unwrap());
        assert!(page.contains("The model is not handed out: output `y` has fidelity 0.9000 to the original."));
        assert_eq!(
            headings(&page),
            [
                "Limits",
                "Before and after",
                "Front",
                "Sensitivity of each layer",
                "Weights",
                "Distributions of weights",
                "Fidelity of each output",
                "Classes",
                "What was left alone",
                "What was done",
                "Samples",
                "Time",
                "How to reproduce"
            ]
        );
    }

    #[test]
    fn the_page_says_what_was_measured() {
        let page = page(&full());
        for words in [
            "4.00x smaller",
            "8.00x smaller",
            "accuracy, 450 samples",
            "1.40 points worse",
            "0.75 (0.70 to 0.80) times as long",
            "it lacks an operator",
            "10 and 2 silent",
            "-10.0",
            "FLOAT → INT8 64×32",
            "it is larger than the first",
            "2.50 s, which was not enough",
            ">original</text>",
            "Judged on 338 samples",
            "the seed is 7",
            "262.00 ms in all",
            "recipe.yaml",
            "scheme: Int8",
            "its node is excluded",
            "a smaller file and less to pull; speed where products in integers measure faster",
        ] {
            assert!(page.contains(words), "{words} is missing");
        }
        assert!(!page.contains("over budget"), "no candidate is");
        // The limit that is exceeded comes before the one that holds.
        assert!(page.find("✗ exceeded").unwrap() < page.find("✓ holds").unwrap());
    }

    #[test]
    fn what_is_absent_of_the_report_is_absent_of_the_page() {
        let page = page(&bare());
        assert_eq!(headings(&page), ["Before and after", "How to reproduce"]);
        assert!(page.contains("? Not measured") && page.contains("the gate was turned off"));
        assert!(page.contains("--no-gate"));
        assert!(!page.contains("NaN") && !page.contains("<svg"));
    }

    #[test]
    fn without_a_search_the_sensitivity_is_there_or_it_is_said_why_not() {
        let layers = full().front.unwrap().sensitivity;
        let with = |layers, left, why: Option<&str>| {
            let report = Report {
                front: None,
                sensitivity: Some(Sweep {
                    layers,
                    left,
                    why: why.map(str::to_owned),
                }),
                ..full()
            };
            let page = page(&report);
            assert!(headings(&page).contains(&"Sensitivity of each layer"));
            page
        };
        let some = with(layers, 3, Some("the time for it was up"));
        assert!(some.contains("first layer") && some.contains("3 smaller layers were not measured: the time for it was up."));
        let none = with(vec![], 0, Some("there are no calibration data"));
        assert!(none.contains("Not measured: there are no calibration data."));
    }

    #[test]
    fn a_model_within_its_budget_is_told_in_one_sentence() {
        let report = Report {
            gate: Gate::default(),
            ..full()
        };
        let sentence = "The model is 4.00x smaller (4Mi to 1Mi), takes 0.75 times as long as the original on Tract and has accuracy 97.0% where \
            the original has 98.4%.";
        assert!(page(&report).contains(sentence), "{}", page(&report));
    }

    #[test]
    fn whatever_comes_from_outside_is_text() {
        let evil = "<script>alert(1)</script>\" onload='x";
        let mut report = full();
        report.inputs.source.uri = format!("https://models/{evil}");
        report.inputs.optimize = serde_yaml_ng::from_str("calibration: {uri: '<script>'}").unwrap();
        report.gate.limits[1].of = evil.into();
        report.gate.limits[1].message = Some(evil.into());
        report.outputs[0].name = evil.into();
        report.engines[1].refused = Some(evil.into());
        report.skipped[0].name = evil.into();
        report.skipped[0].reason = evil.into();
        report.layers[0].weight = evil.into();
        report.layers[0].operator = evil.into();
        let front = report.front.as_mut().unwrap();
        front.candidates[0].why = Some(evil.into());
        front.sensitivity[0].node = evil.into();
        let page = page(&report);
        assert!(!page.contains("<script"), "{page}");
        assert!(!page.contains("\" onload"), "{page}");
        let page = page.replace("<wbr>", "");
        assert!(page.matches("&lt;script&gt;alert(1)&lt;/script&gt;&quot; onload=&#39;x").count() >= 10);
    }

    #[test]
    fn the_page_fetches_nothing_and_runs_nothing() {
        let page = page(&full());
        for forbidden in [
            "<script", "<link", "<img", "<iframe", "src=", "href=", "@import", "url(", "http://", "https://",
        ] {
            assert!(!page.contains(forbidden), "{forbidden}");
        }
        assert!(page.contains("default-src 'none'"));
    }
}
