use std::convert::Infallible;
use std::path::{Path, PathBuf};

use plimsoll_package::digest::Digest;
use serde_json::Value;

use super::resize::Filter;
use super::*;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models/pictures")
}

fn expected() -> Value {
    serde_json::from_slice(&std::fs::read(folder().join("expected.json")).unwrap()).unwrap()
}

fn picture(name: &str) -> Vec<u8> {
    std::fs::read(folder().join(name)).unwrap()
}

fn decoded(name: &str, channels: usize) -> Pixels {
    Decoder::new(&picture(name)).unwrap().decode(channels).unwrap()
}

fn input(shape: [i64; 4]) -> TensorSpec {
    TensorSpec {
        name: "pixel_values".into(),
        datatype: Datatype::Fp32,
        shape: shape.to_vec(),
    }
}

fn images(specification: &Value, shape: [i64; 4]) -> Images {
    let specification = Specification::parse(specification.to_string().as_bytes()).unwrap();
    Images::new(specification, &[input(shape)]).unwrap()
}

fn fill(images: &Images, encoded: Vec<Vec<u8>>) -> Result<Tensor, String> {
    let tensor = Tensor::new(vec![encoded.len()], encoded).unwrap();
    images
        .fill(&tensor, 1 << 20, |_| Ok::<_, Infallible>(()))
        .map_err(|refused| match refused {
            Refused::Given(text) => text,
            Refused::Memory(never) => match never {},
        })
}

#[test]
fn resizing_is_pillows_bit_for_bit() {
    let expected = expected();
    let source = decoded("picture.png", 3);
    let filters = [
        Filter::Nearest,
        Filter::Lanczos,
        Filter::Bilinear,
        Filter::Bicubic,
        Filter::Box,
        Filter::Hamming,
    ];
    for filter in filters {
        for (size, digest) in expected["resized"][format!("{filter:?}")].as_object().unwrap() {
            let (width, height) = size.split_once('x').unwrap();
            let resized = resize::resize(&source, width.parse().unwrap(), height.parse().unwrap(), filter);
            let found = Digest::of(&resized.data).hex().to_owned();
            assert_eq!(found, digest.as_str().unwrap(), "{filter:?} to {size}");
        }
    }
    assert_eq!(
        Digest::of(&decoded("picture.png", 1).data).hex(),
        expected["grey"].as_str().unwrap()
    );
}

#[test]
fn tensors_are_those_of_transformers_image_processors() {
    let expected = expected();
    for case in expected["cases"].as_array().unwrap() {
        let (specification, name) = (case["specification"].as_str().unwrap(), case["picture"].as_str().unwrap());
        let images = images(&expected["specifications"][specification], [-1, 3, 8, 8]);
        let tensor = fill(&images, vec![picture(name)]).unwrap();
        assert_eq!(tensor.shape(), [1, 3, 8, 8]);
        let values = case["values"].as_array().unwrap();
        assert_eq!(values.len(), tensor.data().len());
        // What a step of 255 becomes. Decoders of lossy formats may differ by one in a pixel, and rounding may make two of it.
        let step = match specification {
            "bytes" => 1.0,
            "padded" => 1.0 / 255.0,
            "clip" => 1.0 / 255.0 / 0.26,
            _ => 2.0 / 255.0,
        };
        let lossy = name.ends_with(".jpg") || name == "picture.webp";
        let tolerance = step * if lossy { 2.01 } else { 1e-3 };
        for (index, (found, expected)) in tensor.as_f32().unwrap().iter().zip(values).enumerate() {
            let difference = (f64::from(*found) - expected.as_f64().unwrap()).abs();
            assert!(
                difference <= tolerance,
                "{specification} of {name}: value {index} is {found}, expected {expected}"
            );
        }
    }
}

#[test]
fn channels_come_where_the_model_has_them() {
    let expected = expected();
    let specification = &expected["specifications"]["vit"];
    let first = fill(&images(specification, [-1, 3, 8, 8]), vec![picture("picture.png")]).unwrap();
    let last = fill(&images(specification, [-1, 8, 8, 3]), vec![picture("picture.png")]).unwrap();
    assert_eq!(last.shape(), [1, 8, 8, 3]);
    let (first, last) = (first.as_f32().unwrap(), last.as_f32().unwrap());
    for pixel in 0..64 {
        for channel in 0..3 {
            assert_eq!(first[channel * 64 + pixel], last[pixel * 3 + channel]);
        }
    }
    let grey = serde_json::json!({"size": 8, "do_normalize": false});
    assert_eq!(
        fill(&images(&grey, [-1, 1, 8, 8]), vec![picture("picture.png")]).unwrap().shape(),
        [1, 1, 8, 8]
    );
}

