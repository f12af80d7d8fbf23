use half::{bf16, f16};
use proptest::prelude::*;
use strum::IntoEnumIterator as _;

use super::super::proto::inference::model_infer_request::InferRequestedOutputTensor;
use super::*;

#[test]
fn typed_contents_are_counted_as_they_will_be() {
    let bytes = |contents: InferTensorContents| {
        let input = InferInputTensor {
            contents: Some(contents),
            ..InferInputTensor::default()
        };
        let request = ModelInferRequest {
            inputs: vec![input.clone(), input],
            ..ModelInferRequest::default()
        };
        typed_bytes(&request.encode_to_vec())
    };
    let none = InferTensorContents::default;
    assert_eq!(bytes(none()), 0);
    assert_eq!(
        bytes(InferTensorContents {
            bool_contents: vec![true; 100],
            ..none()
        }),
        200
    );
    assert_eq!(
        bytes(InferTensorContents {
            int_contents: vec![-1; 100],
            ..none()
        }),
        800
    );
    assert_eq!(
        bytes(InferTensorContents {
            uint_contents: vec![300; 100],
            ..none()
        }),
        800
    );
    assert_eq!(
        bytes(InferTensorContents {
            int64_contents: vec![1; 100],
            ..none()
        }),
        1600
    );
    assert_eq!(
        bytes(InferTensorContents {
            uint64_contents: vec![u64::MAX; 100],
            ..none()
        }),
        1600
    );
    assert_eq!(
        bytes(InferTensorContents {
            fp32_contents: vec![1.0; 100],
            ..none()
        }),
        800
    );
    assert_eq!(
        bytes(InferTensorContents {
            fp64_contents: vec![1.0; 100],
            ..none()
        }),
        1600
    );
    assert_eq!(
        bytes(InferTensorContents {
            bytes_contents: vec![b"ab".to_vec(); 100],
            ..none()
        }),
        200 * (24 + 2)
    );
}

fn input(datatype: &str, shape: &[i64], contents: InferTensorContents) -> ModelInferRequest {
    let input = InferInputTensor {
        name: "x".to_owned(),
        datatype: datatype.to_owned(),
        shape: shape.to_vec(),
        contents: Some(contents),
        ..InferInputTensor::default()
    };
    ModelInferRequest {
        inputs: vec![input],
        ..ModelInferRequest::default()
    }
}

fn ints(values: &[i32]) -> InferTensorContents {
    InferTensorContents {
        int_contents: values.to_vec(),
        ..InferTensorContents::default()
    }
}

fn parameter(choice: ParameterChoice) -> InferParameter {
    InferParameter {
        parameter_choice: Some(choice),
    }
}

fn refusal(request: ModelInferRequest) -> String {
    decode(request.encode_to_vec().into()).and_then(read).unwrap_err()
}

#[test]
fn values_come_in_the_list_of_their_datatype() {
    let (request, form) = read(input("INT8", &[2], ints(&[-128, 127]))).unwrap();
    assert_eq!((request.inputs[0].1.data(), form), (&Data::Int8(vec![-128, 127]), Form::Typed));
    let list = InferTensorContents {
        uint_contents: vec![65535],
        ..InferTensorContents::default()
    };
    assert_eq!(
        read(input("UINT16", &[1], list)).unwrap().0.inputs[0].1.data(),
        &Data::Uint16(vec![65535])
    );
    assert_eq!(refusal(input("INT8", &[1], ints(&[128]))), "input `x`: 128 does not fit INT8");
    assert_eq!(
        refusal(input("INT64", &[1], ints(&[1]))),
        "input `x`: values of INT64 come in int64_contents, and in no other list"
    );
    assert_eq!(
        refusal(input("FP16", &[1], ints(&[1]))),
        "input `x`: values of FP16 come in raw_input_contents, and in no other list"
    );
    assert_eq!(
        refusal(input("INT32", &[2, 2], ints(&[1]))),
        "input `x`: shape [2, 2] takes 4 values, 1 were given"
    );
    assert_eq!(
        refusal(input("INT32", &[-1], ints(&[1]))),
        "input `x`: shape [-1] has a negative dimension"
    );
    assert!(refusal(input("INT4", &[1], ints(&[1]))).starts_with("input `x`: `INT4` is no datatype; there are BOOL, UINT8,"));
}

#[test]
fn raw_values_are_for_all_inputs_or_for_none() {
    let mut request = input("INT32", &[1], ints(&[1]));
    request.raw_input_contents = vec![vec![0; 4].into()];
    assert_eq!(
        refusal(request.clone()),
        "input `x`: values are both in contents and in raw_input_contents"
    );
    request.raw_input_contents.push(vec![0; 4].into());
    assert_eq!(refusal(request.clone()), "raw_input_contents holds 2 tensors, inputs has 1");
    request.raw_input_contents.pop();
    for contents in [None, Some(InferTensorContents::default())] {
        request.inputs[0].contents = contents;
        let (read, form) = read(request.clone()).unwrap();
        assert_eq!((read.inputs[0].1.data(), form), (&Data::Int32(vec![0]), Form::Raw));
    }
}

