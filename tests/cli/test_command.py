"""The command `lvvit`, and how it starts programs through accelerate."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from pyarrow import parquet

from modeling_lvvit import launching
from modeling_lvvit.cli import command, launch
from modeling_lvvit.cli.parser import TRAIN_TL
from modeling_lvvit.options import OptionError
from support.images import labelled_table
from support.programs import ROOT, TINY, environment_of, run


LVVIT = ["-m", "modeling_lvvit.cli.command"]


def test_overview_has_a_line_and_an_example_of_each_command(capsys):
    command.run([])
    text = capsys.readouterr().out
    for name, entry in command.COMMANDS.items():
        assert f"  {name} " in text and f"lvvit {name} {entry.example}" in text


@pytest.mark.parametrize("name", command.COMMANDS)
def test_examples_can_be_read(name):
    program, words = command.COMMANDS[name].load_program(), command.COMMANDS[name].example.split()
    if hasattr(program, "recipes"):
        assert program.given_options(words)[1] == []
    else:
        program.parse(words)


def test_unknown_command_names_the_nearest_one():
    with pytest.raises(OptionError, match=r"no command trian \(did you mean train\?\)"):
        command.run(["trian"])


INTERRUPTED_START = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "transformers":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
sys.argv = [{start!r}, "train"]
import modeling_lvvit.cli.command
"""


@pytest.mark.parametrize(("start", "status"), [("/usr/bin/lvvit", 130), ("/home/me/mine.py", -signal.SIGINT)])
def test_ctrl_c_while_libraries_are_imported_is_one_line(start, status):
    """Programs that use the package hear of it as always."""
    code = INTERRUPTED_START.format(start=start)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert (done.stderr == "lvvit: interrupted\n") == (status == 130)
    assert ("Traceback" in done.stderr) == (status != 130)


COLLECTING = """
import gc, sys
sys.argv = [{start!r}, "train"]
import modeling_lvvit
during = gc.isenabled()
from modeling_lvvit.launching import end_imports
end_imports()
print(during, gc.isenabled(), gc.get_freeze_count() > 0)
"""


@pytest.mark.parametrize(
    ("start", "collecting"), [("/usr/bin/lvvit", "False True True"), ("/home/me/mine.py", "True True False")]
)
def test_programs_look_for_garbage_from_their_main_on(start, collecting):
    """And not while libraries are imported, nor among those; other programs are left alone."""
    code = COLLECTING.format(start=start)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == collecting.split()


@pytest.mark.parametrize("shell", command.SHELLS)
def test_completion_has_commands_and_options(shell, capsys):
    command.run(["completion", shell])
    text = capsys.readouterr().out
    assert "annotate" in text and "--annotator_image_size" in text and "--segmentation_head" in text


def test_completion_needs_a_known_shell():
    with pytest.raises(OptionError, match="takes one of bash, zsh"):
        command.run(["completion", "cmd"])


@pytest.mark.parametrize(
    ("words", "options", "left"),
    [
        ("recipe --num_processes 2 --seed 3", "--num_processes 2", "recipe --seed 3"),
        ("--num-processes=2 --bf16 true", "--num-processes=2", "--bf16 true"),
        ("--cpu --max_steps 1 --mixed_precision bf16", "--cpu --mixed_precision bf16", "--max_steps 1"),
        ("--debug underflow_overflow --multi_gpu", "--multi_gpu", "--debug underflow_overflow"),  # both have --debug
        ("--help", "", "--help"),
    ],
)
def test_options_of_the_launcher_are_told_from_those_of_the_program(words, options, left):
    assert launch.split_options(words.split(), TRAIN_TL) == (options.split(), left.split())


def test_launcher_takes_the_whole_machine_and_says_nothing(caplog, monkeypatch):
    monkeypatch.setattr(launch, "default_config_file", "nowhere")
    args = launch.launcher_arguments([], "train_tl", ["--seed", "3"])
    assert (args.num_processes, args.num_machines, args.mixed_precision) == (1, 1, "no")
    assert args.training_script_args == ["--seed", "3"] and not args.multi_gpu
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 4)
    args = launch.launcher_arguments([], "train_tl", [])
    assert (args.num_processes, args.multi_gpu) == (4, True)
    assert launch.launcher_arguments(["--num_processes", "1"], "train_tl", []).multi_gpu is False
    assert not caplog.records


