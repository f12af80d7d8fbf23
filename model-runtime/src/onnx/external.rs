//! External data: tensors whose bytes lie in files beside the model (onnx.proto, `TensorProto.external_data`; `docs/ExternalData.md`).

use std::collections::{BTreeSet, HashMap};
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;

use super::tensor_proto::DataLocation;
use super::{GraphProto, ModelProto, NodeProto, OnnxError, TensorProto, mapping, weights};

/// Every tensor of a model: initialisers and attributes, in subgraphs and functions, too.
pub fn for_each_tensor<E>(model: &mut ModelProto, visit: &mut impl FnMut(&mut TensorProto) -> Result<(), E>) -> Result<(), E> {
    fn of_graph<E>(graph: &mut GraphProto, visit: &mut impl FnMut(&mut TensorProto) -> Result<(), E>) -> Result<(), E> {
        graph.initializer.iter_mut().try_for_each(&mut *visit)?;
        for sparse in &mut graph.sparse_initializer {
            sparse.values.iter_mut().chain(&mut sparse.indices).try_for_each(&mut *visit)?;
        }
        graph.node.iter_mut().try_for_each(|node| of_node(node, visit))
    }
    fn of_node<E>(node: &mut NodeProto, visit: &mut impl FnMut(&mut TensorProto) -> Result<(), E>) -> Result<(), E> {
        for attribute in &mut node.attribute {
            attribute.t.iter_mut().chain(&mut attribute.tensors).try_for_each(&mut *visit)?;
            for graph in attribute.g.iter_mut().chain(&mut attribute.graphs) {
                of_graph(graph, visit)?;
            }
        }
        Ok(())
    }
    if let Some(graph) = &mut model.graph {
        of_graph(graph, visit)?;
    }
    for node in model.functions.iter_mut().flat_map(|function| &mut function.node) {
        of_node(node, visit)?;
    }
    Ok(())
}

/// The files that hold the model's external data, as paths relative to its folder.
///
/// # Errors
/// [`OnnxError::Weight`] where a location is missing, absolute, or leaves the folder.
pub fn locations(model: &mut ModelProto) -> Result<BTreeSet<String>, OnnxError> {
    let mut found = BTreeSet::new();
    for_each_tensor(model, &mut |tensor| {
        if tensor.data_location() == DataLocation::External {
            found.insert(location(tensor)?.to_owned());
        }
        Ok(())
    })?;
    Ok(found)
}

/// Gives every tensor whose data lies in another file of `folder` a view of that file, which is mapped.
///
/// # Errors
/// [`OnnxError::Weight`] where a location leaves the folder, the file is missing or too short, or holds another number of bytes than the
/// tensor's shape says.
pub(super) fn resolve(model: &mut ModelProto, folder: &Path) -> Result<(), OnnxError> {
    let mut files: HashMap<PathBuf, Bytes> = HashMap::new();
    for_each_tensor(model, &mut |tensor| {
        if tensor.data_location() != DataLocation::External {
            return Ok(());
        }
        let name = location(tensor)?.to_owned();
        let path = folder.join(&name);
        if !files.contains_key(&path) {
            let mapped = inside(folder, &path).and_then(|file| mapping::map(&file));
            let mapped = mapped.map_err(|error| refuse(tensor, &format!("keeps its data in `{name}`, which cannot be read: {error}")))?;
            files.insert(path.clone(), mapped);
        }
        let data = view(tensor, &files[&path])?;
        tensor.raw_data = Some(data);
        tensor.external_data.clear();
        tensor.data_location = None;
        Ok(())
    })
}

fn location(tensor: &TensorProto) -> Result<&str, OnnxError> {
    let location = entry(tensor, "location").ok_or_else(|| refuse(tensor, "keeps its data in another file and does not say in which"))?;
    let plain = !location.is_empty() && Path::new(location).components().all(|part| matches!(part, Component::Normal(_)));
    if plain {
        Ok(location)
    } else {
        let reason =
            format!("keeps its data in `{location}`, which is not a file beside the model; save the model again with its data beside it");
        Err(refuse(tensor, &reason))
    }
}

/// A link may lead out of the folder though its name does not.
fn inside(folder: &Path, path: &Path) -> std::io::Result<PathBuf> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let resolved = path.canonicalize()?;
    if resolved.starts_with(folder.canonicalize()?) {
        Ok(resolved)
    } else {
        Err(std::io::Error::other("it is a link that leaves the model's folder"))
    }
}

