"""An eight-bit copy of a float32 ONNX file.

Matrix products with constant weights compute in int8: weights have a scale for each column, activations one for the whole tensor that is found
in each run, so that no images are needed. Calibrated with images, convolutions compute in int8 too. Without, those with a considerable part
of the weights only store them in int8. All else, the preparation of images, attention and norms, stays float32.
"""

import itertools
import math
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..console import require
from .onnx_file import EXTERNAL_DATA, EXTRA, INPUT, file_bytes


LARGEST_LEVEL = 127  # of a weight
# Of all weights. Without calibration, smaller convolutions stay float32: they would save little and run slower.
MIN_SHARE = 0.01
MAX_FILE_BYTES = 2**31 - 2**20  # protobuf ends at 2 GB


@dataclass(frozen=True)
class Quantized:
    """What `quantize_onnx` did.

    Args:
        products: Matrix products that compute in int8.
        convolutions: Convolutions that compute in int8, with the ranges of calibration.
        stored: Convolutions that compute in float32 with weights stored in int8.
        float_products: Matrix products that stay float32, as both factors depend on the image: attention, pooling.
        float_convolutions: Convolutions that stay float32, as they have less than `MIN_SHARE` of the weights.
        bytes_before, bytes_after: Of the files, with weights next to them.
    """

    products: int
    convolutions: int
    stored: int
    float_products: int
    float_convolutions: int
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        share = self.bytes_after / self.bytes_before
        return (
            f"int8: {self.products} x matrix product, {self.convolutions} x convolution; int8 weights, computed in float32: {self.stored} x "
            f"convolution; float32: {self.float_products} x product of two computed matrices, {self.float_convolutions} x convolution with "
            f"less than {MIN_SHARE:.0%} of the weights; {self.bytes_before / 1e6:.1f} MB became {self.bytes_after / 1e6:.1f} ({share:.1%})"
        )


