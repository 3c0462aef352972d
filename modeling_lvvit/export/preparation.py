"""What an image processor does, as the first nodes of an ONNX graph.

Programs that run ONNX files resize images in ways of their own, some without antialiasing, which changes what a model says. A graph that
resizes, crops and normalizes itself says the same everywhere.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape
from PIL import Image

from ..backbones.image_preparation import ImagePreparation


IMAGE, PREPARED, PATCH_LOGITS, CROP_BOX = "pixel_values", "prepared", "patch_logits", "crop_box"
FILTERS = {Image.Resampling.BILINEAR: "linear", Image.Resampling.BICUBIC: "cubic"}  # `mode` of the operator `Resize`
CUBIC_COEFFICIENT = -0.5  # of Pillow's bicubic filter
IR_VERSION, OPSET = 10, 18  # of graphs that only prepare: the first opset whose `Resize` has antialiasing


def check_preparation(preparation: ImagePreparation) -> None:
    """Raises a `ValueError` if ONNX has no such filter."""
    if preparation.resizing.size is not None and preparation.resample not in FILTERS:
        name = Image.Resampling(preparation.resample).name.lower()
        raise ValueError(
            f"The image processor resizes with the filter {name}; graphs have bilinear and bicubic. Export with `prepare` false, and "
            "prepare images in the program that runs the file."
        )


def preparation_model(preparation: ImagePreparation, patch_size: int | None = None) -> ir.Model:
    """A graph with preparation alone: from `pixel_values` to `prepared`, see `prepend_preparation`."""
    steps, image = _Steps(), _new_image()
    pixels, _ = _prepared(steps, image, preparation)
    outputs = [pixels if patch_size is None else _filled(steps, pixels, patch_size)]
    outputs[0].name, outputs[0].type = PREPARED, ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([image], outputs, nodes=steps.tape.nodes, opset_imports={"": OPSET}, name="preparation")
    return ir.Model(graph, ir_version=IR_VERSION)


def prepend_preparation(graph: ir.Graph, preparation: ImagePreparation, patch_size: int | None = None) -> None:
    """Puts preparation in front of a network.

    The new input is `pixel_values`, float32 `(batch, 3, height, width)`: RGB from 0 to 255 in whole numbers, of any size. It is resized as
    Pillow resizes bytes, within one gray level. A network that gives `patch_logits` gets the output `crop_box`, float32 `(4,)`: left, top,
    right and bottom of what it sees, as fractions of the image; below 0 or above 1 where it sees a black border.

    Args:
        graph: Its only input are normalized images; is changed.
        preparation: See `ImagePreparation`.
        patch_size: Fills sides up to multiples of it, with zeros on the right and below, and cuts `logits`, maps of the filled image, to
            what shows the image; `None` where the network takes the size that `preparation` gives.
    """
    steps, image = _Steps(), _new_image()
    (old,) = graph.inputs
    readers = list(old.uses())
    pixels, box = _prepared(steps, image, preparation)
    prepared = pixels if patch_size is None else _filled(steps, pixels, patch_size)
    if any(output.name == PATCH_LOGITS for output in graph.outputs):
        box = steps.constant([0, 0, 1, 1], np.float32) if box is None else _crop_box(steps, *box)
        box.name, box.type, box.shape = CROP_BOX, ir.TensorType(ir.DataType.FLOAT), ir.Shape([4])
        graph.outputs.append(box)
    prepared.name, prepared.shape, prepared.type = PREPARED, old.shape, old.type
    graph.inputs[0] = image
    graph.insert_before(graph[0], steps.tape.nodes)
    for node, position in readers:
        node.replace_input_with(position, prepared)
    if patch_size is not None:
        _cut_logits(graph, pixels, prepared)


class _Steps:
    """Nodes, added one after another."""

    def __init__(self):
        self.tape = Tape()

    def __call__(self, operator: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return self.tape.op(operator, inputs, attributes)

    def constant(self, values: Any, dtype: type = np.int64) -> ir.Value:
        return self("Constant", value=ir.tensor(np.asarray(values, dtype=dtype)))

    def side(self, image: ir.Value, axis: int) -> ir.Value:
        """Length of an axis, `(1,)`."""
        return self("Shape", image, start=axis, end=axis + 1)


def _new_image() -> ir.Value:
    shape = ir.Shape(["batch", 3, "height", "width"])
    return ir.Value(name=IMAGE, type=ir.TensorType(ir.DataType.FLOAT), shape=shape)


def _prepared(
    steps: _Steps, image: ir.Value, preparation: ImagePreparation
) -> tuple[ir.Value, tuple[ir.Value, ir.Value] | None]:
    """Normalized images; corners of a crop and sides of what it was cut from, `None` without one."""
    pixels = steps("Cast", image, to=ir.DataType.UINT8)  # which `Resize` rounds as Pillow does
    resizing = preparation.resizing
    if resizing.size is not None:
        pixels = _resized(steps, image, pixels, preparation)
    crop = None
    if resizing.crop_size is not None:
        pixels, *crop = _cropped(steps, pixels, resizing.crop_size, preparation.rounds_crop)
    pixels = steps("Cast", pixels, to=ir.DataType.FLOAT)
    mean, std = (np.reshape(values, (1, 3, 1, 1)) for values in (preparation.image_mean, preparation.image_std))
    pixels = steps("Mul", pixels, steps.constant(1 / (255 * std), np.float32))
    pixels = steps("Add", pixels, steps.constant(-mean / std, np.float32))
    if preparation.image_size is not None:  # says the size to whoever plans the network
        pixels = steps("Reshape", pixels, steps.constant([0, 3, *preparation.image_size]))
    return pixels, crop


def _filled(steps: _Steps, pixels: ir.Value, patch_size: int) -> ir.Value:
    """Images with zeros on the right and below, up to whole patches."""
    sides = steps("Concat", *(steps.side(pixels, axis) for axis in (2, 3)), axis=0)
    missing = steps("Mod", steps("Neg", sides), steps.constant([patch_size] * 2))  # of the sign of the divisor
    borders = steps("Concat", steps.constant([0, 0]), missing, axis=0)
    return steps("Pad", pixels, borders, None, steps.constant([2, 3]))


def _crop_box(steps: _Steps, corners: ir.Value, sides: ir.Value) -> ir.Value:
    """Left, top, right, bottom as fractions, float32 `(4,)`."""
    fractions = (
        steps("Cast", value, to=ir.DataType.FLOAT) for value in (corners, steps("Concat", sides, sides, axis=0))
    )
    return steps("Gather", steps("Div", *fractions), steps.constant([1, 0, 3, 2]))


def _resized(steps: _Steps, image: ir.Value, pixels: ir.Value, preparation: ImagePreparation) -> ir.Value:
    """Bytes of another size."""
    resizing = preparation.resizing
    if isinstance(resizing.size, int):
        sizes = _resized_sides(steps, image, resizing.size, resizing.longest_edge)
    else:
        sizes = [steps.constant([side]) for side in resizing.size]
    is_cubic = preparation.resample == Image.Resampling.BICUBIC
    return steps(
        "Resize",
        pixels,
        None,
        None,
        steps("Concat", *sizes, axis=0),
        axes=[2, 3],
        mode=FILTERS[preparation.resample],
        antialias=1,
        exclude_outside=1,  # weights add up to 1 at the border, as in Pillow
        coordinate_transformation_mode="half_pixel",
        **({"cubic_coeff_a": CUBIC_COEFFICIENT} if is_cubic else {}),
    )


def _resized_sides(steps: _Steps, image: ir.Value, shortest: int, longest: int | None) -> list[ir.Value]:
    """Height and width, `(1,)` each, with the shorter side given, or the longer one where that would become longer than `longest`; rounded
    as transformers rounds them."""
    height, width = (steps.side(image, axis) for axis in (2, 3))
    short, long = steps("Min", height, width), steps("Max", height, width)
    new_short = steps.constant([shortest])
    new_long = steps("Div", steps("Mul", new_short, long), short)
    if longest is not None:
        limit = steps.constant([longest])
        is_too_long = steps("Greater", steps("Mul", new_short, long), steps("Mul", limit, short))
        exact_limit, exact_short, exact_long = (
            steps("Cast", value, to=ir.DataType.DOUBLE) for value in (limit, short, long)
        )
        exact = steps("Div", steps("Mul", exact_limit, exact_short), exact_long)
        other_short = steps("Cast", steps("Round", exact), to=ir.DataType.INT64)
        other_long = steps("Div", steps("Mul", exact, exact_long), exact_short)
        new_short = steps("Where", is_too_long, other_short, new_short)
        new_long = steps("Where", is_too_long, steps("Cast", other_long, to=ir.DataType.INT64), new_long)
    is_upright = steps("Greater", height, width)
    return [steps("Where", is_upright, new_long, new_short), steps("Where", is_upright, new_short, new_long)]


def _cropped(
    steps: _Steps, pixels: ir.Value, crop_size: Sequence[int], rounds: bool
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The center of images, black where it is larger than they are; its corners (top, left, bottom, right) and the sides of the images."""
    sides = steps("Concat", *(steps.side(pixels, axis) for axis in (2, 3)), axis=0)
    size, zeros, axes = steps.constant(crop_size), steps.constant([0, 0]), steps.constant([2, 3])
    rest = steps("Sub", sides, size)
    start = steps("Div", rest, steps.constant([2]))  # towards zero
    if rounds:
        half = steps("Mul", steps("Cast", rest, to=ir.DataType.DOUBLE), steps.constant([0.5], np.float64))
        rounded = steps("Cast", steps("Round", half), to=ir.DataType.INT64)  # to the even neighbour
        start = steps("Where", steps("Less", rest, zeros), start, rounded)
    before = steps("Max", steps("Neg", start), zeros)
    after = steps("Max", steps("Sub", steps("Add", start, size), sides), zeros)
    pixels = steps("Pad", pixels, steps("Concat", before, after, axis=0), None, axes)
    first = steps("Max", start, zeros)
    pixels = steps("Slice", pixels, first, steps("Add", first, size), axes)
    return pixels, steps("Concat", start, steps("Add", start, size), axis=0), sides