#[test]
fn base64_stands_for_the_bytes_that_json_cannot_hold() {
    let expected = expected();
    let images = images(&expected["specifications"]["vit"], [-1, 3, 8, 8]);
    let plain = STANDARD.encode(picture("picture.jpg"));
    let address = format!("data:image/jpeg;base64,{plain}");
    let tensor = fill(&images, vec![picture("picture.jpg"), plain.into_bytes(), address.into_bytes()]).unwrap();
    assert_eq!(tensor.shape(), [3, 3, 8, 8]);
    let values = tensor.as_f32().unwrap();
    assert!(values[..192] == values[192..384] && values[..192] == values[384..]);
}

/// The start of a PNG of that size and nothing behind it.
fn header_of_png(width: u32, height: u32) -> Vec<u8> {
    let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
    let mut header = b"IHDR".to_vec();
    header.extend(width.to_be_bytes());
    header.extend(height.to_be_bytes());
    header.extend([8, 2, 0, 0, 0]);
    png.extend(13_u32.to_be_bytes());
    let mut checksum = flate2::Crc::new();
    checksum.update(&header);
    png.extend(&header);
    png.extend(checksum.sum().to_be_bytes());
    png.extend([0, 0, 0, 0]);
    png.extend(b"IDAT");
    png
}

#[test]
fn what_is_no_image_or_too_large_is_named_before_it_takes_memory() {
    let expected = expected();
    let images = images(&expected["specifications"]["vit"], [-1, 3, 8, 8]);
    let refuse = |encoded: Vec<u8>| fill(&images, vec![picture("picture.png"), encoded]).unwrap_err();
    assert_eq!(
        refuse(b"hello".to_vec()),
        "input `image`: image 1: it is none of PNG, JPEG and WebP, nor base64 of one"
    );
    let half = picture("picture.png")[..200].to_vec();
    assert!(refuse(half).starts_with("input `image`: image 1: it cannot be decoded: "));
    let text = refuse(header_of_png(16_000, 16_000));
    assert_eq!(text, "input `image`: image 1: it has 16000 by 16000 pixels, the most are 33554432");
    let text = refuse(header_of_png(100_000, 10));
    assert!(text.starts_with("input `image`: image 1: it cannot be decoded: "), "{text}");

    let tensor = Tensor::new(vec![1], vec![picture("picture.png")]).unwrap();
    let refused = images.fill(&tensor, 1 << 20, Err::<(), _>).unwrap_err();
    assert!(matches!(refused, Refused::Memory(bytes) if bytes == 61 * 47 * 11), "{refused:?}");
    let refused = images.fill(&tensor, 100, |_| Ok::<_, Infallible>(())).unwrap_err();
    let Refused::Given(text) = refused;
    assert_eq!(
        text,
        "input `image`: 1 images are more than the 100 bytes that this server takes; send fewer at a time"
    );
}

#[test]
fn an_input_that_does_not_fit_is_named() {
    let unresized = images(&serde_json::json!({"do_rescale": true}), [-1, 3, 8, 8]);
    let text = fill(&unresized, vec![picture("picture.png")]).unwrap_err();
    assert_eq!(
        text,
        "input `image` becomes shape [1, 3, 47, 61], the model's `pixel_values` takes [-1, 3, 8, 8]"
    );
    let text = fill(&unresized, vec![picture("picture.png"), picture("turned.jpg")]).unwrap_err();
    assert_eq!(
        text,
        "input `image`: image 1: it has 61 by 47 pixels after resizing, the first has 47 by 61"
    );

    let new = |specs: &[TensorSpec], specification: &str| {
        Images::new(Specification::parse(specification.as_bytes()).unwrap(), specs)
            .err()
            .unwrap()
    };
    let mean = r#"{"size": 8, "image_mean": [1, 2], "image_std": [1]}"#;
    assert_eq!(
        new(&[input([-1, 3, 8, 8])], mean),
        "image_mean has 2 values, the model takes 3 channels"
    );
    assert_eq!(new(&[], r#"{"size": 8}"#), "the model has no input of four dimensions for it");
    let text = "input `pixel_values` of shape [-1, 4, 8, 8] has neither 1 nor 3 channels";
    assert_eq!(new(&[input([-1, 4, 8, 8])], r#"{"size": 8}"#), text);
}
