use std::fs;
use std::path::Path;
use std::time::UNIX_EPOCH;

use plimsoll_package::manifest::Datatype;

use super::*;

fn spec(name: &str) -> TensorSpec {
    TensorSpec {
        name: name.into(),
        datatype: Datatype::Fp32,
        shape: vec![-1, 2],
    }
}

fn tensor(shape: &[usize], values: &[f32]) -> Tensor {
    Tensor::new(shape.to_vec(), values.to_vec()).unwrap()
}

fn sampling(dir: &Path, share: f64, redact: &[&str]) -> Sampling {
    Sampling {
        to: format!("file://{}", dir.display()),
        share,
        redact: redact.iter().map(|name| (*name).to_owned()).collect(),
    }
}

fn sampler(dir: &Path, share: f64, redact: &[&str]) -> (Sampler, SampleMetrics) {
    let metrics = SampleMetrics::default();
    (
        Sampler::start(&sampling(dir, share, redact), "net", "1", &metrics).unwrap(),
        metrics,
    )
}

/// The lines of all objects, in their order.
fn written(dir: &Path) -> Vec<serde_json::Value> {
    let folder = dir.join("model=net/version=1");
    let mut objects: Vec<_> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().path())
        .collect();
    objects.sort();
    assert!(
        objects
            .iter()
            .all(|object| object.extension().is_some_and(|ending| ending == "jsonl")),
        "{objects:?}"
    );
    let texts = objects.iter().map(|object| fs::read_to_string(object).unwrap());
    texts
        .flat_map(|text| text.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<_>>())
        .collect()
}

#[test]
fn a_line_is_a_row_of_evaluation_data() {
    let sample = Sample {
        id: Some("a-1".into()),
        time: UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
        rows: Some(2),
        inputs: vec![
            (
                "image".into(),
                Tensor::new(vec![2, 2, 2], vec![0.1_f32, 0.25, 3.0, -4.5, 5.0, 6.0, 7.0, 8.0]).unwrap(),
            ),
            ("mask".into(), Tensor::new(vec![2, 1], vec![true, false]).unwrap()),
            ("name".into(), Tensor::new(vec![2], vec![b"one".to_vec(), b"two".to_vec()]).unwrap()),
        ],
        outputs: vec![
            ("scores".into(), tensor(&[2, 2], &[0.5, f32::NAN, 1.0, 2.0])),
            ("constant".into(), Tensor::new(vec![3], vec![1_i64 << 60, 2, 3]).unwrap()),
        ],
        held: Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap(),
    };
    let mut lines = vec![];
    line::write(&mut lines, &sample, "net", "1", &["secret".into()]).unwrap();
    // The optimiser's tests read this file.
    let expected = include_str!("../../../tests/models/samples.jsonl");
    assert_eq!(String::from_utf8(lines).unwrap(), expected);
}

#[test]
fn what_json_or_the_optimiser_cannot_hold_is_no_line() {
    let refused = |tensor: Tensor| {
        let sample = Sample {
            id: None,
            time: UNIX_EPOCH,
            rows: tensor.rows(),
            inputs: vec![("x".into(), tensor)],
            outputs: vec![],
            held: Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap(),
        };
        line::write(&mut vec![], &sample, "net", "1", &[]).unwrap_err().to_string()
    };
    assert!(refused(tensor(&[1, 2], &[1.0, f32::INFINITY])).contains("NaN or infinite"));
    assert!(refused(Tensor::new(vec![1], vec![vec![0xff_u8]]).unwrap()).contains("not UTF-8"));
    assert!(refused(tensor(&[1, 0], &[])).contains("`x` is empty"));
}

#[tokio::test]
async fn a_share_is_written_and_what_is_redacted_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let (sampler, metrics) = sampler(dir.path(), 0.5, &["secret", "id"]);
    let (inputs, outputs) = ([spec("x"), spec("secret")], [spec("y")]);
    for value in 0..10_u8 {
        let tensors = [tensor(&[1, 2], &[value.into(), 0.5]), tensor(&[1, 2], &[0.4375, 0.4375])];
        if let Some(sample) = sampler.take(&inputs, &tensors, Some("who")) {
            sampler.send(sample, &outputs, &[tensor(&[1, 1], &[1.5])]);
        }
    }
    sampler.end().await;
    let lines = written(dir.path());
    assert_eq!(
        lines.iter().map(|line| line["x"][0].as_f64().unwrap()).collect::<Vec<_>>(),
        [1.0, 3.0, 5.0, 7.0, 9.0]
    );
    for line in &lines {
        let text = line.to_string();
        assert!(!text.contains("0.4375") && !text.contains("who"), "{text}");
        let request = &line["_request"];
        assert_eq!(
            (&request["outputs"]["y"][0], &request["redacted"][0]),
            (&1.5.into(), &"secret".into()),
            "{text}"
        );
    }
    assert_eq!(metrics.get(Sampled::Written), 5);
}

