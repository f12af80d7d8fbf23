//! What it takes to read and write a tensor as JSON: by serde_json, which writes the runtime's; number by number with fast-float2, as the
//! runtime reads them; and by a library that is all SIMD.

use std::hint::black_box;
use std::time::Instant;

/// The least of seven times of a call, in microseconds.
fn least(calls: u32, mut call: impl FnMut()) -> f64 {
    let mut time = || {
        let begun = Instant::now();
        (0..calls).for_each(|_| call());
        begun.elapsed().as_secs_f64() * 1e6 / f64::from(calls)
    };
    (0..7).map(|_| time()).fold(f64::INFINITY, f64::min)
}

/// The numbers of a list without white space.
fn read(text: &str) -> Vec<f32> {
    let (mut rest, mut values) = (&text.as_bytes()[1..], vec![]);
    while let Ok((value, length)) = fast_float2::parse_partial(rest) {
        values.push(value);
        rest = &rest[length + 1..];
    }
    values
}

fn main() {
    println!("| floats | serde_json reads | fast-float2 reads | sonic-rs reads | serde_json writes | sonic-rs writes |\n|---|---|---|---|---|---|");
    for count in [128_u32, 24_576] {
        let values: Vec<f32> = (0..count).map(|index| ((index * 7919 % 9973) as f32 / 9973.0 - 0.5) * 3.0).collect();
        let doubles: Vec<f64> = values.iter().map(|&value| value.into()).collect();
        // As languages write them that know doubles alone, and in their own precision.
        let texts = [("as doubles", serde_json::to_string(&doubles)), ("", serde_json::to_string(&values))];
        for (how, text) in texts {
            let text = text.expect("floats are JSON");
            assert_eq!(read(&text), values);
            let calls = 2_000_000 / count / 4;
            let times = [
                least(calls, || drop(black_box(serde_json::from_str::<Vec<f64>>(black_box(&text))))),
                least(calls, || drop(black_box(read(black_box(&text))))),
                least(calls, || drop(black_box(sonic_rs::from_str::<Vec<f64>>(black_box(&text))))),
                least(calls, || drop(black_box(serde_json::to_vec(black_box(&values))))),
                least(calls, || drop(black_box(sonic_rs::to_vec(black_box(&values))))),
            ];
            let times = times.map(|micros| format!("{micros:.1} µs"));
            println!("| {count} {how} | {} |", times.join(" | "));
        }
    }
}
