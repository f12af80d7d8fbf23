//! The classification extension (Triton, "Classification Extension"): the largest values of an output with their indices and labels.

use crate::engine::Tensor;

/// Each row's `count` largest values, the largest first, as strings `value:index` or `value:index:label`. A row is what lies behind the
/// first dimension; a tensor of one dimension is one row. Equal values keep the order of their indices; what is not a number comes last.
///
/// # Errors
/// In words, where the tensor holds no numbers or no value at all.
pub(super) fn classify(tensor: &Tensor, count: usize, labels: &[String]) -> Result<Tensor, String> {
    let values = tensor
        .data()
        .to_f64()
        .ok_or_else(|| format!("{} cannot be classified", tensor.datatype()))?;
    let shape = tensor.shape();
    let rows = if shape.len() > 1 { shape[0] } else { 1 };
    if values.is_empty() {
        return Err(format!("shape {shape:?} holds nothing to classify"));
    }
    let width = values.len() / rows;
    let count = count.min(width);
    let single = tensor.as_f32().is_some();
    let mut classes = Vec::with_capacity(rows * count);
    for row in values.chunks(width) {
        let mut order: Vec<usize> = (0..width).collect();
        let number = |index: usize| (!row[index].is_nan(), row[index]);
        order.sort_by(|&a, &b| number(b).0.cmp(&number(a).0).then(number(b).1.total_cmp(&number(a).1)));
        for &index in &order[..count] {
            // Single precision has shorter digits of its own.
            let mut class = if single {
                format!("{}:{index}", row[index] as f32)
            } else {
                format!("{}:{index}", row[index])
            };
            if let Some(label) = labels.get(index) {
                class.push(':');
                class.push_str(label);
            }
            classes.push(class.into_bytes());
        }
    }
    let shape = if shape.len() > 1 { vec![rows, count] } else { vec![count] };
    Tensor::new(shape, classes).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Data;

    fn classes(shape: &[usize], data: impl Into<Data>, count: usize, labels: &[&str]) -> (Vec<usize>, Vec<String>) {
        let labels: Vec<String> = labels.iter().map(|&label| label.to_owned()).collect();
        let tensor = classify(&Tensor::new(shape.to_vec(), data).unwrap(), count, &labels).unwrap();
        let shape = tensor.shape().to_vec();
        let Data::Bytes(texts) = tensor.into_data() else {
            panic!("strings")
        };
        (shape, texts.into_iter().map(|text| String::from_utf8(text).unwrap()).collect())
    }

    #[test]
    fn each_row_has_its_largest_first() {
        let (shape, texts) = classes(&[2, 3], vec![0.1_f32, 0.7, 0.2, 5.0, 5.0, -1.0], 2, &["cat", "dog"]);
        assert_eq!(shape, [2, 2]);
        assert_eq!(texts, ["0.7:1:dog", "0.2:2", "5:0:cat", "5:1:dog"]);
    }

    #[test]
    fn more_classes_than_there_are_gives_all_and_what_is_no_number_comes_last() {
        let (shape, texts) = classes(&[3], vec![f64::NAN, 1.0, -2.0], 10, &[]);
        assert_eq!(
            (shape, texts),
            (vec![3], vec!["1:1".to_owned(), "-2:2".to_owned(), "NaN:0".to_owned()])
        );
    }

    #[test]
    fn what_has_no_classes_is_refused() {
        let refuse = |data: Data, shape: &[usize]| classify(&Tensor::new(shape.to_vec(), data).unwrap(), 1, &[]).unwrap_err();
        assert_eq!(refuse(vec![b"a".to_vec()].into(), &[1]), "BYTES cannot be classified");
        assert_eq!(refuse(Vec::<f32>::new().into(), &[0, 3]), "shape [0, 3] holds nothing to classify");
    }
}
