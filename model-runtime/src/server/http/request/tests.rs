use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn tensor(input: &Value) -> Result<Tensor, String> {
    let body = json!({"inputs": [input]}).to_string();
    parse(body.as_bytes(), None).map(|(request, _)| request.inputs.into_iter().next().unwrap().1)
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
        assert_eq!(parse(body.as_bytes(), None).unwrap().0.inputs, [("x".to_owned(), expected.clone())]);
    }
}

#[test]
fn id_and_outputs_are_taken_and_unknown_parameters_pass() {
    let body = json!({
        "id": "7", "parameters": {"priority": 1}, "outputs": [{"name": "y", "parameters": {"binary_data": false}}],
        "inputs": [{"name": "t", "datatype": "BYTES", "shape": [2], "data": ["a", "grüß"], "parameters": {"content_type": "str"}}],
    });
    let (request, binary) = parse(body.to_string().as_bytes(), None).unwrap();
    let y = RequestedOutput {
        name: "y".to_owned(),
        classes: 0,
        binary: Some(false),
    };
    assert_eq!((request.id.as_deref(), request.outputs, binary), (Some("7"), vec![y], false));
    assert_eq!(request.options.priority, Some(1));
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
    contains(parse(b"{", None).unwrap_err(), "the body is not an inference request");
    contains(parse(b"{}", None).unwrap_err(), "missing field `inputs`");
    for twice in [
        r#"{"inputs":[],"inputs":[]}"#,
        r#"{"inputs":[],"id":"1","id":null}"#,
        r#"{"outputs":null,"inputs":[],"outputs":[]}"#,
    ] {
        contains(parse(twice.as_bytes(), None).unwrap_err(), "duplicate field `");
    }
    let deep = format!(
        "{{\"inputs\":[{{\"name\":\"x\",\"datatype\":\"FP32\",\"shape\":[1],\"data\":{}",
        "[".repeat(100_000)
    );
    assert!(parse(deep.as_bytes(), None).is_err());
}

#[test]
fn extensions_that_are_not_there_are_refused_by_name() {
    let parameters = json!({"shared_memory_region": "r", "shared_memory_byte_size": 8});
    let text = tensor(&json!({"name": "x", "datatype": "FP32", "shape": [2], "parameters": parameters})).unwrap_err();
    assert!(
        text.contains("input `x`: the extension for shared memory is not supported"),
        "{text}"
    );
    let body = json!({"inputs": [], "parameters": {"sequence_id": 7}});
    assert!(parse(body.to_string().as_bytes(), None).unwrap_err().contains("sequences"));
    let body = json!({"inputs": [], "parameters": {"sequence_id": 0}});
    assert!(parse(body.to_string().as_bytes(), None).is_ok());
}

fn binary(json: &Value, bytes: &[u8]) -> Result<(InferRequest, bool), String> {
    let json = json.to_string();
    parse(&[json.as_bytes(), bytes].concat(), Some(json.len()))
}

#[test]
fn tensors_behind_the_json_are_taken_in_its_order() {
    let input = |name: &str, datatype: &str, size: usize| json!({"name": name, "datatype": datatype, "shape": [1], "parameters": {"binary_data_size": size}});
    let here = json!({"name": "b", "datatype": "FP32", "shape": [1], "data": [2]});
    let body = json!({
        "inputs": [input("a", "UINT16", 2), here, input("c", "BYTES", 6)], "parameters": {"binary_data_output": true},
        "outputs": [{"name": "y", "parameters": {"binary_data": false, "classification": 3}}],
    });
    let (request, by_default) = binary(&body, &[1, 2, 2, 0, 0, 0, b'h', b'i']).unwrap();
    assert!(by_default);
    let given: Vec<&Data> = request.inputs.iter().map(|(_, tensor)| tensor.data()).collect();
    assert_eq!(
        given,
        [&Data::Uint16(vec![513]), &Data::Fp32(vec![2.0]), &Data::Bytes(vec![b"hi".to_vec()])]
    );
    assert_eq!((request.outputs[0].classes, request.outputs[0].binary), (3, Some(false)));
}

