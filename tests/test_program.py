"""The program as a user starts it: files in, model folder out."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoImageProcessor, AutoModelForImageClassification

import modeling_lvvit  # noqa: F401  registers the model
import train_tl
from support.images import encode_image
from support.local_hub import local_hub
from support.programs import ROOT, TINY, options, run, write_data


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("own data"), num_test=10)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """A folder that two processes wrote in two epochs, in bfloat16."""
    output = tmp_path_factory.mktemp("runs") / "a run"
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--mixed_precision", "bf16"]
    result = run([*launch, "train_tl.py", *options(data, output, "--num_train_epochs", "2")], data)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "24 training images, 8 a step" in result.stdout
    assert "top-1 on 10 evaluation images" in result.stdout
    return output


def test_everything_is_saved(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "modeling_lvvit.py"} <= names
    assert {"configuration_lvvit.py", "README.md", "predictions.png", "eval_results.json", "all_results.json"} <= names
    assert 0 <= json.loads((trained / "eval_results.json").read_text())["eval_accuracy"] <= 1
    card = (trained / "README.md").read_text()
    assert "trained with token labels" in card
    assert "![Test images" in card


FRESH_PROCESS = """
import sys, torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
folder, image, output = sys.argv[1:]
options = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **options)
model = AutoModelForImageClassification.from_pretrained(folder, **options)
backbone = AutoModel.from_pretrained(folder, **options)
images = torch.arange(2 * 3 * 32 * 32.0).reshape(2, 3, 32, 32).sin()
with torch.no_grad():
    logits, tokens = model.eval()(images).logits, backbone.eval()(images).last_hidden_state
