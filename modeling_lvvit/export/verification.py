"""Whether an exported file says what the model says."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import nn

from ..backbones.image_preparation import ImagePreparation
from ..backbones.resize import native_image_size
from ..configuration_lvvit import LVViTConfig
from ..console import require
from ..finite import finite_flags
from ..modeling_lvvit import LVViTForSemanticSegmentation, LVViTPreTrainedModel
from .onnx_file import EXTRA, INPUT, export_onnx
from .torch_program import NUM_CHANNELS, fixed_image_size, named_outputs


Run = Callable[[torch.Tensor], dict[str, torch.Tensor]]

BATCH_SIZES = (1, 3)
# float32: an absolute bound, as logits of trained classifiers reach about 10, where S differs by 2e-5; relative for
# larger ones.
MAX_DIFFERENCE, USUAL_LOGIT = 1e-4, 10.0
# float16: ten times what S differs by, in units of its largest logit (1e-3: two units in the last place of a half,
# after 16 layers)
MAX_HALF_DIFFERENCE = 1e-2


@dataclass(frozen=True)
class Agreement:
    """How near an exported file is to its model.

    Args:
        difference: Largest absolute difference of any output.
        bound: What it may be.
        same_class: Share of the predictions (of images, or cells of a segmentation) whose best class is the same.
        sizes: Height and width of the images in pixels.
        not_finite: Outputs with NaN or infinite values, of the file or the model.
    """

    difference: float
    bound: float
    same_class: float
    sizes: tuple[tuple[int, int], ...]
    not_finite: tuple[str, ...] = ()

    @property
    def is_near(self) -> bool:
        """Whether the difference is within its bound; a NaN is not."""
        return self.difference <= self.bound


def onnx_runner(path: Path) -> Run:
    """Runs an ONNX file with ONNX Runtime on the CPU; an `ImportError` if that is missing."""
    require(EXTRA, "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # its threads leave the cores to PyTorch
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        results = session.run(names, {INPUT: pixel_values.numpy()})
        return {name: torch.from_numpy(result) for name, result in zip(names, results)}

    return run


def exported_runner(model: LVViTPreTrainedModel, dtype: torch.dtype) -> Run:
    """Exports a model to a file that does not outlive this call, and runs it with ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, path, dtype)
        return onnx_runner(path)


def program_runner(path: Path) -> Run:
    """Runs a file of `torch.export.save`."""
    return torch.export.load(path).module()


def preparation_runner(
    preparation: ImagePreparation, patch_size: int | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Runs what a file does to images first, see `preparation_model`."""
    require(EXTRA, "onnx", "onnxscript", "onnxruntime")
    import onnx_ir
    import onnxruntime

    from .preparation import PREPARED, preparation_model

    content = onnx_ir.to_proto(preparation_model(preparation, patch_size)).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([PREPARED], {INPUT: images.numpy()})[0])


def model_runner(
    model: nn.Module, image_size: tuple[int, int] | None, preparation: ImagePreparation | None = None
) -> Run:
    """Runs the model itself as a file of it should: on prepared images, or with preparation on images as they are."""
    if preparation is None:
        return torch.no_grad()(lambda images: named_outputs(model, images, image_size))
    is_segmenter = isinstance(model, LVViTForSemanticSegmentation)
    prepare = preparation_runner(preparation)

    @torch.no_grad()
    def run(images: torch.Tensor) -> dict[str, torch.Tensor]:
        prepared = prepare(images)
        if not is_segmenter:
            return named_outputs(model, prepared, image_size)
        sides, patch = prepared.shape[2:], model.config.patch_size
        filled = nn.functional.pad(prepared, (0, -sides[1] % patch, 0, -sides[0] % patch))
        logits = model(filled, interpolate_pos_encoding=True).logits
        return {"logits": _cut(logits, [side / size for side, size in zip(sides, filled.shape[2:])])}

    return run


def _cut(logits: torch.Tensor, shares: Sequence[float]) -> torch.Tensor:
    """The part of a map that shows an image, a share of each side, sampled again at as many places as there are cells of it, whole or in
    part."""
    cells = [share * size for share, size in zip(shares, logits.shape[2:])]
    places = [math.ceil(count - 1e-9) for count in cells]
    rows, columns = (
        (2 * (torch.arange(number) + 0.5) * count / number / size - 1).clamp(1 / size - 1, 1 - 1 / size)
        for number, count, size in zip(places, cells, logits.shape[2:])
    )
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)[None].expand(len(logits), -1, -1, -1)
    return nn.functional.grid_sample(logits, grid.to(logits), align_corners=False)


@torch.no_grad()
def compare(
    run: Run,
    model: nn.Module,
    dtype: torch.dtype,
    image_size: tuple[int, int] | None = None,
    preparation: ImagePreparation | None = None,
) -> Agreement:
    """Compares an exported file, which computes in `dtype`, with its model (float32, evaluation mode, on the CPU) on random images:
    batches of 1 and 3, in its only size (`image_size`, see `export_program`), or in the model's size, a patch larger, and as a
    rectangle of half the height. A file that prepares images gets an upright one, a tall and a wide one."""
    fixed_size = fixed_image_size(model, image_size)
    reference = model_runner(model, fixed_size, preparation)
    if preparation is not None:
        sizes = _sizes_to_prepare(fixed_size or native_image_size(model))
    else:
        sizes = _free_sizes(model.config) if fixed_size is None else (fixed_size,)
    generator = torch.Generator().manual_seed(0)
    distances, magnitudes, same = [], [], []
    not_finite: dict[str, None] = {}  # in this order
    for batch_size, size in product(BATCH_SIZES, sizes):
        shape = (batch_size, NUM_CHANNELS, *size)
        if preparation is None:
            images = torch.randn(shape, generator=generator)
        else:
            images = torch.randint(0, 256, shape, generator=generator).float()
        expected, outputs = reference(images), run(images)
        both = [(name, torch.stack([outputs[name], values])) for name, values in expected.items()]
        not_finite |= {name: None for name, is_finite in zip(*finite_flags(both)) if not is_finite}
        for name, values in expected.items():
            distances.append((outputs[name] - values).abs().max())
            magnitudes.append(values.abs().max())
        same.append((outputs["logits"].argmax(1) == expected["logits"].argmax(1)).float().flatten())
    difference, largest = (torch.stack(values).max().item() for values in (distances, magnitudes))
    if dtype == torch.float32:
        bound = MAX_DIFFERENCE * max(1.0, largest / USUAL_LOGIT)
    else:
        bound = MAX_HALF_DIFFERENCE * largest
    return Agreement(difference, bound, torch.cat(same).mean().item(), sizes, tuple(not_finite))


def _sizes_to_prepare(size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Heights and widths in pixels of images for a model of this size: its own, taller, wider."""
    height, width = size
    return size, (height + height // 2 + 1, width), (height // 2 + 3, width + 5)


def _free_sizes(config: LVViTConfig) -> tuple[tuple[int, int], ...]:
    """Heights and widths in pixels on which a file that takes any size is compared."""
    (rows, columns), side = config.grid_size, config.patch_size
    grids = ((rows, columns), (rows + 1, columns + 1), (max(2, rows // 2), columns + 1))
    return tuple((side * height, side * width) for height, width in grids)
