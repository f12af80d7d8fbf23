//! What readers of untrusted files do with any bytes: give a value or an error, in memory that their size bounds.

use std::fs;
use std::path::Path;

use plimsoll_optimizer::convert;
use plimsoll_optimizer::evaluate::dataset::Dataset;
use plimsoll_optimizer::graph::shape::Shapes;
use plimsoll_optimizer::graph::simplify::simplify;
use plimsoll_package::manifest::{Datatype, TensorSpec};
use plimsoll_runtime::onnx;

/// Most bytes that a dataset may unpack to.
const UNPACKED_BYTES_MAX: u64 = 4 << 20;

/// Reads `bytes` as a model in `folder`, beside which the file `weights` lies, and does with it what comes before compression.
pub(crate) fn model(bytes: &[u8], folder: &Path) {
    let path = folder.join("model.onnx");
    fs::write(&path, bytes).unwrap();
    let Ok(mut model) = onnx::read(&path) else { return };
    if simplify(&mut model).is_err() || onnx::signature(&model).is_err() {
        return;
    }
    drop(Shapes::of(&model));
    // What was accepted is written, and reads the same again.
    let written = folder.join("written.onnx");
    convert::write(&model, &written).unwrap();
    let mut again = onnx::read(&written).unwrap();
    simplify(&mut again).unwrap();
    assert_eq!(onnx::signature(&again).unwrap(), onnx::signature(&model).unwrap());
}

/// Reads `bytes` as a dataset in `folder`, for models that take pictures, vectors and texts.
pub(crate) fn dataset(bytes: &[u8], folder: &Path) {
    let path = folder.join("data");
    fs::write(&path, bytes).unwrap();
    let spec = |name: &str, datatype, shape: &[i64]| TensorSpec {
        name: name.into(),
        datatype,
        shape: shape.to_vec(),
    };
    for specs in [
        vec![spec("image", Datatype::Fp32, &[-1, 1, 4, 4])],
        vec![spec("image", Datatype::Uint8, &[1, 4, -1, 3])],
        vec![spec("a", Datatype::Fp32, &[-1, -1]), spec("b", Datatype::Int64, &[-1])],
        vec![spec("text", Datatype::Bytes, &[-1])],
    ] {
        let Ok(data) = Dataset::read(&path, &specs, None, UNPACKED_BYTES_MAX) else {
            continue;
        };
        for range in data.batches().take(4) {
            drop(data.batch(range));
        }
        drop(data.first());
    }
}
