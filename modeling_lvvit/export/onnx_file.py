"""A model as an ONNX file."""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..backbones.image_preparation import ImagePreparation
from ..console import require
from ..modeling_lvvit import LVViTForSemanticSegmentation
from .torch_program import export_program, fixed_image_size, output_names


INPUT = "pixel_values"
EXTERNAL_DATA = "_data"  # after the name of a file: weights that lie next to it, where transformers.js looks for them
MAX_INLINE_BYTES = 2**31 - 2**26  # of weights within the file: protobuf ends at 2 GiB
EXTRA = "export"  # of this package, which brings the packages for ONNX


def export_onnx(
    model: nn.Module,
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    fuse: bool = True,
    image_size: tuple[int, int] | None = None,
    preparation: ImagePreparation | None = None,
    max_inline_bytes: int = MAX_INLINE_BYTES,
) -> None:
    """Writes a model as an ONNX file, for any batch size; an LV-ViT also for any sides that are multiples of the patch size. With
    preparation, it takes images as they are.

        export_onnx(model, "model.onnx")
        session = onnxruntime.InferenceSession("model.onnx")
        (logits,) = session.run(["logits"], {"pixel_values": pixel_values})

    Needs the extra `export`. Input and outputs are those of `export_program`, with the axis `batch`, and `P*rows` and
    `P*columns` (P: patch size) where sizes are free; images with other sides are refused. With `preparation` the input is described in
    `prepend_preparation`, and there is one more output, `crop_box`, for models with a patch head. The file holds the weights; those of more
    than 2 GB lie next to it.

    Args:
        model: Image classifier of transformers or timm, or LV-ViT for segmentation; stays as it is.
        path: One that is there is overwritten.
        dtype: Of weights and computation, float32 or float16. ONNX Runtime has few half-precision kernels for CPUs: it
            casts to float32 and back there, so that float16 halves the file but is not faster.
        fuse: Whether to fold batch norms and residual divisor of an LV-ViT into the weights; ONNX Runtime folds those of others.
        image_size: See `export_program`; that of the preparation, if there is one.
        preparation: What the file itself does to images first.
        max_inline_bytes: Weights of more bytes lie next to the file, in one that is called the same with `_data` behind it.

    Raises an `ImportError` if a package is missing, a `ValueError` if the model or the type is another.
    """
    require(EXTRA, "onnx", "onnxscript")
    from .preparation import check_preparation, prepend_preparation

    is_segmenter = isinstance(model, LVViTForSemanticSegmentation)
    if preparation is not None:
        check_preparation(preparation)
        image_size = None if is_segmenter else preparation.image_size
    program = export_program(model, dtype, fuse, image_size)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = {"input_names": [INPUT], "output_names": list(output_names(model))}
            converted = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    finally:
        logger.setLevel(level)
    batch, _, height, width = converted.model.graph.inputs[0].shape
    if fixed_image_size(model, image_size) is None:
        factor = f"{model.config.patch_size}*"
        axes = ((batch, "batch"), (height, "rows"), (width, "columns"))
        converted.rename_axes({str(axis).removeprefix(factor): name for axis, name in axes})
        if preparation is None:
            _refuse_other_sides(converted.model.graph, model.config.patch_size)
    else:
        converted.rename_axes({str(batch): "batch"})
    if preparation is not None:
        prepend_preparation(converted.model.graph, preparation, model.config.patch_size if is_segmenter else None)
    for node in converted.model.graph.all_nodes():
        node.metadata_props.clear()  # lines of source code, with paths of this machine
    _save(converted.model, Path(path), max_inline_bytes)


def _save(model: Any, path: Path, max_inline_bytes: int) -> None:
    """Writes a model; weights lie next to it where they have more bytes than `max_inline_bytes`."""
    import onnx_ir

    weights = sum(weight.const_value.nbytes for weight in model.graph.initializers.values())
    onnx_ir.save(model, path, external_data=path.name + EXTERNAL_DATA if weights > max_inline_bytes else None)


def file_bytes(path: Path) -> int:
    """Of an ONNX file and of the weights next to it, whose names begin with its own."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


def _refuse_other_sides(graph: Any, patch_size: int) -> None:
    """Cuts images into blocks of a patch and puts them together again, which only works for sides that are multiples of it. ONNX Runtime
    does not compare sizes with the names of the axes, and convolutions drop the rest of an image."""
    import onnx_ir

    image = graph.inputs[0]
    readers = list(image.uses())
    block = {"blocksize": patch_size}
    cut = onnx_ir.node("SpaceToDepth", [image], block)
    whole = onnx_ir.node("DepthToSpace", cut.outputs, block)
    whole.outputs[0].shape, whole.outputs[0].type = image.shape, image.type
    graph.insert_before(graph[0], [cut, whole])
    for node, position in readers:
        node.replace_input_with(position, whole.outputs[0])
