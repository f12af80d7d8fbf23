//! The bounded part of fuzzing, which every run of the tests does: a saved corpus as it is, and damaged in ways that a fixed seed gives. No
//! input may panic, take memory without bound, or never end. The targets beside this file look for more, led by coverage; what they find is
//! kept in the corpus.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// Damaged files that are made of each kind; `PLIMSOLL_FUZZ_DAMAGED` asks for more of them.
const DAMAGED: u64 = 2000;
/// Most bytes of memory that this process ever held: what tests themselves take, and all readers at once.
const MEMORY_BYTES_MAX: u64 = 400 << 20;

/// Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators": SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

fn read(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
        .into_iter()
        .map(|path| {
            let bytes = fs::read(&path).unwrap();
            (path, bytes)
        })
        .collect()
}

/// Damages `bytes` in one to four places; `other` is a file that pieces are taken from.
fn damaged(bytes: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
    /// Numbers at the edges of what fields hold.
    const EDGES: [u64; 10] = [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, u64::MAX];
    let mut bytes = bytes.to_vec();
    for _ in 0..1 + random.below(4) {
        let place = random.below(bytes.len() + 1);
        let length = 1 + random.below(16);
        let end = (place + length).min(bytes.len());
        match random.below(8) {
            0 if place < bytes.len() => bytes[place] ^= 1 << random.below(8),
            1 if place < bytes.len() => bytes[place] = random.next() as u8,
            2 => bytes.truncate(place),
            3 => drop(bytes.drain(place..end)),
            4 => {
                let copied = bytes[place..end].to_vec();
                let target = random.below(bytes.len() + 1);
                bytes.splice(target..target, copied);
            }
            5 => {
                let from = random.below(other.len() + 1);
                let piece = other[from..(from + 4 * length).min(other.len())].to_vec();
                bytes.splice(place..end, piece);
            }
            6 => {
                let edge = EDGES[random.below(EDGES.len())].to_le_bytes();
                let width = [1, 2, 4, 8][random.below(4)].min(bytes.len() - place);
                bytes[place..place + width].copy_from_slice(&edge[..width]);
            }
            _ => {
                // The same as protobuf writes numbers.
                let mut varint = Vec::new();
                prost::encoding::encode_varint(EDGES[random.below(EDGES.len())], &mut varint);
                bytes.splice(place..(place + 1).min(bytes.len()), varint);
            }
        }
    }
    bytes
}

fn memory_peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() << 10
}

/// Gives `target` every file of `corpus`, and damaged ones.
pub(crate) fn check(corpus: &Path, target: impl Fn(&[u8])) {
    let kind = corpus.file_name().unwrap().to_string_lossy();
    let files = read(corpus);
    let run = |bytes: &[u8], name: &str| {
        if catch_unwind(AssertUnwindSafe(|| target(bytes))).is_err() {
            let kept = std::env::temp_dir().join(format!("plimsoll-{kind}-{name}"));
            fs::write(&kept, bytes).unwrap();
            panic!("the input in {} panics", kept.display());
        }
        let peak = memory_peak();
        assert!(peak < MEMORY_BYTES_MAX, "{kind}, {name}: {} MiB of memory", peak >> 20);
    };
    for (path, bytes) in &files {
        run(bytes, &path.file_name().unwrap().to_string_lossy());
    }
    let mut random = Random(0x5eed);
    let asked = std::env::var("PLIMSOLL_FUZZ_DAMAGED").ok().and_then(|count| count.parse().ok());
    for number in 0..asked.unwrap_or(DAMAGED) {
        let (one, other) = (random.below(files.len()), random.below(files.len()));
        let bytes = damaged(&files[one].1, &files[other].1, &mut random);
        run(&bytes, &number.to_string());
    }
}
