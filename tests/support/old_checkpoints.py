"""Checkpoints of former versions, `tests/old_checkpoints`, and how they are gone on with."""

import json
import shutil
from contextlib import nullcontext, suppress
from pathlib import Path
from unittest import mock

import numpy as np

from modeling_lvvit.annotators import annotate
from modeling_lvvit.labels.label_set import LabelSet
from modeling_lvvit.labels.reader import LabelMapReader
from modeling_lvvit.labels.writer import LabelSetWriter
from support.recorded_runs import RUNS


FOLDER = Path(__file__).parents[1] / "old_checkpoints"
STEPS, STOP = 14, 7  # of three an epoch: within the third
# kind -> run and its further options
KINDS = {
    "training": ("dense labels, weight average", "--ema_decay", "0.9"),
    "stream": ("plain labels", "--ema_decay", "0.9", "--streaming", "true", "--shuffle_buffer", "7"),
    "segmentation": ("segmentation", "--batch_norm", "local"),
    "vit": ("patch head on a ViT",),
}
LABEL_SET, SHARDS, FINISHED = FOLDER / "label_set", 6, 3
ANNOTATION = f"--dataset data --annotator annotator --top_k 3 --rows_per_shard {24 // SHARDS} --num_workers 0".split()


def train(kind: str, *more: str) -> list[float]:
    """Trains in the folder `run` of the present one, with a checkpoint at step `STOP`; the losses of the steps that are made."""
    name, *options = KINDS[kind]
    saving = [
        "--save_strategy",
        "steps",
        "--save_steps",
        str(STOP),
        "--save_total_limit",
        "2",
        "--max_steps",
        str(STEPS),
    ]
    return RUNS[name].losses(*options, *saving, *more)


def go_on(kind: str) -> list[float]:
    """Goes on with a stored checkpoint, in the folder `run` of the present one; the losses of the steps that are made."""
    shutil.copytree(FOLDER / kind / f"checkpoint-{STOP}", Path("run") / f"checkpoint-{STOP}")
    return train(kind, "--resume_from_checkpoint", "last")


def annotate_images(folder: str, shards: int = SHARDS) -> None:
    """Writes a label set, or goes on with it; stopped after so many shards."""
    write = LabelSetWriter.write

    def stopped(self, shard: int, table) -> None:
        if shard >= shards:
            raise KeyboardInterrupt
        write(self, shard, table)

    ends = suppress(KeyboardInterrupt, SystemExit) if shards < SHARDS else nullcontext()
    with mock.patch.object(LabelSetWriter, "write", stopped), ends:
        annotate.main([*ANNOTATION, "--output_dir", folder])


def stored_maps(folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Class ids and scores `(24, 3, rows, columns)` of a finished label set."""
    rows = LabelSet.open(folder, "train").rows
    maps = LabelMapReader(rows).fetch(list(range(len(rows))))
    return np.asarray(maps.ids), np.asarray(maps.scores)


def record(kind: str) -> dict:
    """What is recorded of a kind."""
    return json.loads((FOLDER / kind / "record.json").read_text(encoding="utf-8"))
