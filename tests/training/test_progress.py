"""What a training run says of itself."""

import platform
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState

from modeling_lvvit import console
from modeling_lvvit.data import loaders
from modeling_lvvit.token_labeling import ImageProcessorTransform, TokenLabelDataset
from modeling_lvvit.training.progress import (
    PredictionFigure,
    describe_outputs,
    estimate,
    modification_times,
    run_progress,
)
from modeling_lvvit.training.progress.estimate import RunClock, describe_shorter_run, describe_waiting
from modeling_lvvit.training.progress.evaluations import EvaluationTable
from modeling_lvvit.training.throughput import Throughput
from support.trainers import image_processor, trainer_for, trainer_of


def as_pairs(line: str) -> dict[str, str]:
    words = line.split()
    return dict(zip(words[::2], words[1::2], strict=True))


def state_at(step: int, **fields) -> TrainerState:
    return TrainerState(global_step=step, max_steps=100, is_world_process_zero=True, **fields)


def test_lines_without_a_terminal(tiny_model, labelled_rows, tmp_path, capsys):
    evaluation = TokenLabelDataset(labelled_rows, ImageProcessorTransform(image_processor()))
    settings = {"max_steps": 20, "logging_steps": 5, "eval_strategy": "steps", "eval_steps": 10, "save_strategy": "no"}
    trainer_of(tiny_model, labelled_rows, tmp_path, evaluation, **settings, disable_tqdm=False).train()
    text = capsys.readouterr().out
    assert "\r" not in text
    estimates = [line for line in text.splitlines() if line.startswith("estimate: ")]
    lines = [as_pairs(line) for line in text.splitlines() if line.startswith("step ")]
    logs = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logs] == ["5", "10", "15", "20"] and all(line["steps"] == "20" for line in lines)
    assert {"learning_rate", "images_per_second", "data_wait", "token_loss", "epoch"} <= logs[0].keys()
    assert int(logs[1]["seconds_left"]) >= 0
    first, second = [line for line in lines if "best" in line]
    assert (first["best"], first["best_by"]) == ("yes", "accuracy")
    assert text.count("of the raw weights") == 1
    assert {"eval_accuracy", "eval_raw_accuracy", "eval_loss"} <= first.keys()
    assert len(estimates) == 1 and "in all" in estimates[0] and "memory " in estimates[0]
    assert "2 evaluations of" in estimates[0]


def test_a_bar_on_a_terminal_and_rows_above_it(tiny_model, labelled_rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_progress, "is_terminal", lambda: True)
    evaluation = TokenLabelDataset(labelled_rows, ImageProcessorTransform(image_processor()))
    settings = {"max_steps": 8, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "no"}
    trainer = trainer_of(tiny_model, labelled_rows, tmp_path, evaluation, **settings, disable_tqdm=False)
    trainer.train()
    written = capsys.readouterr()
    rows = [line.split() for line in written.out.splitlines() if not line.startswith("weight average")]
    assert rows[0][:4] == ["epoch", "step", "loss", "top-1"] and "raw" in rows[0]
    assert [row[1] for row in rows[1:]] == ["4", "8"] and rows[1][-4:] == ["best", "by", "top-1", "%"]
    assert "images/s, data wait" in written.err and "8/8" in written.err
    assert "batch 2 of 2" in written.err and "batch 3 of 2" not in written.err


def test_plain_runs_have_no_token_loss(tiny_model, labelled_rows, tmp_path):
    trainer = trainer_for(tiny_model, labelled_rows, tmp_path, with_maps=False, logging_steps=1)
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert "token_loss" not in log and log["cls_loss"] == pytest.approx(log["loss"])


def clock_after(
    steps: int, monkeypatch, evaluation: float = 0.0, waited: float = 0.0
) -> tuple[RunClock, TrainerState]:
    """A clock that has seen 5 steps of 10 s and then ones of 2 s, and an evaluation after the last but one."""
    now, throughput = [0.0], Throughput()
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = RunClock(throughput)
    clock.start(state_at(0), None)
    for step in range(1, steps + 1):
        now[0] += 10.0 if step <= 5 else 2.0
        throughput.waited_seconds += waited
        if step == steps and evaluation:
            now[0] += evaluation
            throughput.paused_seconds += evaluation
            clock.is_evaluated = True
        clock.step(state_at(step))
    return clock, state_at(steps, eval_steps=30, save_steps=500)


def test_time_left_counts_steps_and_evaluations(monkeypatch):
    args = SimpleNamespace(eval_strategy="steps", save_strategy="steps")
    clock, state = clock_after(25, monkeypatch)
    assert clock.measured(state) == (20, 40.0, 0.0) and clock.is_measured(state)
    assert clock.seconds_left(args, state) == 75 * 2.0
    clock, state = clock_after(25, monkeypatch, evaluation=7.0)  # at 30, 60, 90, the last step, and after it
    assert clock.evaluations == [7.0] and clock.seconds_left(args, state) == 75 * 2.0 + 5 * 7.0


