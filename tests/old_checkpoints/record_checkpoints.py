"""Makes the checkpoints of `test_old_checkpoints.py` with an older version of this package, and lets that one go on with them.

    git worktree add ../older COMMIT
    PYTHONPATH=../older:tests python tests/old_checkpoints/record_checkpoints.py

About half a minute. Made once with a version that people have checkpoints of; never made again with a newer one.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from support.old_checkpoints import (
    FINISHED,
    FOLDER,
    KINDS,
    LABEL_SET,
    STOP,
    annotate_images,
    go_on,
    stored_maps,
    train,
)
from support.recorded_runs import run_folder, versions, weight_norm


LEFT_OUT = shutil.ignore_patterns("*.py", ".lock")  # copies of the code are read by no one who goes on


def record_training(kind: str) -> None:
    """Stores the checkpoint, the losses of the steps after it and the norm of the final weights."""
    with tempfile.TemporaryDirectory() as folder, run_folder(Path(folder)):
        losses = train(kind)
        target = FOLDER / kind / f"checkpoint-{STOP}"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(Path("run") / target.name, target, ignore=LEFT_OUT)
        shutil.rmtree("run")
        continued = go_on(kind)
        assert continued == losses[STOP:], (continued, losses)
        found = {
            "losses": continued,
            "weight_norm": weight_norm(Path("run/model.safetensors")),
            "versions": versions(),
        }
    (FOLDER / kind / "record.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def record_label_set() -> None:
    """Stores a label set of which a part is there, and the maps of the whole one."""
    with tempfile.TemporaryDirectory() as folder, run_folder(Path(folder)):
        annotate_images("whole")
        annotate_images("part", FINISHED)
        shutil.rmtree(LABEL_SET / "set", ignore_errors=True)
        shutil.copytree("part", LABEL_SET / "set", ignore=LEFT_OUT)
        ids, scores = stored_maps("whole")
        np.savez_compressed(LABEL_SET / "maps.npz", ids=ids, scores=scores)


def main() -> None:
    """Records every kind."""
    record_label_set()
    for kind in KINDS:
        record_training(kind)


if __name__ == "__main__":
    main()
