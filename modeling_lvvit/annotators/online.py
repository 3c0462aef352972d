"""Dense labels without storage: an annotator scores every training crop on the device, as the student sees it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing
from torch import nn

from ..data.classes.class_labels import pair_classes
from ..data.images import parse_image_size
from ..finite import check_weights
from ..labels.checks.agreement import Agreement, spread_labelled
from ..labels.label_crops import CropGeometry, crop_palette_scores
from ..labels.sparse_targets import SparseTargets
from .annotator import Annotator, load_annotator
from .text.prompts import PROMPTS_HELP, TEXT_PREFIX, check_text_options


MAX_COMPARED = 256  # crops that are labelled before training
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(kw_only=True)
class AnnotatorArguments:
    """An annotator for training crops, instead of stored labels.

    Args:
        annotator: Image classifier: Hub name or folder of transformers, or `timm/NAME`; or `text:` and an image-text model.
        prompts: JSON file of what the classes mean to an image-text model; default: their names.
        annotator_revision: Revision on the Hub.
        annotator_image_size: Side of its input in pixels, or height and width; default: its own.
        annotator_class_map: File that pairs its classes with those of the data, or `"identity"`; default: by name.
        annotator_ignore_extra_classes: Whether it may have classes that the data lacks.
        annotator_dtype: In which type it computes.
        annotator_sampling: `"soft"`: a token learns the annotator's probabilities. `"hard"`: one class, drawn from them (Gumbel
            softmax; self-emerging labels, arXiv:2401.03844).
        annotator_trust_remote_code: Whether code of its Hub repository may run.
    """

    annotator: str | None = field(
        default=None, metadata={"help": "Classifier that labels every training crop, or image-text model: text:NAME."}
    )
    prompts: str | None = field(default=None, metadata={"help": PROMPTS_HELP})
    annotator_revision: str | None = field(default=None, metadata={"help": "Revision on the Hub."})
    annotator_image_size: list[int] | None = field(default=None, metadata={"help": "Its input: side, or both."})
    annotator_class_map: str | None = field(default=None, metadata={"help": "File that pairs classes, or: identity."})
    annotator_ignore_extra_classes: bool = field(default=False, metadata={"help": "Drop classes the data lacks."})
    annotator_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Type in which it computes."}
    )
    annotator_sampling: Literal["soft", "hard"] = field(
        default="soft", metadata={"help": "Learn its probabilities, or a class drawn from them."}
    )
    annotator_trust_remote_code: bool = field(default=False, metadata={"help": "Allow code of its Hub repository."})

    def check_annotator(self) -> None:
        """Raises a `ValueError` for values that cannot be used."""
        if self.annotator_dtype not in DTYPES:
            raise ValueError(f"`annotator_dtype` must be one of {', '.join(DTYPES)}, got {self.annotator_dtype!r}.")
        if self.annotator_sampling not in ("soft", "hard"):
            raise ValueError(f"`annotator_sampling` must be soft or hard, got {self.annotator_sampling!r}.")
        parse_image_size(self.annotator_image_size, "`annotator_image_size`")
        options = (self.annotator_class_map, self.annotator_ignore_extra_classes)
        check_text_options(self.annotator, self.prompts, *options)


class DeviceClock:
    """Seconds that a device spends on something. Nothing waits for the device before `seconds` is asked for."""

    def __init__(self, device: torch.device):
        self.device = device
        self._seconds: float = 0.0
        self._events: list[tuple[torch.Event, torch.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """What is timed."""
        if self.device.type == "cpu":
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        start, end = (torch.Event(self.device, enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._events.append((start, end))

    def seconds(self) -> float:
        """The sum since the last call."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        total, self._seconds, self._events = self._seconds, 0.0, []
        return total


