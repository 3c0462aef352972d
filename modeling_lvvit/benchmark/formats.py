"""A trained classifier in all its formats: speed, bytes, and whether they answer alike on real images."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..console import require
from ..data.classes.unlabeled import EVALUATION_SPLITS
from ..deployment import prepare_for_inference
from ..export.folder import ONNX, ONNX_FILES
from ..export.loading import load
from ..export.onnx_file import EXTRA, INPUT, file_bytes
from ..export.real_images import RealImages, unprepared
from ..modeling_lvvit import LVViTForImageClassification
from .comparison import relative_speed, table
from .interleaved_timing import Entry, time_interleaved


IMAGES, BATCH_SIZES, ROUNDS = 200, (1, 8), 15
PYTORCH = {  # arguments of `prepare_for_inference`
    "PyTorch": None,
    "PyTorch+deployed": {},
    "PyTorch+deployed+bfloat16": {"dtype": torch.bfloat16},
    "PyTorch+int8": {"int8_weights": True},
}
Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Format:
    """A way to run a saved classifier.

    Args:
        name: Of `PYTORCH`, or that of a file.
        model: Folder with the saved model.
        file: ONNX file of `lvvit export`, which takes RGB values 0 to 255 of any size and prepares images itself; `None` for PyTorch.
    """

    name: str
    model: str
    file: Path | None = None


def find_formats(model: str, exported: str | None) -> list[Format]:
    """Those of PyTorch, and the files of an exported folder.

    Raises:
        ImportError: If ONNX Runtime is missing.
        ValueError: If there are no such files, or they do not prepare images.
    """
    formats = [Format(name, model) for name in PYTORCH]
    if exported is None:
        return formats
    require(EXTRA, "onnxruntime")
    folder = Path(exported)
    names = [name for name, _ in ONNX_FILES.values()]
    files = [path for name in names if (path := folder / ONNX / name).is_file()]
    if not files:
        raise ValueError(
            f"`exported` {exported} has none of {', '.join(names)} in its folder {ONNX}. Name a folder of `lvvit export`."
        )
    settings = folder / "preprocessor_config.json"
    if not settings.is_file() or json.loads(settings.read_text(encoding="utf-8")).get("do_normalize", True):
        raise ValueError(
            f"`exported` {exported} holds files that do not prepare images themselves. Export the model again, without --no_prepare."
        )
    return formats + [Format(f"{ONNX}/{path.name}", model, path) for path in files]


def compare_formats(
    formats: list[Format],
    images: str,
    count: int = IMAGES,
    batch_sizes: tuple[int, ...] = BATCH_SIZES,
    rounds: int = ROUNDS,
) -> list[dict[str, object]]:
    """Runs formats in turn, each in a process of its own, where freed memory stays (see `keep_freed_memory`).

    Before they are timed, each predicts real images, which it gets as they are and prepares in its own way. What is timed are fixed
    batches: PyTorch gets prepared images, ONNX those of the input's size, which it prepares in the time that counts.

    Args:
        formats: See `find_formats`; the first is what the others are compared with.
        images: Folder of images, all of which count, or a dataset, of whose evaluation split they are; see `open_images`.
        count: Images to predict at most.
        batch_sizes, rounds: Of the timing.

    Returns:
        A row for each format and batch size with `megabytes` (weights in memory, of ONNX the files), `milliseconds` (median) and `seconds`
        (all), `images_per_second`, `ratio`, `images` (how many were predicted), `same_class` (share of them with the best class
        of the first), `largest_change` (of a probability against the first) and `preparation` (of deployed models).
    """
    predicted = len(RealImages(images, count, unprepared, EVALUATION_SPLITS))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = {each.name: Path(folder) / f"{index}.npz" for index, each in enumerate(formats)}
        for batch_size in batch_sizes:
            entries = {
                each.name: Entry(
                    partial(format_call, each, images, count, batch_size, files[each.name]),
                    torch.get_num_threads(),
                    True,
                )
                for each in formats
            }
            times = time_interleaved(entries, torch.device("cpu"), rounds)
            first = formats[0].name
            expected = np.load(files[first])["probabilities"]
            for name, taken in times.items():
                speed = relative_speed(taken, times[first], batch_size)
                del speed["peak_megabytes"]  # predicting takes memory too
                row = {"mode": "formats", "model": name, "batch_size": batch_size, **speed, "images": predicted}
                rows.append(row | answers(np.load(files[name]), expected))
    return rows


def answers(found: dict[str, np.ndarray], expected: np.ndarray) -> dict[str, object]:
    """How near what `format_call` found is to the probabilities `(images, classes)` of the first format."""
    probabilities = found["probabilities"]
    return {
        "megabytes": float(found["bytes"]) / 1e6,
        "same_class": float((probabilities.argmax(axis=1) == expected.argmax(axis=1)).mean()),
        "largest_change": float(np.abs(probabilities - expected).max()),
        "preparation": str(found["preparation"]),
    }


def format_call(
    kind: Format, images: str, count: int, batch_size: int, predictions: Path
) -> Callable[[], torch.Tensor]:
    """Logits of a fixed batch. If the file `predictions` is not there yet, it is written before: `probabilities`
    `(images, classes)` float32, `bytes` and `preparation`."""
    exportable = load(kind.model)
    if not isinstance(exportable.model, LVViTForImageClassification):
        name = type(exportable.model).__name__
        raise ValueError(f"{kind.model} is {name}; formats of LVViTForImageClassification are compared.")
    if kind.file is None:
        run, size, preparation = pytorch_runner(exportable.model, PYTORCH[kind.name])
        prepare = timed = partial(_processed, exportable.processor)
        predicted_size = batch_size
    else:
        run, size, preparation = onnx_runner(kind.file), file_bytes(kind.file), ""
        prepare, predicted_size = unprepared, 1  # images of several sizes
        height, width = exportable.model.config.image_height_width
        timed = lambda image: unprepared(image.resize((width, height)))  # noqa: E731
    if not predictions.exists():
        normalize = torch.sigmoid if exportable.is_multi_label else partial(torch.softmax, dim=1)
        found = [
            normalize(run(batch).float()).numpy()
            for batch in _batches(RealImages(images, count, prepare, EVALUATION_SPLITS), predicted_size)
        ]
        np.savez(predictions, probabilities=np.concatenate(found), bytes=size, preparation=preparation)
    pictures = RealImages(images, min(count, batch_size), timed, EVALUATION_SPLITS)
    batch = next(_batches(cycle(pictures), batch_size))
    return lambda: run(batch)


def pytorch_runner(model: LVViTForImageClassification, deployed: dict | None) -> tuple[Logits, int, str]:
    """Logits of prepared images float32 `(B, 3, height, width)`, the bytes of the weights, and what was prepared.

    Args:
        deployed: Arguments of `prepare_for_inference`; `None` for the model as it is.
    """
    if deployed is not None:
        model = prepare_for_inference(model, **deployed)
    dtype = model.dtype
    size = sum(tensor.numel() * tensor.element_size() for tensor in chain(model.parameters(), model.buffers()))

    @torch.no_grad()
    def run(pixel_values: torch.Tensor) -> torch.Tensor:
        return model(pixel_values.to(dtype)).logits

    return run, size, "" if deployed is None else str(model.preparation)


def onnx_runner(file: Path) -> Logits:
    """Logits of RGB values 0 to 255, float32 `(B, 3, height, width)` of any size, by ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda values: torch.from_numpy(session.run(["logits"], {INPUT: values.numpy()})[0])


