"""Records onnxruntime_quantization.json: what onnxruntime.quantization makes of small weights, activations and histograms.

    pip install onnx==1.23.2 onnx_ir==1.1.0 ml_dtypes==0.5.4 onnxruntime==1.32.0 sympy==1.14.0 numpy==2.4.6
    python3 onnxruntime_quantization.py > onnxruntime_quantization.json
"""

import contextlib
import json
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.calibrate import HistogramCollector
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

logging.disable(logging.CRITICAL)


def floats(array):
    return [float(value) for value in np.asarray(array, np.float32).reshape(-1)]


def integers(array):
    return [int(value) for value in np.asarray(array).reshape(-1)]


def weights(seed, *shape, alternating=False):
    """Numbers that are about normally distributed; alternating, no two neighbours along the first axis are of one sign."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if alternating:
        signs = np.where(np.arange(shape[0]) % 2 == 0, 1, -1).astype(np.float32)
        values = np.abs(values) * signs.reshape(-1, *[1] * (len(shape) - 1))
    return values


def model(nodes, inputs, outputs, constants, folder):
    value = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    graph = helper.make_graph(
        nodes,
        "g",
        [value(name, shape) for name, shape in inputs.items()],
        [value(name, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    path = str(folder / "model.onnx")
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def initializers(path):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def product(weight, folder):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "product")]
    return model(nodes, {"x": ["batch", weight.shape[0]]}, {"y": ["batch", weight.shape[1]]}, {"w": weight}, folder)


def dynamic(folder):
    """`quantize_dynamic`, per channel, of weights whose neighbours never add up, and of any."""
    for alternating in (True, False):
        weight = weights(3, 64, 8, alternating=alternating)
        quantized = str(folder / "dynamic.onnx")
        quantize_dynamic(product(weight, folder), quantized, per_channel=True, weight_type=QuantType.QInt8)
        stored = initializers(quantized)
        yield {
            "shape": list(weight.shape),
            "weight": floats(weight),
            "alternating": alternating,
            "scales": floats(stored["w_scale"]),
            "zero_points": integers(stored["w_zero_point"]),
            "integers": integers(stored["w_quantized"]),
        }


class Reader(CalibrationDataReader):
    def __init__(self, samples):
        self.rows = iter([{"x": sample[None]} for sample in samples])

    def get_next(self):
        return next(self.rows, None)


def static(folder):
    """`quantize_static` in QDQ form with min-max ranges, of a convolution and a product behind it."""
    kernel, bias, weight = weights(5, 4, 2, 3, 3, alternating=False), weights(6, 4), weights(7, 4 * 4 * 4, 3, alternating=True)
    samples = weights(8, 6, 2, 4, 4)
    nodes = [
        helper.make_node("Conv", ["x", "k", "b"], ["c"], "convolution", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"], "cut"),
        helper.make_node("Flatten", ["r"], ["f"], "flatten"),
        helper.make_node("MatMul", ["f", "w"], ["y"], "product"),
    ]
    path = model(nodes, {"x": ["batch", 2, 4, 4]}, {"y": ["batch", 3]}, {"k": kernel, "b": bias, "w": weight}, folder)
    quantized = str(folder / "static.onnx")
    quantize_static(
        path,
        quantized,
        Reader(samples),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "Relu", "MatMul"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    stored = initializers(quantized)
    activation = lambda name: {"scale": floats(stored[f"{name}_scale"])[0], "zero_point": integers(stored[f"{name}_zero_point"])[0]}
    return {
        "kernel": floats(kernel),
        "bias": floats(bias),
        "weight": floats(weight),
        "samples": floats(samples),
        "activations": {"x": activation("x"), "r": activation("r")},
        "kernel_scales": floats(stored["k_scale"]),
        "weight_scales": floats(stored["w_scale"]),
        "weight_integers": integers(stored["w_quantized"]),
    }


def blocks(folder):
    """`MatMulNBits` of 4 bits in blocks of 32 along 70 inputs, symmetric and not."""
    for symmetric in (True, False):
        weight = weights(9, 70, 3)
        if not symmetric:
            weight = np.abs(weight) + np.float32(1.5)
        quantizer = MatMulNBitsQuantizer(onnx.load(product(weight, folder)), block_size=32, is_symmetric=symmetric)
        quantizer.process()
        graph = quantizer.model.model.graph
        stored = [numpy_helper.to_array(next(tensor for tensor in graph.initializer if tensor.name == name)) for name in graph.node[0].input[1:]]
        yield {
            "shape": list(weight.shape),
            "weight": floats(weight),
            "symmetric": symmetric,
            "dims": list(stored[0].shape),
            "bytes": integers(stored[0]),
            "scales": floats(stored[1]),
            "zero_points": integers(stored[2]) if len(stored) > 2 else [],
            "attributes": {attribute.name: attribute.i for attribute in graph.node[0].attribute},
        }


def ranges():
    """Thresholds of the entropy and percentile calibrators on histograms of 2048 bins over -8 to 8, whose last bin is never empty."""
    generator = np.random.default_rng(10)
    for name, values in {
        "laplace": generator.laplace(size=40000),
        "normal": generator.standard_normal(40000),
        "cut at zero": np.maximum(generator.standard_normal(40000), 0),
        "outliers": np.concatenate([generator.standard_normal(40000) / 4, generator.uniform(-8, 8, 20)]),
    }.items():
        values = np.append(np.clip(values, -7.9, 7.9), 8).astype(np.float32)
        collector = HistogramCollector("entropy", False, 2048, 255, 99.99, "same")
        collector.collect({"v": values})
        entropy = collector.get_entropy_threshold(collector.histogram_dict["v"], 255)
        percentile = collector.compute_percentile()["v"]
        yield {
            "name": name,
            "bins": integers(collector.histogram_dict["v"][0]),
            "entropy": floats(entropy[:2]),
            "percentile": floats(percentile[:2]),
        }


# The peer prints what it does.
with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
    folder = Path(scratch)
    recorded = {"dynamic": list(dynamic(folder)), "static": [static(folder)], "blocks": list(blocks(folder)), "ranges": list(ranges())}
lines = [f'"{name}":[\n' + ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases) + "\n]" for name, cases in recorded.items()]
print("{" + ",\n".join(lines) + "}")
