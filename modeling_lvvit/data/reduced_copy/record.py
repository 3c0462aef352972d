"""What a reduced copy says of itself: its splits, their files, and the images that they were made of."""

import json
from pathlib import Path

from ..files.shard_folder import DATA


RECORD = "reduced_copy.json"
SOURCE_HASH = "source_hash"  # column with the `content_hash` of the image file that a row was made of


def shard_name(split: str, shard: int, num_shards: int) -> str:
    """Name of a file; the `datasets` library knows splits by such names too."""
    return f"{split}-{shard:05d}-of-{num_shards:05d}.parquet"


def count_shards(num_rows: int, rows_per_shard: int) -> int:
    """Number of files of a split."""
    return -(-num_rows // rows_per_shard)


def copied_files(folder: Path) -> dict[str, list[str]] | None:
    """Split -> Parquet files of a reduced copy, in the order of its source; `None` if the folder is none.

    Raises:
        ValueError: If it is unfinished or damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        counts = {
            split: count_shards(about["num_rows"], about["rows_per_shard"])
            for split, about in record["settings"]["splits"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Make the copy again: lvvit cache.") from error
    if "report" not in record:
        raise ValueError(f"The reduced copy in {folder} is not finished. Start the program that writes it again.")
    files = {
        split: [folder / DATA / shard_name(split, shard, number) for shard in range(number)]
        for split, number in counts.items()
    }
    if missing := [file for paths in files.values() for file in paths if not file.is_file()]:
        raise ValueError(
            f"The reduced copy in {folder} lacks {len(missing)} files, first {missing[0].name}. Start the program that writes it again."
        )
    return {split: [str(file) for file in paths] for split, paths in files.items()}
