"""Fetches Google's file-type model magika into a folder, with inputs made of real files.

    python fetch.py FOLDER [FILE...]

downloads the wheel that `requirements.txt` pins by version and hash, writes `magika.onnx`, the names of its outputs as
`magika-labels.txt`, and `magika-inputs.npz` into FOLDER, and prints the paths of the model and the inputs. The inputs are made of the FILEs, by default of files of this repository, few of each kind. Nothing is downloaded
where the model is there already. Needs Python 3.11 with pip, and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from array import array
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
MODEL_MEMBER = "magika/models/standard_v3_3/model.onnx"
CONFIG_MEMBER = "magika/models/standard_v3_3/config.min.json"
MODEL_SHA256 = "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c"

# What the model was trained on, from the package's `config.min.json`: tokens from each end of the file, taken from blocks at its two
# ends, and the token that stands for "no byte here".
TOKENS_PER_END = 1024
BLOCK_BYTES = 4096
PADDING_TOKEN = 256

FILES_MAX = 64
FILES_PER_SUFFIX_MAX = 8
FILE_BYTES_MIN = 16
BUILT_FOLDERS = {"target", "node_modules", "__pycache__"}


def model(folder: Path) -> Path:
    """The model's file, downloaded with the names of its outputs where it is missing or differs."""
    path, labels = folder / "magika.onnx", folder / "magika-labels.txt"
    if path.exists() and labels.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == MODEL_SHA256:
        return path
    with tempfile.TemporaryDirectory() as downloads:
        # `--platform any` chooses the wheel without the native command-line tool: 3 MB in place of 16.
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
            + ["--platform", "any", "--require-hashes", "--requirement", str(HERE / "requirements.txt"), "--dest", downloads],
            check=True,
            stdout=sys.stderr,
        )
        (wheel,) = Path(downloads).glob("magika-*.whl")
        archive = zipfile.ZipFile(wheel)
        content = archive.read(MODEL_MEMBER)
        names = json.loads(archive.read(CONFIG_MEMBER))["target_labels_space"]
    if hashlib.sha256(content).hexdigest() != MODEL_SHA256:
        sys.exit(f"{MODEL_MEMBER} of the wheel is not the model that was pinned")
    labels.write_text("".join(f"{name}\n" for name in names))
    unfinished = path.with_suffix(".part")
    unfinished.write_bytes(content)
    unfinished.rename(path)
    return path


def tokens(content: bytes) -> list[int]:
    """The model's view of a file: its first and last bytes without the surrounding white space, padded on the far sides."""
    first = content[:BLOCK_BYTES].lstrip()[:TOKENS_PER_END]
    last = content[-BLOCK_BYTES:].rstrip()[-TOKENS_PER_END:]
    if len(content) <= BLOCK_BYTES:
        first, last = content.strip()[:TOKENS_PER_END], content.strip()[-TOKENS_PER_END:]
    padding = [PADDING_TOKEN]
    return list(first) + padding * (TOKENS_PER_END - len(first)) + padding * (TOKENS_PER_END - len(last)) + list(last)


def files_of_repository() -> list[Path]:
    """Files of many kinds: a few of each suffix, in the order of their paths."""
    by_suffix: dict[str, int] = {}
    chosen = []
    for path in sorted(REPOSITORY.rglob("*")):
        parts = path.relative_to(REPOSITORY).parts
        hidden = any(part.startswith(".") or part in BUILT_FOLDERS for part in parts)
        if hidden or not path.is_file() or path.stat().st_size < FILE_BYTES_MIN:
            continue
        if by_suffix.get(path.suffix, 0) < FILES_PER_SUFFIX_MAX and len(chosen) < FILES_MAX:
            by_suffix[path.suffix] = by_suffix.get(path.suffix, 0) + 1
            chosen.append(path)
    return chosen


def npz(name: str, rows: list[list[int]]) -> bytes:
    """An .npz with one int32 array (NumPy's NEP 1), so that NumPy itself is not needed."""
    header = f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({len(rows)}, {len(rows[0])}), }}"
    header += " " * (-(len(header) + 11) % 64) + "\n"
    values = array("i", (value for row in rows for value in row))
    if sys.byteorder == "big":
        values.byteswap()
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + values.tobytes()
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w") as archive:
        # A fixed time makes equal inputs equal files.
        archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED)
    return result.getvalue()


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    files = [Path(name) for name in sys.argv[2:]] or files_of_repository()
    inputs = folder / "magika-inputs.npz"
    print(model(folder))
    inputs.write_bytes(npz("bytes", [tokens(file.read_bytes()) for file in files]))
    print(inputs)


if __name__ == "__main__":
    main()
