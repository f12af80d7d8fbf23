//! Prunes weights in memory by magnitude and prints the seconds that it took: what `cargo xtask bench optimizer` sets beside
//! `torch.nn.utils.prune.global_unstructured`.
//!
//! `magnitude COUNT`: that many weights, in eight tensors; half of them become zero.

use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let count: usize = std::env::args().nth(1).ok_or("magnitude COUNT")?.parse()?;
    // A xorshift (Marsaglia 2003): its numbers need no order and no quality, but must differ.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut number = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let mut tensors: Vec<Vec<f32>> = (0..8).map(|_| (0..count / 8).map(|_| number()).collect()).collect();
    let mut slices: Vec<&mut [f32]> = tensors.iter_mut().map(Vec::as_mut_slice).collect();
    let begun = Instant::now();
    plimsoll_optimizer::compress::prune::prune_magnitude(&mut slices, 0.5).map_err(|_| "a weight is not finite")?;
    let seconds = begun.elapsed().as_secs_f64();
    let zeros = tensors.iter().flatten().filter(|value| **value == 0.0).count();
    if zeros.abs_diff(count / 2) > 8 {
        return Err(format!("{zeros} of {count} weights are zero").into());
    }
    println!("{seconds}");
    Ok(())
}
