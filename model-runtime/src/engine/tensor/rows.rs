//! Tensors joined and parted along their first dimension, as batching needs it.

use super::{Data, Tensor};

impl Tensor {
    /// Size of the first dimension; `None` for a scalar.
    #[must_use]
    pub fn rows(&self) -> Option<usize> {
        self.shape.first().copied()
    }

    /// The tensor with its values in the opposite order.
    #[must_use]
    pub fn reversed(&self) -> Self {
        macro_rules! reverse {
            ($($name:ident),*) => {
                match &self.data { $(Data::$name(values) => Data::$name(values.iter().rev().cloned().collect())),* }
            };
        }
        let data = reverse!(
            Bool, Uint8, Uint16, Uint32, Uint64, Int8, Int16, Int32, Int64, Fp16, Bf16, Fp32, Fp64, Bytes
        );
        Self {
            shape: self.shape.clone(),
            data,
        }
    }

    /// The tensors one after another along their first dimension.
    ///
    /// # Panics
    /// Where `parts` is empty, or they differ in type or in any dimension but the first: callers group them by both.
    #[must_use]
    pub fn join(parts: &[&Self]) -> Self {
        let first = parts[0];
        let mut shape = first.shape.clone();
        shape[0] = parts.iter().map(|part| part.shape[0]).sum();
        assert!(parts.iter().all(|part| part.shape[1..] == shape[1..]), "parts of one shape");
        macro_rules! join {
            ($($name:ident),*) => {
                match &first.data {
                    $(Data::$name(_) => {
                        let count = parts.iter().map(|part| part.data.len()).sum();
                        let mut joined = Vec::with_capacity(count);
                        for part in parts {
                            let Data::$name(values) = &part.data else { panic!("parts of one type") };
                            joined.extend_from_slice(values);
                        }
                        Data::$name(joined)
                    })*
                }
            };
        }
        let data = join!(
            Bool, Uint8, Uint16, Uint32, Uint64, Int8, Int16, Int32, Int64, Fp16, Bf16, Fp32, Fp64, Bytes
        );
        Self { shape, data }
    }

    /// Parts of so many rows each; `None` where they are not all of the tensor's rows.
    #[must_use]
    pub fn part(self, rows: &[usize]) -> Option<Vec<Self>> {
        if self.shape.first() != Some(&rows.iter().sum()) {
            return None;
        }
        if rows.len() == 1 {
            return Some(vec![self]);
        }
        let width: usize = self.shape[1..].iter().product();
        let mut parts = Vec::with_capacity(rows.len());
        macro_rules! part {
            ($($name:ident),*) => {
                match self.data {
                    $(Data::$name(values) => {
                        let mut values = values.into_iter();
                        for &rows in rows {
                            let shape = [&[rows], &self.shape[1..]].concat();
                            let data = Data::$name(values.by_ref().take(rows * width).collect());
                            parts.push(Self { shape, data });
                        }
                    })*
                }
            };
        }
        part!(
            Bool, Uint8, Uint16, Uint32, Uint64, Int8, Int16, Int32, Int64, Fp16, Bf16, Fp32, Fp64, Bytes
        );
        Some(parts)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_joined_is_parted_again(rows in prop::collection::vec(0_usize..4, 1..5), inner in prop::collection::vec(0_usize..4, 0..3)) {
            let width: usize = inner.iter().product();
            let mut next = 0;
            let parts: Vec<Tensor> = rows.iter().map(|&rows| {
                let values: Vec<i32> = (0..rows * width).map(|_| { next += 1; next }).collect();
                Tensor::new([&[rows], &inner[..]].concat(), values).unwrap()
            }).collect();
            let joined = Tensor::join(&parts.iter().collect::<Vec<_>>());
            prop_assert_eq!(joined.rows(), Some(rows.iter().sum()));
            prop_assert_eq!(joined.clone().part(&rows), Some(parts));
            prop_assert_eq!(joined.part(&[rows.iter().sum::<usize>() + 1]), None);
        }
    }

    #[test]
    fn strings_are_joined_and_a_scalar_has_no_rows() {
        let text = |text: &str| Tensor::new(vec![1], vec![text.as_bytes().to_vec()]).unwrap();
        let joined = Tensor::join(&[&text("a"), &text("b")]);
        assert_eq!(joined, Tensor::new(vec![2], vec![b"a".to_vec(), b"b".to_vec()]).unwrap());
        assert_eq!(Tensor::new(vec![], vec![1.0_f32]).unwrap().rows(), None);
    }
}
