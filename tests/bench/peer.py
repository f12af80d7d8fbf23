"""What the optimiser is measured against, as users of the peers call it; `cargo xtask bench optimizer` runs each as a process of its own.

    python peer.py dynamic MODEL OUTPUT [HOW]      onnxruntime.quantization.quantize_dynamic, per channel; HOW is per-tensor or external
    python peer.py static MODEL OUTPUT SAMPLES     onnxruntime.quantization.quantize_static, QDQ, per channel, min-max
    python peer.py int4 MODEL OUTPUT               onnxruntime's MatMulNBits, blocks of 32, symmetric
    python peer.py fp16 MODEL OUTPUT               onnxruntime.transformers.float16, inputs and outputs as they were
    python peer.py agree MODEL OTHER SAMPLES       prints 1 where OTHER loads and each of its outputs has a cosine of 0.99 to MODEL's, else 0
    python peer.py infer MODEL... SAMPLES          the bare cost: load every model and run the samples, batches of 32, one thread each for two
    python peer.py sqnr MODEL OTHER SAMPLES        signal to noise of OTHER's outputs, in dB
    python peer.py prune WEIGHTS                   torch's global_unstructured on that many weights in memory; prints its seconds
    python peer.py repeat SAMPLES OUTPUT COUNT     writes that many samples, the same ones again and again
    python peer.py synthesize OUTPUT GIGABYTES     writes a transformer of that size with external data
"""

from __future__ import annotations

import sys
import time
from pathlib import Path


def samples(path: str) -> dict:
    import numpy as np

    return dict(np.load(path))


def batches(data: dict, size: int = 32):
    count = len(next(iter(data.values())))
    for start in range(0, count, size):
        yield {name: values[start : start + size] for name, values in data.items()}


def session(path: str):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options)


def dynamic(model: str, output: str, how: str = "") -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        model, output, per_channel=how != "per-tensor", weight_type=QuantType.QInt8, use_external_data_format=how == "external"
    )


def static(model: str, output: str, path: str) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = batches(samples(path), 1)

        def get_next(self):
            return next(self.rows, None)

    quantize_static(
        model,
        output,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def int4(model: str, output: str) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(model), block_size=32, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(output)


def fp16(model: str, output: str) -> None:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(model), keep_io_types=True), output)


def agree(model: str, other: str, path: str) -> None:
    import numpy as np

    original = session(model)
    known = {value.name for value in original.get_inputs()}
    data = {name: values[:1] for name, values in samples(path).items() if name in known}
    try:
        given = session(other).run(None, data)
    except Exception as error:
        print(error, file=sys.stderr)
        print(0)
        return
    cosines = []
    for before, after in zip(original.run(None, data), given):
        before, after = before.astype(np.float64).ravel(), after.astype(np.float64).ravel()
        cosines.append(float(before @ after) / max(float(np.linalg.norm(before) * np.linalg.norm(after)), 1e-30))
    # A cosine that is no number is no agreement.
    print(int(all(cosine >= 0.99 for cosine in cosines)))


def infer(*arguments: str) -> None:
    *models, path = arguments
    data = samples(path)
    for model in models:
        loaded = session(model)
        for batch in batches(data):
            loaded.run(None, batch)


def sqnr(model: str, other: str, path: str) -> None:
    import numpy as np

    data = samples(path)
    before, after = session(model).run(None, data), session(other).run(None, data)
    signal = sum(float((x.astype(np.float64) ** 2).sum()) for x in before)
    noise = sum(float(((x.astype(np.float64) - y) ** 2).sum()) for x, y in zip(before, after))
    print(10 * np.log10(signal / noise))


def prune(count: str) -> None:
    import torch
    from torch.nn.utils import prune as pruning

    layers = [torch.nn.Linear(1024, int(count) // 8192, bias=False) for _ in range(8)]
    begun = time.perf_counter()
    pruning.global_unstructured([(layer, "weight") for layer in layers], pruning_method=pruning.L1Unstructured, amount=0.5)
    for layer in layers:
        pruning.remove(layer, "weight")
    print(time.perf_counter() - begun)


def repeat(path: str, output: str, count: str) -> None:
    import numpy as np

    np.savez(output, **{name: np.resize(values, (int(count), *values.shape[1:])) for name, values in samples(path).items()})


def synthesize(output: str, gigabytes: str) -> None:
    """Blocks of a transformer's feed-forward part, 4096 wide, written without ever holding more than a matrix."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper

    width, inner = 4096, 16384
    blocks = max(1, round(float(gigabytes) * 1e9 / (2 * width * inner * 4)))
    nodes, tensors, offset = [], [], 0
    path = Path(output)
    data = path.with_name(path.name + ".data")
    generator = np.random.default_rng(7)
    current = "x"
    with data.open("wb") as file:
        for block in range(blocks):
            for name, shape in ((f"up{block}", (width, inner)), (f"down{block}", (inner, width))):
                rows = generator.standard_normal((64, shape[1]), np.float32) * (shape[0] ** -0.5)
                for _ in range(shape[0] // 64):
                    file.write(np.roll(rows, int(generator.integers(shape[1])), 1).tobytes())
                tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
                length = shape[0] * shape[1] * 4
                for key, value in (("location", data.name), ("offset", offset), ("length", length)):
                    tensor.external_data.add(key=key, value=str(value))
                tensors.append(tensor)
                offset += length
            nodes += [
                helper.make_node("MatMul", [current, f"up{block}"], [f"u{block}"]),
                helper.make_node("Relu", [f"u{block}"], [f"r{block}"]),
                helper.make_node("MatMul", [f"r{block}", f"down{block}"], [f"d{block}"]),
                helper.make_node("Add", [current, f"d{block}"], [f"y{block}"]),
            ]
            current = f"y{block}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name in ("x", current)]
    graph = helper.make_graph(nodes, "synthetic", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), output)


def main() -> None:
    tasks = {task.__name__: task for task in (dynamic, static, int4, fp16, agree, infer, sqnr, prune, repeat, synthesize)}
    if len(sys.argv) < 2 or sys.argv[1] not in tasks:
        sys.exit(__doc__)
    tasks[sys.argv[1]](*sys.argv[2:])


if __name__ == "__main__":
    main()
