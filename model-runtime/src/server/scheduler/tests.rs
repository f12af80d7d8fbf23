use std::sync::mpsc::{Receiver, Sender, channel};

use plimsoll_package::manifest::{Datatype, Engine as EngineKind, TensorSpec};

use super::*;

/// Doubles its input, as slowly as the test says, and tells which batches came.
struct Doubling {
    specs: [TensorSpec; 1],
    seconds: fn(usize) -> f64,
    /// What a run waits for, where it waits.
    gate: Option<Mutex<Receiver<()>>>,
    runs: Mutex<Vec<(usize, thread::ThreadId)>>,
}

impl Doubling {
    fn new(seconds: fn(usize) -> f64) -> Arc<Self> {
        Arc::new(Self::with_gate(seconds, None))
    }

    fn with_gate(seconds: fn(usize) -> f64, gate: Option<Mutex<Receiver<()>>>) -> Self {
        let spec = TensorSpec {
            name: "x".to_owned(),
            datatype: Datatype::Fp32,
            shape: vec![-1, -1],
        };
        Self {
            specs: [spec],
            seconds,
            gate,
            runs: Mutex::default(),
        }
    }

    fn gated() -> (Arc<Self>, Sender<()>) {
        let (open, gate) = channel();
        (Arc::new(Self::with_gate(|_| 0.0, Some(Mutex::new(gate)))), open)
    }

    fn rows(&self) -> Vec<usize> {
        self.runs.lock().unwrap().iter().map(|(rows, _)| *rows).collect()
    }
}

impl Engine for Doubling {
    fn kind(&self) -> EngineKind {
        EngineKind::Tract
    }

    fn inputs(&self) -> &[TensorSpec] {
        &self.specs
    }

    fn outputs(&self) -> &[TensorSpec] {
        &self.specs
    }

    fn infer(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
        let rows = inputs[0].rows().unwrap();
        self.runs.lock().unwrap().push((rows, thread::current().id()));
        if let Some(gate) = &self.gate {
            gate.lock().unwrap().recv().unwrap();
        }
        thread::sleep(Duration::from_secs_f64((self.seconds)(rows)));
        let values = inputs[0].as_f32().unwrap();
        assert!(!values.contains(&666.0), "a value that it cannot bear");
        let doubled: Vec<f32> = values.iter().map(|value| 2.0 * value).collect();
        Ok(vec![Tensor::new(inputs[0].shape().to_vec(), doubled).unwrap()])
    }
}

fn batching(rows_max: usize) -> Batching {
    Batching {
        rows_max,
        bytes_max: 1 << 20,
        delay: Duration::ZERO,
    }
}

fn work(values: &[f32], width: usize) -> Work {
    Work {
        inputs: vec![Tensor::new(vec![values.len() / width, width], values.to_vec()).unwrap()],
        client: Client::default(),
        priority: 0,
        deadline: Instant::now() + Duration::from_secs(60),
    }
}

fn outputs(answer: oneshot::Receiver<Result<Answer, Failure>>) -> (Vec<f32>, usize) {
    let answer = answer.blocking_recv().unwrap().unwrap();
    (answer.outputs[0].as_f32().unwrap().to_vec(), answer.rows)
}

/// Waits until the engine has begun as many runs.
fn await_runs(engine: &Doubling, count: usize) {
    while engine.runs.lock().unwrap().len() < count {
        thread::yield_now();
    }
}

#[test]
fn what_waits_is_joined_and_each_gets_its_own() {
    let (engine, open) = Doubling::gated();
    let scheduler = Scheduler::start(vec![engine.clone()], batching(8));
    let first = scheduler.submit(work(&[1.0], 1));
    await_runs(&engine, 1);
    let second = scheduler.submit(work(&[2.0, 3.0], 1));
    let third = scheduler.submit(work(&[4.0], 1));
    let wider = scheduler.submit(work(&[5.0, 6.0], 2));
    (0..3).for_each(|_| open.send(()).unwrap());
    assert_eq!(outputs(first), (vec![2.0], 1));
    assert_eq!(outputs(second), (vec![4.0, 6.0], 3));
    assert_eq!(outputs(third), (vec![8.0], 3));
    assert_eq!(outputs(wider), (vec![10.0, 12.0], 1));
    assert_eq!(engine.rows(), [1, 3, 1]);
}

#[test]
fn a_batch_keeps_to_its_bounds() {
    for (bounds, expected) in [
        (batching(2), vec![1, 2, 2, 1]),
        (batching(1), vec![1; 6]),
        (
            Batching {
                bytes_max: 12,
                ..batching(8)
            },
            vec![1, 3, 2],
        ),
    ] {
        let (engine, open) = Doubling::gated();
        let scheduler = Scheduler::start(vec![engine.clone()], bounds);
        let first = scheduler.submit(work(&[0.0], 1));
        await_runs(&engine, 1);
        let rest: Vec<_> = (0..5).map(|_| scheduler.submit(work(&[1.0], 1))).collect();
        (0..6).for_each(|_| open.send(()).unwrap());
        outputs(first);
        rest.into_iter().for_each(|answer| drop(outputs(answer)));
        assert_eq!(engine.rows(), expected);
    }
}