def test_configurations_of_the_package_are_known_by_name():
    args = launch.launcher_arguments(["--config_file", "eight_gpus"], "train_tl", [])
    assert (args.num_processes, args.multi_gpu) == (8, True)
    with pytest.raises(OptionError, match="no `config_file` nine_gpus; the package has eight_gpus, fsdp2"):
        launch.launcher_arguments(["--config_file", "nine_gpus"], "train_tl", [])


def test_what_the_launcher_refuses_is_one_message():
    with pytest.raises(OptionError, match="accelerate launch: .*--num_processes.*invalid int value: 'two'"):
        launch.launcher_arguments(["--num_processes", "two"], "train_tl", [])
    with pytest.raises(OptionError, match="accelerate launch: You need to use at least 2 processes"):
        launch.launcher_arguments(["--multi_gpu", "--num_processes", "1"], "train_tl", [])


@pytest.mark.parametrize(
    ("before", "options", "variable", "chosen"),
    [
        (None, [], None, []),  # torch takes all cores
        ("1", [], "1", []),  # torch has read it
        (None, ["--num-cpu-threads-per-process", "1"], "1", [1]),
        ("2", ["--num_cpu_threads_per_process=1"], "1", [1]),
    ],
)
def test_a_single_process_has_the_threads_that_were_asked_for(before, options, variable, chosen, monkeypatch):
    """Of four cores."""
    monkeypatch.setattr(
        os, "environ", {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    )
    if before is not None:
        os.environ["OMP_NUM_THREADS"] = before
    numbers = []
    monkeypatch.setattr(launch, "default_config_file", "nowhere")
    monkeypatch.setattr(launching, "num_cpu_cores", lambda: 4)
    monkeypatch.setattr(launching, "keep_freed_memory", lambda: None)
    monkeypatch.setattr("torch.set_num_threads", numbers.append)
    monkeypatch.setattr("train_tl.main", lambda words: launching.set_up_cpu(torch.device("cpu")))
    launch.launch(TRAIN_TL, "train_tl", options)
    assert (os.environ.get("OMP_NUM_THREADS"), numbers) == (variable, chosen)


def test_a_single_process_is_this_one(monkeypatch):
    monkeypatch.setattr(launch, "default_config_file", "nowhere")
    calls = []
    monkeypatch.setattr("train_tl.main", calls.append)
    before = dict(os.environ)
    launch.launch(TRAIN_TL, "train_tl", ["--seed", "3", "--mixed_precision", "bf16"])
    changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
    for name in changed:
        monkeypatch.setenv(name, before[name]) if name in before else monkeypatch.delenv(name)
    assert calls == [["--seed", "3"]] and changed["ACCELERATE_MIXED_PRECISION"] == "bf16"


@pytest.mark.parametrize(
    "words", [["train", "--dataset_name", "./nowhere", "--output_dir", "x"], ["segment", "--sead", "3"]]
)
def test_refusals_are_one_line(words, tmp_path):
    result = run([*LVVIT, *words], tmp_path)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"lvvit {words[0]}: ") and result.stdout == ""


@pytest.mark.slow
def test_two_processes_train_and_refuse_with_one_message(tmp_path):
    parquet.write_table(labelled_table(16), tmp_path / "train.parquet")
    options = [
        "--cpu",
        "--num_processes",
        "2",
        "--image_size",
        "32",
        "--config_overrides",
        TINY,
        "--report_to",
        "none",
    ]
    options += ["--max_steps", "2", "--dataset_name", str(tmp_path), "--eval_fraction", "0.5"]
    result = run([*LVVIT, "train", *options, "--output_dir", str(tmp_path / "run")], tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("training images") == 1 and (tmp_path / "run" / "model.safetensors").is_file()
    assert result.stdout.count("images are loaded without workers") == 1
    refused = run([*LVVIT, "train", *options, "--output_dir", str(tmp_path / "run")], tmp_path)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert refused.stderr.count("holds another run") == 1


def test_installed_script_is_the_command():
    assert subprocess.run(
        [sys.executable, "-c", "from importlib.metadata import entry_points as e; print(e(name='lvvit')['lvvit'].value)"],
        capture_output=True, text=True, cwd=ROOT, env=environment_of(ROOT), check=False,
    ).stdout.strip() == "modeling_lvvit.cli.command:main"  # fmt: skip
