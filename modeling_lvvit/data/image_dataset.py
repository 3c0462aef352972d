"""What all views of a `datasets.Dataset` with images share: rows read in batches, randomness that belongs to a row, and the check
of all rows before training."""

import io
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageFile
from transformers.utils import logging

from ..console import progress_bar
from ..launching import num_cpu_cores, start_worker
from .decoding import EncodedImage
from .images import (
    IMAGE_ERRORS,
    MAX_VALUE,
    ROTATED,
    SIXTEEN_BITS,
    TRANSPARENT,
    ImageReport,
    PixelLimit,
    SampleError,
    UndecodableError,
    examine_image,
    libjpeg_reports_damage,
    pillow_errors,
    read_content,
    upright_size,
)
from .sampling import fold_in, preserve_rng_state, seed_generators


logger = logging.get_logger(__name__)
MAX_REPORTED_PROBLEMS = 10
ROWS_PER_CHECK = 128
SAMPLED_IMAGES = 256  # whose sizes are read
# up to so many images, or from so many passes on, all are decoded before training
FEW_IMAGES, MANY_PASSES = 10_000, 10
DECODE_HELP = (
    "Decode every image once before training, on all cores, and report what libjpeg says of damage; default: where training reads "
    f"every image at least {MANY_PASSES} times, and for up to {FEW_IMAGES:,} images."
)
# how other readers differ from `decode_image`, and what to do; {} is how many images it is about
OTHER_READERS = {
    SIXTEEN_BITS: "16-bit grayscale ({}) is scaled to 8 bits here; the pipelines and image processors of transformers clip it to white. "
    "Save these images with 8 bits, or give those `Image.fromarray(numpy.uint8(numpy.asarray(image) // 257))`",
    TRANSPARENT: "Transparency ({}) is dropped here and in pipelines; image processors of transformers blend it with white. Give those "
    '`image.convert("RGB")`',
    ROTATED: "The Exif orientation ({}) turns images upright here and in pipelines; image processors of transformers do not turn them. "
    "Give those `ImageOps.exif_transpose(image)`",
}


