"""The study: its statistics, its plan, and how its runs are begun, continued and read."""

import json
import math
import subprocess
import sys
import textwrap
import time

import psutil
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

from modeling_lvvit.cli import digit_scenes
from modeling_lvvit.study import runs as study_runs
from modeling_lvvit.study.__main__ import main
from modeling_lvvit.study.arms import ARMS, Arm, parse_arm
from modeling_lvvit.study.confidence_intervals import estimate, paired_difference
from modeling_lvvit.study.report import ArmResults, draw_curves, seed_table, study_table, verdict
from modeling_lvvit.study.runs import Run, RunError, Runner


# stands for lvvit train: notes that it was called, and leaves what a run leaves
STAND_IN = """
import json, pathlib, sys
words = sys.argv[1:]
folder = pathlib.Path(words[words.index("--output_dir") + 1])
seed = int(words[words.index("--seed") + 1])
with (folder / "calls").open("a") as calls:
    calls.write(" ".join(words) + "\\n")
if "0.25" in words:
    sys.exit("no such data")
if "0.75" in words:
    import time
    time.sleep(60)
is_plain = "--use_token_labels" in words
history = [{"step": 1, "epoch": 0.5, "loss": 1.0, **({} if is_plain else {"token_loss": 1.0})}]
for step in (1, 2):
    value = 0.5 + 0.1 * step + 0.01 * seed * (1 if is_plain else 2) + (0 if is_plain else 0.05)
    history.append({"step": step, "epoch": step / 2, "eval_accuracy": value})
history.append({"step": 2, "epoch": 1.0, "train_runtime": 60.0})
(folder / "trainer_state.json").write_text(json.dumps({"global_step": 2, "log_history": history}))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    program = tmp_path / "stand_in.py"
    program.write_text(textwrap.dedent(STAND_IN))
    monkeypatch.setattr(study_runs, "PROGRAM", program)
    monkeypatch.setattr(digit_scenes, "build_or_reuse", lambda: None)
    return tmp_path / "study"


def calls_of(folder) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def test_interval_by_hand():
    """Student's t for two degrees of freedom is 4.303."""
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.half_width == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    assert math.isnan(estimate([1.0]).half_width)
    assert estimate([2.0, 2.0]).half_width == 0


def test_difference_is_that_of_the_pairs():
    """Seeds differ by 10, arms by 1: the pairs see it."""
    found = paired_difference([11.0, 21.0, 31.5], [10.0, 20.0, 30.0])
    assert found.mean == pytest.approx(3.5 / 3) and found.half_width < 1


def results_of(arm: Arm, finals: dict[int, float], steps: int = 8) -> ArmResults:
    return ArmResults(
        arm,
        finals,
        {seed: ([1.0], [value]) for seed, value in finals.items()},
        dict.fromkeys(finals, steps),
        dict.fromkeys(finals, 90.0),
    )


def test_table_has_gain_of_the_first_arm():
    first = results_of(ARMS["token_labels"], {0: 0.8, 1: 0.9})
    plain = results_of(ARMS["plain_labels"], {1: 0.8, 0: 0.7})
    lines = study_table([first, plain], "eval_accuracy").splitlines()
    assert lines[0].startswith("| arm | seeds | top-1 |") and len(lines) == 4
    assert lines[3].startswith("| plain labels | 2 | 75.0 ± 63.5 | 70.0 to 80.0 | +10.0 ± 0.0 | 8 | 1.5 |")


def test_table_says_when_budgets_differ():
    unequal = [
        results_of(arm, {0: 0.5}, steps) for arm, steps in ((ARMS["token_labels"], 8), (ARMS["plain_labels"], 9))
    ]
    assert "**The budgets differ**" in study_table(unequal, "eval_accuracy")


def test_values_by_seed_and_what_they_say():
    """Pairs differ by 0.3, 0.2 and 0.4: their mean is 30 points, its interval 4.303 * 10 / sqrt(3) = 24.8 points."""
    first = results_of(ARMS["token_labels"], {2: 0.9, 0: 0.8, 1: 0.6})
    plain = results_of(ARMS["plain_labels"], {0: 0.5, 1: 0.4, 2: 0.5})
    lines = seed_table([first, plain], "eval_accuracy").splitlines()
    assert lines[0] == "| top-1 (%) | seed 0 | seed 1 | seed 2 | mean, 95 % interval |"
    assert lines[2].startswith("| token labels | 80.0 | 60.0 | 90.0 | 76.7 ± ")
    assert lines[4] == "| token labels minus plain labels | +30.0 | +20.0 | +40.0 | +30.0 ± 24.8 |"
    text = verdict([first, plain], "eval_accuracy")
    assert text.startswith("With token labels top-1 is 30.0 points higher than with plain labels")
    assert "3 pairs of runs: +5.2 to +54.8" in text and text.endswith("more than chance.")
    first.finals[1] = 0.3  # then the pairs differ by 0.3, -0.1 and 0.4
    assert verdict([first, plain], "eval_accuracy").endswith("the interval includes 0.")
    assert "10.0 points lower" in verdict(
        [results_of(first.arm, {0: 0.5}), results_of(plain.arm, {0: 0.6})], "eval_accuracy"
    )


