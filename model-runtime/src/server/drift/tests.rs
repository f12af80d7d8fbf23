use plimsoll_package::manifest::Datatype;
use proptest::prelude::*;

use super::*;

const MINUTE: Duration = Duration::from_secs(60);

fn spec(name: &str, width: i64) -> TensorSpec {
    TensorSpec {
        name: name.into(),
        datatype: Datatype::Fp32,
        shape: vec![-1, width],
    }
}

/// Of a model with the input `x` of four values, spread evenly over 0 to 1, and an output of two classes, of which the first is three times as
/// frequent.
fn drift() -> Drift {
    let tensor = |name: &str| TensorReference {
        name: name.into(),
        ..TensorReference::default()
    };
    let reference = Reference {
        schema_version: 1,
        from: Source::Calibration,
        samples: 1000,
        inputs: vec![TensorReference {
            values: Distribution::of((0..4000).map(|index| f64::from(index) / 4000.0).collect()),
            ..tensor("x")
        }],
        outputs: vec![
            tensor("unknown"),
            TensorReference {
                classes: Some(vec![750, 250]),
                ..tensor("y")
            },
        ],
    };
    Drift::new(&reference, 10 * MINUTE, &[spec("x", 4)], &[spec("other", 1), spec("y", 2)])
}

fn tensor(width: usize, values: Vec<f32>) -> Tensor {
    Tensor::new(vec![values.len() / width, width], values).unwrap()
}

/// Sends so many samples from `now` on, two milliseconds apart: inputs over `shift..shift + 1`, and the second class for one in `second`.
fn send(drift: &Drift, now: Duration, count: u32, shift: f32, second: u32) {
    for index in 0..count {
        let now = now + Duration::from_millis(2) * index;
        let values = (0..4).map(|value| shift + ((index * 4 + value) * 619 % 4000) as f32 / 4000.0);
        let look = drift.look_at(now, &[tensor(4, values.collect())]).unwrap();
        let scores = if index % second == 0 { vec![0.0, 1.0] } else { vec![1.0, 0.0] };
        drift.outputs_at(now, &look, &[tensor(1, vec![0.0]), tensor(2, scores)]);
    }
}

#[test]
fn what_looks_as_it_did_is_stable() {
    let drift = drift();
    send(&drift, MINUTE, 400, 0.0, 4);
    let summary = drift.summary_at(2 * MINUTE);
    assert_eq!((summary.rows, summary.verdict), (400, Verdict::Stable), "{summary:?}");
    let [x, y] = &summary.tensors[..] else { panic!("{summary:?}") };
    assert_eq!((x.name, x.side, x.kind, x.count), ("x", Side::Input, Kind::Values, 1600));
    assert!(x.psi.unwrap() < 0.01 && x.ks.unwrap() < 0.03, "{x:?}");
    assert_eq!((y.name, y.side, y.kind, y.count), ("y", Side::Output, Kind::Classes, 400));
    assert_eq!((y.psi.unwrap(), y.ks), (0.0, None));
}

#[test]
fn shifted_inputs_and_other_classes_are_told() {
    let drift = drift();
    send(&drift, MINUTE, 400, 0.5, 4);
    let summary = drift.summary_at(2 * MINUTE);
    let [x, y] = &summary.tensors[..] else { panic!("{summary:?}") };
    assert_eq!((x.verdict, y.verdict), (Verdict::Significant, Verdict::Stable), "{summary:?}");
    assert!((x.ks.unwrap() - 0.5).abs() < 0.01, "{x:?}");
    let drift = self::drift();
    // A quarter becomes a half: (0.5 - 0.75) ln(0.5 / 0.75) + (0.5 - 0.25) ln(0.5 / 0.25) = 0.2747
    send(&drift, MINUTE, 400, 0.0, 2);
    let summary = drift.summary_at(2 * MINUTE);
    let [x, y] = &summary.tensors[..] else { panic!("{summary:?}") };
    assert_eq!(
        (x.verdict, y.verdict, summary.verdict),
        (Verdict::Stable, Verdict::Significant, Verdict::Significant)
    );
    assert!((y.psi.unwrap() - 0.274_653).abs() < 1e-6, "{y:?}");
}

#[test]
fn little_founds_no_verdict() {
    let drift = drift();
    let summary = drift.summary_at(MINUTE);
    assert_eq!(
        (summary.tensors[0].psi, summary.tensors[0].count, summary.verdict),
        (None, 0, Verdict::TooFew)
    );
    send(&drift, MINUTE, 99, 5.0, 4);
    assert_eq!(drift.summary_at(2 * MINUTE).verdict, Verdict::TooFew);
    send(&drift, 2 * MINUTE, 1, 5.0, 4);
    assert_eq!(drift.summary_at(3 * MINUTE).verdict, Verdict::Significant);
}

