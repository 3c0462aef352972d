"""What is uploaded says nothing of the disk and the machine of the user."""

import json

import pytest
from pyarrow import parquet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modeling_lvvit.hub.published_content import published_contents, without_places
from support.images import labelled_table
from support.local_hub import local_hub
from support.programs import environment_of, options, run


HOST = "machine-of-ann"


@pytest.mark.parametrize(
    ("value", "published"),
    [
        ("/home/ann/runs/a", "a"),
        ("~/runs/a", "a"),
        ("../other/labels", "labels"),
        ("C:\\Users\\ann\\run", "run"),
        ("runs/a", "runs/a"),
        ("timm/resnet50", "timm/resnet50"),
        ({"datasets": ["/data/x", 3]}, {"datasets": ["x", 3]}),
        ("", ""),
    ],
)
def test_places_become_names(value, published):
    assert without_places(value) == published


def test_a_class_may_be_called_like_a_place(tmp_path):
    """As those of Open Images."""
    config = {"id2label": {"0": "/m/0abc"}, "_name_or_path": "/home/ann/start"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    published = json.loads(published_contents(tmp_path, ["config.json"])["config.json"])
    assert published == {"id2label": {"0": "/m/0abc"}, "_name_or_path": "start"}


@pytest.mark.slow
def test_pushed_runs_and_label_sets_name_no_place_and_no_host(tmp_path):
    """A run from weights in a folder, with TensorBoard, checkpoints and a best one; labels by a classifier in a folder. All bytes of all
    commits are looked at."""
    data = tmp_path / "images"
    data.mkdir()
    parquet.write_table(labelled_table(16), data / "train.parquet")
    parquet.write_table(labelled_table(10, seed=1), data / "test.parquet")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(f"import socket\nsocket.gethostname = lambda: {HOST!r}\n")
    start, output = tmp_path / "start", tmp_path / "run"
    brief = ["--max_steps", "2", "--logging_steps", "1", "--save_steps", "1", "--save_strategy", "steps"]
    begun = run(["train_tl.py", *options(data, start, *brief)], data)
    assert begun.returncode == 0, begun.stderr
    with local_hub() as hub:
        environment = {
            name: text for name, text in hub.environment(tmp_path / "home").items() if name.startswith("HF")
        }
        environment |= {"PYTHONPATH": f"{tmp_path / 'site'}:{environment_of(data)['PYTHONPATH']}"}
        command = options(data, output, *brief, "--model_name_or_path", str(start), "--eval_strategy", "steps")
        place = command.index("--config_overrides")
        del command[place : place + 2]
        command += [
            "--eval_steps",
            "1",
            "--load_best_model_at_end",
            "true",
            "--report_to",
            "tensorboard",
            "--push_to_hub",
        ]
        pushes = [["train_tl.py", *command, "--hub_strategy", "every_save", "--hub_model_id", "team/run"]]
        labels = [str(data), "--annotator", str(output), "--output_dir", str(tmp_path / "labels"), "--push_to_hub"]
        pushes.append(["-m", "modeling_lvvit.cli.annotation", *labels, "--hub_model_id", "team/labels"])
        for push in pushes:
            result = run(push, data, **environment)
            assert result.returncode == 0, result.stderr[-3000:]
        commits = [*hub.history("team/run"), *hub.history("team/labels", "dataset")]
        files = hub.files("team/run")
    names = [name for commit in commits for name in commit.files]
    content = b"".join(file.content for commit in commits for file in commit.files.values())
    assert len(content) > 1e5 and {"arguments.json", "token_labels.json", "trainer_state.json"} <= set(names)
    for secret in (str(tmp_path), str(tmp_path.parent), HOST):
        assert secret.encode() not in content and not [name for name in names if secret in name]
    arguments = json.loads(files["arguments.json"])
    assert (arguments["output_dir"], arguments["max_steps"]) == ("run", 2)
    assert json.loads((output / "arguments.json").read_text())["output_dir"] == str(output)  # here it says where
    board = next(name for name in files if "tfevents" in name)
    (tmp_path / "board").mkdir()
    (tmp_path / "board" / "events.out.tfevents.1").write_bytes(files[board])
    curves = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [point.step for point in curves.Scalars("train/loss")] == [1, 2]
