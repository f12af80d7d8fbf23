//! Compression of layers: gzip (RFC 1952), by repetitions or by the frequencies of bytes alone.

use std::io::{self, Read};

use crc32fast::Hasher;
use miniz_oxide::deflate::core::{CompressionStrategy, CompressorOxide, create_comp_flags_from_zip_params};
use miniz_oxide::deflate::stream::deflate;
use miniz_oxide::{MZError, MZFlush, MZStatus};

/// Bytes read at a time.
const PIECE_BYTES: usize = 128 << 10;
/// No name, no time, no operating system: the same bytes for the same content.
const HEADER: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];

/// How bytes are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    /// What repeats is referred to: for texts, floats, and long runs of zeros.
    Repetitions,
    /// Frequent bytes take fewer bits: for integers of which many are zero, but in no order. References to the short runs that chance makes
    /// would cost more than they save.
    Frequencies,
}

impl Packing {
    pub(super) const ALL: [Self; 2] = [Self::Repetitions, Self::Frequencies];

    fn flags(self) -> u32 {
        /// A negative window means deflate without a header of its own (RFC 1951).
        const RAW: i32 = -15;
        match self {
            Self::Repetitions => create_comp_flags_from_zip_params(1, RAW, CompressionStrategy::Default as i32),
            Self::Frequencies => create_comp_flags_from_zip_params(6, RAW, CompressionStrategy::HuffmanOnly as i32),
        }
    }
}

/// The compressed bytes of what `inner` gives.
pub(super) struct Packer<R> {
    inner: R,
    compressor: Box<CompressorOxide>,
    /// Read and not yet compressed.
    input: Vec<u8>,
    taken: usize,
    is_at_end: bool,
    checksum: Hasher,
    length: u32,
    /// Compressed and not yet given.
    output: Vec<u8>,
    given: usize,
    is_finished: bool,
}

impl<R: Read> Packer<R> {
    pub(super) fn new(inner: R, packing: Packing) -> Self {
        Self {
            inner,
            compressor: Box::new(CompressorOxide::new(packing.flags())),
            input: Vec::new(),
            taken: 0,
            is_at_end: false,
            checksum: Hasher::new(),
            length: 0,
            output: HEADER.to_vec(),
            given: 0,
            is_finished: false,
        }
    }

    /// Reads until there is something to compress, or nothing more.
    fn fill(&mut self) -> io::Result<()> {
        if self.taken < self.input.len() || self.is_at_end {
            return Ok(());
        }
        self.input.resize(PIECE_BYTES, 0);
        let read = self.inner.read(&mut self.input)?;
        self.input.truncate(read);
        self.taken = 0;
        self.is_at_end = read == 0;
        self.checksum.update(&self.input);
        self.length = self.length.wrapping_add(read as u32);
        Ok(())
    }
}

impl<R: Read> Read for Packer<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.given == self.output.len() && !self.is_finished {
            self.fill()?;
            self.output.resize(PIECE_BYTES, 0);
            let flush = if self.is_at_end { MZFlush::Finish } else { MZFlush::None };
            let result = deflate(&mut self.compressor, &self.input[self.taken..], &mut self.output, flush);
            self.taken += result.bytes_consumed;
            self.output.truncate(result.bytes_written);
            self.given = 0;
            match result.status {
                Ok(MZStatus::StreamEnd) => {
                    self.output.extend(self.checksum.clone().finalize().to_le_bytes());
                    self.output.extend(self.length.to_le_bytes());
                    self.is_finished = true;
                }
                // With nothing more to take in before the next piece it says that it did nothing.
                Ok(_) | Err(MZError::Buf) => {}
                Err(error) => return Err(io::Error::other(format!("cannot compress: {error:?}"))),
            }
        }
        let count = buffer.len().min(self.output.len() - self.given);
        buffer[..count].copy_from_slice(&self.output[self.given..self.given + count]);
        self.given += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(bytes: &[u8], packing: Packing) -> Vec<u8> {
        let mut packed = Vec::new();
        Packer::new(bytes, packing).read_to_end(&mut packed).unwrap();
        packed
    }

    /// Bytes of a fixed sequence.
    fn noise(count: usize) -> impl Iterator<Item = u8> {
        let next = |state: &u32| Some(state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
        std::iter::successors(Some(1_u32), next)
            .map(|state| (state >> 24) as u8)
            .take(count)
    }

    #[test]
    fn any_reader_of_gzip_gives_the_bytes_back() {
        for count in [0, 1, PIECE_BYTES - 1, PIECE_BYTES, 3 * PIECE_BYTES + 17] {
            let bytes: Vec<u8> = noise(count).map(|byte| if byte < 128 { 0 } else { byte }).collect();
            for packing in Packing::ALL {
                let packed = packed(&bytes, packing);
                let mut back = Vec::new();
                flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut back).unwrap();
                assert!(back == bytes, "{count} bytes by {packing:?}");
            }
        }
    }

    #[test]
    fn scattered_zeros_are_packed_by_frequency_and_runs_by_repetition() {
        let scattered: Vec<u8> = noise(1 << 20).map(|byte| if byte < 128 { 0 } else { byte }).collect();
        let [by_repetition, by_frequency] = Packing::ALL.map(|packing| packed(&scattered, packing).len());
        // A bit that tells zeros apart, and seven for each of the others.
        assert!((by_frequency as f64) < 1.02 * 4.5 / 8.0 * (1 << 20) as f64, "{by_frequency}");
        assert!(by_frequency < by_repetition, "{by_frequency} and {by_repetition}");

        let halves: Vec<u8> = noise(1 << 19).chain(std::iter::repeat_n(0, 1 << 19)).collect();
        let [by_repetition, by_frequency] = Packing::ALL.map(|packing| packed(&halves, packing).len());
        assert!(by_repetition < by_frequency, "{by_repetition} and {by_frequency}");
    }
}
