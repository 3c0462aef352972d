"""RandAugment whose geometric operations are composed into one affine map, so that labels can follow them exactly."""

import copy
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from timm.data.auto_augment import rand_augment_transform


# operations of timm that move pixels; all others change colors only
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel")
POLICY = re.compile(r"rand(-(m\d+|n\d+|p(0(\.\d+)?|1(\.0+)?)|mstd\d+(\.\d+)?|mmax\d+|inc[01]))*")


class _AffineRecorder:
    """Stands in for an image of a width and height: takes PIL's geometric calls and composes them instead of resampling pixels."""

    def __init__(self, size: tuple[int, int]):
        self.size = size
        self.matrix: np.ndarray | None = None  # pixel (x, y, 1) of the result -> pixel of the image

    def transform(self, size: tuple[int, int], method: Any, data: tuple[float, ...], **options: Any):
        """PIL's `Image.transform` with `AFFINE`."""
        step = np.array([*data, 0.0, 0.0, 1.0]).reshape(3, 3)
        # the second operation reads the result of the first: p -> first(second(p))
        self.matrix = step if self.matrix is None else self.matrix @ step
        return self

    def rotate(self, degrees: float, **options: Any):
        """PIL's `Image.rotate`: counter-clockwise about the center."""
        x, y = self.size[0] / 2, self.size[1] / 2
        cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        data = (cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y)
        return self.transform(self.size, Image.Transform.AFFINE, data)


class RandAugment:
    """timm's RandAugment, drawn for one image at a time.

    Operations, their strengths and probabilities are timm's (`rand_augment_transform`). Only the order differs: the
    geometric ones come first, composed, and move the image once; those of color follow in the order drawn.

    Args:
        policy: timm's description. The published recipe is `rand-m9-mstd0.5-inc1`: two operations of fifteen, each applied
            with probability 0.5 and magnitude 9 of 10 (deviation 0.5), in the variant whose strength grows with it.
        image_mean: Per-channel mean in [0, 1] with which the parts are filled that move in from outside.

    Raises:
        ValueError: If the policy is not understood.
    """

    def __init__(self, policy: str, image_mean: list[float]):
        if not POLICY.fullmatch(policy):
            raise ValueError(
                f"`rand_augment` must look like 'rand-m9-mstd0.5-inc1' (m: magnitude, n: operations, p: probability, "
                f"mstd: deviation, mmax: largest magnitude, inc: increasing) or be 'none', got {policy!r}."
            )
        self.fill = tuple(min(255, round(255 * value)) for value in image_mean)
        drawn = rand_augment_transform(policy, {"img_mean": self.fill, "translate_const": 100})
        self.operations, self.num_operations = drawn.ops, drawn.num_layers

    def draw(self, size: tuple[int, int]) -> tuple[np.ndarray | None, list["ColorOperation"]]:
        """Draws the operations for an image of a width and height in pixels.

        Returns:
            `[3, 3]` float64 that maps (x, y, 1) in pixels of the moved image to the given one, `None` if nothing moves; and
            the color operations, each of which is still to be drawn.
        """
        recorder = _AffineRecorder(size)
        colors = []
        for operation in random.choices(self.operations, k=self.num_operations):
            if operation.name in GEOMETRIC:
                operation(recorder)
            else:
                colors.append(ColorOperation(operation))
        return recorder.matrix, colors


class ColorOperation:
    """An operation of timm of which it is known beforehand whether it acts: it draws as timm does, and no image is made for one that does not."""

    def __init__(self, operation: Any):
        self.operation = operation

    def draw(self) -> Callable[[Image.Image], Image.Image] | None:
        """What is to be done to an image, `None` for nothing. Its strength is drawn when it is done, before any other draw."""
        if self.operation.prob < 1.0 and random.random() > self.operation.prob:
            return None
        acting = copy.copy(self.operation)
        acting.prob = 1.0
        return acting
