//! Histograms of a stream of values whose range is not known beforehand.

/// Bins of a histogram; a power of two, so that they can be merged in pairs around zero.
const BINS: usize = 1 << 13;
/// Bins in which the entropy is looked for, as many as TensorRT takes.
const ENTROPY_BINS: usize = 1 << 11;
/// The least half-width: histograms of smaller values are all zero to a quantised activation.
const LIMIT_MIN: f64 = f64::EPSILON;
/// Values that are looked at together, so that the compiler takes several at once.
const LANES: usize = 32;

/// How often values occur, in equal bins over `-limit..limit`. The limit is a power of two and doubles when a value lies beyond it, each
/// two bins becoming one; so the memory does not grow with the number of values.
#[derive(Debug, Clone, PartialEq)]
pub struct Histogram {
    bins: Vec<u64>,
    limit: f64,
    count: u64,
    min: f32,
    max: f32,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            bins: vec![0; BINS],
            limit: LIMIT_MIN,
            count: 0,
            min: f32::INFINITY,
            max: f32::NEG_INFINITY,
        }
    }
}

impl Histogram {
    /// Counts `values`; those that are NaN or infinite are left out.
    pub fn add(&mut self, values: &[f32]) {
        let (min, max) = bounds(values);
        (self.min, self.max) = (self.min.min(min), self.max.max(max));
        let largest = f64::from(self.min.abs().max(self.max.abs()));
        while largest.is_finite() && largest > self.limit {
            self.double();
        }
        // A power of two, so that the product is exact.
        let per_unit = ((BINS / 2) as f64 / self.limit) as f32;
        let (chunks, rest) = values.as_chunks::<LANES>();
        for chunk in chunks {
            self.count(chunk.map(|value| bin_of(value, per_unit)));
        }
        for value in rest {
            self.count([bin_of(*value, per_unit)]);
        }
    }

    fn count<const COUNT: usize>(&mut self, places: [u32; COUNT]) {
        for place in places {
            if let Some(bin) = self.bins.get_mut(place as usize) {
                *bin += 1;
                self.count += 1;
            }
        }
    }

    fn double(&mut self) {
        self.limit *= 2.0;
        if self.count == 0 {
            return;
        }
        let mut merged = vec![0; BINS];
        for (pair, bins) in self.bins.chunks_exact(2).enumerate() {
            merged[BINS / 4 + pair] = bins[0] + bins[1];
        }
        self.bins = merged;
    }

    /// From the smallest to the largest value; `(0, 0)` where there is none.
    #[must_use]
    pub fn min_max(&self) -> (f32, f32) {
        if self.count == 0 { (0.0, 0.0) } else { (self.min, self.max) }
    }

    /// The range that `outer`, a ratio, of the values lie outside of, half of them on either side; to within a bin.
    #[must_use]
    pub fn percentile(&self, outer: f64) -> (f32, f32) {
        if self.count == 0 {
            return (0.0, 0.0);
        }
        let cut = self.count as f64 * outer / 2.0;
        let width = 2.0 * self.limit / BINS as f64;
        let beyond = |bins: &mut dyn Iterator<Item = &u64>| {
            let mut seen = 0.0;
            bins.take_while(|bin| {
                seen += **bin as f64;
                seen <= cut
            })
            .count() as f64
        };
        let low = -self.limit + width * beyond(&mut self.bins.iter());
        let high = self.limit - width * beyond(&mut self.bins.iter().rev());
        let (min, max) = self.min_max();
        ((low as f32).max(min), (high as f32).min(max))
    }