predictions = pipeline("image-classification", model=folder, **options)(image)
assert not any(name.split(".")[0] == "modeling_lvvit" for name in sys.modules), "the package was imported"
torch.save({"logits": logits, "tokens": tokens, "type": config.model_type, "label": predictions[0]["label"]}, output)
"""


def test_fresh_process_without_the_package_gives_the_same_logits(trained, tmp_path):
    (tmp_path / "image.jpg").write_bytes(encode_image(torch.full((50, 70, 3), 90, dtype=torch.uint8).numpy()))
    # started elsewhere and with -P, so that the package could only be found if it were asked for by name
    code = [
        sys.executable,
        "-P",
        "-c",
        FRESH_PROCESS,
        str(trained),
        str(tmp_path / "image.jpg"),
        str(tmp_path / "out.pt"),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run(code, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    fresh = torch.load(tmp_path / "out.pt", weights_only=True)
    model = AutoModelForImageClassification.from_pretrained(trained).eval()
    images = torch.arange(2 * 3 * 32 * 32.0).reshape(2, 3, 32, 32).sin()
    with torch.no_grad():
        assert torch.equal(model(images).logits, fresh["logits"])
        assert torch.equal(model.lvvit(images).last_hidden_state, fresh["tokens"])
    assert fresh["type"] == "lvvit"
    assert fresh["label"] in model.config.label2id


def test_image_processor_is_the_one_of_training(trained):
    processor = AutoImageProcessor.from_pretrained(trained)
    assert (processor.crop_size["height"], processor.size["shortest_edge"]) == (32, 35)


def test_finished_run_is_not_written_over_and_finetunes(trained, data, tmp_path):
    before = (trained / "model.safetensors").read_bytes()
    result = run(["train_tl.py", *options(data, trained)], data)
    assert result.returncode == 1
    assert "holds another run" in result.stderr
    assert (trained / "model.safetensors").read_bytes() == before
    fine = ["--dataset_name", str(data), "--model_name_or_path", str(trained), "--output_dir", str(tmp_path / "fine")]
    result = run(
        ["train_tl.py", *fine, "--max_steps", "2", "--use_token_labels", "False", "--report_to", "none"], data
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "plain labels" in result.stdout
    assert json.loads((tmp_path / "fine" / "config.json").read_text())["patch_logits_weight"] == 0.0


def test_other_class_count_is_refused_or_makes_new_heads(trained, tmp_path):
    for name in ("cat", "dog"):
        folder = tmp_path / "pets" / "train" / name
        folder.mkdir(parents=True)
        for index in range(8):
            (folder / f"{index}.png").write_bytes(
                encode_image(torch.full((40, 50, 3), 9 * index).byte().numpy(), "PNG")
            )
    command = ["train_tl.py", "--dataset_name", str(tmp_path / "pets"), "--model_name_or_path", str(trained)]
    command += ["--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--report_to", "none"]
    result = run(command, tmp_path)
    assert result.returncode == 1
    assert "has 7 classes, the data has 2" in result.stderr
    assert not (tmp_path / "run").exists()
    result = run([*command, "--ignore_mismatched_sizes"], tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert model.patch_classifier.out_features == 2


def test_killed_run_continues(data, tmp_path):
    command = ["train_tl.py", *options(data, tmp_path / "run", "--save_strategy", "steps", "--save_steps", "3")]
    short, whole = ["--max_steps", "3"], ["--max_steps", "6"]
    assert run([*command, *short], data).returncode == 0
    result = run([*command, *whole, "--resume_from_checkpoint", "last"], data)
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 6


REFUSED = {
    "odd patch size": (["--config_overrides", "{patch_size: 7}"], "`patch_size` must be even, got 7"),
    "image size": (["--image_size", "30"], "multiples of `patch_size`"),
    "unused columns": (["--remove_unused_columns", "True"], "leave it at False"),
    "unknown option": (["--dense_wieght", "1"], "did you mean --dense_weight?"),
    "no data": (["--dataset_name", "./nowhere"], "There is no dataset at"),
    "no such column": (["--label_column", "kind"], "has no column 'kind'"),
    "nothing to resume": (["--resume_from_checkpoint", "last"], "There is no whole checkpoint in"),
    "no such model": (["--config_overrides", "{}", "--model_name_or_path", "./nowhere"], "There is no model folder"),
    "unknown variant": (["--variant", "lvvit_xl"], "Unknown LV-ViT variant 'lvvit_xl'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_stop_with_one_clear_line(case, data, tmp_path):
    extra, message = REFUSED[case]
    with pytest.raises(
        SystemExit, match=re.escape(message)
    ) as refusal:  # Python prints its text and ends with status 1
        train_tl.main(options(data, tmp_path / "run", *extra))
    assert str(refusal.value).startswith("lvvit train: ")
    assert not (tmp_path / "run").exists()


def test_a_refused_program_prints_its_line_and_ends_with_status_1(data, tmp_path):
    result = run(["train_tl.py", *options(data, tmp_path / "run"), "--dataset_name", "./nowhere"], data)
    assert (result.returncode, "Traceback" in result.stderr) == (1, False)
    assert "lvvit train: There is no dataset at" in result.stderr
    assert not (tmp_path / "run").exists()


def test_two_processes_share_the_images_and_end_with_equal_weights(tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = run([*launch, str(ROOT / "tests" / "support" / "two_processes.py"), str(tmp_path)], tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for epoch in (slice(0, 8), slice(8, 16)):
        assert sorted(first["seen"][epoch] + second["seen"][epoch]) == list(range(16))
    assert first["seen"][:8] != first["seen"][8:]
    assert first["weights"] == second["weights"]
    assert all(a != b for a, b in zip(first["crops"], second["crops"]))


def test_two_processes_publish_one_repository_with_a_card(data, tmp_path):
    with local_hub() as hub:
        launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "train_tl.py"]
        more = [
            "--max_steps",
            "4",
            "--ema_decay",
            "0.5",
            "--save_strategy",
            "steps",
            "--save_steps",
            "2",
            "--eval_strategy",
            "steps",
        ]
        more += [
            "--eval_steps",
            "2",
            "--logging_steps",
            "1",
            "--push_to_hub",
            "--hub_strategy",
            "every_save",
            "--hub_always_push",
        ]
        more += ["--hub_model_id", "team/pets", "--license", "mit"]
        environment = {
            name: value for name, value in hub.environment(tmp_path / "home").items() if name.startswith("HF_")
        }
        result = run([*launch, *options(data, tmp_path / "out", *more)], data, **environment)
        assert result.returncode == 0, f"{result.stderr[-3000:]}\n{hub.unknown}"
        messages = [commit.message for commit in hub.history("team/pets")]
        files = hub.files("team/pets")
    assert messages[1:] == ["Training in progress, step 2", "Training in progress, step 4", "End of training"]
    assert result.stdout.count("published: http") == 1
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.model_name, card.data.datasets) == ("mit", "pets", None)
    metrics = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found["accuracy"] == pytest.approx(metrics["eval_accuracy"], abs=1e-4)
    assert 'model="team/pets"' in card.text and "the moving average of those of training" in card.text
    table = [line for line in card.text.splitlines() if line.startswith(("| 0.", "| 1."))]
    assert len(table) == 2  # an evaluation each 2 of 4 steps
    assert not [name for name in files if name.endswith((".bin", ".pt"))]


def test_fine_tuning_names_its_start_and_takes_over_the_licence(trained, data, tmp_path):
    (tmp_path / "start").mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        shutil.copy(trained / name, tmp_path / "start" / name)
    (tmp_path / "start" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Start\n")
    start = ["--model_name_or_path", str(tmp_path / "start"), "--max_steps", "1"]
    command = [*options(data, tmp_path / "out", *start)]
    command = [word for word in command if word not in ("--config_overrides", TINY, "--image_size", "32")]
    result = run(["train_tl.py", *command], data)
    assert result.returncode == 0, result.stderr[-3000:]
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "cc-by-4.0" and card.data.base_model is None  # a folder is no name of the Hub
    assert "Started from `start`." in card.text and "and of the model it started from" in card.text


def test_refused_push_ends_both_processes_with_one_line(data, tmp_path):
    with local_hub() as hub:
        launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "train_tl.py"]
        push = ["--push_to_hub", "--hub_model_id", "stranger/pets"]
        environment = {
            name: value for name, value in hub.environment(tmp_path / "home").items() if name.startswith("HF_")
        }
        result = run([*launch, *options(data, tmp_path / "out", *push)], data, **environment)
        assert result.returncode != 0
        assert "stranger/pets cannot be opened for an upload: the token may not write there" in result.stderr
        assert "Connection closed" not in result.stderr  # of the other process
        with pytest.raises(KeyError):
            hub.files("stranger/pets")
