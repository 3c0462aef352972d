"""Classes of an image by the model that lies next to this file. Needs onnxruntime, numpy and Pillow, nothing else.

    python predict.py image.jpg --top 5                   # a classifier: its best classes, with a probability of their own where an image
                                                          # may have several
    python predict.py image.jpg --output classes.png      # a segmentation model: classes painted, and their shares

The files in `onnx/` are the model, and prepare images themselves; `config.json` has its class names.
"""

import argparse
import colorsys
import io
import json
import struct
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


FOLDER = Path(__file__).parent
FILES = ("model.onnx", "model_fp16.onnx", "model_quantized.onnx")  # float32, float16, int8
# what Pillow raises for files that are no images or damaged
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, IndexError, KeyError, TypeError, RuntimeError, struct.error)
MAX_VALUE = 65_535  # of a pixel: 16 bits
COLORS = 256  # of a palette
GOLDEN_RATIO = 0.618033988749895  # of the circle of hues from class to class, so that neighbours differ


def to_rgb(image: Image.Image) -> Image.Image:
    """An 8-bit RGB image, as in training: transparency is dropped, 16-bit grayscale is scaled, where Pillow alone would turn all but
    the darkest tones white; a `ValueError` if the pixels are floating point, or integers beyond 16 bits."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; save the image with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > MAX_VALUE:
            raise ValueError(
                f"its values are {values.min()} to {values.max()}, expected 0 to {MAX_VALUE}; save the image with 8 or 16 bits"
            )
        image = Image.fromarray(np.uint8(values // 257))
    return image.convert("RGB")


def read_image(path: Path, max_pixels: int | None = None) -> Image.Image:
    """The upright 8-bit RGB image of a file, of an animation the first frame.

    Args:
        max_pixels: Width times height that it may have; default: 178,956,970, the limit of Pillow.

    Raises a `ValueError` if it is no image, is damaged or too large.
    """
    if max_pixels is not None:
        Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2)  # Pillow warns from there on, and refuses twice as many
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # not by its name: Pillow would map the file, and mixes up the pixels of TIFF files that lie on their side
            return to_rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(path.read_bytes()))))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{str(error).partition(',')[0]}; --max_image_pixels allows more") from error
    except IMAGE_ERRORS as error:
        raise ValueError(str(error).partition(" <")[0]) from error  # without the address of a buffer


def class_map(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The class of every pixel, uint8 `size`.

    Args:
        logits: `(num_labels, h, w)`, which cover the image.
        size: Height and width of the result in pixels; logits are resized to it, bilinear.
    """
    best, classes = np.full(size, -np.inf, dtype=np.float32), np.zeros(size, dtype=np.uint8)
    for index, plane in enumerate(logits):
        wide = np.asarray(Image.fromarray(plane).resize(size[::-1], Image.Resampling.BILINEAR))
        is_better = wide > best
        best[is_better], classes[is_better] = wide[is_better], index
    return classes


def palette() -> list[int]:
    """Red, green and blue of every class in turn, in [0, 255]."""
    colors = (colorsys.hsv_to_rgb(index * GOLDEN_RATIO % 1, 0.65, 0.95) for index in range(COLORS))
    return [round(255 * part) for color in colors for part in color]


class Model:
    """The model of a folder with `config.json` and files in `onnx/`, which prepare images themselves.

    Args:
        folder: Its path.
        file: One of those in `onnx/`; default: the first of `FILES` that is there.
    """

    def __init__(self, folder: Path, file: str | None = None):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.names = {int(index): name for index, name in config.get("id2label", {}).items()}
        # an image may have several classes, or none
        self.is_multi_label = config.get("problem_type") == "multi_label_classification"
        file = file or next((name for name in FILES if (folder / "onnx" / name).exists()), FILES[0])
        # more providers, if there is a GPU: "CUDAExecutionProvider" before this one
        self.session = onnxruntime.InferenceSession(folder / "onnx" / file, providers=["CPUExecutionProvider"])
        self.is_classifier = len(self.session.get_outputs()[0].shape) == 2  # (batch, classes)

    def name(self, index: int) -> str:
        """Of a class."""
        return self.names.get(int(index), f"LABEL_{index}")

    def logits(self, image: Image.Image) -> np.ndarray:
        """`(num_labels,)`, or of a segmentation model `(num_labels, h, w)`."""
        pixel_values = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)[None]  # RGB, 0 to 255
        return self.session.run(["logits"], {"pixel_values": pixel_values})[0][0]

    def best_classes(self, image: Image.Image, count: int) -> list[tuple[str, float]]:
        """Names and probabilities of the best classes, the best first."""
        logits = self.logits(image)
        if self.is_multi_label:
            shares = 0.5 + 0.5 * np.tanh(0.5 * logits)  # sigmoid, which never overflows
        else:
            powers = np.exp(logits - logits.max())
            shares = powers / powers.sum()
        return [(self.name(index), float(shares[index])) for index in np.argsort(-shares, kind="stable")[:count]]

    def classes_of_pixels(self, image: Image.Image) -> np.ndarray:
        """The class of every pixel, uint8 `(height, width)`. The image is looked at as a whole, not in windows."""
        return class_map(self.logits(image), (image.height, image.width))


def check_output(output: Path, image: Path) -> None:
    """Raises a `ValueError` if an image of classes cannot be written there."""
    if not output.parent.is_dir():
        raise ValueError(f"there is no folder {output.parent}")
    if output.is_dir() or output.resolve() == image.resolve():
        raise ValueError("name a new file, for example classes.png")
    try:
        Image.new("P", (1, 1)).save(io.BytesIO(), Image.registered_extensions()[output.suffix.lower()])
    except (KeyError, OSError) as error:
        raise ValueError(f"images of classes are saved as .png, got {output.suffix or 'no ending'}") from error


def positive(word: str) -> int:
    """A number of an option, at least 1."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {word}")
    return int(word)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="file of an image")
    parser.add_argument("--top", type=positive, default=5, help="classes to print; default: %(default)s")
    parser.add_argument("--output", type=Path, help="image of classes; default: NAME_classes.png where it is called")
    parser.add_argument(
        "--max_image_pixels", type=positive, help="width times height that an image may have; default: 178,956,970"
    )
    parser.add_argument("--file", choices=FILES, help="which of the files in onnx/; default: the first that is there")
    args = parser.parse_args()
    model = Model(FOLDER, args.file)
    if model.is_classifier and args.output is not None:
        parser.exit(1, "--output: the model is a classifier, which paints no classes; leave it out\n")
    output = args.output or Path(f"{args.image.stem}_classes.png")
    named = args.image
    try:
        image = read_image(args.image, args.max_image_pixels)
        if not model.is_classifier:
            named = "--output"
            check_output(output, args.image)
    except ValueError as error:
        parser.exit(1, f"{named}: {error}\n")
    if model.is_classifier:
        shares = model.best_classes(image, args.top)
    else:
        classes = model.classes_of_pixels(image)
        painted = Image.fromarray(classes)
        painted.putpalette(palette())
        painted.save(output)
        print(f"saved {output}")
        ids, counts = np.unique(classes, return_counts=True)
        order = np.argsort(-counts, kind="stable")[: args.top]
        shares = [(model.name(ids[index]), counts[index] / classes.size) for index in order]
    for name, share in shares:
        print(f"{share:7.2%}  {name}")


if __name__ == "__main__":
    main()
