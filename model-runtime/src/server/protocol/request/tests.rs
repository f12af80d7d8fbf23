use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn tensor(input: &Value) -> Result<Tensor, String> {
    let body = json!({"inputs": [input]}).to_string();
    parse(body.as_bytes()).map(|request| request.inputs.into_iter().next().unwrap().1)
}

fn refusal(datatype: &str, shape: &Value, data: &Value) -> String {
    tensor(&json!({"name": "x", "datatype": datatype, "shape": shape, "data": data})).unwrap_err()
}

#[test]
fn flat_and_nested_data_are_the_same_tensor_in_any_order_of_keys() {
    let expected = Tensor::new(vec![2, 2], vec![1.0_f32, 2.0, 3.5, -4.0]).unwrap();
    for body in [
        r#"{"inputs":[{"name":"x","shape":[2,2],"datatype":"FP32","data":[1,2,3.5,-4]}]}"#,
        r#"{"inputs":[{"name":"x","shape":[2,2],"datatype":"FP32","data":[[1,2],[3.5,-4]]}]}"#,
        r#"{"inputs":[{"data":[[1,2],[3.5,-4]],"datatype":"FP32","shape":[2,2],"name":"x"}]}"#,
    ] {
        assert_eq!(parse(body.as_bytes()).unwrap().inputs, [("x".to_owned(), expected.clone())]);
    }
}

#[test]
fn id_and_outputs_are_taken_and_unknown_parameters_pass() {
    let body = json!({
        "id": "7", "parameters": {"priority": 1}, "outputs": [{"name": "y", "parameters": {"binary_data": false}}],
        "inputs": [{"name": "t", "datatype": "BYTES", "shape": [2], "data": ["a", "grüß"], "parameters": {"content_type": "str"}}],
    });
    let request = parse(body.to_string().as_bytes()).unwrap();
    assert_eq!((request.id.as_deref(), request.outputs), (Some("7"), Some(vec!["y".to_owned()])));
    assert_eq!(
        request.inputs[0].1.data(),
        &Data::Bytes(vec![b"a".to_vec(), "grüß".as_bytes().to_vec()])
    );
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let contains = |text: String, expected: &str| assert!(text.contains(expected), "{text}");
    contains(
        refusal("FP32", &json!([2, 2]), &json!([1, 2, 3])),
        "input `x`: shape [2, 2] takes 4 values, 3 were given",
    );
    contains(
        refusal("FP32", &json!([2]), &json!([1, 2, 3])),
        "input `x`: shape [2] takes 2 values, more were given",
    );
    contains(refusal("UINT8", &json!([1]), &json!([256])), "input `x`: 256 does not fit UINT8");
    contains(refusal("INT8", &json!([1]), &json!([1.5])), "input `x`: 1.5 does not fit INT8");
    contains(refusal("FP16", &json!([1]), &json!([1e6])), "does not fit FP16");
    contains(refusal("FP32", &json!([1]), &json!([null])), "null does not fit FP32");
    contains(refusal("INT32", &json!([1]), &json!(["1"])), "a string does not fit INT32");
    contains(refusal("BYTES", &json!([1]), &json!([1])), "1 does not fit BYTES");
    contains(
        refusal("FP32", &json!([2, 2]), &json!([[1, 2], [3]])),
        "a list at depth 1 holds 1 values, shape [2, 2] says 2",
    );
    contains(
        refusal("FP32", &json!([2, 2]), &json!([[1, 2]])),
        "a list at depth 0 holds 1 values, shape [2, 2] says 2",
    );
    contains(
        refusal("FP32", &json!([2, 2]), &json!([1, [2, 3], 4])),
        "neither a flat list nor nested as shape [2, 2]",
    );
    contains(refusal("FP32", &json!([2]), &json!([[1, 2]])), "nested deeper than shape [2]");
    contains(refusal("FP32", &json!([1, 1, 1]), &json!([[1]])), "neither a flat list nor nested");
    contains(refusal("FP32", &json!([1]), &json!(1)), "neither a flat list");
    contains(refusal("FP99", &json!([1]), &json!([1])), "unknown variant `FP99`");
    contains(refusal("FP32", &json!([-1]), &json!([1])), "integer `-1`");
    let big = u64::MAX / 2;
    contains(refusal("FP32", &json!([big, 3]), &json!([1])), "more than memory holds");
    contains(
        tensor(&json!({"name": "x", "shape": [1], "data": [1]})).unwrap_err(),
        "input `x` has no datatype",
    );
    contains(
        tensor(&json!({"name": "x", "shape": [1], "datatype": "FP32"})).unwrap_err(),
        "input `x` has no data",
    );
    contains(parse(b"{").unwrap_err(), "the body is not an inference request");
    contains(parse(b"{}").unwrap_err(), "missing field `inputs`");
    let deep = format!(
        "{{\"inputs\":[{{\"name\":\"x\",\"datatype\":\"FP32\",\"shape\":[1],\"data\":{}",
        "[".repeat(100_000)
    );
    assert!(parse(deep.as_bytes()).is_err());
}