#[tokio::test]
async fn rows_are_lines_and_what_is_no_row_is_written_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (sampler, metrics) = sampler(dir.path(), 1.0, &[]);
    let send = |inputs: &[Tensor], output: Tensor| {
        let sample = sampler.take(&[spec("x"), spec("z")], inputs, None).unwrap();
        sampler.send(sample, &[spec("y")], &[output]);
    };
    send(
        &[tensor(&[3, 1], &[1.0, 2.0, 3.0]), tensor(&[3], &[7.0, 8.0, 9.0])],
        tensor(&[3, 1], &[4.0, 5.0, 6.0]),
    );
    send(&[tensor(&[2, 1], &[1.0, 2.0]), tensor(&[], &[7.0])], tensor(&[1], &[4.0]));
    send(&[tensor(&[1, 1], &[f32::NAN]), tensor(&[1], &[7.0])], tensor(&[1], &[4.0]));
    sampler.end().await;
    let lines = written(dir.path());
    assert_eq!(lines.len(), 4, "{lines:?}");
    assert_eq!((&lines[1]["x"], &lines[1]["z"]), (&serde_json::json!([2.0]), &8.0.into()));
    assert_eq!(
        (&lines[1]["_request"]["row"], &lines[1]["_request"]["outputs"]["y"]),
        (&1.into(), &serde_json::json!([5.0]))
    );
    assert_eq!((&lines[3]["x"], &lines[3]["z"]), (&serde_json::json!([[1.0], [2.0]]), &7.0.into()));
    assert_eq!((metrics.get(Sampled::Written), metrics.get(Sampled::Unwritable)), (2, 1));
}

#[tokio::test]
async fn what_the_buffer_does_not_hold_is_dropped_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let (sampler, metrics) = sampler(dir.path(), 1.0, &[]);
    let take = |bytes: usize| sampler.take(&[spec("x")], &[tensor(&[1, bytes / 4], &vec![1.0; bytes / 4])], None);
    // By bytes: a second sample of more than half of what may wait has no room while the first is there.
    let first = take(20 << 20).unwrap();
    assert!(take(20 << 20).is_none());
    assert_eq!(metrics.get(Sampled::Dropped), 1);
    drop(first);
    // By number: nothing is written before this task waits.
    for _ in 0..WAITING_MAX + 10 {
        let sample = take(4).unwrap();
        sampler.send(sample, &[], &[]);
    }
    assert_eq!(metrics.get(Sampled::Dropped), 1 + 10);
    sampler.end().await;
    assert_eq!(metrics.get(Sampled::Written), WAITING_MAX as u64);
}

#[tokio::test]
async fn a_store_that_fails_loses_samples_in_the_open() {
    let dir = tempfile::tempdir().unwrap();
    let (sampler, metrics) = sampler(dir.path(), 1.0, &[]);
    fs::write(dir.path().join("model=net"), "a file where a folder should be").unwrap();
    let sample = sampler.take(&[spec("x")], &[tensor(&[1, 1], &[1.0])], None).unwrap();
    sampler.send(sample, &[], &[]);
    sampler.end().await;
    assert_eq!((metrics.get(Sampled::Failed), metrics.get(Sampled::Written)), (1, 0));
}

#[tokio::test]
async fn lines_wait_no_longer_than_stated() {
    let dir = tempfile::tempdir().unwrap();
    let metrics = SampleMetrics::default();
    let age = Duration::from_millis(50);
    let sampler = Sampler::start_with(&sampling(dir.path(), 1.0, &[]), "net", "1", &metrics, age).unwrap();
    let sample = sampler.take(&[spec("x")], &[tensor(&[1, 1], &[1.0])], None).unwrap();
    sampler.send(sample, &[], &[]);
    while metrics.get(Sampled::Written) == 0 {
        tokio::time::sleep(age / 10).await;
    }
    assert_eq!(written(dir.path()).len(), 1);
}

#[test]
fn a_name_that_keeps_nothing_back_is_refused() {
    let sampling = |name: &str| sampling(Path::new("/"), 1.0, &[name]);
    for known in ["x", "y", "id"] {
        assert_eq!(sampling(known).check(&[spec("x")], &[spec("y")]), Ok(()));
    }
    let refused = sampling("X").check(&[spec("x")], &[spec("y")]).unwrap_err();
    assert_eq!(refused, "--sample-redact X is none of what is written, which is x, y, id");
}