class ImageDataset(torch.utils.data.Dataset):
    """Rows with an image that become samples. A subclass says what else belongs to a sample (`fetch`) and makes it (`sample`).

    Rows are fetched in Arrow format, a batch at a time. Once `start_epoch` was called, what a transform draws for a row depends on
    seed, epoch and row alone: not on the number of processes or workers, the batch size, or whether the run was interrupted.

    Args:
        dataset: The rows.
        columns: Columns to read, that of the images first.
        name: What messages call the dataset.

    Raises:
        ValueError: If a column is missing.
    """

    def __init__(self, dataset: datasets.Dataset, columns: list[str], name: str):
        check_has_columns(dataset, columns, name)
        self.image_column, self.name = columns[0], name
        self.pixel_limit = PixelLimit()  # for the processes that load
        self.notes: Counter[str] = Counter()  # how many images have each of `reading_notes`, once all were looked at
        self.rows = dataset.select_columns(columns).with_format("arrow")
        # shared, so that workers that outlive an epoch see it change
        self._seed_and_epoch = torch.full((2,), -1, dtype=torch.int64).share_memory_()

    def fetch(self, table: pa.Table, indices: list[int]) -> Any:
        """What besides the images belongs to some rows, which `table` holds."""
        raise NotImplementedError

    def sample(self, image: EncodedImage, fetched: Any, offset: int, index: int) -> dict[str, Any]:
        """The sample of row `index`, which is number `offset` of those that `fetched` is about; what is needed of its image is decoded."""
        raise NotImplementedError

    def start_epoch(self, seed: int, epoch: int) -> None:
        """Makes samples a function of `seed`, `epoch` and their row; the Trainer calls it."""
        self._seed_and_epoch.copy_(torch.tensor([seed, epoch]))

    def seed_and_epoch(self) -> tuple[int, int]:
        """What `start_epoch` was called with last; -1 both before."""
        return tuple(self._seed_and_epoch.tolist())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int | tuple[int, int]]) -> list[dict[str, Any]]:
        """Samples of several rows; PyTorch's `DataLoader` calls this once for each batch. A row that is drawn several times in an epoch
        is a pair of its number and how often it was drawn before, so that its samples differ."""
        return self.draw(indices, *self.seed_and_epoch())

    def draw(self, indices: list[int | tuple[int, int]], run_seed: int, epoch: int) -> list[dict[str, Any]]:
        """Samples of several rows as a seed and an epoch draw them, whatever `start_epoch` was called with; an epoch of -1 draws from the
        generators as they are."""
        draws = [index[1] if isinstance(index, tuple) else 0 for index in indices]
        indices = [index[0] if isinstance(index, tuple) else index for index in indices]
        table = self.rows[indices]
        fetched, images = self.fetch(table, indices), table[self.image_column]
        samples = []
        with preserve_rng_state() if epoch >= 0 else nullcontext():
            for offset, index in enumerate(indices):
                value, seed = images[offset].as_py(), {}
                if epoch >= 0:
                    again = [draws[offset]] if draws[offset] else []
                    seed = {"seed": fold_in(run_seed, epoch, index, *again)}
                    seed_generators(seed["seed"])
                with self.reading(value, index):
                    sample = self.sample(EncodedImage.open(value), fetched, offset, index)
                samples.append({**sample, **seed})
        return samples

    def read_image(self, index: int) -> Image.Image:
        """The RGB image of a row, before any transform."""
        value = self.rows[index][self.image_column][0].as_py()
        with self.reading(value, index):
            return EncodedImage.open(value).decode()

    @contextmanager
    def reading(self, value: dict[str, Any] | None, index: int) -> Iterator[None]:
        """Raises a `SampleError` that names row and file for an image column's value that cannot be read, while it is opened and decoded."""
        if value is None:
            raise SampleError(f"Row {index} of the {self.name} data has no image.")
        try:
            yield
        except UndecodableError as error:
            raise SampleError(
                f"Row {index} of the {self.name} data{file_hint(value)}: the image cannot be decoded ({error})."
            ) from error

    def check_all_rows(
        self, find_problems: Callable[[pa.Table, int], list[tuple[int, str]]], decode: bool = False
    ) -> None:
        """Looks at every row: image files as `examine_image` does, and what `find_problems` looks at. Warns of damage with which an
        image can be read, and of images that other readers read in another way.

        Args:
            find_problems: Called with some rows and the number of the first; returns what is wrong with them: offsets and texts.
            decode: Decodes every image.

        Raises:
            ValueError: With the first problems found, each with its row.
        """
        problems, damaged, brightest = [], [], 0
        self.notes.clear()
        if decode and not libjpeg_reports_damage():
            logger.warning(
                "This build of torchvision says nothing of damage inside a JPEG: only what Pillow refuses is noticed."
            )
        starts = progress_bar(
            range(0, len(self), ROWS_PER_CHECK), desc=f"Checking the images ({self.name})", unit="batch"
        )
        for start, reports in zip(starts, self._examined(decode)):
            table = self.rows[start : start + ROWS_PER_CHECK]
            images = table[self.image_column]
            row_problems = find_problems(table, start)
            for offset, report in enumerate(reports):
                self.notes.update(report.notes)
                brightest = max(brightest, report.brightest or 0)
                if report.problem:
                    row_problems.append((offset, report.problem))
                elif report.damage:
                    damaged.append(f"row {start + offset}{file_hint(images[offset].as_py())}: {report.damage}")
            for offset, text in sorted(row_problems):
                problems.append(f"row {start + offset}{file_hint(images[offset].as_py())}: {text}")
            if len(problems) >= MAX_REPORTED_PROBLEMS:
                problems[MAX_REPORTED_PROBLEMS:] = ["... (the check stopped here)"]
                break
        if problems:
            raise ValueError(f"The {self.name} data has rows that cannot be used:\n  " + "\n  ".join(problems))
        self._warn(damaged, brightest)

    def _examined(self, decode: bool) -> Iterator[list[ImageReport]]:
        """Reports of all images, `ROWS_PER_CHECK` at a time."""
        blocks = _ExaminedBlocks(self.rows, self.image_column, decode, self.pixel_limit)
        # libjpeg is listened to in processes of their own
        number = min(num_cpu_cores(), len(blocks)) if decode or len(self) > FEW_IMAGES else 0
        starts_fast = number and "fork" in multiprocessing.get_all_start_methods()
        yield from torch.utils.data.DataLoader(
            blocks,
            batch_size=None,
            num_workers=number,
            multiprocessing_context="fork" if starts_fast else None,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # the run's own draws stay as they are
        )

    def _warn(self, damaged: list[str], brightest: int) -> None:
        if damaged:
            listed = damaged[:MAX_REPORTED_PROBLEMS]
            listed += [f"... and {len(damaged) - len(listed)} more"] if len(damaged) > len(listed) else []
            logger.warning(
                "libjpeg reports damage (%d of %d %s images). They can be read, but parts of them may show something else: replace "
                "them, or leave them out.\n  %s",
                len(damaged), len(self), self.name, "\n  ".join(listed),
            )  # fmt: skip
        for text in self.differences():
            logger.warning("%s.", text)
        if 0 < brightest <= MAX_VALUE // 2:
            logger.warning(
                "The largest value of the %s images with 16-bit grayscale is %d of %d: as 8-bit images they are nearly black. Save them "
                "with 8 bits, scaled to 0 to 255.",
                self.name, brightest, MAX_VALUE,
            )  # fmt: skip
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            logger.warning("Pillow's LOAD_TRUNCATED_IMAGES is set: what files lack becomes gray, without a message.")

    def differences(self) -> list[str]:
        """How other readers would read some of the images, each with their number; after `check_all_rows`."""
        counts = {note: f"{self.notes[note]:,} of {len(self):,} {self.name} images" for note in OTHER_READERS}
        return [text.format(counts[note]) for note, text in OTHER_READERS.items() if self.notes[note]]