#[test]
fn parameters_are_read_in_whichever_way_they_come() {
    let mut request = input("INT32", &[1], ints(&[1]));
    request
        .parameters
        .insert("priority".to_owned(), parameter(ParameterChoice::Uint64Param(3)));
    request
        .parameters
        .insert("timeout".to_owned(), parameter(ParameterChoice::Int64Param(500)));
    request
        .parameters
        .insert("sequence_id".to_owned(), parameter(ParameterChoice::Int64Param(0)));
    request
        .parameters
        .insert("colour".to_owned(), parameter(ParameterChoice::StringParam("red".to_owned())));
    let classes = [("classification".to_owned(), parameter(ParameterChoice::Int64Param(2)))];
    request.outputs.push(InferRequestedOutputTensor {
        name: "y".to_owned(),
        parameters: classes.into(),
    });
    let (read, _) = read(request.clone()).unwrap();
    assert_eq!((read.options.priority, read.options.timeout), (Some(3), Some(500)));
    assert_eq!((read.outputs[0].name.as_str(), read.outputs[0].classes), ("y", 2));

    let mut wrong = request.clone();
    wrong
        .parameters
        .insert("timeout".to_owned(), parameter(ParameterChoice::Int64Param(-1)));
    assert_eq!(refusal(wrong), "parameter `timeout` takes a whole number that is not negative");
    let mut wrong = request.clone();
    wrong
        .parameters
        .insert("sequence_id".to_owned(), parameter(ParameterChoice::StringParam("s".to_owned())));
    assert_eq!(
        refusal(wrong),
        "the extension for sequences is not supported; the model keeps no state between requests"
    );
    let mut wrong = request;
    let region = parameter(ParameterChoice::StringParam("r".to_owned()));
    wrong.inputs[0].parameters.insert("shared_memory_region".to_owned(), region);
    assert_eq!(
        refusal(wrong),
        "input `x`: the extension for shared memory is not supported; send the tensors in the request"
    );
}

#[test]
fn what_would_take_far_more_memory_than_its_bytes_is_refused() {
    // A million empty inputs in two bytes each, and the like.
    let refuse = |message: Vec<u8>| decode(message.into()).unwrap_err();
    assert_eq!(
        refuse([0x2a, 0].repeat(1_000_000)),
        "there are more inputs than the 1024 that any model takes"
    );
    assert_eq!(
        refuse([0x32, 0].repeat(1_000_000)),
        "there are more outputs than the 1024 that any model takes"
    );
    assert_eq!(
        refuse([0x3a, 0].repeat(1_000_000)),
        "there are more raw tensors than the 1024 that any model takes"
    );
    assert_eq!(
        refuse([0x22, 0].repeat(1_000_000)),
        "there are more parameters than the 1024 that any model takes"
    );
    let within = |field: u8, bytes: &[u8]| {
        let mut out = vec![];
        encode_key(field.into(), WireType::LengthDelimited, &mut out);
        encode_varint(bytes.len() as u64, &mut out);
        out.extend_from_slice(bytes);
        out
    };
    let dimensions = "there are more dimensions than the 1024 that any model takes";
    assert_eq!(refuse(within(5, &within(3, &[1; 5000]))), dimensions, "packed");
    assert_eq!(refuse(within(5, &[0x18, 1].repeat(5000))), dimensions, "one by one");
    let parameters = "there are more parameters than the 1024 that any model takes";
    assert_eq!(refuse(within(5, &[0x22, 0].repeat(5000))), parameters);
    assert_eq!(refuse(within(6, &[0x12, 0].repeat(5000))), parameters);
    // What is cut off is counted up to there.
    let mut cut = within(5, &within(3, &[1; 5000]));
    cut.truncate(4000);
    assert_eq!(refuse(cut), dimensions);
}

/// A tensor of each datatype with the edges of its values.
fn edges(datatype: Datatype) -> Tensor {
    let data = match datatype {
        Datatype::Uint64 => Data::Uint64(vec![0, u64::MAX]),
        Datatype::Int64 => Data::Int64(vec![i64::MIN, i64::MAX]),
        Datatype::Fp16 => Data::Fp16(vec![f16::NAN, f16::MAX]),
        Datatype::Bf16 => Data::Bf16(vec![bf16::NEG_INFINITY, bf16::MAX]),
        Datatype::Bytes => Data::Bytes(vec![vec![0xff, 0], vec![]]),
        other => Data::from_f64(other, &[f64::MIN, f64::MAX]),
    };
    Tensor::new(vec![2, 1], data).unwrap()
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    let mut out = vec![];
    tensor.data().write_bytes(&mut out);
    out
}

#[test]
fn every_datatype_is_written_as_it_was_asked_for() {
    for datatype in Datatype::iter() {
        for form in [Form::Raw, Form::Typed] {
            let tensor = edges(datatype);
            let output = Output {
                name: "y".to_owned(),
                tensor: tensor.clone(),
                binary: None,
            };
            let frame = write("m", "1", "i".to_owned(), vec![output], form);
            let answer = ModelInferResponse::decode(frame::message(&frame)).unwrap();
            assert_eq!(
                (answer.model_name.as_str(), answer.model_version.as_str(), answer.id.as_str()),
                ("m", "1", "i")
            );
            let output = &answer.outputs[0];
            assert_eq!((output.datatype.parse(), &output.shape[..]), (Ok(datatype), &[2_i64, 1][..]));
            let data = match &output.contents {
                Some(contents) => typed(datatype, contents.clone()).unwrap(),
                None => Data::from_bytes(datatype, &[2, 1], &answer.raw_output_contents[0]).unwrap(),
            };
            let has_list = !matches!(datatype, Datatype::Fp16 | Datatype::Bf16);
            assert_eq!(output.contents.is_some(), has_list && form == Form::Typed, "{datatype}");
            assert_eq!(bytes(&Tensor::new(vec![2, 1], data).unwrap()), bytes(&tensor), "{datatype}");
            // The same within a stream's message.
            let streamed = in_stream(Ok(frame));
            let streamed = ModelStreamInferResponse::decode(frame::message(&streamed)).unwrap();
            assert_eq!(streamed.infer_response, Some(answer));
        }
    }
}

proptest! {
    #[test]
    fn no_message_makes_it_panic(message in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = decode(message.into()).and_then(read);
    }
}
