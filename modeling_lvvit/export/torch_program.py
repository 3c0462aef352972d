"""A model as a graph of PyTorch that takes any number of images."""

import copy
import warnings
from typing import Any

import torch
from torch import nn

from ..backbones.feature_search import output_logits
from ..backbones.loading import first_line
from ..backbones.patch_head import has_patch_head
from ..backbones.resize import forward_options, native_image_size
from ..modeling_lvvit import LVViTForImageClassification, LVViTForSemanticSegmentation, LVViTPreTrainedModel


DTYPES = {"float32": torch.float32, "float16": torch.float16}
WITH_PATCH_HEAD = ("logits", "cls_logits", "patch_logits")
MIN_PATCHES = 2  # on each side: with a single row or column, the memory layouts in the graph are others
NUM_CHANNELS = 3  # of an image
# what the library raises for a graph that does not hold for every batch size, or an operation that it does not know
EXPORT_ERRORS = (RuntimeError, ValueError, TypeError, torch._dynamo.exc.UserError)
EXAMPLE_BATCH, EXAMPLE_GRID = 2, (3, 4)  # of the image that is traced; sizes of 0 and 1 would be taken for constants


class MeanPooling(nn.Module):
    """`nn.AdaptiveAvgPool2d` as two matrix products: the exporter to ONNX writes a graph for it that holds for the
    size of the example alone.

    `(batch_size, channels, height, width)` -> `(batch_size, channels, bins, bins)`.
    """

    def __init__(self, bins: int):
        super().__init__()
        self.bins = bins

    def _weights(self, length: int, like: torch.Tensor) -> torch.Tensor:
        """Share of each cell in the mean of each bin, `(bins, length)`: bin b holds the cells from b * length / bins,
        rounded down, to (b + 1) * length / bins, rounded up."""
        bins, cells = torch.arange(self.bins, device=like.device), torch.arange(length, device=like.device)
        first, end = bins * length // self.bins, ((bins + 1) * length + self.bins - 1) // self.bins
        inside = (cells >= first[:, None]) & (cells < end[:, None])
        return (inside / (end - first)[:, None]).to(like.dtype)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        rows, columns = (self._weights(length, maps) for length in maps.shape[-2:])
        return rows @ maps @ columns.T


class ImagesToLogits(nn.Module):
    """A model with images as its only input and named float32 tensors as output, whatever it computes in.

    Args:
        model: Image classifier, or LV-ViT for segmentation; an LV-ViT is changed, so that it fits images of any size.
        image_size: Height and width of the images in pixels; no matter for an LV-ViT.
    """

    def __init__(self, model: nn.Module, image_size: tuple[int, int] | None = None):
        super().__init__()
        self.model, self.image_size = model, image_size
        if isinstance(model, LVViTPreTrainedModel):
            _fit_any_size(model)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        pixel_values = pixel_values.to(next(self.model.parameters()).dtype)
        return named_outputs(self.model, pixel_values, self.image_size)


def _fit_any_size(model: LVViTPreTrainedModel) -> None:
    """Replaces what cannot be exported for images of any size."""
    model.set_attn_implementation("sdpa")  # others are kernels of their own, which cannot be exported
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d):
                pooling = MeanPooling(child.output_size)
                setattr(module, name, pooling)
                module.layers = [pooling if layer is child else layer for layer in module.layers]  # what it runs


def named_outputs(
    model: nn.Module, pixel_values: torch.Tensor, image_size: tuple[int, int] | None = None
) -> dict[str, torch.Tensor]:
    """What an exported model gives for images, as the model itself computes it; float32, each a tensor of its own.

    Args:
        model: Image classifier, or LV-ViT for segmentation.
        pixel_values: Normalized images, `(batch_size, channels, height, width)`.
        image_size: Height and width in pixels; no matter for an LV-ViT.
    """
    outputs, names = model(pixel_values, **_options(model, image_size)), output_names(model)
    values = [output_logits(outputs)] if names == ("logits",) else [outputs[name] for name in names]
    return {name: value.to(torch.float32, copy=True) for name, value in zip(names, values)}


def _options(model: nn.Module, image_size: tuple[int, int] | None) -> dict[str, Any]:
    """Keyword arguments of a forward pass."""
    if isinstance(model, LVViTPreTrainedModel):
        return {"interpolate_pos_encoding": True}
    return forward_options(model, image_size)


