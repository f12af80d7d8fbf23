//! What a package records for a runtime to tell drift by.

use std::path::Path;

use plimsoll_package::drift::{DRIFT_FILE, Reference, Source, kolmogorov_smirnov, psi};
use plimsoll_package::manifest::Manifest;

use super::{model, program};

/// Optimises digits with those flags; gives the package's reference, as it is and as it is written.
fn recorded(package: &Path, flags: &[&str]) -> (Reference, Vec<u8>) {
    let output = program()
        .arg("optimize")
        .arg(model("digits/digits-v1.onnx"))
        .arg("--output")
        .arg(package)
        // Of one engine: under load another may be given up, and engines differ in the last digits.
        .args(["--quantize", "int8", "--engine", "tract"])
        .args(flags)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let manifest = Manifest::read(package).unwrap();
    manifest.verify(package).unwrap();
    assert!(manifest.files.contains_key(DRIFT_FILE));
    (Reference::read(package).unwrap(), std::fs::read(package.join(DRIFT_FILE)).unwrap())
}

fn data(name: &str) -> String {
    model(&format!("digits/digits-{name}.npz")).to_str().unwrap().to_owned()
}

#[test]
fn a_package_records_what_its_data_look_like() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ["--evaluation", &data("heldout")];
    let (evaluated, written) = recorded(&dir.path().join("evaluated"), &flags);
    assert_eq!((evaluated.from, evaluated.samples), (Source::Evaluation, 450));
    let [image] = &evaluated.inputs[..] else { panic!("{evaluated:?}") };
    let [logits] = &evaluated.outputs[..] else {
        panic!("{evaluated:?}")
    };
    assert_eq!((&*image.name, &image.classes, &image.lengths), ("image", &None, &None));
    assert_eq!(image.values.as_ref().unwrap().counts().iter().sum::<u64>(), 450 * 64);
    let classes = logits.classes.as_ref().unwrap();
    assert_eq!((classes.len(), classes.iter().sum::<u64>()), (10, 450));
    // There are about as many of each digit.
    assert!(classes.iter().all(|count| (35..=55).contains(count)), "{classes:?}");
    assert!(written.len() < 4096, "{}", written.len());

    let (_, again) = recorded(&dir.path().join("again"), &flags);
    assert_eq!(written, again, "the same inputs give the same bytes");

    // Calibration data go before: they are what the model was fitted to. At most 512 of its 1347 pictures are run.
    let flags = ["--evaluation", &data("heldout"), "--calibration", &data("training")];
    let (calibrated, _) = recorded(&dir.path().join("calibrated"), &flags);
    assert_eq!((calibrated.from, calibrated.samples), (Source::Calibration, 512));
    let counts = |reference: &Reference| reference.outputs[0].classes.clone().unwrap();
    let distance = psi(&counts(&evaluated), &counts(&calibrated)).unwrap();
    assert!(distance < 0.1, "digits are as frequent in both: {distance}");
    assert!(kolmogorov_smirnov(&counts(&evaluated), &counts(&calibrated)).unwrap() < 0.1);
}

#[test]
fn one_dataset_for_both_is_divided_before() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ["--evaluation", &data("heldout"), "--calibration", &data("heldout")];
    let (reference, _) = recorded(&dir.path().join("package"), &flags);
    assert_eq!((reference.from, reference.samples), (Source::Calibration, 450 / 4));
}
