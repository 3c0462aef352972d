"""The study: its statistics, its plan, and how its runs are begun, continued and read."""

import json
import math
import sys
import textwrap

import pytest

from modeling_lvvit.study import runs as study_runs
from modeling_lvvit.study.__main__ import main
from modeling_lvvit.study.arms import ARMS, Arm, parse_arm
from modeling_lvvit.study.intervals import estimate, paired_difference
from modeling_lvvit.study.report import ArmResults, study_table
from modeling_lvvit.study.runs import Run, RunError, run_all


# stands for train_tl.py: notes that it was called, and leaves what a run leaves
STAND_IN = """
import json, pathlib, sys
words = sys.argv[1:]
folder = pathlib.Path(words[words.index("--output_dir") + 1])
seed = int(words[words.index("--seed") + 1])
with (folder / "calls").open("a") as calls:
    calls.write(" ".join(words) + "\\n")
if "--fail" in words:
    sys.exit("no such data")
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
    assert "9 runs, 2 at a time, of train_tl.py study" in printed
    assert "| plain labels | 3 | 71.0 ± 2.5 | 70.0 to 72.0 | +6.0 ± 2.5 | 2 | 1.0 |" in printed
    record = json.loads((stand_in / "study.json").read_text())
    assert record["arms"][0]["values"] == {"0": 0.75, "1": 0.77, "2": 0.79}
    assert (stand_in / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "--label_crop authors --seed 1" in calls_of(stand_in / "authors_crop" / "seed_1")[0]
    main([*arguments, "--arms", "token_labels", "half=--dense_weight 0.5"])  # finished runs are not made again
    assert len(calls_of(stand_in / "token_labels" / "seed_0")) == 1
    assert "| half |" in (stand_in / "study.md").read_text()


def test_runs_of_other_options_are_not_mistaken(stand_in):
    arguments = ["--output_dir", str(stand_in), "--seeds", "0", "--arms", "token_labels"]
    main(arguments)
    with pytest.raises(SystemExit, match=r"seed_0 holds a run with study, wanted: study --num_train_epochs 3"):
        main([*arguments, "--num_train_epochs", "3"])


def test_failed_run_ends_the_study_with_its_log(stand_in, tmp_path):
    run = Run(Arm("broken", "broken", ("--fail",)), 0, stand_in / "broken", ())
    with pytest.raises(RunError, match=r"(?s)arm broken, seed 0 ended with status 1.*no such data"):
        list(run_all([run], 1))
    assert not run.is_finished()


def test_stopped_run_goes_on_from_its_checkpoint(stand_in):
    run = Run(ARMS["plain_labels"], 0, stand_in / "run", ())
    (run.folder / "checkpoint-5").mkdir(parents=True)
    (run.folder / "checkpoint-5" / "trainer_state.json").touch()
    list(run_all([run], 1, launcher=[sys.executable]))
    assert "--resume_from_checkpoint last" in calls_of(run.folder)[0]
    assert run.is_finished()


def test_arm_of_token_labels_without_any_is_an_error(stand_in):
    run = Run(Arm("dense", "dense", ("--use_token_labels", "false"), needs_token_labels=True), 0, stand_in / "run", ())
    with pytest.raises(RunError, match="the data has no dense labels"):
        list(run_all([run], 1))


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
    shared += ["--image_size", "32", "--max_steps", "2", "--per_device_train_batch_size", "4", "--logging_steps", "1"]
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
