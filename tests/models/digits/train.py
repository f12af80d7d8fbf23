"""Trains the two versions of the handwritten-digit model and exports them as ONNX.

    python train.py [FOLDER]

writes `digits-v1.onnx`, `digits-v2.onnx`, `digits-training.npz` and `digits-heldout.npz` into FOLDER (default: beside this
file), and prints the held-out accuracy of each as ONNX Runtime measures it. It ends with an error where a model is below 97 %.

The data are the 1797 images of 8 x 8 pixels that scikit-learn carries (`load_digits`). The networks are small enough to be
trained with NumPy alone in a minute, which spares the download of a deep-learning framework and keeps every number of
the training in this file. All randomness comes from one seeded generator a model.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

# The order in which threads add up floats would make the weights differ from run to run.
for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits

OPSET = 17
IR_VERSION = 8
CLASSES = 10
SPLIT_SEED = 20
HELDOUT_SAMPLES = 450
ACCURACY_MIN = 0.97


@dataclass(frozen=True)
class Version:
    """One version of the model: its widths and its training."""

    name: str
    channels: tuple[int, int]
    hidden: int
    epochs: int
    seed: int


VERSIONS = (
    Version("v1", channels=(16, 32), hidden=128, epochs=12, seed=1),
    Version("v2", channels=(24, 48), hidden=160, epochs=30, seed=2),
)


def columns(images: np.ndarray) -> np.ndarray:
    """The 3 x 3 neighbourhoods of every pixel, zero-padded: [N, C, H, W] -> [N * H * W, C * 9]."""
    count, channels, height, width = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(count * height * width, channels * 9)


def columns_gradient(gradient: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The transpose of `columns`: every neighbourhood's gradient is added back to its pixels."""
    count, channels, height, width = shape
    gradient = gradient.reshape(count, height, width, channels, 3, 3)
    padded = np.zeros((count, channels, height + 2, width + 2), dtype=np.float32)
    for row in range(3):
        for column in range(3):
            padded[:, :, row : row + height, column : column + width] += gradient[..., row, column].transpose(0, 3, 1, 2)
    return padded[:, :, 1:-1, 1:-1]


