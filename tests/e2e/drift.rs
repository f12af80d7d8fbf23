//! Drift: what the optimiser recorded, and what a model is asked about.

use std::io::Cursor;

use serde_json::{Value, json};

use crate::cluster::{Namespace, digits_spec, fixture, story, training};
use crate::traffic::{ask, get};

/// The pictures of a dataset of digits, 64 values each.
fn pictures(file: &str) -> Vec<Vec<f32>> {
    let file = std::fs::File::open(fixture(file)).expect("a fixture");
    let mut archive = zip::ZipArchive::new(file).expect("an archive");
    let mut array = vec![];
    std::io::Read::read_to_end(&mut archive.by_name("image.npy").expect("pictures"), &mut array).expect("an array");
    let values: Vec<f32> = npyz::NpyFile::new(Cursor::new(array))
        .expect("an array")
        .into_vec()
        .expect("floats");
    values.chunks(64).map(<[f32]>::to_vec).collect()
}

/// Asks about each picture, changed, and returns what the runtime says of drift then.
fn drift_after(namespace: &Namespace, model: &str, change: impl Fn(f32) -> f32) -> Value {
    let address = namespace.address(model);
    for picture in pictures("models/digits/digits-heldout.npz") {
        let data: Vec<f32> = picture.iter().map(|value| change(*value)).collect();
        let input = json!([{ "name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": data }]);
        ask(&address, model, &input).unwrap();
    }
    let (status, summary) = get(&format!("{address}/v2/models/{model}/drift"));
    assert_eq!(status, 200, "{summary}\n{}", story(&namespace.name));
    summary
}

fn of<'a>(summary: &'a Value, name: &str, kind: &str) -> &'a Value {
    let tensors = summary["tensors"].as_array().expect("a list");
    let found = tensors.iter().find(|tensor| tensor["name"] == name && tensor["kind"] == kind);
    found.unwrap_or_else(|| panic!("no {kind} of {name} in {summary}"))
}

/// The line of the pod's metrics that tells PSI of the pictures.
fn psi_metric(namespace: &Namespace, model: &str) -> f64 {
    let label = format!("app.kubernetes.io/component=runtime,plimsoll.dev/model={model}");
    let pod = &namespace.items(&["pods", "-l", &label])[0];
    let path = format!(
        "/api/v1/namespaces/{}/pods/{}:8082/proxy/metrics",
        namespace.name,
        pod["metadata"]["name"].as_str().expect("a name")
    );
    let metrics = namespace.kubectl(&["get", "--raw", &path]);
    let is_psi = |line: &&str| line.starts_with("plimsoll_runtime_drift_psi{") && line.contains("tensor=\"image\"");
    let line = metrics
        .lines()
        .find(is_psi)
        .unwrap_or_else(|| panic!("no PSI of the pictures in\n{metrics}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn shifted_inputs_raise_drift_and_usual_ones_do_not() {
    let namespace = Namespace::new("drift");
    let mut spec = digits_spec("v1");
    spec["replicas"] = json!(1);
    namespace.apply_model("usual", &spec);
    // The reference is of what the model was calibrated on where there is such data, and of what it was judged on where not.
    spec["optimize"]["calibration"] = json!({ "uri": training() });
    namespace.apply_model("calibrated", &spec);
    // Without any data there is nothing to compare with.
    namespace.apply_model("bare", &json!({ "source": spec["source"], "replicas": 1 }));
    for model in ["usual", "calibrated", "bare"] {
        namespace.wait_ready(model);
    }
    for (model, from) in [("usual", "Evaluation"), ("calibrated", "Calibration")] {
        let summary = drift_after(&namespace, model, |value| value);
        assert_eq!(summary["reference"]["from"], from, "{summary}");
        let image = of(&summary, "image", "values");
        assert_eq!(image["verdict"], "Stable", "{summary}");
        assert!(psi_metric(&namespace, model) < 0.1);
    }
    // Ink and paper change places.
    let summary = drift_after(&namespace, "usual", |value| 1.0 - value);
    let image = of(&summary, "image", "values");
    assert!(
        image["psi"].as_f64().unwrap() >= 0.25 && image["verdict"] == "Significant",
        "{summary}"
    );
    assert_eq!(summary["verdict"], "Significant", "{summary}");
    assert!(psi_metric(&namespace, "usual") >= 0.25);

    let (status, refusal) = get(&format!("{}/v2/models/bare/drift", namespace.address("bare")));
    assert_eq!(status, 404);
    assert!(
        refusal["error"].as_str().unwrap().contains("calibration or evaluation data"),
        "{refusal}"
    );
}
