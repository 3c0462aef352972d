"""What a former version left unfinished is gone on with by this one, with the same result: see `record_checkpoints.py`.

Losses agree within 1e-5 of themselves, and the norm of the final weights (of the average, where a run has one) within 1e-6: equal bits are
promised with equal versions of the libraries, and on equal processors, only.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from support.old_checkpoints import (
    FINISHED,
    KINDS,
    LABEL_SET,
    SHARDS,
    STEPS,
    STOP,
    annotate_images,
    go_on,
    record,
    stored_maps,
)
from support.recorded_runs import run_folder, weight_norm


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_with_the_same_losses(kind, tmp_path):
    with run_folder(tmp_path):
        losses = go_on(kind)
        norm = weight_norm(Path("run/model.safetensors"))
    expected = record(kind)
    assert len(losses) == STEPS - STOP  # it did not start over
    assert losses == pytest.approx(expected["losses"], rel=1e-5)
    assert norm == pytest.approx(expected["weight_norm"], rel=1e-6)


def test_half_a_label_set_is_completed(tmp_path):
    with run_folder(tmp_path):
        shutil.copytree(LABEL_SET / "set", "set")
        annotate_images("set")
        annotate_images("whole")  # by this version alone
        ids, scores = stored_maps("set")
    shards = [f"train-{number:05d}.parquet" for number in range(SHARDS)]
    for number, shard in enumerate(shards):
        source = LABEL_SET / "set" if number < FINISHED else tmp_path / "whole"
        assert (tmp_path / "set" / "data" / shard).read_bytes() == (source / "data" / shard).read_bytes(), shard
    expected = np.load(LABEL_SET / "maps.npz")
    np.testing.assert_allclose(scores, expected["scores"], atol=2e-3, rtol=2e-3)  # float16
    assert (ids == expected["ids"]).mean() > 0.99  # scores that are almost equal may come in another order


def test_checkpoints_are_small_and_hold_no_path_of_a_machine():
    files = [path for path in LABEL_SET.parent.rglob("*") if path.is_file() and path.suffix != ".py"]
    sizes = {
        kind: sum(path.stat().st_size for path in files if kind in path.parts) for kind in (*KINDS, LABEL_SET.name)
    }
    assert all(0 < size < 2e6 for size in sizes.values()), sizes
    assert [
        path for path in files if any(part in path.read_bytes() for part in (b"/root/", b"/home/", b"/tmp/"))
    ] == []
