use std::io::Write as _;
use std::path::PathBuf;

use proptest::prelude::*;
use zip::CompressionMethod;
use zip::write::SimpleFileOptions;

use super::*;

fn spec(name: &str, datatype: Datatype, shape: &[i64]) -> TensorSpec {
    TensorSpec {
        name: name.into(),
        datatype,
        shape: shape.to_vec(),
    }
}

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join("data");
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

fn read(bytes: impl AsRef<[u8]>, specs: &[TensorSpec]) -> Result<Dataset, String> {
    let place = Place::new();
    Dataset::read(&place.write(bytes), specs, None, 1 << 20)
}

fn npy(kind: &str, shape: &str, values: &[u8]) -> Vec<u8> {
    let header = format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}");
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend((header.len() as u16).to_le_bytes());
    file.extend(header.as_bytes());
    file.extend(values);
    file
}

fn zipped(entries: &[(&str, Vec<u8>)], method: CompressionMethod) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        archive
            .start_file(*name, SimpleFileOptions::default().compression_method(method))
            .unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

fn floats(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

fn integers(values: impl IntoIterator<Item = i64>) -> Vec<u8> {
    values.into_iter().flat_map(i64::to_le_bytes).collect()
}

/// Every value of every batch of the first input.
fn all(dataset: &Dataset) -> Vec<f64> {
    dataset
        .batches()
        .flat_map(|range| dataset.batch(range).unwrap()[0].data().to_f64().unwrap())
        .collect()
}

const IMAGE: [i64; 2] = [-1, 2];

#[test]
fn what_a_runtime_sampled_is_evaluation_data() {
    let specs = [
        spec("name", Datatype::Bytes, &[-1]),
        spec("image", Datatype::Fp32, &[-1, 2, 2]),
        spec("mask", Datatype::Bool, &[-1, 1]),
    ];
    // As the runtime's tests hold it to write.
    let dataset = read(include_str!("../../../../model-runtime/tests/models/samples.jsonl"), &specs).unwrap();
    assert_eq!((dataset.samples(), dataset.labels()), (2, None));
    let [name, image, mask] = &dataset.batch(0..2).unwrap()[..] else {
        panic!("three inputs")
    };
    assert_eq!(name.data(), &Data::Bytes(vec![b"one".to_vec(), b"two".to_vec()]));
    assert_eq!(
        (image.shape(), image.as_f32()),
        (&[2, 2, 2][..], Some(&[0.1, 0.25, 3.0, -4.5, 5.0, 6.0, 7.0, 8.0][..]))
    );
    assert_eq!((mask.shape(), mask.data()), (&[2, 1][..], &Data::Bool(vec![true, false])));
}

#[test]
fn arrays_are_found_by_name_and_read_packed_or_not() {
    let image = [spec("image", Datatype::Fp32, &IMAGE)];
    for method in [CompressionMethod::Stored, CompressionMethod::Deflated] {
        for name in ["image", "x", "pixels"] {
            let file = zipped(
                &[
                    (
                        &format!("{name}.npy"),
                        npy("<f4", "(3, 2)", &floats([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])),
                    ),
                    ("y.npy", npy("<i8", "(3,)", &integers([1, 0, 2]))),
                ],
                method,
            );
            let dataset = read(file, &image).unwrap();
            assert_eq!((dataset.samples(), dataset.labels()), (3, Some(&[1.0, 0.0, 2.0][..])), "{name}");
            assert_eq!(dataset.batch(1..3).unwrap()[0].as_f32(), Some(&[2.0, 3.0, 4.0, 5.0][..]));
        }
    }
    // Labels by the name that they are given by.
    let pixels = ("image.npy", npy("<f4", "(2, 2)", &floats([0.0, 1.0, 2.0, 3.0])));
    let labels = ("target.npy", npy("<i8", "(2,)", &integers([4, 5])));
    let file = zipped(&[pixels, labels], CompressionMethod::Stored);
    let place = Place::new();
    let dataset = Dataset::read(&place.write(file), &image, Some("target"), 1 << 20).unwrap();
    assert_eq!(dataset.labels(), Some(&[4.0, 5.0][..]));
}

#[test]
fn a_single_array_and_doubles_serve_as_floats() {
    let doubles: Vec<u8> = [1.0_f64, 2.0].iter().flat_map(|value| value.to_le_bytes()).collect();
    let dataset = read(npy("<f8", "(1, 2)", &doubles), &[spec("image", Datatype::Fp32, &IMAGE)]).unwrap();
    assert_eq!(dataset.batch(0..1).unwrap()[0].as_f32(), Some(&[1.0, 2.0][..]));
}

#[test]
fn a_sample_comes_with_or_without_the_batch_dimension_of_one() {
    let values = || floats((0..12).map(|value| value as f32));
    for shape in ["(3, 2, 2)", "(3, 1, 2, 2)"] {
        for first in [-1, 1] {
            let dataset = read(npy("<f4", shape, &values()), &[spec("x", Datatype::Fp32, &[first, 2, 2])]).unwrap();
            let shapes: Vec<Vec<usize>> = dataset
                .batches()
                .map(|range| dataset.batch(range).unwrap()[0].shape().to_vec())
                .collect();
            if first == 1 {
                assert_eq!(shapes, vec![vec![1, 2, 2]; 3], "{shape}");
            } else {
                assert_eq!(shapes, [[3, 2, 2]], "{shape}");
            }
            assert_eq!(all(&dataset), (0..12).map(f64::from).collect::<Vec<_>>());
        }
    }
}

#[test]
fn a_sample_that_is_the_whole_input_is_run_alone_and_one_value_holds_for_all() {
    // As a voice detector has it: sound, a recurrent state whose first axis is no batch, and a sampling rate.
    let specs = [
        spec("input", Datatype::Fp32, &[-1, -1]),
        spec("state", Datatype::Fp32, &[2, -1, 3]),
        spec("sr", Datatype::Int64, &[]),
    ];
    let file = zipped(
        &[
            ("input.npy", npy("<f4", "(2, 4)", &floats((0..8).map(|value| value as f32)))),
            ("state.npy", npy("<f4", "(2, 2, 1, 3)", &floats((0..12).map(|value| value as f32)))),
            ("sr.npy", npy("<i8", "()", &integers([16000]))),
        ],
        CompressionMethod::Stored,
    );
    let dataset = read(file, &specs).unwrap();
    let batches: Vec<Vec<Tensor>> = dataset.batches().map(|range| dataset.batch(range).unwrap()).collect();
    assert_eq!(batches.len(), 2);
    let shapes: Vec<&[usize]> = batches[1].iter().map(Tensor::shape).collect();
    assert_eq!(shapes, [&[1, 4][..], &[2, 1, 3], &[]]);
    assert_eq!(batches[1][1].as_f32().unwrap()[0], 6.0);
    assert_eq!(batches[1][2].data(), &Data::Int64(vec![16000]));
}

#[test]
fn csv_columns_are_one_vector_or_inputs_of_their_own() {
    let text = "a,b,y\n1,2,0\n3,4.5,1\n";
    let dataset = read(text, &[spec("features", Datatype::Fp32, &IMAGE)]).unwrap();
    assert_eq!((all(&dataset), dataset.labels()), (vec![1.0, 2.0, 3.0, 4.5], Some(&[0.0, 1.0][..])));
    let own = [spec("b", Datatype::Fp32, &[-1, 1]), spec("name", Datatype::Bytes, &[-1, 1])];
    let dataset = read("name,b,label\nada,1,0\n\"x, y\",2,1\n", &own).unwrap();
    let tensors = dataset.batch(0..2).unwrap();
    assert_eq!(tensors[0].shape(), [2, 1]);
    assert_eq!(tensors[1].data(), &Data::Bytes(vec![b"ada".to_vec(), b"x, y".to_vec()]));
    let squares = [spec("image", Datatype::Uint8, &[-1, 1, 2, 2])];
    let dataset = read("p0,p1,p2,p3\n1,2,3,4\n", &squares).unwrap();
    assert_eq!(dataset.batch(0..1).unwrap()[0].shape(), [1, 1, 2, 2]);
}

#[test]
fn json_lines_hold_nested_lists() {
    let text = "{\"image\": [[1, 2], [3, 4]], \"y\": 3}\n\n{\"y\": 1, \"image\": [[5, 6], [7, 8]]}\n";
    let dataset = read(text, &[spec("image", Datatype::Fp32, &[-1, 2, 2])]).unwrap();
    assert_eq!(all(&dataset), (1..9).map(f64::from).collect::<Vec<_>>());
    assert_eq!(dataset.labels(), Some(&[3.0, 1.0][..]));
    let text = "{\"text\": \"one\"}\n{\"text\": \"two\"}\n";
    let dataset = read(text, &[spec("text", Datatype::Bytes, &[-1])]).unwrap();
    assert_eq!(dataset.batch(1..2).unwrap()[0].data(), &Data::Bytes(vec![b"two".to_vec()]));
}

fn parquet_file(codec: ::parquet::basic::Compression) -> Vec<u8> {
    use ::parquet::data_type::{DoubleType, Int64Type};
    use ::parquet::file::properties::WriterProperties;
    use ::parquet::file::writer::SerializedFileWriter;
    use ::parquet::schema::parser::parse_message_type;
    let schema = "message rows {
        required group image (LIST) { repeated group list { required double element; } }
        required int64 y;
    }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut bytes = Vec::new();
    let properties = WriterProperties::builder().set_compression(codec).build();
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, Arc::new(properties)).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column
        .typed::<DoubleType>()
        .write_batch(&[1.0, 2.0, 3.0, 4.0], Some(&[1, 1, 1, 1]), Some(&[0, 1, 0, 1]))
        .unwrap();
    column.close().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<Int64Type>().write_batch(&[7, 8], None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
    bytes
}

