"""Writes the node tests of ONNX's backend suite into a folder, as the package has them: python cases.py FOLDER

NAME/model.onnx, NAME/input_0.pb and on, NAME/output_0.pb and on (TensorProto; none where one of them is a sequence, map or optional), and
cases.json, the list of them."""

import json
import pathlib
import sys
import warnings

import numpy
from onnx import TensorProto, numpy_helper
from onnx.backend.test.loader import load_model_tests


def tensor(value):
    """The value as a tensor whose numbers lie in `raw_data`, whichever form it had."""
    if isinstance(value, TensorProto):
        value = numpy_helper.to_array(value)
    return numpy_helper.from_array(numpy.asarray(value)).SerializeToString()


def is_tensor(info):
    return info.type.HasField("tensor_type")


def operator(case, models):
    """What the case tests; one that has its operator as a function of others is named after the case that has the operator itself."""
    base, expanded, _ = case.name.rpartition("_expanded")
    graph = models.get(base, case.model).graph if expanded else case.model.graph
    domain, name = graph.node[0].domain, graph.node[0].op_type
    return f"{domain}.{name}" if domain else name


def main():
    folder = pathlib.Path(sys.argv[1])
    cases = load_model_tests(kind="node")
    models = {case.name: case.model for case in cases}
    for case in cases:
        own = folder / case.name
        own.mkdir(parents=True)
        (own / "model.onnx").write_bytes(case.model.SerializeToString())
        ((inputs, outputs),) = case.data_sets
        graph = case.model.graph
        if all(map(is_tensor, [*graph.input, *graph.output])):
            for role, values in [("input", inputs), ("output", outputs)]:
                for index, value in enumerate(values):
                    (own / f"{role}_{index}.pb").write_bytes(tensor(value))
    listed = [{"name": case.name, "operator": operator(case, models), "rtol": case.rtol, "atol": case.atol} for case in cases]
    (folder / "cases.json").write_text(json.dumps(sorted(listed, key=lambda case: case["name"]), indent=1))


# The cases compute what overflows on purpose.
warnings.simplefilter("ignore")
main()