def test_nothing_is_estimated_in_the_warm_up(monkeypatch):
    clock, state = clock_after(5, monkeypatch)
    assert clock.seconds_left(SimpleNamespace(), state) is None and not clock.is_measured(state)
    clock, state = clock_after(14, monkeypatch)
    assert not clock.is_measured(state)


def test_a_long_run_is_told_how_to_be_shorter(monkeypatch):
    clock, state = clock_after(25, monkeypatch)  # 90 s so far, 2 s a step
    clock.steps_per_epoch = 20
    args = SimpleNamespace(eval_strategy="no", save_strategy="no", max_steps=-1, num_train_epochs=50)
    assert describe_shorter_run(clock, args, state) is None  # 150 s left
    state.max_steps = 1_000  # 1,950 s left, 2,040 s in all: 2.04 s a step, 40.8 s an epoch
    text = describe_shorter_run(clock, args, state)
    assert text == (
        "shorter: --num_train_epochs 14 takes about 10 minutes, --max_steps 294 about 10 minutes, "
        "--early_stopping_patience 5 ends training when it gets no better"
    )
    args = SimpleNamespace(**{**vars(args), "max_steps": 1_000}, early_stopping_patience=3)
    assert describe_shorter_run(clock, args, state) == "shorter: --max_steps 294 takes about 10 minutes"
    clock.steps_per_epoch = None
    clock.first_step = 500  # of a run that goes on
    assert describe_shorter_run(clock, args, state) is None


def test_the_line_says_what_to_try_where_data_limits(monkeypatch):
    monkeypatch.setattr(loaders, "num_cpu_cores", lambda: 8)
    monkeypatch.setattr(estimate, "lacks_shared_memory", lambda: False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(estimate.jpeg_regions, "is_used", lambda: False)
    gpu = torch.device("cuda")
    assert describe_waiting(SimpleNamespace(dataloader_num_workers=0, device=gpu), 0.1) is None
    text = describe_waiting(SimpleNamespace(dataloader_num_workers=2, device=gpu), 0.45)
    assert text == "45% of the time waits for images: try more --dataloader_num_workers (now 2, 8 cores)"
    text = describe_waiting(SimpleNamespace(dataloader_num_workers=8, device=gpu), 0.45)
    assert text == (
        "45% of the time waits for images, although 8 --dataloader_num_workers load them on 8 cores: try smaller files (lvvit cache), "
        "a faster decoder (pip install nvidia-nvimgcodec-cu13)"
    )
    on_cpu = SimpleNamespace(dataloader_num_workers=0, device=torch.device("cpu"))
    assert "more" not in describe_waiting(on_cpu, 0.45) and "lvvit cache" in describe_waiting(on_cpu, 0.45)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert describe_waiting(on_cpu, 0.45).endswith("try smaller files (lvvit cache)")


def test_the_warm_up_and_short_intervals_do_not_count_as_waiting(monkeypatch):
    """Of steps of 10 s in the warm-up and of 2 s after it, each waits for 1 s."""
    clock, state = clock_after(25, monkeypatch, waited=1.0)
    assert clock.waited_share(state) == 0.5  # 20 steps
    state.global_step += 5
    assert clock.waited_share(state) is None  # the interval goes on
    assert clock.waited_share(clock_after(5, monkeypatch, waited=1.0)[1]) is None


def test_waiting_is_explained_once(tiny_model, labelled_rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(RunClock, "waited_share", lambda self, state: 0.05 if state.global_step == 1 else 0.5)
    settings = {"max_steps": 4, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": False}
    trainer = trainer_of(tiny_model, labelled_rows, tmp_path, **settings)
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    (place,) = [index for index, line in enumerate(lines) if line.startswith("50% of the time waits for images")]
    assert lines[place - 1].startswith("step 2 ")


@pytest.mark.parametrize(
    ("metric", "values", "is_best"),
    [
        ("eval_accuracy", [0.5, 0.6], True),
        ("eval_accuracy", [0.6, 0.6], False),
        ("eval_loss", [2.0, 3.0], False),
        ("eval_loss", [2.0, 1.0], True),
        ("eval_other", [1.0], None),
    ],
)
def test_best_evaluation(metric, values, is_best):
    state = state_at(9, log_history=[{metric: value} for value in values])
    assert EvaluationTable.is_best(SimpleNamespace(metric_for_best_model=None), state) is is_best


def test_table_repeats_its_heading_only_when_it_changes():
    table, state = EvaluationTable(), state_at(1200, epoch=2.5)
    metrics = {"eval_loss": 1.2345, "eval_accuracy": 0.8125, "eval_raw_accuracy": 0.5, "eval_runtime": 3.0}
    heading, row = table.lines(state, metrics, "eval_accuracy")
    assert heading.split() == ["epoch", "step", "loss", "top-1", "%", "raw", "weights", "top-1", "%"]
    mark = "  best by top-1 %"
    assert row.removesuffix(mark).split() == ["2.5", "1,200", "1.234", "81.25", "50.00"]
    assert len(row) == len(heading) + len(mark)
    assert len(table.lines(state, metrics, None)) == 1
    assert len(table.lines(state, {"eval_mean_iou": 0.25}, None)) == 2


@pytest.mark.parametrize("is_repeated", [False, True])
def test_the_last_evaluation_is_not_repeated_where_nothing_has_changed(
    is_repeated, tiny_model, labelled_rows, tmp_path, monkeypatch
):
    evaluation = TokenLabelDataset(labelled_rows, ImageProcessorTransform(image_processor()))
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2}
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "ema_decay": 0.9}
    trainer = trainer_of(tiny_model, labelled_rows, tmp_path, evaluation, **settings, **(best if is_repeated else {}))
    trainer.train()
    if is_repeated:
        trainer.state.best_global_step = 2
    expected = trainer.evaluate()
    loops = []
    monkeypatch.setattr(type(trainer), "evaluate", lambda self: loops.append(1) or expected)
    metrics = trainer.evaluate_result()
    assert len(loops) == is_repeated
    for name in ("eval_loss", "eval_accuracy"):
        assert metrics[name] == pytest.approx(expected[name])


def test_tensorboard_gets_the_predictions_at_each_evaluation(tiny_model, labelled_rows, tmp_path):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    evaluation = TokenLabelDataset(labelled_rows, ImageProcessorTransform(image_processor()))
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "report_to": "tensorboard"}
    trainer = trainer_of(tiny_model, labelled_rows, tmp_path, evaluation, **settings)
    earlier, counts = modification_times(tmp_path), []

    def draw(path, count):
        counts.append(count)
        Image.new("RGB", (6, 4)).save(path)

    trainer.add_callback(PredictionFigure(trainer, draw))
    trainer.train()
    (folder,) = (tmp_path / "runs").iterdir()
    board = EventAccumulator(str(folder))
    board.Reload()
    assert [(event.step, event.width, event.height) for event in board.Images("predictions")] == [(2, 6, 4), (4, 6, 4)]
    trainer.evaluate()  # not part of the run
    assert len(counts) == 2
    (tmp_path / "old.png").write_bytes(b"")
    places = "\n".join(describe_outputs(trainer, earlier))
    assert f"curves:      tensorboard --logdir {tmp_path / 'runs'}" in places and "checkpoint-4" in places
    assert "old.png" in places and "old.png" not in "\n".join(describe_outputs(trainer, modification_times(tmp_path)))