class _ExaminedBlocks(torch.utils.data.Dataset):
    """Reports of `ROWS_PER_CHECK` images each."""

    def __init__(self, rows: datasets.Dataset, image_column: str, decode: bool, pixel_limit: PixelLimit):
        self.rows, self.decode, self.pixel_limit = rows.select_columns(image_column), decode, pixel_limit
        self.image_column = image_column

    def __len__(self) -> int:
        return -(-len(self.rows) // ROWS_PER_CHECK)

    def __getitem__(self, block: int) -> list[ImageReport]:
        images = self.rows[block * ROWS_PER_CHECK : (block + 1) * ROWS_PER_CHECK][self.image_column]
        return [examine_image(image, self.decode) for image in images]


def read_image_sizes(rows: datasets.Dataset, column: str, count: int = SAMPLED_IMAGES) -> np.ndarray:
    """Heights and widths in pixels of up to `count` images, spread evenly over the rows, by the headers of their files, int64 `(n, 2)`.
    Files that are no images are left out: `check_all_rows` names them."""
    picked = np.unique(np.linspace(0, len(rows) - 1, count).astype(np.int64)).tolist()
    sizes = []
    for value in rows.select_columns(column).with_format("arrow")[picked][column]:
        with suppress(*IMAGE_ERRORS), pillow_errors():
            sizes.append(upright_size(Image.open(io.BytesIO(read_content(value.as_py())))))
    return np.array(sizes, dtype=np.int64).reshape(-1, 2)


def check_has_columns(dataset: datasets.Dataset, columns: list[str], name: str) -> None:
    """Raises a `ValueError` if the rows, which messages call by `name`, lack a column."""
    if missing := [column for column in columns if column not in dataset.column_names]:
        raise ValueError(
            f"The {name} data has no column {', '.join(map(repr, missing))}; it has {dataset.column_names}."
        )


def with_image_column(dataset: datasets.Dataset, column: str) -> datasets.Dataset:
    """Rows whose column, if it is there, is one of images (plain paths are made so)."""
    if column not in dataset.column_names or isinstance(dataset.features[column], datasets.Image):
        return dataset
    return dataset.cast_column(column, datasets.Image())


def file_hint(value: dict[str, Any] | None) -> str:
    """The path of an image column's value in brackets, where it has one."""
    return f" ({value['path']})" if value and value.get("path") else ""
