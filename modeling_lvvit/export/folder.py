"""A folder with an exported model and all that is needed to run it."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig

from ..backbones.loading import LOADING_ERRORS, first_line, load_image_processor
from ..console import require
from ..data.files.atomic_files import atomic_directory, check_new_directory, write_atomically
from ..data.files.digests import file_digests, write_digests
from ..data.sources import looks_local
from ..finite import NotFiniteError, check_weights
from ..modeling_lvvit import LVViTForSemanticSegmentation, LVViTPreTrainedModel
from .onnx_file import EXTRA, export_onnx
from .torch_program import DTYPES, MIN_PATCHES, OUTPUTS, export_program
from .verification import Agreement, compare, onnx_runner, program_runner


FORMATS = {"onnx": "model.onnx", "torch": "model.pt2"}
SCRIPT = Path(__file__).with_name("predict.py")
SCRIPT_CLASSES = 256  # of an image with a palette
PROBE_SIZE = (320, 200)  # width and height of the image on which preparations are compared
# gray levels by which Pillow, with which the script resizes, differs from torchvision: 2 on 50 photographs
MAX_GRAY_LEVELS = 3


def export_folder(
    name: str,
    output_dir: Path,
    file_format: str = "onnx",
    dtype: str = "float32",
    fuse: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Agreement:
    """Exports a saved model, checks the file against it, and only then puts the folder in place.

    The folder holds `model.onnx` or `model.pt2`, `config.json`, `preprocessor_config.json` and, for ONNX,
    `predict.py`, which needs onnxruntime, numpy and Pillow alone.

    Args:
        name: Folder or Hub name of a classifier or a segmentation model.
        output_dir: Must not exist, or be empty.
        file_format: Of `FORMATS`.
        dtype: Of `DTYPES`; input and outputs are float32.
        fuse: Whether to fold batch norms and residual divisor into the weights.
        revision, trust_remote_code: As in `from_pretrained`.

    Returns:
        How near the file is to the model in float32, not fused.

    Raises:
        FileExistsError: If `output_dir` is not empty; nothing in it is touched.
        ImportError: If a package is missing.
        ValueError: If the model cannot be loaded or exported, or the file differs from it.
    """
    check_new_directory(output_dir)
    if file_format == "onnx":
        require(EXTRA, "onnx", "onnxscript", "onnxruntime")
    model, processor = load(name, revision, trust_remote_code)
    if file_format == "onnx":
        check_script(model, processor)
    elif min(model.config.grid_size) < MIN_PATCHES:
        raise ValueError(f"{name} has {model.config.grid_size} patches; programs need {MIN_PATCHES} on each side.")
    with atomic_directory(output_dir) as partial:
        path = partial / FORMATS[file_format]
        if file_format == "onnx":
            export_onnx(model, path, DTYPES[dtype], fuse)
            shutil.copy(SCRIPT, partial)
            run = onnx_runner(path)
        else:
            content = io.BytesIO()  # not the file: where that finds no room, PyTorch's writer ends the whole process
            torch.export.save(export_program(model, DTYPES[dtype], fuse), content)
            write_atomically(path, lambda file: file.write(content.getbuffer()))
            run = program_runner(path)
        model.config.to_json_file(partial / "config.json")  # without the code that `save_pretrained` puts next to it
        processor.save_pretrained(partial)
        agreement = compare(run, model, DTYPES[dtype])
        if agreement.not_finite:
            raise ValueError(
                f"The exported file or {name} gives NaN or infinite values in {', '.join(agreement.not_finite)}; not saved. Weights or "
                "activations may be too large for `dtype` float16."
            )
        if not agreement.is_near:
            raise ValueError(
                f"The outputs of the exported file differ from the model's by up to {agreement.difference:.1e}, more "
                f"than {agreement.bound:.1e}; not saved."
            )
        write_digests(partial, file_digests(partial, [path.name]))
    return agreement


def load(name: str, revision: str | None, trust_remote_code: bool) -> tuple[LVViTPreTrainedModel, Any]:
    """A model in float32 for evaluation, and its image processor.

    Raises:
        ValueError: If there is none, it is no LV-ViT with a head, weights are missing, NaN or infinite, or there is no image processor.
    """
    if looks_local(name) and not Path(name).expanduser().is_dir():
        raise ValueError(f"There is no model folder {name} (seen from {Path.cwd()}).")
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **source)
    except LOADING_ERRORS as error:
        raise ValueError(f"{name} is no model: {first_line(error)}") from error
    classes, architectures = {model_class.__name__: model_class for model_class in OUTPUTS}, config.architectures or ()
    model_class = next((classes[architecture] for architecture in architectures if architecture in classes), None)
    if model_class is None:
        description = ", ".join(architectures) or f"a {config.model_type!r} model"
        raise ValueError(f"{name} is {description}; {' and '.join(classes)} can be exported.")
    try:
        processor = load_image_processor(name, source)
    except ValueError as error:
        raise ValueError(
            f"{name} has no preprocessor_config.json, which says how images are prepared; save the image processor "
            f"of its training next to the model. ({error})"
        ) from error
    try:
        options = {"revision": revision, "dtype": torch.float32, "output_loading_info": True}
        model, report = model_class.from_pretrained(name, **options)
    except LOADING_ERRORS as error:
        raise ValueError(f"{name} cannot be loaded: {first_line(error)}") from error
    if report["missing_keys"]:
        raise ValueError(f"{name} lacks weights: {', '.join(sorted(report['missing_keys'])[:3])} ...")
    try:
        check_weights(model)
    except NotFiniteError as error:
        raise ValueError(f"{name} cannot be exported: {error}") from error
    return model.eval().requires_grad_(False), processor


def check_script(model: LVViTPreTrainedModel, processor: Any) -> None:
    """Raises a `ValueError` if `predict.py` prepares images in another way than their image processor, or cannot
    paint so many classes."""
    from .predict import prepare

    if isinstance(model, LVViTForSemanticSegmentation) and model.config.num_labels > SCRIPT_CLASSES:
        raise ValueError(
            f"{SCRIPT.name} paints at most {SCRIPT_CLASSES} classes, the model has {model.config.num_labels}."
        )
    noise = np.random.default_rng(0).integers(0, 256, (*PROBE_SIZE[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = np.asarray(processor(image, return_tensors="pt")["pixel_values"])
    settings = json.loads(processor.to_json_string())
    try:
        prepared = prepare(image, settings)
    except (KeyError, TypeError) as error:  # settings that are missing, or null
        raise ValueError(
            f"{SCRIPT.name} does not know the settings of {type(processor).__name__}: {error}."
        ) from error
    level = settings.get("rescale_factor", 1) / min(settings.get("image_std") or [1])
    if prepared.shape != expected.shape or np.abs(prepared - expected).max() > MAX_GRAY_LEVELS * level:
        raise ValueError(f"{SCRIPT.name} would prepare images in another way than {type(processor).__name__}.")