#[test]
fn bytes_that_are_too_few_or_too_many_are_refused_by_name() {
    let input = |size: usize| json!({"name": "a", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": size}});
    let refuse = |size, bytes: &[u8]| binary(&json!({"inputs": [input(size)]}), bytes).unwrap_err();
    assert_eq!(refuse(4, &[0; 4]), "input `a`: FP32 of shape [2] takes 8 bytes, 4 were given");
    assert_eq!(refuse(8, &[0; 4]), "input `a` has binary_data_size 8, 4 bytes are left in the body");
    assert_eq!(refuse(8, &[0; 9]), "1 bytes are left behind the last binary tensor");
    let text = parse(b"{}", Some(3)).unwrap_err();
    assert_eq!(text, "Inference-Header-Content-Length is 3, the body has 2 bytes");
    let both = json!({"name": "a", "datatype": "FP32", "shape": [1], "data": [1], "parameters": {"binary_data_size": 4}});
    assert!(
        binary(&json!({"inputs": [both]}), &[0; 4])
            .unwrap_err()
            .contains("both data and binary_data_size")
    );
}

#[test]
fn a_million_dimensions_are_refused_before_they_are_read() {
    let shape = format!("[{}1]", "1,".repeat(1_000_000));
    let body = format!("{{\"inputs\":[{{\"name\":\"x\",\"datatype\":\"FP32\",\"shape\":{shape},\"data\":[1]}}]}}");
    let text = parse(body.as_bytes(), None).unwrap_err();
    assert!(text.contains("a list is longer than the 1024 that any model has"), "{text}");
}

#[test]
fn what_is_wrong_has_a_place() {
    let text = |body: &str| parse(body.as_bytes(), None).unwrap_err();
    assert_eq!(
        text("{\"inputs\": [\n {\"name\": 7}]}"),
        "the body is not an inference request: invalid type: integer `7`, expected a string at line 2 column 11"
    );
    assert_eq!(
        text("{\"inputs\": []}}"),
        "the body is not an inference request: trailing characters at line 1 column 15"
    );
    assert_eq!(
        text(r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[2],"data":[1.5 2]}]}"#),
        "the body is not an inference request: input `x`: expected `,` or `]` at line 1 column 66"
    );
    assert_eq!(
        text(r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[2],"data":[1,0x2]}]}"#),
        "the body is not an inference request: input `x`: expected `,` or `]` at line 1 column 65"
    );
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
    fn numbers_are_those_of_json(number in "-?[+.]?[0-9]{0,20}(\\.[0-9]{0,20})?([eE][+-]?[0-9]{0,3})?") {
        let body = format!(r#"{{"inputs":[{{"name":"x","datatype":"FP64","shape":[1],"data":[{number}]}}]}}"#);
        let read = parse(body.as_bytes(), None).ok().map(|(request, _)| request.inputs[0].1.data().clone());
        let expected = serde_json::from_str::<f64>(&number).ok().map(|value| Data::Fp64(vec![value]));
        prop_assert_eq!(read, expected, "{}", number);
    }

    #[test]
    fn whole_numbers_fit_or_are_refused(number in any::<i128>(), bits in 1_u32..128) {
        let number = number >> bits;
        let read = |datatype: &str| {
            let body = format!(r#"{{"inputs":[{{"name":"x","datatype":"{datatype}","shape":[1],"data":[{number}]}}]}}"#);
            parse(body.as_bytes(), None).ok().map(|(request, _)| request.inputs[0].1.data().clone())
        };
        prop_assert_eq!(read("UINT64"), u64::try_from(number).ok().map(|value| Data::Uint64(vec![value])));
        prop_assert_eq!(read("INT8"), i8::try_from(number).ok().map(|value| Data::Int8(vec![value])));
        prop_assert_eq!(read("INT32"), i32::try_from(number).ok().map(|value| Data::Int32(vec![value])));
        prop_assert_eq!(read("INT64"), i64::try_from(number).ok().map(|value| Data::Int64(vec![value])));
    }

    #[test]
    fn floats_are_the_nearest(value in any::<f32>().prop_filter("JSON knows no others", |value| value.is_finite())) {
        let read = tensor(&json!({"name": "x", "datatype": "FP32", "shape": [1], "data": [f64::from(value)]})).unwrap();
        prop_assert_eq!(read.data(), &Data::Fp32(vec![value]));
    }

    #[test]
    fn json_is_read_where_it_is_valid_and_nowhere_else(text in "[\\[\\]{},:\"a1 \n.-]{0,24}") {
        let valid = serde_json::from_str::<serde::de::IgnoredAny>(&text).is_ok();
        for body in [format!(r#"{{"inputs":[],"other":{text}}}"#), format!(r#"{{"inputs":[],"other":[{text},{text}]}}"#)] {
            prop_assert_eq!(parse(body.as_bytes(), None).is_ok(), serde_json::from_str::<Value>(&body).is_ok(), "{}", body);
        }
        if !valid {
            prop_assert!(parse(text.as_bytes(), None).is_err());
        }
    }

    #[test]
    fn no_bytes_make_it_panic(body in prop::collection::vec(any::<u8>(), 0..200), length in 0_usize..300) {
        let _ = parse(&body, None);
        let _ = parse(&body, Some(length));
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
        let _ = parse(format!("{{\"inputs\":[{{\"name\":\"x\",{fields}}}]}}").as_bytes(), None);
    }
}