def formats_table(rows: list[dict[str, object]]) -> str:
    """A line for each format, with columns for each batch size."""
    lines: dict[str, dict[str, object]] = {}
    columns = {"model": "{}", "megabytes": "{:.1f}"}
    for row in rows:
        rate, ratio = (f"{name} ({row['batch_size']})" for name in ("images/s", "ratio"))
        columns |= {rate: "{:.1f}", ratio: "{:.2f}"}
        lines.setdefault(row["model"], {}).update(row, **{rate: row["images_per_second"], ratio: row["ratio"]})
    columns |= {"same_class": "{:.1%}", "largest_change": "{:.4f}"}
    notes = [f"{name}: {line['preparation']}" for name, line in lines.items() if line["preparation"]]
    return "\n".join([table(list(lines.values()), columns), *notes])


def _processed(processor: Callable, image: Image.Image) -> np.ndarray:
    """What the image processor makes of an image, float32 `(1, 3, height, width)`."""
    return np.asarray(processor(images=image, return_tensors="pt")["pixel_values"])


def _batches(images: Iterable[np.ndarray], size: int) -> Iterator[torch.Tensor]:
    """So many images at a time, float32 `(B, 3, height, width)`; the last batch may have fewer."""
    images = iter(images)
    while batch := list(islice(images, size)):
        yield torch.from_numpy(np.concatenate(batch))
