"""What IO binding saves on a GPU: times of one inference by ONNX Runtime's package for GPUs, on the first of them.

    pip install numpy onnxruntime-gpu==1.31.1
    python binding.py MODEL       an encoder of [rows, tokens] INT64 inputs, such as MiniLM; 64 tokens a row

"run" is what the runtime does: inputs and outputs in the processor's memory. "bound" binds them for each inference, "bound once" keeps them
bound to the same memory, and "on the GPU" leaves both there, which no server can do: what any binding could save at most.
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np
import onnxruntime

TOKENS = 64
INFERENCES = 400
ROUNDS = 3


def median_us(infer) -> float:
    for _ in range(INFERENCES // 8):
        infer()
    times = []
    for _ in range(INFERENCES):
        begun = time.perf_counter()
        infer()
        times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e6


def main(model: str) -> None:
    # As the runtime has it: full single precision.
    session = onnxruntime.InferenceSession(model, providers=[("CUDAExecutionProvider", {"use_tf32": 0})])
    if session.get_providers()[0] != "CUDAExecutionProvider":
        sys.exit("CUDA is not there")
    output = session.get_outputs()[0].name
    value = onnxruntime.OrtValue.ortvalue_from_numpy
    print("| rows | run, µs | bound | bound once | on the GPU |\n|--:|--:|--:|--:|--:|")
    for rows in (1, 16, 64):
        inputs = {spec.name: np.ones((rows, TOKENS), np.int64) for spec in session.get_inputs()}
        given = session.run([output], inputs)[0]

        def bound() -> None:
            binding = session.io_binding()
            for name, array in inputs.items():
                binding.bind_cpu_input(name, array)
            binding.bind_output(output, "cpu")
            session.run_with_iobinding(binding)
            binding.get_outputs()[0].numpy()

        once, device = session.io_binding(), session.io_binding()
        for name, array in inputs.items():
            once.bind_ortvalue_input(name, value(array))
            device.bind_ortvalue_input(name, value(array, "cuda", 0))
        once.bind_ortvalue_output(output, value(given))
        device.bind_ortvalue_output(output, value(given, "cuda", 0))

        def on_device() -> None:
            session.run_with_iobinding(device)
            device.synchronize_outputs()

        ways = [lambda: session.run([output], inputs), bound, lambda: session.run_with_iobinding(once), on_device]
        times = [[median_us(way) for way in ways] for _ in range(ROUNDS)]
        run, *others = (statistics.median(of_way) for of_way in zip(*times))
        print(f"| {rows} | {run:.0f} | " + " | ".join(f"{other / run:.2f}x" for other in others) + " |")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
