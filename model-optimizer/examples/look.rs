use plimsoll_package::report::{Report, front::*, LatencyChange, MetricChange, Spread};
use plimsoll_package::recipe::{Metric, Technique};
fn main() {
    let a: Vec<String> = std::env::args().collect();
    if a[1] == "time" {
        let read = |p: &str| plimsoll_optimizer::convert::read("x", std::path::Path::new(p)).unwrap();
        let (b, c) = (read(&a[2]), read(&a[3]));
        for d in [false, false, false, true, true, true] {
            let t = std::time::Instant::now();
            let l = plimsoll_optimizer::evaluate::layers::changes(&b, &c, d).unwrap();
            println!("{d} {} {:?}", l.len(), t.elapsed());
        }
        let t = std::time::Instant::now();
        let s = plimsoll_optimizer::graph::weight::sparsity(c.graph.as_ref().unwrap());
        println!("sparsity {s} {:?}", t.elapsed());
        return;
    }
    let mut report: Report = serde_json::from_slice(&std::fs::read(&a[1]).unwrap()).unwrap();
    let recipe = |y: &str| -> Vec<Technique> { serde_yaml_ng::from_str(y).unwrap() };
    let candidate = |y: &str, size: f64, f: f64, lat: f64, outcome, why: Option<&str>| {
        let failed = outcome == Outcome::Failed;
        Candidate {
            recipe: recipe(y),
            size: (!failed).then_some((report.summary.size_before as f64 * size) as u64),
            size_layer: (!failed).then_some((report.summary.size_before as f64 * size * 0.8) as u64),
            metric: (a.len() > 2 && !failed).then_some(MetricChange { name: Metric::Accuracy, before: 0.984, after: 0.984 - (1.0 - f), samples: 450 }),
            fidelity: (!failed).then_some(f),
            latency: (!failed).then_some(LatencyChange { before_us: 1000.0, after_us: 1000.0 * lat }),
            latency_ratio: (!failed).then_some(Spread { median: lat, p10: lat * 0.95, p90: lat * 1.07 }),
            outcome,
            why: why.map(str::to_owned),
        }
    };
    let candidates = vec![
        candidate("[]", 1.0, 1.0, 1.0, Outcome::Dominated, Some("candidate 2 is smaller, faster and as accurate")),
        candidate("[{quantize: {scheme: Float16}}]", 0.5, 0.9999995, 0.9, Outcome::OnFront, Some("candidate 4 is smaller and within the budget")),
        candidate("[{quantize: {scheme: Int8Weights}}]", 0.262, 0.9991, 1.02, Outcome::Dominated, Some("candidate 4 is as small and faster")),
        candidate("[{quantize: {scheme: Int8Dynamic}}]", 0.26, 0.9989, 0.8, Outcome::OnFront, Some("candidate 8 is smaller and within the budget")),
        candidate("[{quantize: {scheme: Int8Static}}]", 0.2600001, 0.9985, 0.6, Outcome::OnFront, None),
        candidate("[{quantize: {scheme: Int4}}]", 0.16, 0.975, 0.7, Outcome::BudgetExceeded, Some("output `y` has fidelity 0.9750 to the original, minFidelity asks for 0.99")),
        candidate("[{prune: {amount: 50%}}, {quantize: {scheme: Int8}}]", 0.26, 0.62, 0.8, Outcome::BudgetExceeded, Some("output `y` has fidelity 0.6200 to the original, minFidelity asks for 0.99")),
        candidate("[{quantize: {scheme: Int4, exclude: [encoder/layer.0/attention, encoder/layer.5/output]}}]", 0.19, 0.992, 0.72, Outcome::Chosen, None),
        candidate("[{prune: {amount: 25%, structure: Channels}}]", 0.0, 0.0, 0.0, Outcome::Failed, Some("the channels of every layer are stuck: a residual ties them to the output")),
    ];
    let sensitivity = (0..40).map(|i| Sensitivity { node: format!("/encoder/layer.{}/attention/self/query/MatMul_{i}", i % 6), operator: "MatMul".into(),
        fidelity: 1.0 - 10f64.powf(-0.5 - 0.12 * f64::from(i)), sqnr_db: Some(4.0 + f64::from(i)), saved: 442_000 }).collect();
    report.front = Some(Front { seed: 42, took_ms: 312_400.0, complete: false, candidates, sensitivity });
    print!("{}", plimsoll_optimizer::report::page(&report));
}
