"""A folder with an exported model and all that is needed to run it."""

import io
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import SegformerImageProcessor, ViTImageProcessor

from ..console import progress_bar, require
from ..data.classes.unlabeled import EVALUATION_SPLITS
from ..data.files.atomic_files import atomic_directory, check_new_directory, write_atomically
from ..data.files.digests import file_digests, write_digests
from ..modeling_lvvit import LVViTPreTrainedModel
from .agreement import ImageAgreement, compare_on_images
from .loading import EXPORTED_FROM, Exportable, load
from .onnx_file import EXTERNAL_DATA, EXTRA, MAX_INLINE_BYTES, export_onnx
from .quantization import Quantized, quantize_onnx
from .real_images import RealImages, unprepared
from .torch_program import DTYPES, MIN_PATCHES, WITH_PATCH_HEAD, export_program, output_names
from .verification import Agreement, Run, compare, model_runner, onnx_runner, program_runner


FORMATS = ("onnx", "torch")
ONNX, PROGRAM = "onnx", "model.pt2"  # folder of ONNX files; program of `torch.export`
INT8 = "int8"
# in the order of preference, with names of transformers.js: of the file, and of the type
ONNX_FILES = {
    "float32": ("model.onnx", "fp32"),
    "float16": ("model_fp16.onnx", "fp16"),
    INT8: ("model_quantized.onnx", "q8"),
}
SCRIPT = Path(__file__).with_name("predict.py")
SCRIPT_CLASSES = 256  # of an image with a palette
CALIBRATION_IMAGES = 100
# what transformers.js takes for a model of ours: one of its types with the same inputs and outputs, whose preparation can be switched off
JS_TYPES = {
    "classifier": ("vit", "ViTForImageClassification", ViTImageProcessor),
    "segmenter": ("segformer", "SegformerForSemanticSegmentation", SegformerImageProcessor),
}


@dataclass(frozen=True)
class ExportSettings:
    """How a model is exported.

    Args:
        file_format: Of `FORMATS`.
        dtypes: Of `ONNX_FILES`, each a file; of a program of `torch.export` one, and not int8. Input and outputs are float32.
        fuse: Whether to fold batch norms and residual divisor into the weights.
        prepare: Whether ONNX files prepare images themselves.
        calibration: Dataset whose images set the ranges of int8 activations; default: they are found in each run.
        check_images: Dataset on whose images the files are compared with the model, others than those for calibration; int8 needs it.
        max_check_images: How many of them at most.
        min_agreement: Share of equal predictions on them below which nothing is saved, in [0, 1].
    """

    file_format: str = "onnx"
    dtypes: Sequence[str] = ("float32",)
    fuse: bool = True
    prepare: bool = True
    calibration: str | None = None
    check_images: str | None = None
    max_check_images: int = 500
    min_agreement: float = 0.99

    def __post_init__(self):
        unknown = [dtype for dtype in self.dtypes if dtype not in ONNX_FILES]
        if unknown:
            raise ValueError(f"`dtype` must be of {', '.join(ONNX_FILES)}; got {' '.join(unknown)}.")
        if not self.dtypes or len(set(self.dtypes)) < len(self.dtypes):
            raise ValueError(f"`dtype` names each type once, got {' '.join(self.dtypes) or 'none'}.")
        if self.file_format == "torch" and (len(self.dtypes) > 1 or INT8 in self.dtypes):
            raise ValueError(
                f"A program of torch.export has one `dtype`, float32 or float16; got {' '.join(self.dtypes)}."
            )
        if INT8 in self.dtypes and self.check_images is None:
            raise ValueError(
                "Eight bits may change what a model says: name images on which it is compared, `check_images` with a folder or dataset."
            )
        if self.calibration is not None and INT8 not in self.dtypes:
            raise ValueError(f"`calibration` is for `dtype` {INT8}, got {' '.join(self.dtypes)}.")
        if not 0 <= self.min_agreement <= 1:
            raise ValueError(f"`min_agreement` must lie in [0, 1], got {self.min_agreement}.")
        if self.max_check_images < 1:
            raise ValueError(f"`max_check_images` must be at least 1, got {self.max_check_images}.")


@dataclass
class ExportedFile:
    """A file and what was found of it.

    Args:
        path: In the folder.
        agreement: With the model on random images; `None` of int8.
        on_images: With the model on real images; `None` if there were none.
        quantized: What became int8; `None` of other types.
    """

    path: Path
    agreement: Agreement | None = None
    on_images: ImageAgreement | None = None
    quantized: Quantized | None = None

    def lines(self) -> list[str]:
        """What the program says."""
        lines = [] if self.quantized is None else [f"{self.path.name}: {self.quantized}"]
        if self.agreement is not None:
            sizes = ", ".join(f"{height} x {width}" for height, width in self.agreement.sizes)
            lines.append(
                f"{self.path.name}: largest difference to PyTorch at {sizes} pixels {self.agreement.difference:.1e} "
                f"(bound {self.agreement.bound:.1e}), same best class {self.agreement.same_class:.2%}"
            )
        return lines if self.on_images is None else [*lines, f"{self.path.name}: {self.on_images}"]