def test_nothing_is_drawn_without_tensorboard(tiny_model, labelled_rows, tmp_path):
    evaluation = TokenLabelDataset(labelled_rows, ImageProcessorTransform(image_processor()))
    trainer = trainer_of(tiny_model, labelled_rows, tmp_path, evaluation, max_steps=1, eval_strategy="epoch")
    trainer.add_callback(PredictionFigure(trainer, lambda path, count: pytest.fail("drawn")))
    trainer.train()


def test_an_untrained_patch_head_is_not_missed(tiny_model, labelled_rows, tmp_path, monkeypatch):
    trainer = trainer_for(tiny_model, labelled_rows, tmp_path, with_maps=False)
    said = []
    monkeypatch.setattr("transformers.trainer.logger.warning", said.append)
    keys = torch.nn.modules.module._IncompatibleKeys
    trainer.model.saves_patch_head = False
    trainer._issue_warnings_after_load(keys(["timm_model.patch_head.0.weight"], []))
    assert said == []
    trainer._issue_warnings_after_load(keys(["timm_model.fc.weight"], []))
    assert len(said) == 1


def test_bars_become_lines_without_a_terminal(capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    for index in console.progress_bar(range(1000), desc="Reading", unit="batch"):
        now[0] += 0.125  # a number without rounding
        assert index < 1000
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Reading: 240 of 1,000 batches, 00:30 so far, 01:35 left"
    assert lines[-1] == "Reading: 1,000 of 1,000 batches, 02:05 so far" and len(lines) == 5


def test_ctrl_c_ends_a_program_with_a_line(capsys, monkeypatch):
    @console.program("name.py")
    def main(arguments):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ending:
        main([])
    assert ending.value.code == 130 and capsys.readouterr().err == "name.py: interrupted\n"
