"""Makes the models of this folder and, beside each, a probe whose outputs come from ONNX's reference implementation.

Run in a virtual environment with onnx 1.23: python make.py
"""

import json
import pathlib

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

FOLDER = pathlib.Path(__file__).parent
NAMES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8", "int16": "INT16",
    "int32": "INT32", "int64": "INT64", "float16": "FP16", "float32": "FP32", "float64": "FP64",
}
random = np.random.default_rng(7)


def weight(name, *shape):
    return numpy_helper.from_array(random.normal(size=shape).astype(np.float32), name)


def tensor(name, value):
    data = [float(x) for x in value.astype(np.float64).ravel()]
    return {"name": name, "datatype": NAMES[value.dtype.name], "shape": list(value.shape), "data": data}


def make(name, nodes, inputs, outputs, initializers=(), feed=None):
    graph = helper.make_graph(nodes, name, inputs, outputs, list(initializers))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="plimsoll-tests")
    onnx.checker.check_model(model)
    (FOLDER / f"{name}.onnx").write_bytes(model.SerializeToString())
    if feed is None:
        return
    # The reference knows DequantizeLinear from opset 19 on; none of the operators here changed since 17.
    reference = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    values = ReferenceEvaluator(reference).run(None, feed)
    probe = {
        "inputs": [tensor(key, value) for key, value in feed.items()],
        "outputs": [tensor(output.name, value) for output, value in zip(outputs, values)],
        "tolerance": 1e-5,
    }
    (FOLDER / f"{name}.probe.json").write_text(json.dumps(probe) + "\n")


def info(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


make(
    "mlp",
    [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["z"]),
        helper.make_node("Softmax", ["z"], ["y"], axis=-1),
    ],
    [info("x", TensorProto.FLOAT, ["batch", 4])],
    [info("y", TensorProto.FLOAT, ["batch", 3])],
    [weight("w1", 4, 8), weight("b1", 8), weight("w2", 8, 3), weight("b2", 3)],
    {"x": random.normal(size=(2, 4)).astype(np.float32)},
)

