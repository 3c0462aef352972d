"""A model as an ONNX file."""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from ..console import require
from ..modeling_lvvit import LVViTPreTrainedModel
from .torch_program import export_program, output_names


INPUT = "pixel_values"
EXTRA = "export"  # of this package, which brings the packages for ONNX


def export_onnx(
    model: LVViTPreTrainedModel, path: str | Path, dtype: torch.dtype = torch.float32, fuse: bool = True
) -> None:
    """Writes a model as an ONNX file, for any batch size and any sides that are multiples of the patch size.

        export_onnx(model, "model.onnx")
        session = onnxruntime.InferenceSession("model.onnx")
        (logits,) = session.run(["logits"], {"pixel_values": pixel_values})

    Needs the extra `export`. Input and outputs are those of `export_program`, with the axes `batch`, `P*rows` and
    `P*columns` (P: patch size); images with other sides are refused. The file holds the weights; those of more than 2 GB lie next to it.

    Args:
        model: Classifier or segmentation model; stays as it is.
        path: One that is there is overwritten.
        dtype: Of weights and computation, float32 or float16. ONNX Runtime has few half-precision kernels for CPUs: it
            casts to float32 and back there, so that float16 halves the file but is not faster.
        fuse: Whether to fold batch norms and residual divisor into the weights.

    Raises an `ImportError` if a package is missing, a `ValueError` if the model or the type is another.
    """
    require(EXTRA, "onnx", "onnxscript")
    program = export_program(model, dtype, fuse)
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
    factor = f"{model.config.patch_size}*"
    names = {
        str(axis).removeprefix(factor): name for axis, name in ((batch, "batch"), (height, "rows"), (width, "columns"))
    }
    converted.rename_axes(names)
    _refuse_other_sides(converted.model.graph, model.config.patch_size)
    for node in converted.model.graph.all_nodes():
        node.metadata_props.clear()  # lines of source code, with paths of this machine
    converted.save(path)


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