class OnlineAnnotator:
    """Labels the crops of a batch.

    The annotator sees each crop after flip, crop, RandAugment and color changes, so that its labels lie where the student's tokens
    lie, and before erasing and before tokens are exchanged. Images that CutMix or Mixup mixed it sees mixed.

    Args:
        annotator: From `load_annotator`, with the classes of the data. It is moved to `device` and computes in `dtype`.
        image_mean, image_std: Normalization of the student's images.
        device, dtype: Where and how it computes.
        random_erasing: Probability that a rectangle of a crop is replaced by noise after labelling, in [0, 1]. Leave erasing out
            of the training transform then.
        draws_classes: Whether the target of a patch token is one class, drawn from the annotator's probabilities.

    Raises:
        ValueError: If its map has fewer than 2 x 2 cells, or weights are not finite in this type.
    """

    def __init__(
        self,
        annotator: Annotator,
        image_mean: list[float],
        image_std: list[float],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        random_erasing: float = 0.0,
        draws_classes: bool = False,
    ):
        rows, columns = annotator.dense.grid_size
        if min(rows, columns) < 2:
            raise ValueError(
                f"The annotator {annotator.name} has {rows} x {columns} cells; token labels need at least 2 x 2. Give it larger "
                "images (`annotator_image_size`)."
            )
        self.annotator, self.dtype, self.device = annotator, dtype, torch.device(device)
        self.draws_classes = draws_classes
        annotator.dense.to(self.device, dtype)
        check_weights(annotator.dense, f"the annotator {annotator.name} in {str(dtype).removeprefix('torch.')}")
        self.bad_images = torch.zeros((), dtype=torch.int64, device=self.device)
        self.image_mean, self.image_std = (
            torch.tensor(values, device=self.device).view(3, 1, 1) for values in (image_mean, image_std)
        )
        self.random_erasing = RandomErasing(random_erasing, mode="pixel", device=self.device)
        self.clock = DeviceClock(self.device)

    @property
    def num_classes(self) -> int:
        """Classes of its labels."""
        class_map = self.annotator.class_map
        return len(self.annotator.class_names) if class_map is None else len(class_map.groups)

    def check_num_classes(self, num_classes: int) -> None:
        """Raises a `ValueError` if the student has another number of classes."""
        if self.num_classes != num_classes:
            raise ValueError(
                f"The annotator {self.annotator.name} has {self.num_classes} classes, the model {num_classes}. Give it a `class_map` "
                "from its classes to those of the data."
            )

    @torch.no_grad()
    def label(
        self, pixel_values: torch.Tensor, grid_size: tuple[int, int], temperature: float = 1.0
    ) -> tuple[SparseTargets, SparseTargets]:
        """Targets of class token and patch tokens of whole crops, not smoothed.

        Args:
            pixel_values: The student's images, `(B, 3, height, width)`, normalized or uint8.
            grid_size: Token rows and columns of the student.
            temperature: Divides the pooled scores before softmax.
        """
        with self.clock.running():
            with torch.inference_mode():
                scores = self.score_map(pixel_values)
                self.bad_images += (~scores.flatten(1).isfinite().all(dim=1)).sum()  # read when the loss is logged
            batch_size, num_classes = scores.shape[:2]
            palette = torch.arange(num_classes, device=scores.device).expand(batch_size, -1)
            whole = scores.new_zeros(batch_size, 4)
            whole[:, 2:] = 1  # made on the device: for numbers that come from the processor, it would wait
            cls_targets, token_targets = crop_palette_scores(
                scores, palette, CropGeometry(whole), grid_size, num_classes, temperature=temperature
            )
            if self.draws_classes:
                # as `torch.multinomial` draws, without its checks, which wait for the device: the first of C exponential clocks
                probabilities = token_targets.to_dense()  # (B, N, C)
                drawn = (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1, keepdim=True)
                excess = torch.zeros_like(probabilities).scatter_(-1, drawn, 1.0)
                token_targets = SparseTargets(palette, excess, torch.zeros_like(excess[..., 0]), num_classes)
            return replace(cls_targets, names_all=True), replace(token_targets, names_all=True)

    def score_map(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits `(B, classes, rows, columns)`, float32."""
        size = self.annotator.preprocessing.image_size
        values = pixel_values.float()
        if pixel_values.dtype != torch.uint8:
            values = 255 * (values * self.image_std + self.image_mean)
        if tuple(values.shape[-2:]) != tuple(size):
            values = nn.functional.interpolate(values, size=size, mode="bicubic", antialias=True).clamp_(0, 255)
        return self.annotator.score_map(values, self.dtype).float()

    def images_per_second(self, batch_size: int, repeats: int = 3) -> float:
        """Its speed on batches of its own input size."""
        size = self.annotator.preprocessing.image_size
        pixel_values = torch.zeros(batch_size, 3, *size, device=self.device)
        for _ in range(2):  # the first round warms up
            self.clock.seconds()
            for _ in range(repeats):
                self.label(pixel_values, (2, 2))
        return batch_size * repeats / self.clock.seconds()

    def compare_with_labels(self, samples: Any, seed: int, batch_size: int) -> Agreement | None:
        """What it says of at most 256 crops of the first epoch, next to the human labels; `None` where there are none.

        Args:
            samples: Training data, a `TokenLabelDataset`.
            seed: `data_seed` of the run.
        """
        classes = samples.class_ids()
        rows, first = spread_labelled(classes, MAX_COMPARED), []
        for part in np.array_split(rows, -(-len(rows) // batch_size)) if len(rows) else ():
            crops = torch.stack([sample["pixel_values"] for sample in samples.draw(part.tolist(), seed, 0)])
            first.append(self.label(crops.to(self.device), (2, 2))[0].to_dense().argmax(dim=1).cpu().numpy())
        return Agreement(np.concatenate(first), classes[rows], are_crops=True) if first else None

    def erase(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images with rectangles of noise."""
        return self.random_erasing(pixel_values.clone()) if self.random_erasing.probability else pixel_values


def describe_heads(annotator: OnlineAnnotator) -> str | None:
    """That an annotator with heads for the images that it was fitted on does not use them in training; `None` for others."""
    if annotator.annotator.fold_heads is None:
        return None
    return (
        f"The annotator {annotator.annotator.name} has heads for the images that it was fitted on, which only stored labels use: crops in training "
        "are labeled by the head that has seen them all."
    )


def open_annotator(
    args: Any,
    class_names: list[str],
    image_mean: list[float],
    image_std: list[float],
    device: torch.device,
) -> OnlineAnnotator:
    """The annotator that arguments name, with the classes of the data.

    Args:
        args: Fields of `AnnotatorArguments`, and `random_erasing`.
        class_names: Of the data.
        image_mean, image_std, device: See `OnlineAnnotator`.

    Raises:
        ValueError: If it cannot be loaded, cannot label cells, or its classes do not match.
    """
    annotator = load_annotator(
        args.annotator,
        parse_image_size(args.annotator_image_size, "`annotator_image_size`"),
        device=device,
        revision=args.annotator_revision,
        trust_remote_code=args.annotator_trust_remote_code,
        class_names=class_names,
        prompts=args.prompts,
    )
    options = (DTYPES[args.annotator_dtype], args.random_erasing, args.annotator_sampling == "hard")
    if args.annotator.startswith(TEXT_PREFIX):  # it has the classes of the data
        return OnlineAnnotator(annotator, image_mean, image_std, device, *options)
    are_named = not all(name.isdigit() for name in class_names)
    choice = (args.annotator_class_map, args.annotator_ignore_extra_classes)
    annotator.class_map, names = pair_classes(
        annotator.class_names, class_names, are_named, *choice, "The label column"
    )
    if len(names) != len(class_names):
        raise ValueError(
            f"The annotator {args.annotator} has {len(names)} classes, the data {len(class_names)}. Pair them in a file "
            "(`class_map`)."
        )
    return OnlineAnnotator(annotator, image_mean, image_std, device, *options)