class Network:
    """conv 3 x 3 -> relu -> conv 3 x 3 -> relu -> max pool 2 x 2 -> dense -> relu -> dense."""

    def __init__(self, version: Version, random: np.random.Generator):
        first, second = version.channels

        def weights(*shape: int) -> np.ndarray:
            # He et al. 2015, "Delving Deep into Rectifiers", equation 10.
            deviation = np.sqrt(2.0 / np.prod(shape[1:]))
            return (random.standard_normal(shape) * deviation).astype(np.float32)

        self.parameters = {
            "conv1.weight": weights(first, 1, 3, 3),
            "conv1.bias": np.zeros(first, np.float32),
            "conv2.weight": weights(second, first, 3, 3),
            "conv2.bias": np.zeros(second, np.float32),
            "dense1.weight": weights(version.hidden, second * 16),
            "dense1.bias": np.zeros(version.hidden, np.float32),
            "dense2.weight": weights(CLASSES, version.hidden),
            "dense2.bias": np.zeros(CLASSES, np.float32),
        }

    def convolve(self, name: str, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A convolution with its bias and relu: the result and the neighbourhoods it was computed from."""
        weight, bias = self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]
        count, _, height, width = images.shape
        patches = columns(images)
        result = np.maximum(patches @ weight.reshape(len(weight), -1).T + bias, 0)
        return result.reshape(count, height, width, len(weight)).transpose(0, 3, 1, 2), patches

    def gradients(self, images: np.ndarray, labels: np.ndarray, random: np.random.Generator) -> dict[str, np.ndarray]:
        """The gradient of the mean cross-entropy, with half of the dense layer's inputs dropped."""
        p = self.parameters
        count = len(images)
        first, first_patches = self.convolve("conv1", images)
        second, second_patches = self.convolve("conv2", first)
        channels = second.shape[1]
        quads = second.reshape(count, channels, 4, 2, 4, 2).transpose(0, 1, 2, 4, 3, 5).reshape(count, channels, 4, 4, 4)
        winner = quads.argmax(axis=-1)
        flat = quads.max(axis=-1).reshape(count, -1)
        kept = (random.random(flat.shape) < 0.5).astype(np.float32) * 2
        dropped = flat * kept
        hidden = np.maximum(dropped @ p["dense1.weight"].T + p["dense1.bias"], 0)
        logits = hidden @ p["dense2.weight"].T + p["dense2.bias"]

        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        error = exponents / exponents.sum(axis=1, keepdims=True)
        error[np.arange(count), labels] -= 1
        error /= count

        hidden_error = (error @ p["dense2.weight"]) * (hidden > 0)
        flat_error = (hidden_error @ p["dense1.weight"]) * kept
        quads_error = np.zeros_like(quads)
        np.put_along_axis(quads_error, winner[..., None], flat_error.reshape(count, channels, 4, 4, 1), axis=-1)
        second_error = quads_error.reshape(count, channels, 4, 4, 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(second.shape) * (second > 0)
        second_rows = second_error.transpose(0, 2, 3, 1).reshape(-1, channels)
        first_error = columns_gradient(second_rows @ p["conv2.weight"].reshape(channels, -1), first.shape) * (first > 0)
        first_rows = first_error.transpose(0, 2, 3, 1).reshape(-1, first.shape[1])
        return {
            "conv1.weight": (first_rows.T @ first_patches).reshape(p["conv1.weight"].shape),
            "conv1.bias": first_rows.sum(axis=0),
            "conv2.weight": (second_rows.T @ second_patches).reshape(p["conv2.weight"].shape),
            "conv2.bias": second_rows.sum(axis=0),
            "dense1.weight": hidden_error.T @ dropped,
            "dense1.bias": hidden_error.sum(axis=0),
            "dense2.weight": error.T @ hidden,
            "dense2.bias": error.sum(axis=0),
        }


def train(version: Version, images: np.ndarray, labels: np.ndarray) -> Network:
    """Adam (Kingma and Ba 2015) with a learning rate that falls to zero along a cosine; images are shifted by up to a pixel."""
    random = np.random.default_rng(version.seed)
    network = Network(version, random)
    mean = {name: np.zeros_like(value) for name, value in network.parameters.items()}
    square = {name: np.zeros_like(value) for name, value in network.parameters.items()}
    batch, step = 32, 0
    steps = version.epochs * (len(images) // batch)
    for _ in range(version.epochs):
        order = random.permutation(len(images))
        for start in range(0, len(images) - batch + 1, batch):
            chosen = order[start : start + batch]
            down, right = random.integers(-1, 2, size=2)
            shifted = np.pad(images[chosen], ((0, 0), (0, 0), (1, 1), (1, 1)))[:, :, 1 + down : 9 + down, 1 + right : 9 + right]
            rate = 0.002 * 0.5 * (1 + np.cos(np.pi * step / steps))
            step += 1
            for name, gradient in network.gradients(shifted, labels[chosen], random).items():
                mean[name] = 0.9 * mean[name] + 0.1 * gradient
                square[name] = 0.999 * square[name] + 0.001 * gradient**2
                change = (mean[name] / (1 - 0.9**step)) / (np.sqrt(square[name] / (1 - 0.999**step)) + 1e-8)
                network.parameters[name] = (network.parameters[name] - rate * change).astype(np.float32)
    return network


def export(version: Version, network: Network) -> onnx.ModelProto:
    """The network as an ONNX graph of standard operators with a free batch size."""
    nodes = [
        helper.make_node("Conv", ["image", "conv1.weight", "conv1.bias"], ["conv1"], "conv1", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv1"], ["relu1"], "relu1"),
        helper.make_node("Conv", ["relu1", "conv2.weight", "conv2.bias"], ["conv2"], "conv2", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv2"], ["relu2"], "relu2"),
        helper.make_node("MaxPool", ["relu2"], ["pool"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["pool"], ["flat"], "flat"),
        helper.make_node("Gemm", ["flat", "dense1.weight", "dense1.bias"], ["dense1"], "dense1", transB=1),
        helper.make_node("Relu", ["dense1"], ["relu3"], "relu3"),
        helper.make_node("Gemm", ["relu3", "dense2.weight", "dense2.bias"], ["logits"], "dense2", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        f"digits-{version.name}",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in network.parameters.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="plimsoll tests/models/digits/train.py"
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def accuracy(model: bytes, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images whose largest logit is the label's, by ONNX Runtime."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": images})
    return float((logits.argmax(axis=1) == labels).mean())


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    data = load_digits()
    # Pixels are 0 to 16 in the data, 0 to 1 in the model.
    images = (data.images / 16).astype(np.float32)[:, None]
    labels = data.target.astype(np.int64)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    heldout, training = order[:HELDOUT_SAMPLES], order[HELDOUT_SAMPLES:]
    for name, chosen in [("training", training), ("heldout", heldout)]:
        np.savez_compressed(folder / f"digits-{name}.npz", image=images[chosen], y=labels[chosen])
    for version in VERSIONS:
        network = train(version, images[training], labels[training])
        model = export(version, network).SerializeToString(deterministic=True)
        (folder / f"digits-{version.name}.onnx").write_bytes(model)
        measured = accuracy(model, images[heldout], labels[heldout])
        print(f"digits-{version.name}.onnx: {len(model)} bytes, {measured:.2%} of {len(heldout)} held-out images")
        if measured < ACCURACY_MIN:
            sys.exit(f"digits-{version.name} is below {ACCURACY_MIN:.0%}")


if __name__ == "__main__":
    main()
