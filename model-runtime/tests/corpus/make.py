"""Makes the files that fuzzing starts from, in folders beside this file: python make.py

Run in a virtual environment with the requirements of tests/clients/triton.
"""

import json
import pathlib
import struct

from tritonclient.grpc import service_pb2

FOLDER = pathlib.Path(__file__).parent
# Values of each type as text, as bytes, and the list of gRPC that holds them.
TYPES = {
    "BOOL": ([True, False], "<??", "bool_contents"),
    "UINT8": ([0, 255], "<BB", "uint_contents"),
    "UINT16": ([0, 65535], "<HH", "uint_contents"),
    "UINT32": ([0, 2**32 - 1], "<II", "uint_contents"),
    "UINT64": ([0, 2**64 - 1], "<QQ", "uint64_contents"),
    "INT8": ([-128, 127], "<bb", "int_contents"),
    "INT16": ([-(2**15), 2**15 - 1], "<hh", "int_contents"),
    "INT32": ([-(2**31), 2**31 - 1], "<ii", "int_contents"),
    "INT64": ([-(2**63), 2**63 - 1], "<qq", "int64_contents"),
    "FP16": ([-1.5, 0.25], "<ee", None),
    "FP32": ([-1.5, 1e30], "<ff", "fp32_contents"),
    "FP64": ([-1.5, 1e300], "<dd", "fp64_contents"),
    "BYTES": (["grüß", ""], None, "bytes_contents"),
}


def packed(datatype, values):
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in values)
    return struct.pack(TYPES[datatype][1], *values)


def write(folder, name, content):
    (FOLDER / folder).mkdir(exist_ok=True)
    (FOLDER / folder / name).write_bytes(content)


def dumps(value):
    return json.dumps(value, ensure_ascii=False).encode()


def http():
    def given(name, datatype, values):
        return {"name": name, "datatype": datatype, "shape": [2], "data": values}

    every = [given(f"x{index}", datatype, values) for index, (datatype, (values, _, _)) in enumerate(TYPES.items())]
    write("http", "every-type", dumps({"id": "a-1", "inputs": every}))
    nested = {"data": [[1, 2.5, -3e3], [4, 5, 6]], "parameters": {"colour": "red"}, "shape": [2, 3], "datatype": "FP32", "name": "x"}
    options = {"priority": 1, "timeout": 1000, "binary_data_output": True, "sequence_id": 0}
    outputs = [{"name": "y", "parameters": {"classification": 2, "binary_data": False}}]
    write("http", "options", dumps({"parameters": options, "outputs": outputs, "inputs": [nested]}))
    write("http", "empty", dumps({"inputs": [{"name": "x", "datatype": "INT64", "shape": [0, 3], "data": []}], "outputs": []}))
    escaped = b'{"inputs":[{"\\u006eame":"x","datatype":"BYTES","shape":[1,1],"data":[["\\ud83d\\ude00\\n"]]}],"unknown":{"a":[null]}}'
    write("http", "escaped", escaped)


def binary():
    def body(inputs, tail, **more):
        text = dumps({"inputs": inputs, **more})
        return struct.pack("<H", len(text)) + text + tail

    def given(name, datatype, shape, size):
        return {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}

    inputs, tail = [], b""
    for index, (datatype, (values, _, _)) in enumerate(TYPES.items()):
        content = packed(datatype, values)
        inputs.append(given(f"x{index}", datatype, [2, 1], len(content)))
        tail += content
    write("binary", "every-type", body(inputs, tail, parameters={"binary_data_output": True}))
    mixed = [given("a", "BF16", [2], 4), {"name": "b", "datatype": "INT32", "shape": [1], "data": [7]}, given("c", "FP32", [0], 0)]
    write("binary", "mixed", body(mixed, b"\0\x3f\0\xbf"))


def grpc():
    def request():
        return service_pb2.ModelInferRequest(model_name="model", model_version="1", id="a-1")

    raw, typed = request(), request()
    for index, (datatype, (values, _, field)) in enumerate(TYPES.items()):
        raw.inputs.add(name=f"x{index}", datatype=datatype, shape=[2])
        raw.raw_input_contents.append(packed(datatype, values))
        if field is not None:
            given = typed.inputs.add(name=f"x{index}", datatype=datatype, shape=[2])
            getattr(given.contents, field).extend([text.encode() if datatype == "BYTES" else text for text in values])
    write("grpc", "raw", raw.SerializeToString())
    write("grpc", "typed", typed.SerializeToString())
    options = request()
    options.parameters["priority"].uint64_param = 1
    options.parameters["timeout"].int64_param = 1000
    options.parameters["colour"].string_param = "red"
    options.parameters["ratio"].double_param = 0.5
    options.outputs.add(name="y").parameters["classification"].int64_param = 2
    given = options.inputs.add(name="x", datatype="FP32", shape=[0, 4])
    given.parameters["content_type"].string_param = "np"
    given.contents.SetInParent()
    write("grpc", "options", options.SerializeToString())


http()
binary()
grpc()
