//! The choice among equal magnitudes that `torch.topk` makes on a CPU.
//!
//! `torch.topk(k, largest=False)` pairs each value with its position and selects with the C++ standard library by the value alone
//! (ATen, `native/TopKImpl.h`): `std::partial_sort` where `64 k <= n`, otherwise `std::nth_element`. Which of several equal values come
//! among the first `k` follows from the order in which GNU's library (libstdc++, `bits/stl_heap.h` and `bits/stl_algo.h`) moves them,
//! which has been the same in every version; this module moves them in that order.

/// A key in the upper half and its position in the lower one.
type Pair = u64;

fn less(a: Pair, b: Pair) -> bool {
    a >> 32 < b >> 32
}

/// The positions of the `count` smallest of `keys` that `torch.topk` gives, in no particular order.
///
/// There are at most 2^32 keys, and `count` is at least 1 and at most their number.
pub(super) fn smallest(keys: impl Iterator<Item = u32>, count: usize) -> Vec<u32> {
    let mut pairs: Vec<Pair> = keys.zip(0_u64..).map(|(key, position)| u64::from(key) << 32 | position).collect();
    if count * 64 <= pairs.len() {
        select_by_heap(&mut pairs, count);
    } else {
        select_by_partition(&mut pairs, count - 1);
    }
    pairs.truncate(count);
    pairs.into_iter().map(|pair| pair as u32).collect()
}

/// `std::nth_element`: introspective selection (Musser 1997).
fn select_by_partition(pairs: &mut [Pair], nth: usize) {
    let (mut first, mut last) = (0, pairs.len());
    if nth == last {
        return;
    }
    let mut depth = 2 * pairs.len().ilog2();
    while last - first > 3 {
        if depth == 0 {
            select_by_heap(&mut pairs[first..last], nth + 1 - first);
            pairs.swap(first, nth);
            return;
        }
        depth -= 1;
        let cut = partition(pairs, first, last);
        if cut <= nth {
            first = cut;
        } else {
            last = cut;
        }
    }
    insertion_sort(&mut pairs[first..last]);
}

/// Around the median of the second, the middle and the last one; gives where the upper part begins.
fn partition(pairs: &mut [Pair], first: usize, last: usize) -> usize {
    let (a, b, c) = (first + 1, first + (last - first) / 2, last - 1);
    let median = match (less(pairs[a], pairs[b]), less(pairs[b], pairs[c]), less(pairs[a], pairs[c])) {
        (true, true, _) => b,
        (true, false, true) => c,
        (true, false, false) => a,
        (false, _, true) => a,
        (false, true, false) => c,
        (false, false, false) => b,
    };
    pairs.swap(first, median);
    let pivot = pairs[first];
    let (mut low, mut high) = (first + 1, last);
    loop {
        while less(pairs[low], pivot) {
            low += 1;
        }
        high -= 1;
        while less(pivot, pairs[high]) {
            high -= 1;
        }
        if low >= high {
            return low;
        }
        pairs.swap(low, high);
        low += 1;
    }
}

fn insertion_sort(pairs: &mut [Pair]) {
    for index in 1..pairs.len() {
        let value = pairs[index];
        let place = if less(value, pairs[0]) {
            0
        } else {
            let mut place = index;
            while less(value, pairs[place - 1]) {
                place -= 1;
            }
            place
        };
        pairs[place..=index].rotate_right(1);
    }
}

/// `std::__heap_select`: the `count` smallest come first, as a heap whose top is the largest of them.
fn select_by_heap(pairs: &mut [Pair], count: usize) {
    let (heap, rest) = pairs.split_at_mut(count);
    for parent in (0..count / 2).rev() {
        sift(heap, parent, heap[parent]);
    }
    for pair in rest {
        if less(*pair, heap[0]) {
            let value = std::mem::replace(pair, heap[0]);
            sift(heap, 0, value);
        }
    }
}

/// `std::__adjust_heap`: lets `hole` sink to a leaf and `value` rise from there.
fn sift(heap: &mut [Pair], top: usize, value: Pair) {
    let (mut hole, length) = (top, heap.len());
    loop {
        let right = 2 * hole + 2;
        let child = match right.cmp(&length) {
            std::cmp::Ordering::Less if less(heap[right], heap[right - 1]) => right - 1,
            std::cmp::Ordering::Less => right,
            std::cmp::Ordering::Equal => right - 1,
            std::cmp::Ordering::Greater => break,
        };
        heap[hole] = heap[child];
        hole = child;
    }
    while hole > top {
        let parent = (hole - 1) / 2;
        if !less(heap[parent], value) {
            break;
        }
        heap[hole] = heap[parent];
        hole = parent;
    }
    heap[hole] = value;
}