def output_names(model: nn.Module) -> tuple[str, ...]:
    """What an exported model gives; a `ValueError` if it is an LV-ViT without a head."""
    if isinstance(model, LVViTForSemanticSegmentation):
        return ("logits",)
    if isinstance(model, LVViTPreTrainedModel) and not isinstance(model, LVViTForImageClassification):
        raise ValueError(
            f"Models for image classification and segmentation can be exported, got {type(model).__name__}."
        )
    return WITH_PATCH_HEAD if has_patch_head(model) else ("logits",)


def fixed_image_size(model: nn.Module, image_size: tuple[int, int] | None) -> tuple[int, int] | None:
    """Height and width in pixels of the only images that an exported model takes: those asked for, or those that the model was made for;
    `None` for an LV-ViT that takes any.

    Raises:
        ValueError: If another model does not say for which size it was made.
    """
    if image_size is not None or isinstance(model, LVViTPreTrainedModel):
        return image_size
    hook = getattr(model, "feature_hook", None)
    size = native_image_size(model) if hook is None else hook.image_size
    if size is None:
        raise ValueError(
            f"{type(model).__name__} does not say for which images it was made; give `image_size`, height and width in pixels."
        )
    return size


def export_program(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    fuse: bool = True,
    image_size: tuple[int, int] | None = None,
) -> torch.export.ExportedProgram:
    """A model as a program of `torch.export`, which is saved, loaded and run without this package.

        torch.export.save(export_program(model), "model.pt2")
        run = torch.export.load("model.pt2").module()
        logits = run(pixel_values)["logits"]

    Such a file holds the example images that were traced as a pickle, which `torch.export.load` reads with
    `weights_only=True` first, and without if that fails. So load only files that you trust.

    Args:
        model: Image classifier of transformers or timm, or LV-ViT for segmentation; stays as it is.
        dtype: Of weights and computation, float32 or float16. Input and outputs are float32 in any case.
        fuse: Whether to fold batch norms and residual divisor of an LV-ViT into the weights, see `LVViTPreTrainedModel.fuse`.
        image_size: Height and width in pixels of the images that the program takes. Default: of an LV-ViT any that are multiples of the
            patch size, at least two patches; of other models those that they were made for.

    Returns:
        Program on the CPU with one input, `pixel_values`: normalized images, float32 `(batch_size, num_channels,
        height, width)`, for any batch size. Its output is a dictionary of float32 tensors: of a classifier `logits`
        `(batch_size, num_labels)`, of one with a patch head also `cls_logits`, of the same shape, and `patch_logits`
        `(batch_size, rows * columns, num_labels)`; of a segmentation model `logits` `(batch_size, num_labels, height / s,
        width / s)`, s = 4 for UperNet and 8 for FCN (patches of 16 pixels).

    Raises:
        ValueError: If the model or the type is another, or the model cannot be exported for all batch sizes.
    """
    if dtype not in DTYPES.values():
        raise ValueError(f"Expected one of {', '.join(DTYPES)}, got {dtype}.")
    output_names(model)
    size = fixed_image_size(model, image_size)
    is_fused = fuse and isinstance(model, LVViTPreTrainedModel)
    prepared = (model.fuse() if is_fused else copy.deepcopy(model)).to("cpu", dtype).eval().requires_grad_(False)
    example, axes = _example(prepared, size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what the library keeps next to a forward pass
            program = torch.export.export(
                ImagesToLogits(prepared, size).eval(), (example,), dynamic_shapes={"pixel_values": axes}
            )
    except EXPORT_ERRORS as error:
        raise ValueError(
            f"{type(model).__name__} cannot be exported for all batch sizes: {first_line(error)}"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _example(model: nn.Module, size: tuple[int, int] | None) -> tuple[torch.Tensor, dict[int, Any]]:
    """Images that are traced, and the names of their free axes."""
    axes = {0: torch.export.Dim("batch")}
    if size is not None:
        return torch.zeros(EXAMPLE_BATCH, NUM_CHANNELS, *size), axes
    side = model.config.patch_size
    axes[2] = side * torch.export.Dim("rows", min=MIN_PATCHES)
    axes[3] = side * torch.export.Dim("columns", min=MIN_PATCHES)
    return torch.zeros(EXAMPLE_BATCH, model.config.num_channels, *(side * cells for cells in EXAMPLE_GRID)), axes