def export_folder(
    name: str,
    output_dir: Path,
    settings: ExportSettings = ExportSettings(),
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> list[ExportedFile]:
    """Exports a saved model, checks the files against it, and only then puts the folder in place.

    The folder holds `onnx/model.onnx` (float16: `model_fp16.onnx`, int8: `model_quantized.onnx`), `config.json` and
    `preprocessor_config.json`, laid out for transformers.js, and `predict.py`, which needs onnxruntime, numpy and Pillow alone; or
    `model.pt2`, with configuration and image processor of the model.

    Args:
        name: See `load`.
        output_dir: Must not exist, or be empty.
        revision, trust_remote_code: As in `from_pretrained`.

    Raises:
        FileExistsError: If `output_dir` is not empty; nothing in it is touched.
        FileNotFoundError: If there are no such images.
        ImportError: If a package is missing.
        ValueError: If the model cannot be loaded or exported, or a file differs from it.
    """
    check_new_directory(output_dir)
    if settings.file_format == "onnx":
        require(EXTRA, "onnx", "onnxscript", "onnxruntime")
    exportable = load(name, revision, trust_remote_code)
    export = _Export(name, exportable, settings)
    with atomic_directory(output_dir) as folder:
        files = export.onnx_files(folder) if settings.file_format == "onnx" else [export.program(folder)]
        written = [path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if path.suffix != ".json"]
        write_digests(folder, file_digests(folder, [path for path in sorted(written) if path != SCRIPT.name]))
    return files


class _Export:
    """One run of `export_folder`."""

    def __init__(self, name: str, exportable: Exportable, settings: ExportSettings):
        self.name, self.exportable, self.settings = name, exportable, settings
        self.model, self.is_segmenter = exportable.model, exportable.kind == "segmenter"
        is_lvvit = isinstance(self.model, LVViTPreTrainedModel)
        is_onnx = settings.file_format == "onnx"
        self.preparation = exportable.preparation if is_onnx and settings.prepare else None
        takes_any_size = self.is_segmenter or (is_lvvit and self.preparation is None)
        self.image_size = None if takes_any_size else exportable.image_size
        if not is_onnx and is_lvvit and min(self.model.config.grid_size) < MIN_PATCHES:
            raise ValueError(
                f"{name} has {self.model.config.grid_size} patches; programs need {MIN_PATCHES} on each side."
            )
        if self.preparation is not None and self.is_segmenter and len(exportable.class_names) > SCRIPT_CLASSES:
            raise ValueError(
                f"{SCRIPT.name} paints at most {SCRIPT_CLASSES} classes, the model has {len(exportable.class_names)}."
            )
        self.reference = model_runner(self.model, self.image_size, self.preparation)
        open_images = partial(RealImages, as_input=unprepared if self.preparation is not None else self._prepared)
        self.images = self.calibration = self.expected = None
        if settings.calibration is not None:
            self.calibration = open_images(settings.calibration, CALIBRATION_IMAGES, preferred_splits=("train",))
        if settings.check_images is not None:
            self.images = open_images(
                settings.check_images,
                settings.max_check_images,
                preferred_splits=EVALUATION_SPLITS,
                other_than=self.calibration,
            )

    def _prepared(self, image: Image.Image) -> np.ndarray:
        """An image as a file takes it that prepares nothing: normalized, and filled up to whole patches where it takes any size."""
        pixels = self.exportable.preparation.prepare(image)[None]
        if self.image_size is not None:
            return pixels
        borders = [(0, -side % self.model.config.patch_size) for side in pixels.shape[2:]]
        return np.pad(pixels, ((0, 0), (0, 0), *borders))

    def onnx_files(self, folder: Path) -> list[ExportedFile]:
        """Writes the files of all types, and what lies next to them."""
        (folder / ONNX).mkdir()
        files = []
        for dtype in (dtype for dtype in ONNX_FILES if dtype in self.settings.dtypes):
            file = ExportedFile(folder / ONNX / ONNX_FILES[dtype][0])
            if dtype == INT8:
                file.quantized = self._quantize(folder / ONNX / ONNX_FILES["float32"][0], file.path)
            else:
                self._write(file.path, dtype)
            run = onnx_runner(file.path)
            if dtype != INT8:
                self._compare(file, run, dtype)
            self._compare_on_images(file, run)
            files.append(file)
        if self.preparation is None:
            self.exportable.processor.save_pretrained(folder)
        else:
            shutil.copy(SCRIPT, folder)
            processor = JS_TYPES[self.exportable.kind][2]
            processor(do_resize=False, do_rescale=False, do_normalize=False, do_convert_rgb=True).save_pretrained(
                folder
            )
        _write_json(self._config([file.path for file in files]), folder / "config.json")
        return files

    def program(self, folder: Path) -> ExportedFile:
        """Writes a program of `torch.export`, and what lies next to it."""
        file, (dtype,) = ExportedFile(folder / PROGRAM), self.settings.dtypes
        content = io.BytesIO()  # not the file: where that finds no room, PyTorch's writer ends the whole process
        program = export_program(self.model, DTYPES[dtype], self.settings.fuse, self.image_size)
        torch.export.save(program, content)
        write_atomically(file.path, lambda stream: stream.write(content.getbuffer()))
        run = program_runner(file.path)
        self._compare(file, run, dtype)
        self._compare_on_images(file, run)
        if hasattr(self.model, "config"):  # without the code that `save_pretrained` puts next to it
            self.model.config.to_json_file(folder / "config.json")
        else:  # of timm
            names = list(self.exportable.class_names)
            config = {
                "architecture": self.model.pretrained_cfg["architecture"],
                "num_classes": len(names),
                "label_names": names,
            }
            _write_json(config | self._timm_preparation(), folder / "config.json")
        self.exportable.processor.save_pretrained(folder)
        return file

    def _write(self, path: Path, dtype: str) -> None:
        settings = (self.settings.fuse, self.image_size, self.preparation, MAX_INLINE_BYTES)
        export_onnx(self.model, path, DTYPES[dtype], *settings)

    def _quantize(self, full: Path, path: Path) -> Quantized:
        """Writes the int8 copy of a float32 file, which is made for it if it is not wanted itself."""
        if full.is_file():
            return quantize_onnx(full, path, self.calibration)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            full = Path(folder) / full.name
            self._write(full, "float32")
            self._compare(ExportedFile(full), onnx_runner(full), "float32")
            return quantize_onnx(full, path, self.calibration)

    def _compare(self, file: ExportedFile, run: Run, dtype: str) -> None:
        """Compares a file with the model on random images; a `ValueError` if it is not near."""
        found = file.agreement = compare(run, self.model, DTYPES[dtype], self.image_size, self.preparation)
        if found.not_finite:
            raise ValueError(
                f"{file.path.name} or {self.name} gives NaN or infinite values in {', '.join(found.not_finite)}; not saved. Weights or "
                "activations may be too large for `dtype` float16."
            )
        if not found.is_near:
            raise ValueError(
                f"The outputs of {file.path.name} differ from the model's by up to {found.difference:.1e}, more than {found.bound:.1e}; "
                "not saved."
            )

    def _compare_on_images(self, file: ExportedFile, run: Run) -> None:
        """Compares a file with the model on real images, if there are any; a `ValueError` if too few predictions are equal."""
        if self.images is None:
            return
        if (
            not self.is_segmenter and self.expected is None
        ):  # of the model, which is slower than its files: once for all
            images = progress_bar(self.images, total=len(self.images), desc="Predicting with PyTorch", unit="image")
            self.expected = [self.reference(torch.from_numpy(image))["logits"] for image in images]
        expected = iter(self.expected or ())
        reference = self.reference if self.is_segmenter else lambda image: {"logits": next(expected)}
        file.on_images = compare_on_images(run, reference, self.images, self.exportable.is_multi_label)
        try:
            file.on_images.require(self.settings.min_agreement)
        except ValueError as error:
            raise ValueError(
                f"{file.path.name} is not saved. {error} `calibration` images may help, or `dtype` float16; `min_agreement` says what is "
                "enough, 0 takes it as it is."
            ) from error

    def _config(self, files: list[Path]) -> dict[str, Any]:
        """A configuration that transformers and transformers.js read."""
        names = dict(enumerate(self.exportable.class_names))
        model_type, architecture, _ = JS_TYPES[self.exportable.kind]
        own = getattr(self.model, "config", None)
        types = dict(ONNX_FILES.values())
        external = {path.name: 1 for path in files if path.with_name(path.name + EXTERNAL_DATA).exists()}
        config = {
            "architectures": [architecture],
            "model_type": model_type,  # which transformers.js knows; inputs and outputs are the same
            EXPORTED_FROM: type(self.model).__name__,
            "id2label": names,
            "label2id": {name: index for index, name in names.items()},
            "image_size": self.image_size,
            "patch_size": getattr(own, "patch_size", None),
            "patch_grid_size": self._patch_grid_size(),
            "problem_type": "multi_label_classification" if self.exportable.is_multi_label else None,
            "transformers.js_config": {
                "dtype": types[files[0].name],  # without it, Node takes float32 and a browser int8
                "use_external_data_format": external or None,
            },
        }
        return _without_none(config if self.preparation is not None else config | self._timm_preparation())

    def _patch_grid_size(self) -> tuple[int, int] | None:
        """Rows and columns of `patch_logits`; `None` without a patch head, and for one that was not trained."""
        if output_names(self.model) != WITH_PATCH_HEAD or self.image_size is None:
            return None
        if not isinstance(self.model, LVViTPreTrainedModel):
            return self.model.patch_grid_size
        patch_size, is_trained = self.model.config.patch_size, self.model.config.patch_logits_weight
        return tuple(side // patch_size for side in self.image_size) if is_trained else None

    def _timm_preparation(self) -> dict[str, Any]:
        """What timm's image processor, which writes no file, reads of `config.json`."""
        settings = getattr(self.exportable.processor, "data_config", None)
        return {} if settings is None else {"pretrained_cfg": settings}


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_none(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value is not None
    }
