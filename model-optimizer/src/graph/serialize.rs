//! Writing a model: tensor by tensor, so that memory never holds the whole; what one protobuf message cannot hold goes to external data.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use plimsoll_runtime::onnx::tensor_proto::DataLocation;
use plimsoll_runtime::onnx::{GraphProto, ModelProto, StringStringEntryProto, TensorProto, mapping};
use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};

/// Most bytes of a protobuf message.
const MESSAGE_BYTES_MAX: usize = i32::MAX as usize;
/// Fewest bytes of a tensor that goes to external data.
const EXTERNAL_BYTES_MIN: usize = 1024;
/// External data begin at multiples of this, so that engines can map them.
const ALIGNMENT: u64 = 4096;
/// Fewest bytes of a new tensor that is counted, and kept on disk where memory holds [`HELD_BYTES_MAX`] of such already.
const COUNTED_BYTES_MIN: usize = 1 << 20;
/// Most bytes of new tensors that are kept in memory.
const HELD_BYTES_MAX: usize = 24 << 20;

/// The bytes of new tensors that are kept in memory.
static HELD: AtomicUsize = AtomicUsize::new(0);

/// Bytes that are counted as long as they are there.
struct Held(Vec<u8>);

impl Held {
    /// `data`, or `Err` where there would be too many.
    fn new(data: Vec<u8>) -> Result<Self, Vec<u8>> {
        let added = data.len();
        if HELD.fetch_add(added, Ordering::Relaxed) + added <= HELD_BYTES_MAX {
            return Ok(Self(data));
        }
        HELD.fetch_sub(added, Ordering::Relaxed);
        Err(data)
    }
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        HELD.fetch_sub(self.0.len(), Ordering::Relaxed);
    }
}

/// Field numbers of `onnx.proto`.
mod field {
    pub(super) const MODEL_GRAPH: u32 = 7;
    pub(super) const GRAPH_INITIALIZER: u32 = 5;
    pub(super) const TENSOR_RAW_DATA: u32 = 9;
}

/// The file beside the model at `path` that holds its external data, where it has any.
#[must_use]
pub fn external_file(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".data");
    path.with_file_name(name)
}

/// The files that the model at `path` consists of, itself first.
#[must_use]
pub fn files(path: &Path) -> Vec<PathBuf> {
    [path.to_owned()]
        .into_iter()
        .chain(Some(external_file(path)).filter(|file| file.is_file()))
        .collect()
}

/// Writes `model` to `path` and, where it has more than 2 GiB, its weights to [`external_file`]. The files appear whole or not at all.
///
/// # Errors
/// Where the disk does not take it.
pub fn write(model: &ModelProto, path: &Path) -> io::Result<()> {
    write_within(model, path, MESSAGE_BYTES_MAX)
}

/// Writes `model` to `path` without the weights that lie in mapped files: it refers to links to those files beside it, so that next to nothing
/// is written. Where no link can be made, the weights are written after all.
///
/// # Errors
/// Where the disk does not take it.
pub fn write_referring(model: &ModelProto, path: &Path) -> io::Result<()> {
    let tensors = model.graph.as_ref().map_or(&[][..], |graph| &graph.initializer);
    let mut links: HashMap<PathBuf, Option<String>> = HashMap::new();
    let mut inside = model.encoded_len();
    let mut heads = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let mut head = head(tensor);
        let data = tensor.raw_data();
        let origin = Some(data).filter(|data| data.len() >= EXTERNAL_BYTES_MIN).and_then(mapping::origin);
        if let Some((file, offset)) = origin {
            let number = links.len();
            let link = links.entry(file).or_insert_with_key(|file| {
                let link = path.with_extension(format!("weights-{number}"));
                // What an interrupted run left behind gives way.
                let _ = fs::remove_file(&link);
                fs::hard_link(file, &link).ok()?;
                Some(link.file_name()?.to_string_lossy().into_owned())
            });
            if let Some(location) = link {
                refer(&mut head, location, offset, data.len());
                inside -= data.len();
            }
        }
        heads.push(head);
    }
    if inside > MESSAGE_BYTES_MAX {
        return write(model, path);
    }
    let file = tempfile::NamedTempFile::new_in(folder_of(path))?;
    write_message(file.as_file(), model, tensors, &heads)?;
    file.persist(path)?;
    Ok(())
}

/// Makes of `head` a reference to external data.
fn refer(head: &mut TensorProto, location: &str, offset: u64, length: usize) {
    let entry = |key: &str, value: String| StringStringEntryProto {
        key: Some(key.to_owned()),
        value: Some(value),
    };
    head.data_location = Some(DataLocation::External as i32);
    head.external_data = vec![
        entry("location", location.to_owned()),
        entry("offset", offset.to_string()),
        entry("length", length.to_string()),
    ];
}