#[test]
fn one_that_the_engine_cannot_bear_fails_alone() {
    let (engine, open) = Doubling::gated();
    let scheduler = Scheduler::start(vec![engine.clone()], batching(8));
    let first = scheduler.submit(work(&[1.0], 1));
    await_runs(&engine, 1);
    let (good, bad) = (scheduler.submit(work(&[2.0], 1)), scheduler.submit(work(&[666.0], 1)));
    (0..4).for_each(|_| open.send(()).unwrap());
    assert_eq!(outputs(first).0, [2.0]);
    assert_eq!(outputs(good), (vec![4.0], 1));
    let error = bad.blocking_recv().unwrap().unwrap_err();
    assert!(
        matches!(&error, Failure::Engine(EngineError::Panicked(text)) if text.contains("cannot bear")),
        "{error:?}"
    );
}

#[test]
fn nothing_is_computed_for_a_client_that_has_gone_or_a_deadline_that_has_passed() {
    let (engine, open) = Doubling::gated();
    let scheduler = Scheduler::start(vec![engine.clone()], batching(8));
    let first = scheduler.submit(work(&[1.0], 1));
    await_runs(&engine, 1);
    drop(scheduler.submit(work(&[2.0], 1)));
    let late = scheduler.submit(Work {
        deadline: Instant::now(),
        ..work(&[3.0], 1)
    });
    let last = scheduler.submit(work(&[4.0], 1));
    (0..2).for_each(|_| open.send(()).unwrap());
    outputs(first);
    assert!(matches!(late.blocking_recv().unwrap(), Err(Failure::Late)));
    assert_eq!(outputs(last), (vec![8.0], 1));
    assert_eq!(engine.rows(), [1, 1]);
}

#[test]
fn an_engine_serves_on_when_all_that_wait_have_gone() {
    let (engine, open) = Doubling::gated();
    let scheduler = Scheduler::start(vec![engine.clone()], batching(8));
    let first = scheduler.submit(work(&[1.0], 1));
    await_runs(&engine, 1);
    drop(scheduler.submit(work(&[2.0], 1)));
    open.send(()).unwrap();
    outputs(first);
    while !scheduler.shared.lock().line.is_empty() {
        thread::yield_now();
    }
    open.send(()).unwrap();
    let next = scheduler.submit(work(&[3.0], 1));
    let deadline = Instant::now() + Duration::from_secs(10);
    while engine.runs.lock().unwrap().len() < 2 {
        assert!(Instant::now() < deadline, "the engine is lost");
        thread::yield_now();
    }
    assert_eq!(outputs(next), (vec![6.0], 1));
}

#[test]
fn batches_that_serve_nobody_sooner_are_not_made() {
    // Two rows take eight times as long as one.
    let engine = Doubling::new(|rows| 0.002 * (rows * rows * rows) as f64);
    let scheduler = Scheduler::start(vec![engine.clone()], batching(8));
    for _ in 0..20 {
        let answers: Vec<_> = (0..4).map(|_| scheduler.submit(work(&[1.0], 1))).collect();
        answers.into_iter().for_each(|answer| drop(outputs(answer)));
    }
    let rows = engine.rows();
    // Each class of sizes was tried three times: 2 rows, and 3 or 4.
    assert!(rows.iter().filter(|&&rows| rows > 1).count() <= 6, "{rows:?}");
}

#[test]
fn a_quick_model_runs_where_the_request_was_read_and_a_slow_one_elsewhere() {
    let here = thread::current().id();
    for (seconds, inline) in [((|_| 0.0) as fn(usize) -> f64, true), (|_| 0.002, false)] {
        let engine = Doubling::new(seconds);
        let scheduler = Scheduler::start(vec![engine.clone()], batching(8));
        for _ in 0..20 {
            outputs(scheduler.submit(work(&[1.0], 1)));
        }
        let runs = engine.runs.lock().unwrap();
        assert_ne!(runs[0].1, here, "nothing is known of the first");
        assert!(runs[1..].iter().all(|(_, thread)| (*thread == here) == inline));
    }
}

#[test]
fn a_delay_lets_a_batch_fill_up() {
    let engine = Doubling::new(|_| 0.0);
    let bounds = Batching {
        delay: Duration::from_secs(30),
        ..batching(2)
    };
    let scheduler = Scheduler::start(vec![engine.clone()], bounds);
    let answers = [scheduler.submit(work(&[1.0], 1)), scheduler.submit(work(&[2.0], 1))];
    for (answer, expected) in answers.into_iter().zip([2.0, 4.0]) {
        assert_eq!(outputs(answer), (vec![expected], 2));
    }
    let bounds = Batching {
        delay: Duration::from_millis(1),
        ..batching(2)
    };
    let scheduler = Scheduler::start(vec![engine], bounds);
    assert_eq!(outputs(scheduler.submit(work(&[3.0], 1))), (vec![6.0], 1));
}

#[test]
fn an_engine_that_does_not_come_back_is_seen() {
    let (engine, open) = Doubling::gated();
    let scheduler = Scheduler::start(vec![engine.clone()], batching(1));
    assert_eq!(scheduler.busy_for(), Duration::ZERO);
    let answer = scheduler.submit(work(&[1.0], 1));
    await_runs(&engine, 1);
    thread::sleep(Duration::from_millis(5));
    assert!(scheduler.busy_for() >= Duration::from_millis(5));
    open.send(()).unwrap();
    outputs(answer);
    while scheduler.busy_for() > Duration::ZERO {
        thread::yield_now();
    }
}