#[test]
fn a_reference_of_little_founds_no_verdict_either() {
    let reference = Reference {
        schema_version: 1,
        from: Source::Evaluation,
        samples: 40,
        inputs: vec![],
        outputs: vec![TensorReference {
            name: "y".into(),
            classes: Some(vec![4; 10]),
            ..TensorReference::default()
        }],
    };
    let drift = Drift::new(&reference, MINUTE, &[spec("x", 4)], &[spec("y", 10)]);
    for index in 0..1000 {
        let now = Duration::from_millis(2 * index);
        let look = drift.look_at(now, &[tensor(4, vec![0.0; 4])]).unwrap();
        drift.outputs_at(now, &look, &[tensor(10, vec![0.0; 10])]);
    }
    let summary = drift.summary_at(Duration::from_secs(3));
    assert!(summary.tensors[0].psi.unwrap() > 1.0);
    assert_eq!(summary.verdict, Verdict::TooFew);
}

#[test]
fn the_window_forgets_and_takes_no_more_memory() {
    let drift = drift();
    send(&drift, Duration::ZERO, 400, 5.0, 1);
    assert_eq!(drift.summary_at(9 * MINUTE).verdict, Verdict::Significant);
    assert_eq!(drift.summary_at(10 * MINUTE).rows, 0);
    let held = |drift: &Drift| {
        let ring = drift.ring();
        (
            ring.parts.len(),
            ring.parts.iter().map(|part| part.counts.capacity()).sum::<usize>(),
        )
    };
    let before = held(&drift);
    assert_eq!(before, (10, 10 * (12 + 2)));
    for part in 0..200 {
        send(&drift, MINUTE * (10 + part), 100, 0.0, 4);
    }
    assert_eq!(held(&drift), before);
    let summary = drift.summary_at(MINUTE * 209);
    assert_eq!((summary.rows, summary.verdict), (1000, Verdict::Stable), "{summary:?}");
}

#[test]
fn a_flood_is_looked_at_a_thousand_times_a_second() {
    let drift = drift();
    let input = [tensor(4, vec![0.0; 4])];
    // Twenty-five requests a millisecond, for a second.
    let looks = (0..25_000).filter(|index| drift.look_at(Duration::from_micros(40 * index), &input).is_some());
    assert_eq!(looks.count(), 1000);
    // A request of more values than are looked at.
    drift.look_at(MINUTE, &[tensor(4, vec![0.0; 40_000])]).unwrap();
    let summary = drift.summary_at(MINUTE);
    assert_eq!(summary.rows, 11_000);
    assert_eq!(summary.tensors[0].count, 4000 + 1000);
}

#[test]
fn without_something_to_compare_with_it_is_told_what_to_do() {
    let none = |window| Drift::read(Path::new("/nowhere"), None, window, &[], &[]).err().unwrap();
    assert!(none(MINUTE).contains("optimise it with calibration or evaluation data"));
    assert!(none(Duration::ZERO).contains("--drift-window"));
}

fn histograms() -> impl Strategy<Value = (Vec<u64>, Vec<u64>)> {
    (1_usize..40).prop_flat_map(|bins| {
        let counts = || prop::collection::vec(prop_oneof![Just(0), 0_u64..10, 0_u64..1_000_000], bins);
        (counts(), counts())
    })
}

proptest! {
    #[test]
    fn the_index_is_zero_for_equals_never_negative_and_the_same_both_ways((one, other) in histograms()) {
        let scaled: Vec<u64> = one.iter().map(|count| count * 3).collect();
        match psi(&one, &scaled) {
            Some(same) => prop_assert!(same.abs() < 1e-9),
            None => prop_assert!(one.iter().all(|count| *count == 0)),
        }
        if let Some(index) = psi(&one, &other) {
            prop_assert!(index >= 0.0 && index.is_finite());
            prop_assert!((index - psi(&other, &one).unwrap()).abs() < 1e-9);
        }
    }

    #[test]
    fn the_statistic_lies_between_zero_and_one((one, other) in histograms()) {
        if let Some(statistic) = kolmogorov_smirnov(&one, &other) {
            prop_assert!((0.0..=1.0).contains(&statistic));
            prop_assert!((statistic - kolmogorov_smirnov(&other, &one).unwrap()).abs() < 1e-12);
            prop_assert!(kolmogorov_smirnov(&one, &one).unwrap() < 1e-12);
        }
    }

    #[test]
    fn every_value_has_a_bin_and_the_data_have_theirs(values in prop::collection::vec(-1e6_f64..1e6, 1..200), other in any::<f64>()) {
        let distribution = Distribution::of(values.clone()).unwrap();
        let mut counts = vec![0; distribution.bins()];
        values.iter().for_each(|value| counts[distribution.bin(*value)] += 1);
        prop_assert_eq!(counts, distribution.counts());
        prop_assert!(distribution.bin(other) < distribution.bins());
    }
}