    /// The range around zero in which values quantised to `levels` integers have a distribution of least relative entropy to the true
    /// one.
    #[must_use]
    pub fn entropy(&self, levels: usize) -> (f32, f32) {
        let (min, max) = self.min_max();
        if self.count == 0 {
            return (0.0, 0.0);
        }
        // Bins that hold nothing at either end would be taken for a part of the range.
        let largest = f64::from(min.abs().max(max.abs()));
        let merged = BINS / ENTROPY_BINS;
        let bins: Vec<u64> = self.bins.chunks_exact(merged).map(|bins| bins.iter().sum()).collect();
        let used = ((largest / self.limit * (ENTROPY_BINS / 2) as f64).ceil() as usize).clamp(1, ENTROPY_BINS / 2);
        let bins = &bins[ENTROPY_BINS / 2 - used..ENTROPY_BINS / 2 + used];
        let half = least_entropy(bins, levels);
        let threshold = (half as f64 / (ENTROPY_BINS / 2) as f64 * self.limit) as f32;
        (min.max(-threshold), max.min(threshold))
    }
}

/// The bin of a value that is `value * per_unit` bins above zero; none of them where it is NaN or infinite.
fn bin_of(value: f32, per_unit: f32) -> u32 {
    let is_finite = value.abs() < f32::INFINITY;
    let scaled = if is_finite { value } else { 0.0 } * per_unit;
    let whole = scaled as i32;
    // Down, also below zero.
    let below = whole - i32::from(scaled < whole as f32);
    let bin = (below + BINS as i32 / 2).min(BINS as i32 - 1);
    if is_finite { bin.cast_unsigned() } else { u32::MAX }
}

/// The least and the largest of the finite values; infinities of the other sign where there is none.
fn bounds(values: &[f32]) -> (f32, f32) {
    let (mut low, mut high) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    let mut widen = |lane: usize, value: f32| {
        let is_finite = value.abs() < f32::INFINITY;
        let (least, most) = if is_finite {
            (value, value)
        } else {
            (f32::INFINITY, f32::NEG_INFINITY)
        };
        low[lane] = if least < low[lane] { least } else { low[lane] };
        high[lane] = if most > high[lane] { most } else { high[lane] };
    };
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, value) in chunk.iter().enumerate() {
            widen(lane, *value);
        }
    }
    for (lane, value) in rest.iter().enumerate() {
        widen(lane, *value);
    }
    (
        low.into_iter().fold(f32::INFINITY, f32::min),
        high.into_iter().fold(f32::NEG_INFINITY, f32::max),
    )
}

/// Of a histogram symmetric about zero, the number of bins on either side of zero that are best kept when what lies beyond is clipped to
/// them and they are quantised to `levels` integers: where the relative entropy of the quantised to the clipped distribution is least.
///
/// All bins are kept where there are not more of them than levels.
///
/// Migacz 2017, "8-bit Inference with TensorRT", GTC.
#[must_use]
pub fn least_entropy(bins: &[u64], levels: usize) -> usize {
    let zero = bins.len() / 2;
    let total: u64 = bins.iter().sum();
    let mut best = (f64::INFINITY, zero);
    let mut inside: u64 = 0;
    let (mut low, mut high) = (zero, zero);
    for half in levels.div_ceil(2)..=zero {
        while low > zero - half {
            low -= 1;
            inside += bins[low];
        }
        let (mut left, mut right) = (0, 0);
        while high < zero + half {
            inside += bins[high];
            high += 1;
        }
        if inside < total {
            left = bins[..low].iter().sum();
            right = bins[high..].iter().sum();
        }
        let divergence = divergence(&bins[low..high], left, right, levels);
        if divergence < best.0 {
            best = (divergence, half);
        }
    }
    best.1
}

