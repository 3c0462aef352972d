"""What all views of a `datasets.Dataset` with images share: rows read in batches, randomness that belongs to a row, and the check
of all rows before training."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import datasets
import pyarrow as pa
import torch
from PIL import Image
from tqdm.auto import tqdm

from .images import IMAGE_ERRORS, SampleError, decode_image, find_image_problem
from .sampling import fold_in, preserve_rng_state, seed_generators


MAX_REPORTED_PROBLEMS = 10
ROWS_PER_CHECK = 512


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
        self.rows = dataset.select_columns(columns).with_format("arrow")
        # shared, so that workers that outlive an epoch see it change
        self._seed_and_epoch = torch.full((2,), -1, dtype=torch.int64).share_memory_()

    def fetch(self, table: pa.Table, indices: list[int]) -> Any:
        """What besides the images belongs to some rows, which `table` holds."""
        raise NotImplementedError

    def sample(self, image: Image.Image, fetched: Any, offset: int, index: int) -> dict[str, Any]:
        """The sample of row `index`, which is number `offset` of those that `fetched` is about."""
        raise NotImplementedError

    def start_epoch(self, seed: int, epoch: int) -> None:
        """Makes samples a function of `seed`, `epoch` and their row; the Trainer calls it."""
        self._seed_and_epoch.copy_(torch.tensor([seed, epoch]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Samples of several rows; PyTorch's `DataLoader` calls this once for each batch."""
        table = self.rows[indices]
        fetched, images = self.fetch(table, indices), table[self.image_column]
        run_seed, epoch = self._seed_and_epoch.tolist()
        samples = []
        with preserve_rng_state() if epoch >= 0 else nullcontext():
            for offset, index in enumerate(indices):
                image = self.decode(images[offset].as_py(), index)
                seed = {}
                if epoch >= 0:
                    seed = {"seed": fold_in(run_seed, epoch, index)}
                    seed_generators(seed["seed"])
                samples.append({**self.sample(image, fetched, offset, index), **seed})
        return samples

    def read_image(self, index: int) -> Image.Image:
        """The RGB image of a row, before any transform."""
        return self.decode(self.rows[index][self.image_column][0].as_py(), index)

    def decode(self, value: dict[str, Any] | None, index: int) -> Image.Image:
        """The RGB image of an image column's value; raises a `SampleError` that names row and file if it cannot be read."""
        if value is None:
            raise SampleError(f"Row {index} of the {self.name} data has no image.")
        try:
            return decode_image(value)
        except IMAGE_ERRORS as error:
            raise SampleError(
                f"Row {index} of the {self.name} data{file_hint(value)}: the image cannot be decoded ({error})."
            ) from error

    def check_all_rows(self, find_problems: Callable[[pa.Table, int], list[tuple[int, str]]]) -> None:
        """Looks at every row: image files for being there and whole, and what `find_problems` looks at.

        Image files are opened and checked for their end (JPEG) or their checksums (PNG); only other formats and doubtful
        files are decoded.

        Args:
            find_problems: Called with some rows and the number of the first; returns what is wrong with them: offsets and texts.

        Raises:
            ValueError: With the first problems found, each with its row.
        """
        problems: list[str] = []
        for start in tqdm(range(0, len(self), ROWS_PER_CHECK), desc=f"Checking {self.name} data", unit="batch"):
            table = self.rows[start : start + ROWS_PER_CHECK]
            images = table[self.image_column]
            row_problems = find_problems(table, start)
            row_problems += [(offset, text) for offset, text in enumerate(map(find_image_problem, images)) if text]
            for offset, text in sorted(row_problems):
                problems.append(f"row {start + offset}{file_hint(images[offset].as_py())}: {text}")
            if len(problems) >= MAX_REPORTED_PROBLEMS:
                problems[MAX_REPORTED_PROBLEMS:] = ["... (the check stopped here)"]
                break
        if problems:
            raise ValueError(f"The {self.name} data has rows that cannot be used:\n  " + "\n  ".join(problems))


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
