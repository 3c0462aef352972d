"""A model as a graph of PyTorch that takes any number of images of any size."""

import copy
import warnings

import torch
from torch import nn

from ..modeling_lvvit import LVViTForImageClassification, LVViTForSemanticSegmentation, LVViTPreTrainedModel


DTYPES = {"float32": torch.float32, "float16": torch.float16}
OUTPUTS = {
    LVViTForImageClassification: ("logits", "cls_logits", "patch_logits"),
    LVViTForSemanticSegmentation: ("logits",),
}
MIN_PATCHES = 2  # on each side: with a single row or column, the memory layouts in the graph are others
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
        model: One of `OUTPUTS`; is changed, so that it fits images of any size.
    """

    def __init__(self, model: LVViTPreTrainedModel):
        super().__init__()
        self.model = model
        self.names = output_names(model)
        model.set_attn_implementation("sdpa")  # others are kernels of their own, which cannot be exported
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.AdaptiveAvgPool2d):
                    pooling = MeanPooling(child.output_size)
                    setattr(module, name, pooling)
                    module.layers = [pooling if layer is child else layer for layer in module.layers]  # what it runs

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.model(pixel_values, interpolate_pos_encoding=True)
        return {name: outputs[name].float() for name in self.names}


def output_names(model: LVViTPreTrainedModel) -> tuple[str, ...]:
    """What an exported model gives; a `ValueError` if it is neither a classifier nor a segmentation model."""
    for model_class, names in OUTPUTS.items():
        if isinstance(model, model_class):
            return names
    expected = " and ".join(model_class.__name__ for model_class in OUTPUTS)
    raise ValueError(f"{expected} can be exported, got {type(model).__name__}.")


def export_program(
    model: LVViTPreTrainedModel, dtype: torch.dtype = torch.float32, fuse: bool = True
) -> torch.export.ExportedProgram:
    """A model as a program of `torch.export`, which is saved, loaded and run without this package.

        torch.export.save(export_program(model), "model.pt2")
        run = torch.export.load("model.pt2").module()
        logits = run(pixel_values)["logits"]

    Such a file holds the example images that were traced as a pickle, which `torch.export.load` reads with
    `weights_only=True` first, and without if that fails. So load only files that you trust.

    Args:
        model: Classifier or segmentation model; stays as it is.
        dtype: Of weights and computation, float32 or float16. Input and outputs are float32 in any case.
        fuse: Whether to fold batch norms and residual divisor into the weights, see `LVViTPreTrainedModel.fuse`.

    Returns:
        Program on the CPU with one input, `pixel_values`: normalized images, float32 `(batch_size, num_channels,
        height, width)`, for any batch size and sides that are multiples of the patch size, at least two patches. Its
        output is a dictionary of float32 tensors: of a classifier `logits` and `cls_logits` `(batch_size, num_labels)`
        and `patch_logits` `(batch_size, rows * columns, num_labels)`, of a segmentation model `logits` `(batch_size,
        num_labels, height / s, width / s)`, s = 4 for UperNet and 8 for FCN (patches of 16 pixels).

    Raises:
        ValueError: If the model or the type is another.
    """
    if dtype not in DTYPES.values():
        raise ValueError(f"Expected one of {', '.join(DTYPES)}, got {dtype}.")
    output_names(model)
    prepared = (model.fuse() if fuse else copy.deepcopy(model)).to("cpu", dtype).eval().requires_grad_(False)
    side = prepared.config.patch_size
    rows, columns = EXAMPLE_GRID
    example = torch.zeros(EXAMPLE_BATCH, prepared.config.num_channels, rows * side, columns * side)
    sizes = {
        0: torch.export.Dim("batch"),
        2: side * torch.export.Dim("rows", min=MIN_PATCHES),
        3: side * torch.export.Dim("columns", min=MIN_PATCHES),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what the library keeps next to a forward pass
        program = torch.export.export(
            ImagesToLogits(prepared).eval(), (example,), dynamic_shapes={"pixel_values": sizes}
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program