/// The relative entropy of `kept`, quantised to `levels` and spread over its bins again, to `kept` with what was clipped in its end bins.
fn divergence(kept: &[u64], left: u64, right: u64, levels: usize) -> f64 {
    let last = kept.len() - 1;
    let clipped = |index: usize| {
        let outliers = if index == 0 { left } else { 0 } + if index == last { right } else { 0 };
        (kept[index] + outliers) as f64
    };
    let total: u64 = kept.iter().sum();
    let (all, quantized_all) = ((total + left + right) as f64, total as f64);
    let per_level = kept.len() / levels;
    let mut divergence = 0.0;
    for level in 0..levels {
        let start = level * per_level;
        let end = if level + 1 == levels { kept.len() } else { start + per_level };
        let sum: u64 = kept[start..end].iter().sum();
        let occupied = (start..end).filter(|index| clipped(*index) > 0.0).count();
        if occupied == 0 {
            continue;
        }
        let quantized = sum as f64 / occupied as f64 / quantized_all;
        for index in start..end {
            let truth = clipped(index) / all;
            if truth > 0.0 {
                if quantized == 0.0 {
                    return f64::INFINITY;
                }
                divergence += truth * (truth / quantized).ln();
            }
        }
    }
    divergence
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_range_that_grows_loses_no_value() {
        let mut grown = Histogram::default();
        grown.add(&[0.001, -0.002]);
        grown.add(&[3.0, f32::NAN, f32::INFINITY]);
        grown.add(&[-100.0]);
        let mut at_once = Histogram::default();
        at_once.add(&[0.001, -0.002, 3.0, -100.0]);
        assert_eq!(grown, at_once);
        assert_eq!((grown.count, grown.min_max(), grown.limit), (4, (-100.0, 3.0), 128.0));
    }

    #[test]
    fn an_outlier_is_cut_and_a_range_without_any_is_kept() {
        let mut histogram = Histogram::default();
        let values: Vec<f32> = (0..100_000).map(|index| index as f32 / 100_000.0).collect();
        histogram.add(&values);
        histogram.add(&[50.0]);
        let (low, high) = histogram.percentile(1e-3);
        assert!(low >= 0.0 && (0.99..1.02).contains(&high), "{low} {high}");
        assert_eq!(histogram.percentile(0.0), (0.0, 50.0));
        assert_eq!(Histogram::default().percentile(1e-5), (0.0, 0.0));
    }

    #[test]
    fn of_a_long_tail_the_entropy_keeps_less_than_all() {
        let mut histogram = Histogram::default();
        for index in 1..=200_000_u32 {
            let share = f64::from(index) / 200_001.0;
            let value = -(1.0 - share).ln() as f32;
            histogram.add(&[value, -value]);
        }
        let (low, high) = histogram.entropy(255);
        assert!(high > 3.0 && high < 12.0 && (low + high).abs() < 1e-6, "{low} {high}");
        assert_eq!(least_entropy(&[5, 5, 5, 5], 8), 2);
    }

    proptest! {
        /// By the definition of a bin, value by value.
        #[test]
        fn many_values_at_once_are_counted_as_one_by_one(
            values in proptest::collection::vec(
                prop_oneof![8 => -1e3_f32..1e3, 2 => -1e-3_f32..1e-3, 1 => Just(0.0), 1 => Just(-128.0), 1 => Just(f32::NAN), 1 => Just(f32::NEG_INFINITY)],
                0..200,
            ),
        ) {
            let mut histogram = Histogram::default();
            histogram.add(&values);
            let mut expected = vec![0; BINS];
            let finite: Vec<f32> = values.into_iter().filter(|value| value.is_finite()).collect();
            for value in &finite {
                let bin = (f64::from(*value) / histogram.limit * (BINS / 2) as f64).floor() + (BINS / 2) as f64;
                expected[(bin as usize).min(BINS - 1)] += 1;
            }
            prop_assert!(histogram.bins == expected);
            let extremes = finite.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), value| (low.min(*value), high.max(*value)));
            prop_assert_eq!((histogram.min, histogram.max, histogram.count), (extremes.0, extremes.1, finite.len() as u64));
        }

        #[test]
        fn the_percentile_holds_the_share_that_it_says(values in proptest::collection::vec(-1e4_f32..1e4, 1..500), outer in 0.0_f64..0.5) {
            let mut histogram = Histogram::default();
            histogram.add(&values);
            let (low, high) = histogram.percentile(outer);
            let outside = values.iter().filter(|value| **value < low || **value > high).count();
            prop_assert!(outside as f64 <= outer * values.len() as f64, "{outside} of {} lie outside of {low}..{high}", values.len());
        }
    }
}