#[test]
fn extensions_that_are_not_there_are_refused_by_name() {
    let parameters = json!({"shared_memory_region": "r", "shared_memory_byte_size": 8});
    let text = tensor(&json!({"name": "x", "datatype": "FP32", "shape": [2], "parameters": parameters})).unwrap_err();
    assert!(
        text.contains("input `x`: the extension for shared memory is not supported"),
        "{text}"
    );
    let body = json!({"inputs": [], "outputs": [{"name": "y", "parameters": {"binary_data": true}}]});
    assert!(parse(body.to_string().as_bytes()).unwrap_err().contains("binary tensors"));
}

#[test]
fn whole_numbers_are_exact() {
    let read = |datatype: &str, data: Value| {
        tensor(&json!({"name": "x", "datatype": datatype, "shape": [1], "data": [data]}))
            .unwrap()
            .into_data()
    };
    assert_eq!(read("UINT64", json!(u64::MAX)), Data::Uint64(vec![u64::MAX]));
    assert_eq!(read("INT64", json!(i64::MIN)), Data::Int64(vec![i64::MIN]));
    assert_eq!(read("INT16", json!(7.0)), Data::Int16(vec![7]));
    assert_eq!(read("BOOL", json!(true)), Data::Bool(vec![true]));
    assert_eq!(read("BOOL", json!(0)), Data::Bool(vec![false]));
}

fn nest(shape: &[usize], values: &mut impl Iterator<Item = Value>) -> Value {
    match shape {
        [] => values.next().unwrap(),
        [size, rest @ ..] => Value::Array((0..*size).map(|_| nest(rest, values)).collect()),
    }
}

proptest! {
    #[test]
    fn any_tensor_is_read_back_flat_and_nested(shape in prop::collection::vec(0_usize..4, 1..5), seed in any::<i32>()) {
        let count: usize = shape.iter().product();
        let values: Vec<i32> = (0..count).map(|i| seed.wrapping_mul(i as i32 + 1)).collect();
        let expected = Tensor::new(shape.clone(), values.clone()).unwrap();
        let flat = json!({"name": "x", "datatype": "INT32", "shape": shape, "data": values});
        prop_assert_eq!(tensor(&flat).unwrap(), expected.clone());
        let nested = nest(&shape, &mut values.iter().map(|&value| json!(value)));
        prop_assert_eq!(tensor(&json!({"name": "x", "datatype": "INT32", "shape": shape, "data": nested})).unwrap(), expected);
    }

    #[test]
    fn a_count_that_does_not_fill_the_shape_is_refused(shape in prop::collection::vec(0_usize..5, 1..4), given in 0_usize..80) {
        let count: usize = shape.iter().product();
        prop_assume!(given != count);
        let values = vec![0; given];
        let error = tensor(&json!({"name": "x", "datatype": "INT32", "shape": shape, "data": values})).unwrap_err();
        prop_assert!(error.contains("input `x`"), "{}", error);
    }

    #[test]
    fn no_bytes_make_it_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse(&body);
    }

    #[test]
    fn no_json_makes_it_panic(
        shape in "\\[[0-9,\\-\\[\\]]{0,12}\\]",
        data in "[\\[\\],0-9tfnul\".e-]{0,40}",
        datatype in "(FP32|INT8|BOOL|BYTES|FP16|UINT64)",
        first in any::<bool>(),
    ) {
        let (one, two) = (format!("\"shape\":{shape},\"datatype\":\"{datatype}\""), format!("\"data\":{data}"));
        let fields = if first { format!("{one},{two}") } else { format!("{two},{one}") };
        let _ = parse(format!("{{\"inputs\":[{{\"name\":\"x\",{fields}}}]}}").as_bytes());
    }
}