#[test]
fn a_parquet_list_is_a_vector_however_the_file_is_compressed() {
    use ::parquet::basic::Compression;
    for codec in [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(Default::default()),
        Compression::BROTLI(Default::default()),
        Compression::LZ4,
        Compression::LZ4_RAW,
    ] {
        let read = read(parquet_file(codec), &[spec("image", Datatype::Fp32, &IMAGE)]);
        let dataset = read.unwrap_or_else(|why| panic!("{codec}: {why}"));
        assert_eq!(
            (all(&dataset), dataset.labels()),
            (vec![1.0, 2.0, 3.0, 4.0], Some(&[7.0, 8.0][..])),
            "{codec}"
        );
    }
}

fn png(pixels: &[u8], width: u32, height: u32) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    let picture = image::RgbImage::from_raw(width, height, pixels.to_vec()).unwrap();
    picture.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

fn tarred(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, bytes) in entries {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, bytes.as_slice()).unwrap();
    }
    archive.into_inner().unwrap()
}

#[test]
fn pictures_become_values_in_the_order_of_their_labels() {
    let (red, blue) = ([255, 0, 0, 255, 0, 0], [0, 0, 255, 0, 0, 255]);
    let entries = [
        ("set/red.png", png(&red, 2, 1)),
        ("set/blue.png", png(&blue, 2, 1)),
        ("set/labels.csv", b"file,label\nblue.png,4\nred.png,2\n".to_vec()),
    ];
    let channels_first = [spec("image", Datatype::Fp32, &[-1, 3, 1, 2])];
    for file in [zipped(&entries, CompressionMethod::Deflated), tarred(&entries)] {
        let dataset = read(file, &channels_first).unwrap();
        assert_eq!(dataset.labels(), Some(&[4.0, 2.0][..]));
        assert_eq!(all(&dataset), [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
    }
    let dataset = read(tarred(&entries), &[spec("image", Datatype::Uint8, &[-1, 2, 1, 3])]).unwrap();
    assert_eq!(all(&dataset)[..3], [0.0, 0.0, 255.0]);
    let with = |json: &str| {
        let mut entries = entries.to_vec();
        entries.push(("set/preprocessing.json", json.as_bytes().to_vec()));
        read(tarred(&entries), &[spec("image", Datatype::Fp32, &[-1, 3, -1, -1])])
    };
    let dataset = with("{\"size\": [2, 2], \"mean\": [0.5], \"std\": [0.5, 0.5, 0.25]}").unwrap();
    assert_eq!(
        all(&dataset)[..12],
        [-1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, 2.0, 2.0, 2.0, 2.0]
    );
    assert!(
        with("{}")
            .unwrap_err()
            .contains("write size, such as [224, 224], into preprocessing.json")
    );
    assert!(with("{\"sice\": 3}").unwrap_err().contains("unknown field `sice`"));
}

#[test]
fn what_does_not_fit_is_refused_in_a_sentence() {
    let image = [spec("image", Datatype::Int32, &IMAGE)];
    let refusal = |bytes: &[u8]| read(bytes, &image).unwrap_err();
    let array = |shape: &str, count: i64| npy("<i8", shape, &integers(0..count));
    for (bytes, words) in [
        (array("(3, 4)", 12), "has shape [4], the model takes [-1, 2]"),
        (npy("<f4", "(1, 2)", &floats([0.5, 0.5])), "are of type FP32, the model takes INT32"),
        (array("(0, 2)", 0), "it holds no sample"),
        (array("(3, 2)", 2), "says that it is larger than its file"),
        (array("(4611686018427387904, 4)", 2), "says that it is larger than its file"),
        (npy(">i8", "(1, 2)", &integers(0..2)), "is big-endian"),
        (npy("|O", "(1, 2)", &integers(0..2)), "is of type |O, which holds no plain numbers"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff".to_vec(), "has a header of 4294967295 bytes"),
        (b"".to_vec(), "it is empty"),
        (b"a,b\n1,2\n1\n".to_vec(), "it is no CSV: CSV error: record 2"),
        (b"a,b\n1,two\n".to_vec(), "line 2 holds `two` in column `b`, which is no number"),
        (b"1,2\n3,4\n".to_vec(), "the first line of a CSV file names the columns"),
        (b"a,b\n".to_vec(), "it holds no sample"),
        (b"a,b\n1.5,2\n".to_vec(), "holds 1.5 for `image`, which takes INT32"),
        (
            b"{\"image\": [1, 2]}\n{\"image\": [1]}\n".to_vec(),
            "line 2: sample 2 has shape [1] for `image` and the first sample has [2]",
        ),
        (b"{\"image\": [[1], [2, 3]]}\n".to_vec(), "holds lists of different lengths"),
        (b"{\"image\": [1, 2]\n".to_vec(), "line 1 is no JSON object"),
        (b"{\"image\": [1, 2], \"y\": \"cat\"}\n".to_vec(), "the label of sample 1 is `cat`"),
        (b"PAR1 and then nothing".to_vec(), "it is a broken Parquet file"),
        (b"PK\x03\x04 and then nothing".to_vec(), "it is a broken zip archive"),
        (b"\x00\x01\x02\x03".to_vec(), "it is of no known form"),
    ] {
        let said = refusal(&bytes);
        assert!(said.contains(words), "{said}\ndoes not say: {words}");
    }
    let two = zipped(
        &[("a.npy", array("(1, 2)", 2)), ("b.npy", array("(1, 2)", 2))],
        CompressionMethod::Stored,
    );
    assert!(refusal(&two).contains("it holds no array `image` for the model's input of that name; there are a, b"));
    let place = Place::new();
    let file = place.write(array("(3, 2)", 6));
    assert!(
        Dataset::read(&file, &image, Some("z"), 1 << 20)
            .unwrap_err()
            .contains("no array `z` for the labels; there are x")
    );
}

#[test]
fn nothing_is_unpacked_beyond_the_limit() {
    let large = zipped(
        &[("x.npy", npy("<f4", "(1000, 1000)", &vec![0; 4_000_000]))],
        CompressionMethod::Deflated,
    );
    assert!(large.len() < 100_000);
    let image = [spec("x", Datatype::Fp32, &[-1, 1000])];
    assert_eq!(read(large, &image).unwrap_err(), "it unpacks to more than 1048576 bytes");
    let lines = "{\"x\": [0, 0]}\n".repeat(200_000);
    assert_eq!(
        read(lines, &[spec("x", Datatype::Fp64, &IMAGE)]).unwrap_err(),
        "line 65537: it unpacks to more than 1048576 bytes"
    );
}

#[test]
fn calibration_and_evaluation_share_no_sample() {
    let file = npy("<f4", "(101, 2)", &floats((0..202).map(|value| value as f32)));
    let labelled = zipped(
        &[("x.npy", file), ("y.npy", npy("<i8", "(101,)", &integers(0..101)))],
        CompressionMethod::Stored,
    );
    let whole = read(labelled, &[spec("x", Datatype::Fp32, &IMAGE)]).unwrap();
    let part = |part, seed| whole.clone().split(part, seed).unwrap();
    let (calibration, evaluation) = (part(Part::Calibration, 7), part(Part::Evaluation, 7));
    assert_eq!((calibration.samples(), evaluation.samples()), (25, 76));
    let mut both: Vec<f64> = all(&calibration).into_iter().chain(all(&evaluation)).collect();
    both.sort_by(f64::total_cmp);
    assert_eq!(both, (0..202).map(f64::from).collect::<Vec<_>>());
    // A label stays with its sample.
    for dataset in [&calibration, &evaluation] {
        let firsts: Vec<f64> = all(dataset).iter().step_by(2).map(|value| value / 2.0).collect();
        assert_eq!(dataset.labels(), Some(&firsts[..]));
    }
    assert_eq!(all(&calibration), all(&part(Part::Calibration, 7)));
    assert_ne!(all(&calibration), all(&part(Part::Calibration, 8)));
    let one = read(npy("<f4", "(1, 2)", &floats([0.0, 1.0])), &[spec("x", Datatype::Fp32, &IMAGE)]).unwrap();
    assert!(one.split(Part::Calibration, 7).unwrap_err().contains("name two datasets"));
}

#[test]
fn a_model_of_a_fixed_batch_gets_whole_batches_only() {
    let specs = [spec("x", Datatype::Fp32, &[4, 2])];
    let dataset = read(npy("<f4", "(11, 2)", &floats((0..22).map(|value| value as f32))), &specs).unwrap();
    assert_eq!(dataset.batches().collect::<Vec<_>>(), [0..4, 4..8]);
    let refusal = read(npy("<f4", "(3, 2)", &floats((0..6).map(|value| value as f32))), &specs).unwrap_err();
    assert!(refusal.contains("the model takes 4 samples at once, and it holds 3"));
}

#[test]
fn drawn_samples_are_the_same_every_time() {
    let specs = [spec("a", Datatype::Fp32, &[-1, -1, 3]), spec("b", Datatype::Int64, &[-1, 4])];
    let (one, other) = (Dataset::drawn(&specs, 8, false).unwrap(), Dataset::drawn(&specs, 8, false).unwrap());
    let tensors = one.batch(0..8).unwrap();
    assert_eq!(tensors, other.batch(0..8).unwrap());
    assert_eq!(tensors[0].shape(), [8, 8, 3]);
    assert!(tensors[1].data().to_f64().unwrap().iter().all(|value| [0.0, 1.0].contains(value)));
    let state = [spec("x", Datatype::Fp32, &[-1, 5]), spec("state", Datatype::Fp32, &[2, -1, 4])];
    let whole = Dataset::drawn(&state, 1, true).unwrap();
    assert_eq!(whole.batch(3..4).unwrap()[1].shape(), [2, 1, 4]);
    assert!(Dataset::drawn(&[spec("x", Datatype::Fp32, &[-1, 1 << 60])], 8, false).is_none());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_damaged_dataset_is_refused_or_read_and_never_ends_the_program(
        form in 0..5_usize, place in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<Option<prop::sample::Index>>()
    ) {
        let mut bytes = match form {
            0 => zipped(&[("image.npy", npy("<f4", "(2, 2)", &floats([1.0, 2.0, 3.0, 4.0])))], CompressionMethod::Stored),
            1 => parquet_file(::parquet::basic::Compression::SNAPPY),
            2 => b"a,b,y\n1,2,0\n3,4.5,1\n".to_vec(),
            3 => b"{\"image\": [1, 2], \"y\": 3}\n{\"image\": [4, 5], \"y\": 3}\n".to_vec(),
            _ => tarred(&[("a.png", png(&[1, 2, 3], 1, 1)), ("labels.csv", b"file,label\na.png,1\n".to_vec())]),
        };
        let place = place.index(bytes.len());
        bytes[place] = byte;
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let shape: &[i64] = if form == 4 { &[-1, 3, 1, 1] } else { &IMAGE };
        if let Ok(dataset) = read(bytes, &[spec("image", Datatype::Fp32, shape)]) {
            for range in dataset.batches() {
                prop_assert!(dataset.batch(range).is_ok());
            }
        }
    }
}
