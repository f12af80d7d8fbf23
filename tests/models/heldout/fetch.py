"""Fetches models that no technique was tuned on into a folder, with inputs made of real pictures and of sounds.

    python fetch.py FOLDER

downloads the wheels that `requirements.txt` pins by version and hash, and writes of each model NAME.onnx and NAME-inputs.npz: the text detector,
recogniser and classifier of RapidOCR (Apache-2.0) on pictures that scikit-image carries, and the voice detector Silero (MIT) in three exports on
tones like vowels with pauses in between. Needs numpy and Pillow. Nothing is downloaded where all of it is there.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
MODELS = {
    "rapidocr-detector": ("rapidocr_onnxruntime-*.whl", "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx"),
    "rapidocr-recogniser": ("rapidocr_onnxruntime-*.whl", "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"),
    "rapidocr-classifier": ("rapidocr_onnxruntime-*.whl", "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx"),
    "silero-voice": ("silero_vad-*.whl", "silero_vad/data/silero_vad.onnx"),
    "silero-voice-16k": ("silero_vad-*.whl", "silero_vad/data/silero_vad_16k_op15.onnx"),
    "silero-voice-sequence": ("silero_vad-*.whl", "silero_vad/data/silero_vad_16k_sequence.onnx"),
}
PAGES = ["page.png", "text.png"]
PICTURES = ["astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "page.png", "text.png", "coins.png"]
SIDE = 320
LINE = (48, 320)
BADGE = (48, 192)
SAMPLES_MAX = 32
RATE_HZ, WINDOW, CONTEXT, STATE = 16000, 512, 64, 128
SEED = 9


def wheels(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--dest", str(folder)]
    command += ["--only-binary=:all:", "--python-version", "3.11", "--platform", "manylinux_2_28_x86_64", "--platform", "any"]
    subprocess.run([*command, "--requirement", str(HERE / "requirements.txt")], check=True, stdout=sys.stderr)


def open_wheel(folder: Path, pattern: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(folder.glob(pattern)))


def pixels(image: Image.Image, rows: int, columns: int) -> np.ndarray:
    """Channels first, from -1 to 1, as RapidOCR takes them."""
    values = np.asarray(image.convert("RGB").resize((columns, rows)), np.float32)
    return (values / 127.5 - 1).transpose(2, 0, 1)


def strips(page: Image.Image) -> list[Image.Image]:
    """Strips of the page, 24 rows high, that hold some print."""
    grey = page.convert("L")
    cut = [grey.crop((left, top, left + 160, top + 24)) for top in range(0, grey.height - 24, 24) for left in range(0, grey.width - 160, 160)]
    return [strip for strip in cut if np.asarray(strip).std() > 20]


def sounds(count: int) -> np.ndarray:
    """Windows with what lies before each: harmonics of a pitch that glides, shaped by two formants, and pauses with faint noise."""
    generator = np.random.default_rng(SEED)
    time = np.arange(count * WINDOW + CONTEXT) / RATE_HZ
    pitch = 120 + 40 * np.sin(2 * np.pi * 0.7 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE_HZ
    formant = lambda frequency: sum(np.exp(-(((frequency - centre) / 150) ** 2)) for centre in (600, 1400))
    voice = sum((formant(harmonic * 120) + 0.05) * np.sin(harmonic * phase) for harmonic in range(1, 30))
    voice *= (np.sin(2 * np.pi * 0.9 * time) > -0.3) * 0.2
    wave = (voice + generator.standard_normal(len(time)) * 0.003).astype(np.float32)
    return np.stack([wave[at * WINDOW : at * WINDOW + WINDOW + CONTEXT] for at in range(count)])


def inputs(carrier: zipfile.ZipFile) -> dict[str, dict[str, np.ndarray]]:
    picture = lambda name: Image.open(io.BytesIO(carrier.read(f"skimage/data/{name}")))
    lines = [strip for name in PAGES for strip in strips(picture(name))][:SAMPLES_MAX]
    turned = [line if place % 2 == 0 else line.rotate(180) for place, line in enumerate(lines)]
    waves = sounds(SAMPLES_MAX)
    state = np.zeros((len(waves), 2, 1, STATE), np.float32)
    voice = {"input": waves[:, None], "state": state, "sr": np.int64(RATE_HZ)}
    # Of the sequence one sample is all windows.
    rest = np.zeros((4, 1, 1, STATE), np.float32)
    return {
        "rapidocr-detector": {"x": np.stack([pixels(picture(name), SIDE, SIDE) for name in PICTURES])},
        "rapidocr-recogniser": {"x": np.stack([pixels(line, *LINE) for line in lines])},
        "rapidocr-classifier": {"x": np.stack([pixels(line, *BADGE) for line in turned])},
        "silero-voice": voice,
        "silero-voice-16k": voice,
        "silero-voice-sequence": {"input": waves.reshape(4, -1, WINDOW + CONTEXT), "h": rest, "c": rest},
    }


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}{suffix}" for name in MODELS for suffix in (".onnx", "-inputs.npz")]
    if not all(path.is_file() for path in files):
        with tempfile.TemporaryDirectory() as scratch:
            wheels(Path(scratch))
            for name, (wheel, member) in MODELS.items():
                (folder / f"{name}.onnx").write_bytes(open_wheel(Path(scratch), wheel).read(member))
            for name, arrays in inputs(open_wheel(Path(scratch), "scikit_image-*.whl")).items():
                np.savez(folder / f"{name}-inputs.npz", **arrays)
    for path in files:
        print(path)


if __name__ == "__main__":
    main()
