"""Writes the part of the corpus that is made by Python's libraries: small models and arrays.

    pip install onnx numpy pillow
    python3 make.py

Parquet files and the pictures of `tar` and `zip` are written by the crates that read them; what else lies here was found by fuzzing.
"""

import io
import pathlib
import tarfile
import zipfile

import numpy as np
import onnx
from PIL import Image
from onnx import TensorProto, helper, numpy_helper

HERE = pathlib.Path(__file__).parent


def save(kind, name, content):
    path = HERE / kind / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def value(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def constant(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


def model(name, nodes, inputs, outputs, constants=(), opset=17, **more):
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(constants))
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1)]
    made = helper.make_model(graph, opset_imports=imports, ir_version=8, **more)
    save("model", name, made.SerializeToString())


def models():
    floats = lambda *shape: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 7
    node = helper.make_node
    x, y = value("x", ["batch", 4]), value("y", None)
    model(
        "dense",
        [node("Transpose", ["w"], ["t"]), node("MatMul", ["x", "t"], ["m"]), node("Identity", ["m"], ["i"]), node("Add", ["i", "b"], ["y"])],
        [x], [y], [constant("w", floats(3, 4)), constant("b", floats(3)), constant("twin", floats(3, 4))],
    )
    picture = value("x", ["batch", 2, 5, 5])
    norm = [constant(name, np.ones(4, np.float32)) for name in "suvq"]
    model(
        "convolution",
        [node("Conv", ["x", "w"], ["c"], pads=[1] * 4), node("BatchNormalization", ["c", *"suvq"], ["n"]), node("Relu", ["n"], ["y"])],
        [picture], [y], [constant("w", floats(4, 2, 3, 3)), *norm],
    )
    model(
        "shapes",
        [
            node("Shape", ["x"], ["s"]), node("Gather", ["s", "one"], ["g"]), node("Unsqueeze", ["g", "axes"], ["u"]),
            node("Concat", ["minus", "u", "tail"], ["target"], axis=0), node("Reshape", ["x", "target"], ["r"]),
            node("Slice", ["sizes", "axes", "one_", "axes", "one_"], ["cut"]), node("ConstantOfShape", ["cut"], ["zeros"]),
            node("Expand", ["half", "cut"], ["wide"]), node("Cast", ["wide"], ["cast"], to=TensorProto.INT64),
            node("Div", ["sizes", "sizes"], ["d"]), node("Squeeze", ["r", "axes2"], ["y"]),
        ],
        [x], [y, value("zeros", None), value("cast", None, TensorProto.INT64), value("d", None, TensorProto.INT64)],
        [
            constant("one", np.int64(1)), constant("axes", np.int64([0])), constant("one_", np.int64([1])), constant("minus", np.int64([-1])),
            constant("tail", np.int64([1])), constant("sizes", np.int64([2, 3])), constant("half", np.float32(0.5)), constant("axes2", np.int64([2])),
        ],
    )
    branch = lambda name, op: helper.make_graph([node(op, ["x", "k"], [name])], name, [], [value(name, None)], [constant("k", floats(1))])
    model(
        "branches",
        [node("If", ["c"], ["i"], then_branch=branch("t", "Add"), else_branch=branch("e", "Mul")), node("Dropout", ["i"], ["y"])],
        [x, value("c", [], TensorProto.BOOL)], [y],
    )
    body = helper.make_graph(
        [node("Add", ["v", "x"], ["w"]), node("Identity", ["k"], ["go"])], "body",
        [value("i", [], TensorProto.INT64), value("k", [], TensorProto.BOOL), value("v", [None, 4])],
        [value("go", [], TensorProto.BOOL), value("w", None)],
    )
    model("loop", [node("Loop", ["n", "", "x"], ["y"], body=body)], [x], [y], [constant("n", np.int64(3))])
    function = helper.make_function(
        "local", "Twice", ["a"], ["b"],
        [node("Add", ["a", "a"], ["t"]), node("Softmax", ["t"], ["b"])], [helper.make_opsetid("", 17)], ["axis"],
    )
    attribute = onnx.AttributeProto(name="axis", ref_attr_name="axis", type=onnx.AttributeProto.INT)
    function.node[1].attribute.append(attribute)
    model("function", [node("Twice", ["x"], ["y"], domain="local", axis=1)], [x], [y], functions=[function])
    external = constant("w", floats(4, 4))
    external.ClearField("raw_data")
    external.data_location = TensorProto.EXTERNAL
    for key, text in [("location", "weights"), ("offset", "64"), ("length", "64")]:
        external.external_data.add(key=key, value=text)
    model("external", [node("MatMul", ["x", "w"], ["y"])], [x], [y], [external])
    typed = helper.make_tensor("w", TensorProto.FLOAT, [4, 2], [1.0] * 8)
    held = node("Constant", [], ["k"], value=helper.make_tensor("", TensorProto.INT8, [2], [1, -2]))
    model(
        "old", [held, node("Gemm", ["x", "w"], ["g"]), node("Unsqueeze", ["g"], ["u"], axes=[1]), node("Softmax", ["u"], ["y"], axis=1)],
        [x], [y, value("k", [2], TensorProto.INT8)], [typed], opset=9,
    )