fn folder_of(path: &Path) -> &Path {
    path.parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

fn write_within(model: &ModelProto, path: &Path, message_bytes_max: usize) -> io::Result<()> {
    let folder = folder_of(path);
    let graph = model.graph.as_ref();
    let tensors = graph.map_or(&[][..], |graph| &graph.initializer);
    let mut heads: Vec<TensorProto> = tensors.iter().map(head).collect();
    let external = external_file(path);
    if model.encoded_len() > message_bytes_max {
        let data = tempfile::NamedTempFile::new_in(folder)?;
        let location = external.file_name().unwrap_or_default().to_string_lossy().into_owned();
        write_external(data.as_file(), &location, tensors, &mut heads)?;
        data.persist(&external)?;
    } else if let Err(error) = fs::remove_file(&external)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    let file = tempfile::NamedTempFile::new_in(folder)?;
    write_message(file.as_file(), model, tensors, &heads)?;
    file.persist(path)?;
    Ok(())
}

/// The tensor without its raw data.
fn head(tensor: &TensorProto) -> TensorProto {
    TensorProto {
        raw_data: None,
        ..tensor.clone()
    }
}

fn write_external(file: &File, location: &str, tensors: &[TensorProto], heads: &mut [TensorProto]) -> io::Result<()> {
    let mut out = BufWriter::new(file);
    let mut offset = 0_u64;
    for (tensor, head) in tensors.iter().zip(heads) {
        let data = tensor.raw_data();
        if data.len() < EXTERNAL_BYTES_MIN {
            continue;
        }
        let start = offset.next_multiple_of(ALIGNMENT);
        out.write_all(&vec![0; (start - offset) as usize])?;
        out.write_all(data)?;
        mapping::release(data);
        offset = start + data.len() as u64;
        refer(head, location, start, data.len());
    }
    out.flush()
}

fn write_message(file: &File, model: &ModelProto, tensors: &[TensorProto], heads: &[TensorProto]) -> io::Result<()> {
    let mut out = BufWriter::new(file);
    // A message's fields may come in any order; the graph's length is all that has to be known before.
    let rest = ModelProto {
        ir_version: model.ir_version,
        opset_import: model.opset_import.clone(),
        producer_name: model.producer_name.clone(),
        producer_version: model.producer_version.clone(),
        domain: model.domain.clone(),
        model_version: model.model_version,
        doc_string: model.doc_string.clone(),
        graph: None,
        metadata_props: model.metadata_props.clone(),
        training_info: model.training_info.clone(),
        functions: model.functions.clone(),
        ..ModelProto::default()
    };
    out.write_all(&rest.encode_to_vec())?;
    let Some(graph) = &model.graph else { return out.flush() };
    let graph = GraphProto {
        node: graph.node.clone(),
        name: graph.name.clone(),
        initializer: vec![],
        sparse_initializer: graph.sparse_initializer.clone(),
        doc_string: graph.doc_string.clone(),
        input: graph.input.clone(),
        output: graph.output.clone(),
        value_info: graph.value_info.clone(),
        quantization_annotation: graph.quantization_annotation.clone(),
        metadata_props: graph.metadata_props.clone(),
    };
    let inline = |tensor: &TensorProto, head: &TensorProto| {
        let inside = tensor.raw_data.is_some() && head.data_location() != DataLocation::External;
        inside.then(|| tensor.raw_data().len())
    };
    let tensor_length = |tensor: &TensorProto, head: &TensorProto| {
        let raw = inline(tensor, head).map_or(0, |raw| key_len(field::TENSOR_RAW_DATA) + encoded_len_varint(raw as u64) + raw);
        head.encoded_len() + raw
    };
    let lengths: Vec<usize> = tensors
        .iter()
        .zip(heads)
        .map(|(tensor, head)| tensor_length(tensor, head))
        .collect();
    let initializers: usize = lengths
        .iter()
        .map(|length| key_len(field::GRAPH_INITIALIZER) + encoded_len_varint(*length as u64) + length)
        .sum();
    let mut prefix = Vec::new();
    open(&mut prefix, field::MODEL_GRAPH, graph.encoded_len() + initializers);
    graph.encode(&mut prefix).map_err(io::Error::other)?;
    out.write_all(&prefix)?;
    drop(prefix);
    for ((tensor, head), length) in tensors.iter().zip(heads).zip(lengths) {
        let mut prefix = Vec::new();
        open(&mut prefix, field::GRAPH_INITIALIZER, length);
        head.encode(&mut prefix).map_err(io::Error::other)?;
        if let Some(raw) = inline(tensor, head) {
            open(&mut prefix, field::TENSOR_RAW_DATA, raw);
            out.write_all(&prefix)?;
            out.write_all(tensor.raw_data())?;
            mapping::release(tensor.raw_data());
        } else {
            out.write_all(&prefix)?;
        }
    }
    out.flush()
}

/// The key and length of a field of bytes or of a message.
fn open(out: &mut Vec<u8>, field: u32, length: usize) {
    encode_key(field, WireType::LengthDelimited, out);
    encode_varint(length as u64, out);
}

/// `data` as a tensor's bytes; what is large lies in a file without a name as soon as there is much of it, so that memory is bounded by the
/// largest tensor.
#[must_use]
pub fn spilled(data: Vec<u8>) -> Bytes {
    if data.len() < COUNTED_BYTES_MIN {
        return data.into();
    }
    let data = match Held::new(data) {
        Ok(held) => return Bytes::from_owner(held),
        Err(data) => data,
    };
    // A disk that is full or missing is no reason to stop as long as memory is there.
    let spill = || {
        let mut file = tempfile::tempfile()?;
        file.write_all(&data)?;
        mapping::map_unnamed(&file)
    };
    let spilled: io::Result<Bytes> = spill();
    spilled.unwrap_or_else(|_| data.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{float_tensor, node};
    use plimsoll_runtime::onnx::{self, ValueInfoProto};

    fn model() -> ModelProto {
        let value = |name: &str| ValueInfoProto {
            name: Some(name.into()),
            ..ValueInfoProto::default()
        };
        let typed = TensorProto {
            name: Some("typed".into()),
            dims: vec![2],
            data_type: Some(1),
            float_data: vec![1.5, -2.5],
            ..TensorProto::default()
        };
        let graph = GraphProto {
            name: Some("g".into()),
            node: vec![node("Add", &["x", "w"], "y", vec![])],
            initializer: vec![
                float_tensor("w", &[600], &(0..600).map(|index| index as f32).collect::<Vec<_>>()),
                typed,
                float_tensor("empty", &[0], &[]),
                float_tensor("v", &[2, 300], &(0..600).map(|index| -(index as f32)).collect::<Vec<_>>()),
            ],
            input: vec![value("x")],
            output: vec![value("y")],
            ..GraphProto::default()
        };
        ModelProto {
            ir_version: Some(8),
            producer_name: Some("p".into()),
            graph: Some(graph),
            ..ModelProto::default()
        }
    }

    #[test]
    fn what_is_written_is_what_the_protobuf_library_reads() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.onnx");
        write(&model(), &path).unwrap();
        assert_eq!(ModelProto::decode(&*fs::read(&path).unwrap()).unwrap(), model());
        assert_eq!(fs::metadata(&path).unwrap().len() as usize, model().encoded_len());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left behind");
    }

    #[test]
    fn what_is_mapped_is_referred_to_and_reads_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let (source, path) = (folder.path().join("source"), folder.path().join("m.onnx"));
        write(&model(), &source).unwrap();
        let mapped = onnx::read(&source).unwrap();
        for _ in 0..2 {
            write_referring(&mapped, &path).unwrap();
        }
        assert!(fs::metadata(&path).unwrap().len() < 1000, "the weights are not written again");
        fs::remove_file(&source).unwrap();
        assert_eq!(onnx::read(&path).unwrap(), model());
    }

    #[test]
    fn what_one_message_cannot_hold_goes_to_a_file_beside_it_and_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.onnx");
        write_within(&model(), &path, 1000).unwrap();
        assert!(fs::metadata(&path).unwrap().len() < 1000);
        let data = fs::metadata(external_file(&path)).unwrap().len();
        assert_eq!(data, ALIGNMENT + 2400, "two large tensors, the second aligned");
        assert_eq!(onnx::read(&path).unwrap(), model());
        // Written again within the limit, the external data go.
        write(&onnx::read(&path).unwrap(), &path).unwrap();
        assert!(!external_file(&path).exists());
        assert_eq!(onnx::read(&path).unwrap(), model());
    }

    #[test]
    fn a_large_tensor_reads_the_same_from_the_disk() {
        let data: Vec<u8> = (0..HELD_BYTES_MAX + 3).map(|index| (index % 253) as u8).collect();
        assert!(Held::new(data.clone()).is_err(), "it is more than memory may hold");
        assert!(spilled(data.clone()) == data);
        let small = spilled(data[..COUNTED_BYTES_MIN].to_vec());
        assert!(small == data[..COUNTED_BYTES_MIN]);
    }
}
