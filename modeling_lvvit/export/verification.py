"""Whether an exported file says what the model says."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from ..console import require
from ..finite import finite_flags
from ..modeling_lvvit import LVViTPreTrainedModel
from .onnx_file import EXTRA, INPUT, export_onnx


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


@torch.no_grad()
def compare(run: Run, model: LVViTPreTrainedModel, dtype: torch.dtype) -> Agreement:
    """Compares an exported file, which computes in `dtype`, with its model (float32, evaluation mode, on the CPU) on random images:
    batches of 1 and 3, each in the model's size, a patch larger, and as a rectangle of half the height."""
    rows, columns = model.config.grid_size
    side = model.config.patch_size
    grids = ((rows, columns), (rows + 1, columns + 1), (max(2, rows // 2), columns + 1))
    sizes = tuple((side * height, side * width) for height, width in grids)
    generator = torch.Generator().manual_seed(0)
    distances, magnitudes, same = [], [], []
    not_finite: dict[str, None] = {}  # in this order
    for batch_size, size in product(BATCH_SIZES, sizes):
        images = torch.randn(batch_size, model.config.num_channels, *size, generator=generator)
        expected, outputs = model(images, interpolate_pos_encoding=True), run(images)
        both = [(name, torch.stack([values, expected[name]])) for name, values in outputs.items()]
        not_finite |= {name: None for name, is_finite in zip(*finite_flags(both)) if not is_finite}
        for name, values in outputs.items():
            distances.append((values - expected[name]).abs().max())
            magnitudes.append(expected[name].abs().max())
        same.append((outputs["logits"].argmax(1) == expected["logits"].argmax(1)).float().flatten())
    difference, largest = (torch.stack(values).max().item() for values in (distances, magnitudes))
    if dtype == torch.float32:
        bound = MAX_DIFFERENCE * max(1.0, largest / USUAL_LOGIT)
    else:
        bound = MAX_HALF_DIFFERENCE * largest
    return Agreement(difference, bound, torch.cat(same).mean().item(), sizes, tuple(not_finite))
