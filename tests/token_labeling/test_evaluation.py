"""Evaluations: each image counts once, however many processes share them."""

import json

import pytest

from support.programs import ROOT, run


def evaluations(folder, num_processes: int) -> dict[str, dict[str, float]]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    program = str(ROOT / "tests" / "support" / "several_evaluations.py")
    result = run([*launch, program, str(folder), str(num_processes)], folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / f"{num_processes}.json").read_text())


@pytest.mark.slow
def test_every_number_of_processes_measures_what_one_does(tmp_path):
    """Also where the last batch is filled up, and with fewer images than processes; losses, scores, predictions, raw weights."""
    one = evaluations(tmp_path, 1)
    assert {"eval_loss", "eval_raw_accuracy", "test_loss", "predictions"} <= one["37 by 8"].keys()
    for number in (2, 3):
        for name, figures in evaluations(tmp_path, number).items():
            assert figures == pytest.approx(one[name], rel=1e-5, abs=1e-7, nan_ok=True), (number, name)
