"""Losses of 20 steps of six recipes, made small, that no change may move unnoticed.

One thread: with two, sums are added up in another order, which moves some losses by 4e-5. From the same weights they agree within 1e-5 over the
oldest and newest versions that `setup.py` allows, and over kernels for AVX-512, AVX2 and none of them. `record_losses.py` records them anew.
"""

import json

import pytest

from support.recorded_runs import GOLDEN, RUNS, run_folder, versions


RECORD = json.loads((GOLDEN / "losses.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_the_recorded_ones(name, tmp_path):
    with run_folder(tmp_path):
        losses = RUNS[name].losses()
    expected = RECORD["losses"][name]
    assert len(losses) == len(expected) == 20
    others = {library: (was, versions()[library]) for library, was in RECORD["versions"].items() if was != versions()[library]}  # fmt: skip
    assert losses == pytest.approx(expected, rel=1e-5), f"versions then and now: {others or 'the same'}"