def quantize_onnx(
    source: Path,
    target: Path,
    calibration: Iterable[np.ndarray] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Quantized:
    """Writes an eight-bit copy of an ONNX file; the same inputs give the same bytes.

        quantize_onnx(Path("model.onnx"), Path("model_quantized.onnx"))

    Needs the extra `export`. Inputs and outputs stay as they are. Whether the copy says what the file says depends on the model: see
    `compare_on_images`.

    Args:
        source: File with float32 weights, in it or next to it, and the input `pixel_values`.
        target: File to write; one that is there is overwritten.
        calibration: Images `(1, 3, height, width)`, float32, as `source` takes them; about 100 that are typical. They set the ranges of the
            inputs and outputs of convolutions: ResNet-18 becomes 3 times as fast as in float32, without them slower than that, LV-ViT-S 2.4
            times instead of 1.8. Probabilities change more.
        max_file_bytes: A larger copy has its weights next to it, in a file with `_data` after the name of `target`.

    Raises:
        ImportError: If a package is missing.
        ValueError: If `source` has no matrix product or convolution with constant float32 weights, or `calibration` has no image.
    """
    require(EXTRA, "onnx", "onnxruntime")
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static

    images = None if calibration is None else _Images(calibration)
    model = onnx.load(source)
    bytes_before = file_bytes(source)
    if not _weights(model.graph):
        raise ValueError(f"{source} has no matrix product or convolution with constant float32 weights to quantize.")
    del model.graph.value_info[
        :
    ]  # found anew; older libraries transpose weights without the shapes that are written here
    properties = {entry.key: entry.value for entry in model.metadata_props}
    # tells the library that its optimizer has run: it gains nothing, as ONNX Runtime fuses what it can when it loads a file
    onnx.helper.set_model_props(model, properties | {"onnx.quant.pre_process": "onnxruntime.quant"})
    options = {
        "per_channel": True,
        # 7 bits: CPUs without instructions for sums of products of bytes (VNNI) add two products in 16 bits, which overflow with 8. All
        # compute the same this way, and what is verified on one CPU holds for the others.
        "reduce_range": True,
        "weight_type": QuantType.QInt8,
        "use_external_data_format": True,
    }
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        plain, dynamic, static = (Path(folder) / f"{name}.onnx" for name in ("plain", "dynamic", "static"))
        onnx.save_model(model, plain, save_as_external_data=True, location="plain.data")
        del model
        quantize_dynamic(plain, dynamic, op_types_to_quantize=["MatMul"], **options)
        if images is not None:
            options["activation_type"] = QuantType.QUInt8
            quantize_static(dynamic, static, images, op_types_to_quantize=["Conv", "Relu"], **options)
        quantized = onnx.load(static if images is not None else dynamic)
    stored = _store_convolutions(quantized.graph) if images is None else 0
    onnx.helper.set_model_props(quantized, properties)
    _save(quantized, target, max_file_bytes)
    return _summary(quantized.graph, stored, bytes_before, file_bytes(target))


class _Images:
    """Images as the library reads them: one after the other, then `None`. A `ValueError` if there is none."""

    def __init__(self, images: Iterable[np.ndarray]):
        images = iter(images)
        first = next(images, None)
        if first is None:
            raise ValueError("Expected images for calibration, got none.")
        self.images = itertools.chain([first], images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.images, None)
        return None if image is None else {INPUT: image}


def _weights(graph: Any) -> dict[str, Any]:
    """Constant float32 weights of matrix products and convolutions, by name."""
    import onnx

    readers = {node.input[1] for node in graph.node if node.op_type in ("MatMul", "Gemm", "Conv")}
    return {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.name in readers and tensor.data_type == onnx.TensorProto.FLOAT
    }


def _store_convolutions(graph: Any) -> int:
    """Stores weights of convolutions in int8 with a scale for each output channel, `(channels, ...)`, where they have a share of at least
    `MIN_SHARE`; how many convolutions read them."""
    import onnx

    least = MIN_SHARE * sum(math.prod(tensor.dims) for tensor in graph.initializer)
    weights = {name: tensor for name, tensor in _weights(graph).items() if math.prod(tensor.dims) >= least}
    readers = [node for node in graph.node if node.op_type == "Conv" and node.input[1] in weights]
    for name in dict.fromkeys(node.input[1] for node in readers):
        values = onnx.numpy_helper.to_array(weights[name])
        largest = np.abs(values).max(axis=tuple(range(1, values.ndim)))
        scales = np.where(largest > 0, largest / LARGEST_LEVEL, 1).astype(np.float32)
        levels = np.rint(values / scales.reshape(-1, *[1] * (values.ndim - 1))).astype(np.int8)
        graph.initializer.remove(weights[name])
        inputs = {f"{name}_int8": levels, f"{name}_scale": scales}
        graph.initializer.extend(onnx.numpy_helper.from_array(value, key) for key, value in inputs.items())
        graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", list(inputs), [name], f"{name}_float", axis=0))
    return len(readers)


def _save(model: Any, path: Path, max_file_bytes: int) -> None:
    """Writes a model; weights lie next to it where it is larger than `max_file_bytes`."""
    import onnx

    weights = _weights_path(path)
    for old in (path, weights):
        old.unlink(missing_ok=True)  # the library would append to weights
    is_large = sum(tensor.ByteSize() for tensor in model.graph.initializer) > max_file_bytes
    onnx.save_model(model, path, save_as_external_data=is_large, location=weights.name)


def _weights_path(path: Path) -> Path:
    return path.with_name(path.name + EXTERNAL_DATA)


def _summary(graph: Any, stored: int, bytes_before: int, bytes_after: int) -> Quantized:
    """Counts nodes of a quantized graph."""
    kinds = Counter(node.op_type for node in graph.node)
    float_weights = _weights(graph)
    float_convolutions = sum(node.op_type == "Conv" and node.input[1] in float_weights for node in graph.node)
    return Quantized(
        products=kinds["MatMulInteger"],
        convolutions=kinds["Conv"] - stored - float_convolutions,
        stored=stored,
        float_products=kinds["MatMul"] + kinds["Gemm"],
        float_convolutions=float_convolutions,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
    )