make(
    "convolution",
    [
        helper.make_node("Conv", ["image", "w"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["features"]),
    ],
    [info("image", TensorProto.FLOAT, [1, 1, 8, 8])],
    [info("features", TensorProto.FLOAT, [1, 4, 1, 1])],
    [weight("w", 4, 1, 3, 3)],
    {"image": random.normal(size=(1, 1, 8, 8)).astype(np.float32)},
)

# Weights in int8 with a scale a channel, as the optimiser writes them for convolutions.
make(
    "weight-only",
    [
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["w"], axis=0),
        helper.make_node("Conv", ["image", "w"], ["features"], kernel_shape=[3, 3]),
    ],
    [info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
    [info("features", TensorProto.FLOAT, ["batch", 4, 6, 6])],
    [
        numpy_helper.from_array(random.integers(-127, 128, size=(4, 1, 3, 3)).astype(np.int8), "q"),
        numpy_helper.from_array(np.array([0.01, 0.5, 0.002, 0.1], np.float32), "scale"),
        numpy_helper.from_array(np.zeros(4, np.int8), "zero"),
    ],
    {"image": random.normal(size=(3, 1, 8, 8)).astype(np.float32)},
)

make(
    "two-inputs",
    [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Greater", ["a", "b"], ["greater"])],
    [info("a", TensorProto.INT64, ["n", 2]), info("b", TensorProto.INT64, ["n", 2])],
    [info("sum", TensorProto.INT64, ["n", 2]), info("greater", TensorProto.BOOL, ["n", 2])],
    feed={"a": np.array([[1, -2], [3, 4]], np.int64), "b": np.array([[5, -6], [7, 1 << 40]], np.int64)},
)

kinds = {
    "bool": (TensorProto.BOOL, np.array([0, 1, 1], bool)),
    "uint8": (TensorProto.UINT8, np.array([0, 1, 255], np.uint8)),
    "uint16": (TensorProto.UINT16, np.array([0, 1, 65535], np.uint16)),
    "uint32": (TensorProto.UINT32, np.array([0, 1, 2**32 - 1], np.uint32)),
    "uint64": (TensorProto.UINT64, np.array([0, 1, 2**53], np.uint64)),
    "int8": (TensorProto.INT8, np.array([-128, 0, 127], np.int8)),
    "int16": (TensorProto.INT16, np.array([-32768, 0, 32767], np.int16)),
    "int32": (TensorProto.INT32, np.array([-(2**31), 0, 2**31 - 1], np.int32)),
    "int64": (TensorProto.INT64, np.array([-(2**53), 0, 2**53], np.int64)),
    "fp16": (TensorProto.FLOAT16, np.array([-1.5, 0, 65504], np.float16)),
    "fp32": (TensorProto.FLOAT, np.array([-1.5, 0, 3e38], np.float32)),
    "fp64": (TensorProto.DOUBLE, np.array([-1.5, 0, 1e300], np.float64)),
}
make(
    "every-type",
    [helper.make_node("Identity", [f"{name}_in"], [f"{name}_out"]) for name in kinds],
    [info(f"{name}_in", kind, [3]) for name, (kind, _) in kinds.items()],
    [info(f"{name}_out", kind, [3]) for name, (kind, _) in kinds.items()],
    feed={f"{name}_in": value for name, (_, value) in kinds.items()},
)

make("strings", [helper.make_node("Identity", ["text"], ["same"])],
     [info("text", TensorProto.STRING, ["n"])], [info("same", TensorProto.STRING, ["n"])])

make("bfloat16", [helper.make_node("Identity", ["x"], ["y"])],
     [info("x", TensorProto.BFLOAT16, [2])], [info("y", TensorProto.BFLOAT16, [2])])
# NumPy has no bfloat16, and the outputs of an identity need no reference.
same = {"datatype": "BF16", "shape": [2], "data": [1.5, -2.0]}
probe = {"inputs": [{"name": "x", **same}], "outputs": [{"name": "y", **same}], "tolerance": 0.0}
(FOLDER / "bfloat16.probe.json").write_text(json.dumps(probe) + "\n")

# Slow on purpose: 40 products of 512 x 512 matrices that stay as they are (10 GFLOP), so that requests overlap.
SIZE, STEPS = 512, 40
make(
    "slow",
    [
        helper.make_node("ConstantOfShape", ["size"], ["w"], value=helper.make_tensor("v", TensorProto.FLOAT, [1], [1 / SIZE])),
        helper.make_node("Mul", ["w", "x"], ["m0"]),
    ]
    + [helper.make_node("MatMul", [f"m{step}", f"m{step}"], [f"m{step + 1}"]) for step in range(STEPS)]
    + [helper.make_node("ReduceMean", [f"m{STEPS}"], ["y"], axes=[0, 1], keepdims=1)],
    [info("x", TensorProto.FLOAT, [1, 1])],
    [info("y", TensorProto.FLOAT, [1, 1])],
    [numpy_helper.from_array(np.array([SIZE, SIZE], np.int64), "size")],
)

# A product with weights in int8, long enough for engines that would round what is multiplied with them to 8 bits as well.
make(
    "weight-only-product",
    [helper.make_node("DequantizeLinear", ["q", "scale"], ["w"], axis=1), helper.make_node("MatMul", ["x", "w"], ["y"])],
    [info("x", TensorProto.FLOAT, ["batch", 64])],
    [info("y", TensorProto.FLOAT, ["batch", 16])],
    [
        numpy_helper.from_array(random.integers(-127, 128, size=(64, 16)).astype(np.int8), "q"),
        numpy_helper.from_array(np.linspace(0.0001, 0.002, 16).astype(np.float32), "scale"),
    ],
    {"x": random.normal(size=(3, 64)).astype(np.float32)},
)
