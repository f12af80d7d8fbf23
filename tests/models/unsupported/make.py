"""Makes the files of this folder that no optimiser can use; see README.md.

    python make.py       # needs the `onnx` package, see ../digits/requirements.txt
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HERE = Path(__file__).resolve().parent
TRUNCATED_BYTES = 4096


def custom_operator() -> onnx.ModelProto:
    """A valid graph in which one of two nodes is of a domain that no engine knows."""
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "weight")
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "weight"], ["product"], "product"),
            helper.make_node("Murmurate", ["product"], ["y"], "flock", domain="com.example.birds", strength=0.5),
        ],
        "custom-operator",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [weight],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.example.birds", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=8, producer_name="plimsoll tests/models/unsupported/make.py")


def main() -> None:
    (HERE / "custom-operator.onnx").write_bytes(custom_operator().SerializeToString(deterministic=True))
    whole = (HERE.parent / "digits" / "digits-v1.onnx").read_bytes()
    (HERE / "truncated.onnx").write_bytes(whole[:TRUNCATED_BYTES])


if __name__ == "__main__":
    main()