def arrays():
    image, label = np.arange(48, dtype=np.float32).reshape(3, 1, 4, 4), np.int64([0, 1, 2])
    for name, pack in [("stored", np.savez), ("deflated", np.savez_compressed)]:
        out = io.BytesIO()
        pack(out, image=image, y=label)
        save("npz", name, out.getvalue())
    out = io.BytesIO()
    np.savez(out, a=np.zeros((2, 3)), b=np.int64(5), y=np.zeros(2, np.uint8))
    save("npz", "constant", out.getvalue())
    out = io.BytesIO()
    np.save(out, np.zeros((2, 4, 2, 3), np.uint8))
    save("npz", "single", out.getvalue())


def texts():
    rows = "\n".join(",".join(str((row * 7 + pixel) % 5 / 2) for pixel in range(16)) + f",{row}" for row in range(4))
    save("text", "csv", (",".join(f"p{pixel}" for pixel in range(16)) + ",y\n" + rows + "\n").encode())
    save("text", "two-inputs.csv", b'a_0,a_1,b\n1,2,3\n"4",5e0, 6\n')
    save("text", "words.csv", b'text,y\n"one, two",0\n\xe2\x82\xac,1\n')
    save("text", "lines.json", b'{"a": [1, 2.5], "b": 3, "y": 1}\n\n{"a": [4, -1e3], "b": 7, "y": 0}\n')
    save("text", "nested.json", b'\xef\xbb\xbf{"image": [[[0,1,2,3],[4,5,6,7],[8,9,1,2],[3,4,5,6]]], "label": true}\n')
    save("text", "words.json", b'{"text": "caf\\u00e9", "y": 0}\n{"text": "", "y": 1}\n')


def pictures():
    """JPEG and WebP in the forms that they have: baseline and progressive, grey and in colour, lossy and not, with alpha."""
    ramp = np.add.outer(np.arange(12) * 13, np.arange(10) * 11).astype(np.uint8)
    colour = Image.fromarray(np.stack([ramp, 255 - ramp, ramp.T.copy().reshape(12, 10)], 2))
    alpha = Image.fromarray(np.stack([ramp, ramp, ramp, 255 - ramp], 2))
    forms = {
        "jpeg.zip": {"grey.jpg": (Image.fromarray(ramp), {}), "progressive.jpg": (colour, {"progressive": True, "quality": 60})},
        "webp.zip": {"lossy.webp": (colour, {"quality": 40}), "lossless.webp": (alpha, {"lossless": True})},
    }
    for name, files in forms.items():
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            write = lambda member, content: archive.writestr(zipfile.ZipInfo(member, (1980, 1, 1, 0, 0, 0)), content)
            for member, (picture, options) in files.items():
                held = io.BytesIO()
                picture.save(held, pathlib.Path(member).suffix[1:].replace("jpg", "jpeg"), **options)
                write(member, held.getvalue())
            write("labels.csv", "file,label\n" + "".join(f"{member},{label}\n" for label, member in enumerate(files)))
        save("pictures", name, out.getvalue())


if __name__ == "__main__":
    models()
    pictures()
    arrays()
    texts()