def test_runs_that_were_evaluated_once_are_points():
    axis = Figure().subplots()
    draw_curves(axis, [results_of(ARMS["token_labels"], {0: 0.5, 1: 0.9})], 100)
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines if len(line.get_xdata())]
    assert points == [(1.0, 50.0), (1.0, 90.0), (1.0, 70.0)]
    assert all(line.get_marker() in (".", "o") for line in axis.lines)


def test_own_arms():
    assert parse_arm("half=--dense_weight 0.5") == Arm("half", "half", ("--dense_weight", "0.5"))
    for text, message in (
        ("all", "Unknown arm 'all'"),
        ("a/b=--dense_weight 0.5", "letters, digits"),
        ("half=--seed 3", "--seed is set by the study"),
        ("half=--output_dir=x", "--output_dir is set by the study"),
        ("half=--a 'b", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_arm(text)


def test_study_from_runs_to_report(stand_in, capsys):
    arguments = ["--output_dir", str(stand_in), "--seeds", "0", "1", "2", "--jobs", "2"]
    main(arguments)
    printed = capsys.readouterr().out
    assert "9 runs, 2 at a time, of lvvit train study" in printed
    assert "| plain labels | 3 | 71.0 ± 2.5 | 70.0 to 72.0 | +6.0 ± 2.5 | 2 | 0.0 |" in printed
    record = json.loads((stand_in / "study.json").read_text())
    assert record["arms"][0]["values"] == {"0": 0.75, "1": 0.77, "2": 0.79}
    assert (stand_in / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (
        "--label_crop authors --require_token_labels true --seed 1"
        in calls_of(stand_in / "authors_crop" / "seed_1")[0]
    )
    main([*arguments, "--arms", "token_labels", "half=--dense_weight 0.5"])  # finished runs are not made again
    assert len(calls_of(stand_in / "token_labels" / "seed_0")) == 1
    assert "| half |" in (stand_in / "study.md").read_text()


def test_quick_study_says_how_long_it_takes_and_what_labels_are_worth(stand_in, capsys):
    main(["--quick", "--output_dir", str(stand_in), "--seeds", "1", "3", "--jobs", "2"])
    printed = capsys.readouterr().out
    assert "4 runs, 2 at a time, of lvvit train quick_study" in printed
    assert torch.accelerator.is_available() or "minutes on 2 CPU cores" in printed
    assert "| token labels minus plain labels | +6.0 | +8.0 | +7.0 ± 12.7 |" in printed
    assert "With token labels top-1 is 7.0 points higher" in printed
    written = (stand_in / "study.md").read_text()
    assert "| plain labels | 2 | 72.0 ± 12.7 |" in written and "With token labels" in written
    with pytest.raises(SystemExit, match="has data of its own"):
        main(["--quick", "--output_dir", str(stand_in), "--dataset_name", "images"])


def test_runs_of_other_options_are_not_mistaken(stand_in, tmp_path):
    arguments = ["--output_dir", str(stand_in), "--seeds", "0", "--arms", "token_labels"]
    recipe = tmp_path / "own.yaml"
    recipe.write_text("base: study\nnum_train_epochs: 2\n")
    main([str(recipe), *arguments])
    recipe.write_text("num_train_epochs: 2\nbase: study\nseed: 0\n")  # the same
    main([str(recipe), *arguments])
    assert len(calls_of(stand_in / "token_labels" / "seed_0")) == 1
    recipe.write_text("base: study\nnum_train_epochs: 3\n")
    with pytest.raises(SystemExit, match=r"a run with other options \(num_train_epochs 2.0, now 3.0\)"):
        main([str(recipe), *arguments])


def test_stopped_run_does_not_go_on_with_other_options(stand_in):
    arguments = ["--output_dir", str(stand_in), "--seeds", "0", "--arms"]
    with pytest.raises(SystemExit, match="ended with status 1"):
        main([*arguments, "half=--dense_weight 0.25"])
    assert not json.loads((stand_in / "half" / "seed_0" / "study_run.json").read_text())["is_finished"]
    with pytest.raises(SystemExit, match=r"dense_weight 0.25, now 0.5"):
        main([*arguments, "half=--dense_weight 0.5"])


def test_foreign_folders_and_broken_records_are_left_alone(stand_in):
    folder = stand_in / "token_labels" / "seed_0"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").touch()
    arguments = ["--output_dir", str(stand_in), "--seeds", "0", "--arms", "token_labels"]
    with pytest.raises(SystemExit, match="holds something that is no run of a study"):
        main(arguments)
    (folder / "study_run.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"study_run.json cannot be read"):
        main(arguments)


def test_failed_run_ends_the_study_with_its_log_and_those_beside_it(stand_in):
    broken, slow, later = (
        Run(Arm(name, name, ("--dense_weight", weight)), 0, stand_in / name, ("study",))
        for name, weight in (("broken", "0.25"), ("slow", "0.75"), ("later", "0.5"))
    )
    begin = time.monotonic()
    with pytest.raises(RunError, match=r"(?s)arm broken, seed 0 ended with status 1.*no such data"):
        list(Runner(2).run_all([slow, broken, later]))
    assert time.monotonic() - begin < 30
    assert not any(run.is_finished() for run in (broken, slow, later))
    assert not later.folder.exists()


def test_sigterm_ends_the_runs_too(stand_in):
    code = "import sys; from pathlib import Path; from modeling_lvvit.study import runs, __main__ as study\n"
    code += "study.digit_scenes.build_or_reuse = lambda: None\n"
    code += "runs.PROGRAM = Path(sys.argv[1]); study.main(sys.argv[2:])"
    arguments = ["--output_dir", str(stand_in), "--seeds", "0", "--arms", "slow=--dense_weight 0.75"]
    study = subprocess.Popen(
        [sys.executable, "-c", code, str(study_runs.PROGRAM), *arguments], stderr=subprocess.PIPE, text=True
    )
    calls = stand_in / "slow" / "seed_0" / "calls"
    while not calls.exists() and study.poll() is None:
        time.sleep(0.1)
    (child,) = psutil.Process(study.pid).children()
    with pytest.raises(SystemExit, match="Another run is writing to .*study: process"):
        main(arguments)
    study.terminate()
    assert "the same command goes on from here" in study.communicate(timeout=30)[1]
    assert study.returncode == 143 and not child.is_running()


def test_stopped_run_goes_on_from_its_checkpoint(stand_in):
    run = Run(ARMS["plain_labels"], 0, stand_in / "run", ("study",))
    (run.folder / "checkpoint-5").mkdir(parents=True)  # that was being written
    (run.folder / "study_run.json").write_text(json.dumps({"settings": run.settings, "seconds": 7.0}))
    assert study_runs._continuation(run) == ["--overwrite_output_dir", "true"]
    (run.folder / "checkpoint-5" / "trainer_state.json").write_text("{}")
    torch.save({}, run.folder / "checkpoint-5" / "scheduler.pt")
    save_file({"weight": torch.zeros(1)}, run.folder / "checkpoint-5" / "model.safetensors")
    list(Runner(1).run_all([run]))
    assert "--resume_from_checkpoint last" in calls_of(run.folder)[0]
    assert run.is_finished() and run.read_record()["seconds"] > 7


def test_losses_are_no_percentages():
    found = [results_of(ARMS["token_labels"], {0: 1.5, 1: 1.7}), results_of(ARMS["plain_labels"], {0: 2.0, 1: 2.2})]
    lines = study_table(found, "eval_loss").splitlines()
    assert "difference of token labels" in lines[0]
    assert lines[3].startswith("| plain labels | 2 | 2.1000 ± 1.2706 | 2.0000 to 2.2000 | -0.5000 ± 0.0000 |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_train_epoch", "3"], "num_train_epoch"),
        (["no_recipe"], "no recipe file"),
        (["--seeds", "1", "1"], "names something twice"),
        (["--jobs", "0"], "at least 1"),
        (["--seed", "1"], "set by the study"),
        (["--arms", "x"], "Unknown arm"),
        (["--arms", "a=--dense_weigth 2"], "dense_weigth"),
        (["--arms", "token_labels=--dense_weight 2"], "has already"),
        (["--resume-from-checkpoint", "last"], "set by the study"),
        (["--variant", "lvvit_t_224"], "has a model of its own"),
        (["--annotator", "MODEL"], "label_crop changes nothing"),
    ],
)
def test_wrong_studies_end_before_anything_runs(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main(["--output_dir", str(tmp_path / "study"), *arguments])
    assert not (tmp_path / "study").exists()


def test_unknown_metric_is_named(stand_in):
    with pytest.raises(SystemExit, match="has no metric eval_f1; it has eval_accuracy"):
        main(["--output_dir", str(stand_in), "--seeds", "0", "--metric", "eval_f1"])


@pytest.mark.slow
def test_study_of_real_runs(labelled_rows, tmp_path, capsys):
    labelled_rows.to_parquet(tmp_path / "train.parquet")
    model = '{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 8}'
    shared = [
        "--dataset_name",
        str(tmp_path / "train.parquet"),
        "--variant",
        "lvvit_t_224",
        "--config_overrides",
        model,
    ]
    shared += ["--image_size", "32", "--max_steps", "2", "--per_device_train_batch_size", "4"]
    main(
        [
            *shared,
            "--report_to",
            "none",
            "--save_strategy",
            "no",
            "--seeds",
            "0",
            "1",
            "--output_dir",
            str(tmp_path / "study"),
        ]
    )
    printed = capsys.readouterr().out
    assert printed.count("| 2 |") >= 3 and "token labels, authors' crop" in printed
    plain = labelled_rows.remove_columns(["token_label_ids", "token_label_scores"])
    plain.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(SystemExit, match="--require_token_labels: the data has no dense labels"):
        main(
            [
                *shared,
                "--report_to",
                "none",
                "--seeds",
                "0",
                "--arms",
                "token_labels",
                "--output_dir",
                str(tmp_path / "plain"),
            ]
        )
