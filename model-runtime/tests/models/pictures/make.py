"""Makes pictures in the formats that are served, a small model of them, and records what Pillow and transformers make of them.

    python make.py

needs numpy, onnx 1.23, pillow 13.0 and transformers 4.57, and writes into its own folder. The pictures and the model are this script's own.
"""

import hashlib
import json
import pathlib

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw, ImageOps
from transformers import CLIPImageProcessor, ConvNextImageProcessor, ViTImageProcessor

FOLDER = pathlib.Path(__file__).parent
SIDE = 8
FILTERS = {"Nearest": 0, "Lanczos": 1, "Bilinear": 2, "Bicubic": 3, "Box": 4, "Hamming": 5}
SIZES = [(13, 9), (97, 71), (61, 20), (20, 47), (1, 1)]
SPECIFICATIONS = {
    "vit": (ViTImageProcessor, {"size": {"height": SIDE, "width": SIDE}}),
    "clip": (CLIPImageProcessor, {"size": {"shortest_edge": 10}, "crop_size": {"height": SIDE, "width": SIDE}}),
    "convnext": (ConvNextImageProcessor, {"size": {"shortest_edge": SIDE}, "crop_pct": 0.875, "resample": 3}),
    # Smaller than what is cut out of it.
    "padded": (CLIPImageProcessor, {"size": {"shortest_edge": 5}, "crop_size": {"height": SIDE, "width": SIDE}, "do_normalize": False}),
    "bytes": (ViTImageProcessor, {"size": {"height": SIDE, "width": SIDE}, "do_normalize": False, "do_rescale": False, "resample": 0}),
}


def picture() -> Image.Image:
    width, height = 61, 47
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    channels = [200 + 40 * np.sin(x / 9), 60 + 2 * y, 30 + x + y / 2]
    made = Image.fromarray(np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(made)
    draw.ellipse((8, 6, 30, 28), fill=(250, 240, 40))
    draw.rectangle((36, 20, 55, 41), fill=(20, 90, 220), outline=(0, 0, 0))
    return made


def pictures() -> None:
    made = picture()
    made.save(FOLDER / "picture.png", optimize=True)
    made.save(FOLDER / "lossless.webp", lossless=True)
    made.save(FOLDER / "picture.webp", quality=90)
    made.save(FOLDER / "picture.jpg", quality=95, subsampling=0)
    exif = Image.Exif()
    exif[0x0112] = 6  # the top is on the right
    made.save(FOLDER / "turned.jpg", quality=95, subsampling=0, exif=exif)
    made.convert("P", palette=Image.Palette.ADAPTIVE, colors=32).save(FOLDER / "palette.png", optimize=True)
    made.convert("L").save(FOLDER / "grey.png", optimize=True)
    made.putalpha(Image.linear_gradient("L").resize(made.size))
    made.save(FOLDER / "transparent.png", optimize=True)


def opened(name: str) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(FOLDER / name)).convert("RGB")


def model() -> onnx.ModelProto:
    """Gives the mean of each colour, and the pixels as they came."""
    nodes = [
        helper.make_node("ReduceMean", ["pixel_values"], ["logits"], axes=[2, 3], keepdims=0),
        helper.make_node("Identity", ["pixel_values"], ["pixels"]),
    ]
    value = helper.make_tensor_value_info
    shape = ["batch", 3, SIDE, SIDE]
    outputs = [value("logits", TensorProto.FLOAT, ["batch", 3]), value("pixels", TensorProto.FLOAT, shape)]
    graph = helper.make_graph(nodes, "pictures", [value("pixel_values", TensorProto.FLOAT, shape)], outputs)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="plimsoll-tests")
    onnx.checker.check_model(made)
    return made


def main() -> None:
    pictures()
    onnx.save(model(), FOLDER / "pictures.onnx")
    (FOLDER / "config.json").write_text(json.dumps({"id2label": {"0": "red", "1": "green", "2": "blue"}}) + "\n")
    processors = {name: kind(**options) for name, (kind, options) in SPECIFICATIONS.items()}
    written = {name: json.loads(processor.to_json_string()) for name, processor in processors.items()}
    (FOLDER / "preprocessor_config.json").write_text(json.dumps(written["vit"], indent=1) + "\n")

    def processed(processor, name):
        values = processor(opened(name), return_tensors="np")["pixel_values"][0]
        return np.round(values.astype(np.float64), 6).ravel().tolist()

    files = sorted(path.name for path in FOLDER.iterdir() if path.suffix in {".png", ".jpg", ".webp"})
    cases = [("vit", name) for name in files] + [(name, "picture.png") for name in written if name != "vit"] + [("clip", "turned.jpg")]
    source = opened("picture.png")
    grey = np.asarray(Image.open(FOLDER / "picture.png").convert("L"))
    resized = {
        name: {f"{width}x{height}": hashlib.sha256(source.resize((width, height), number).tobytes()).hexdigest() for width, height in SIZES}
        for name, number in FILTERS.items()
    }
    expected = {
        "specifications": written,
        "cases": [{"specification": name, "picture": file, "values": processed(processors[name], file)} for name, file in cases],
        "resized": resized,
        "grey": hashlib.sha256(grey.tobytes()).hexdigest(),
    }
    (FOLDER / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()
