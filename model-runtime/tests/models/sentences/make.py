"""Makes a small model of sentences with the files that sentence-transformers keeps beside one, and records what comes of some texts.

    python make.py

needs numpy, onnx 1.23 and tokenizers 0.22, and writes into its own folder. The weights and the vocabulary are this script's own. What is recorded
in `expected.json` comes from Hugging Face's tokenizers, ONNX's reference implementation and NumPy.
"""

import json
import pathlib

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

FOLDER = pathlib.Path(__file__).parent
WIDTH = 8
TOKENS_MAX = 12
WORDS = "a and cat dog in on rain sat ship slept storm the under water while sail ##or ##s ##ing ##ed , . !".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
TEXTS = [
    "The cat slept.",
    "A sailor sails in the rain, and the storm sails on!",
    "Café",
    "",
    "the ship sat under water while the dog slept and the sailor sailed on and on and on in the rain",
]
PAIR = ["the cat slept", "a dog sat in the rain"]
random = np.random.default_rng(11)


def write(name: str, value: object) -> None:
    path = FOLDER / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def tokenizer() -> Tokenizer:
    tokens = [*SPECIAL, *dict.fromkeys([*WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)])]
    made = Tokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", tokens.index("[SEP]")), ("[CLS]", tokens.index("[CLS]")))
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(SPECIAL)
    # As published ones have it; sentence-transformers overrides both.
    made.enable_truncation(6)
    made.enable_padding(length=6, pad_id=0, pad_token="[PAD]")
    return made


def model(vocabulary: int) -> onnx.ModelProto:
    def weight(name, *shape):
        return numpy_helper.from_array(random.normal(size=shape).astype(np.float32), name)

    node = helper.make_node
    nodes = [
        node("Gather", ["words", "input_ids"], ["of_words"]),
        node("Gather", ["types", "token_type_ids"], ["of_types"]),
        node("Add", ["of_words", "of_types"], ["each"]),
        # Each token sees the mean of all that are no padding.
        node("Unsqueeze", ["attention_mask", "last"], ["wide"]),
        node("Cast", ["wide"], ["mask"], to=TensorProto.FLOAT),
        node("Mul", ["each", "mask"], ["masked"]),
        node("ReduceSum", ["masked", "tokens"], ["sum"], keepdims=1),
        node("ReduceSum", ["mask", "tokens"], ["count"], keepdims=1),
        node("Div", ["sum", "count"], ["mean"]),
        node("MatMul", ["mean", "mix"], ["mixed"]),
        node("Add", ["each", "mixed"], ["added"]),
        node("Tanh", ["added"], ["last_hidden_state"]),
    ]
    shape = ["batch", "sequence"]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in ["input_ids", "attention_mask", "token_type_ids"]]
    outputs = [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [*shape, WIDTH])]
    weights = [
        weight("words", vocabulary, WIDTH),
        weight("types", 2, WIDTH),
        weight("mix", WIDTH, WIDTH),
        numpy_helper.from_array(np.array([2], np.int64), "last"),
        numpy_helper.from_array(np.array([1], np.int64), "tokens"),
    ]
    graph = helper.make_graph(nodes, "sentences", inputs, outputs, weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="plimsoll-tests")
    onnx.checker.check_model(made)
    return made


def main() -> None:
    made = tokenizer()
    made.save(str(FOLDER / "tokenizer.json"))
    graph = model(made.get_vocab_size())
    onnx.save(graph, FOLDER / "sentences.onnx")
    write("config.json", {"model_type": "bert", "max_position_embeddings": 64, "pad_token_id": 0})
    write("sentence_bert_config.json", {"max_seq_length": TOKENS_MAX, "do_lower_case": False})
    kind = "sentence_transformers.models"
    write(
        "modules.json",
        [
            {"idx": 0, "name": "0", "path": "", "type": f"{kind}.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kind}.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{kind}.Normalize"},
        ],
    )
    write("1_Pooling/config.json", {"word_embedding_dimension": WIDTH, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True})

    reference = ReferenceEvaluator(graph)
    made.enable_truncation(TOKENS_MAX)

    def run(texts):
        made.enable_padding(pad_id=0, pad_token="[PAD]")
        encoded = made.encode_batch(texts)
        column = lambda of: np.array([of(one) for one in encoded], np.int64)
        mask = column(lambda one: one.attention_mask)
        feed = {"input_ids": column(lambda one: one.ids), "attention_mask": mask, "token_type_ids": column(lambda one: one.type_ids)}
        (hidden,) = reference.run(None, feed)
        mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
        return feed, hidden, mean, mean / np.linalg.norm(mean, axis=1, keepdims=True)

    feed, hidden, mean, normalized = run(TEXTS)
    pair_feed, *_, of_pair = run([tuple(PAIR)])
    rounded = lambda array: np.round(array.astype(np.float64), 7).tolist()
    write(
        "expected.json",
        {
            "texts": TEXTS,
            "input_ids": feed["input_ids"].tolist(),
            "attention_mask": feed["attention_mask"].tolist(),
            "last_hidden_state": rounded(hidden),
            "mean": rounded(mean),
            "cls": rounded(hidden[:, 0]),
            "sentence_embedding": rounded(normalized),
            "pair": PAIR,
            "pair_input_ids": pair_feed["input_ids"].tolist(),
            "pair_token_type_ids": pair_feed["token_type_ids"].tolist(),
            "pair_sentence_embedding": rounded(of_pair),
        },
    )


if __name__ == "__main__":
    main()
