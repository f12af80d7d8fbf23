"""Intel's Neural Compressor, as its users call it; `cargo xtask bench optimizer` runs each as a process of its own.

    python peer.py dynamic MODEL OUTPUT            quantize with DynamicQuantConfig, per channel
    python peer.py static MODEL OUTPUT SAMPLES     quantize with StaticQuantConfig, QDQ, per channel
    python peer.py int4 MODEL OUTPUT               MatMulNBitsQuantizer, blocks of 32, symmetric, rounded to nearest
"""

from __future__ import annotations

import sys


def dynamic(model: str, output: str) -> None:
    from onnx_neural_compressor.quantization import config, quantize

    quantize(model, output, config.DynamicQuantConfig(per_channel=True))


def static(model: str, output: str, path: str) -> None:
    import numpy as np
    from onnx_neural_compressor.data_reader import CalibrationDataReader
    from onnx_neural_compressor.quantization import QuantFormat, config, quantize

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.data = dict(np.load(path))
            self.rewind()

        def get_next(self):
            return next(self.rows, None)

        def rewind(self) -> None:
            count = len(next(iter(self.data.values())))
            self.rows = ({name: values[i : i + 1] for name, values in self.data.items()} for i in range(count))

    settings = config.StaticQuantConfig(calibration_data_reader=Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
    quantize(model, output, settings)


def int4(model: str, output: str) -> None:
    import onnx
    from onnx_neural_compressor.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(model, block_size=32, is_symmetric=True, n_bits=4)
    quantizer.process()
    # An `ONNXModel` of its own, around the message.
    onnx.save(getattr(quantizer.model, "model", quantizer.model), output)


def main() -> None:
    tasks = {task.__name__: task for task in (dynamic, static, int4)}
    if len(sys.argv) < 2 or sys.argv[1] not in tasks:
        sys.exit(__doc__)
    tasks[sys.argv[1]](*sys.argv[2:])


if __name__ == "__main__":
    main()
