"""Makes attention.onnx: a block of a transformer with four heads, one of which hardly counts; see README.md.

    python make.py       # needs the `onnx` package, see ../digits/requirements.txt
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HERE = Path(__file__).resolve().parent
LENGTH, FEATURES, HEADS, WIDTH, OUTPUTS = 6, 32, 4, 64, 8
DEPTH = FEATURES // HEADS
WEAK_HEAD, WEAK = 2, 0.02
SEED = 4


def model() -> onnx.ModelProto:
    generator = np.random.default_rng(SEED)
    constants, nodes = [], []

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(value, name))
        return name

    def node(operator: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], output, **attributes))
        return output

    def weight(rows: int, columns: int) -> np.ndarray:
        return (generator.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)

    def linear(x: str, name: str, matrix: np.ndarray) -> str:
        bias = constant(f"{name}.bias", (generator.standard_normal(matrix.shape[1]) / 10).astype(np.float32))
        return node("Add", [node("MatMul", [x, constant(f"{name}.weight", matrix)], f"{name}/MatMul"), bias], f"{name}/Add")

    split = constant("split", np.int64([0, -1, HEADS, DEPTH]))
    merge = constant("merge", np.int64([-1, LENGTH, FEATURES]))
    root = constant("root", np.float32(np.sqrt(DEPTH)))

    def head(name: str, order: list[int]) -> str:
        matrix = weight(FEATURES, FEATURES)
        matrix[:, WEAK_HEAD * DEPTH : (WEAK_HEAD + 1) * DEPTH] *= WEAK
        parts = node("Reshape", [linear("x", name, matrix), split], f"{name}/split")
        return node("Transpose", [parts], f"{name}/Transpose", perm=order)

    query, key, value = head("query", [0, 2, 1, 3]), head("key", [0, 2, 3, 1]), head("value", [0, 2, 1, 3])
    scores = node("Div", [node("MatMul", [query, key], "scores"), root], "scaled")
    mixed = node("MatMul", [node("Softmax", [scores], "shares", axis=-1), value], "mixed")
    joined = node("Reshape", [node("Transpose", [mixed], "mixed/Transpose", perm=[0, 2, 1, 3]), merge], "joined")
    matrix = weight(FEATURES, FEATURES)
    matrix[WEAK_HEAD * DEPTH : (WEAK_HEAD + 1) * DEPTH] *= WEAK
    attended = node("Add", [linear(joined, "out", matrix), "x"], "residual")
    hidden = node("Relu", [linear(attended, "up", weight(FEATURES, WIDTH))], "active")
    narrowed = node("Add", [linear(hidden, "down", weight(WIDTH, FEATURES)), attended], "narrowed")
    y = linear(narrowed, "y", weight(FEATURES, OUTPUTS))
    values = lambda name, size: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", LENGTH, size])
    graph = helper.make_graph(nodes, "attention", [values("x", FEATURES)], [values(y, OUTPUTS)], constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="plimsoll tests/models/attention/make.py")
    onnx.checker.check_model(made, full_check=True)
    return made


if __name__ == "__main__":
    (HERE / "attention.onnx").write_bytes(model().SerializeToString(deterministic=True))