def _cut_logits(graph: ir.Graph, pixels: ir.Value, filled: ir.Value) -> None:
    """Makes the only output cover the images and not what it was filled up with: sampled again, bilinear, at as many places as there are
    cells that show some of the image. Nothing changes where nothing was filled up."""
    (logits,) = graph.outputs
    steps = _Steps()
    name, logits.name = logits.name, "filled_logits"
    rows = _sampling_weights(steps, pixels, filled, logits, 2)
    columns = _sampling_weights(steps, pixels, filled, logits, 3)
    cut = steps("MatMul", steps("MatMul", rows, logits), steps("Transpose", columns, perm=[1, 0]))
    cut.name, cut.type = name, logits.type
    cut.shape = ir.Shape([*logits.shape[:2], "logit_rows", "logit_columns"])
    graph.extend(steps.tape.nodes)
    graph.outputs[0] = cut


def _sampling_weights(steps: _Steps, pixels: ir.Value, filled: ir.Value, logits: ir.Value, axis: int) -> ir.Value:
    """Share of each cell of an axis in each place that is sampled, float32 `(places, cells)`."""
    side, filled_side, cells = (steps.side(value, axis) for value in (pixels, filled, logits))
    product = steps("Mul", side, cells)
    places = steps(
        "Div", steps("Sub", steps("Add", product, filled_side), steps.constant([1])), filled_side
    )  # rounded up
    zero, one, half = steps.constant(0), steps.constant(1), steps.constant([0.5], np.float32)
    product, filled_side, count, last = (
        steps("Cast", value, to=ir.DataType.FLOAT)
        for value in (product, filled_side, places, steps("Sub", cells, steps.constant([1])))
    )
    step = steps("Div", product, steps("Mul", filled_side, count))  # cells from one place to the next, at most 1
    numbers, columns = (
        steps("Cast", steps("Range", zero, steps("Squeeze", length), one), to=ir.DataType.FLOAT)
        for length in (places, cells)
    )
    positions = steps("Sub", steps("Mul", steps("Add", numbers, half), step), half)
    positions = steps("Min", steps("Max", positions, steps.constant([0], np.float32)), last)
    distances = steps("Abs", steps("Sub", steps("Unsqueeze", positions, steps.constant([1])), columns))
    return steps("Max", steps("Sub", steps.constant([1], np.float32), distances), steps.constant([0], np.float32))