fn view(tensor: &TensorProto, file: &Bytes) -> Result<Bytes, OnnxError> {
    let number = |key: &str| match entry(tensor, key) {
        None => Ok(None),
        Some(text) => text
            .parse::<u64>()
            .map(Some)
            .map_err(|_| refuse(tensor, &format!("has the {key} `{text}`, which is no number of bytes"))),
    };
    let size = file.len() as u64;
    let offset = number("offset")?.unwrap_or(0);
    let length = number("length")?.unwrap_or(size.saturating_sub(offset));
    let expected = weights::byte_length(tensor)?;
    if expected.is_some_and(|expected| expected != length) {
        let reason = format!(
            "has {length} bytes of external data, and its shape and type say {}",
            expected.unwrap_or_default()
        );
        return Err(refuse(tensor, &reason));
    }
    let end = offset.checked_add(length).filter(|end| *end <= size);
    let end = end.ok_or_else(|| {
        let reason = format!(
            "has its external data at {offset}, {length} bytes long, in a file of {size} bytes; the file is cut off or another one"
        );
        refuse(tensor, &reason)
    })?;
    Ok(file.slice(offset as usize..end as usize))
}

fn entry<'a>(tensor: &'a TensorProto, key: &str) -> Option<&'a str> {
    tensor
        .external_data
        .iter()
        .find(|entry| entry.key() == key)
        .map(|entry| entry.value())
}

fn refuse(tensor: &TensorProto, reason: &str) -> OnnxError {
    OnnxError::Weight {
        name: tensor.name().to_owned(),
        reason: reason.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::tensor_proto::DataType;
    use crate::onnx::{StringStringEntryProto, ValueInfoProto};
    use prost::Message as _;

    fn external(entries: &[(&str, &str)]) -> ModelProto {
        let tensor = TensorProto {
            name: Some("w".into()),
            dims: vec![2, 2],
            data_type: Some(DataType::Float as i32),
            data_location: Some(DataLocation::External as i32),
            external_data: entries
                .iter()
                .map(|(key, value)| StringStringEntryProto {
                    key: Some((*key).into()),
                    value: Some((*value).into()),
                })
                .collect(),
            ..TensorProto::default()
        };
        let graph = GraphProto {
            initializer: vec![tensor],
            output: vec![ValueInfoProto::default()],
            ..GraphProto::default()
        };
        ModelProto {
            graph: Some(graph),
            ..ModelProto::default()
        }
    }

    fn read(entries: &[(&str, &str)]) -> Result<ModelProto, String> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("w.data"), (0..32).collect::<Vec<u8>>()).unwrap();
        std::fs::write(folder.path().join("m.onnx"), external(entries).encode_to_vec()).unwrap();
        crate::onnx::read(&folder.path().join("m.onnx")).map_err(|error| error.to_string())
    }

    #[test]
    fn data_beside_the_model_is_seen_as_if_it_were_inside() {
        let model = read(&[("location", "w.data"), ("offset", "8"), ("length", "16")]).unwrap();
        let tensor = &model.graph.unwrap().initializer[0];
        assert_eq!(tensor.raw_data(), (8..24).collect::<Vec<u8>>());
        assert_eq!((tensor.data_location(), tensor.external_data.len()), (DataLocation::Default, 0));
    }

    #[test]
    fn what_leaves_the_folder_is_missing_or_does_not_fit_is_refused_by_name() {
        for (entries, words) in [
            (&[("location", "../w.data")][..], "is not a file beside the model"),
            (&[("location", "/etc/passwd")], "is not a file beside the model"),
            (&[("offset", "0")], "does not say in which"),
            (&[("location", "gone.data")], "`gone.data`, which cannot be read"),
            (
                &[("location", "w.data"), ("length", "12")],
                "12 bytes of external data, and its shape and type say 16",
            ),
            (
                &[("location", "w.data"), ("offset", "20"), ("length", "16")],
                "cut off or another one",
            ),
            (&[("location", "w.data"), ("offset", "-1")], "no number of bytes"),
        ] {
            let said = read(entries).unwrap_err();
            assert!(said.starts_with("tensor `w`") && said.contains(words), "{said}");
        }
    }

    #[test]
    fn a_link_out_of_the_folder_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let outside = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(outside.path(), [0; 16]).unwrap();
        std::os::unix::fs::symlink(outside.path(), folder.path().join("w.data")).unwrap();
        std::fs::write(folder.path().join("m.onnx"), external(&[("location", "w.data")]).encode_to_vec()).unwrap();
        let said = crate::onnx::read(&folder.path().join("m.onnx")).unwrap_err().to_string();
        assert!(said.contains("a link that leaves the model's folder"), "{said}");
    }
}
