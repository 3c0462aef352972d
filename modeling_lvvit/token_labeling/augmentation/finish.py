"""What is left to do to the images of a batch, on the device: they come as uint8, a quarter of the bytes of float32."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.data.random_erasing import RandomErasing


@dataclass(frozen=True)
class ErasedBox:
    """A rectangle that is replaced by normal noise once the images are normalized.

    Args:
        top, left, height, width: In pixels.
        seed: Of its noise, so that this depends on the sample alone.
        row: Of the image in its batch.
    """

    top: int
    left: int
    height: int
    width: int
    seed: int
    row: int = 0

    def at(self, row: int) -> "ErasedBox":
        """The same in row `row` of a batch."""
        return replace(self, row=row)


class BoxEraser:
    """Draws the rectangle that random erasing takes, with Python's generator: timm's rule, area 0.02 to 1/3, aspect ratio 0.3 to 1/0.3.

    Args:
        probability: That there is one, in [0, 1].
    """

    def __init__(self, probability: float):
        self.rule = RandomErasing(probability, mode="const", device="cpu")

    def draw(self, image_size: tuple[int, int]) -> ErasedBox | None:
        """A rectangle in an image of this height and width, or `None`."""
        recorder = _SliceRecorder()
        self.rule._erase(recorder, 1, *image_size, torch.uint8)
        if recorder.slices is None:
            return None
        rows, columns = recorder.slices
        seed = int(torch.randint(1 << 62, ()))
        return ErasedBox(rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start, seed)


class _SliceRecorder:
    """Stands in for an image of which timm would erase a part."""

    slices: tuple[slice, slice] | None = None

    def __setitem__(self, place: tuple[slice, ...], values: Any) -> None:
        self.slices = place[1:]


def finish_images(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of `TokenLabelCollator` with images as the model takes them. Nothing waits for the device.

    Where `pixel_values` are uint8, they are normalized by its `normalization` (`data.images.Normalization`), then rectangles of
    `erased` are filled with noise, then pixels are mixed: a share `pixel_share`, `(1, 1, height, width)` or `(1, 1, 1, 1)`, is that of the
    image in the mirrored place of the batch. These three fields are gone afterwards. Other images stay as they are.

    Raises:
        ValueError: If uint8 images come without `normalization`.
    """
    batch = dict(batch)
    normalization, erased, share = (batch.pop(name, None) for name in ("normalization", "erased", "pixel_share"))
    pixel_values = batch["pixel_values"]
    if pixel_values.dtype == torch.uint8:
        if normalization is None:
            raise ValueError(
                "The images are uint8 and come without `normalization`. Collate samples of `TrainTransform` with `TokenLabelCollator`, or "
                "normalize the images yourself."
            )
        pixel_values = normalization(pixel_values)
    if erased:
        erase(pixel_values, erased)
    if share is not None:
        pixel_values = torch.lerp(pixel_values, pixel_values.flip(0), share)
    return {**batch, "pixel_values": pixel_values}


def erase(pixel_values: torch.Tensor, boxes: list[ErasedBox]) -> None:
    """Fills rectangles of normalized images `(B, 3, height, width)` with noise, in place."""
    try:
        generator = torch.Generator(pixel_values.device)
    except RuntimeError:  # of this kind of device there is none: its noise is drawn here and copied
        generator = torch.Generator()
    for box in boxes:
        generator.manual_seed(box.seed)
        rows, columns = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
        part = pixel_values[box.row, :, rows, columns]
        part.copy_(torch.empty(part.shape, device=generator.device).normal_(generator=generator))
