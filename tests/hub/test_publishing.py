"""What runs, converter and publish program put on the Hub; the hub is the local one."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from modeling_lvvit import LVViTForImageClassification, publish
from modeling_lvvit.cli.model_arguments import ModelArguments
from modeling_lvvit.cli.model_card import Provenance, find_provenance, run_metadata, training_table
from modeling_lvvit.data.files.digests import DIGESTS
from modeling_lvvit.hub import hub_trainer as publishing
from modeling_lvvit.hub import repository as hub_uploads
from modeling_lvvit.hub.hub_trainer import push_finished_run
from modeling_lvvit.hub.repository import HubError, HubTarget
from modeling_lvvit.original.convert import main as convert
from modeling_lvvit.token_labeling import TokenLabelTrainingArguments
from modeling_lvvit.variants import evaluation_image_processor, variant_config
from support.label_sets import layout_of, random_maps, table_of, write_label_set
from support.local_hub import Fault
from support.models import tiny_config
from support.original_layout import original_state_dict
from support.trainers import trainer_for


CODE = {"configuration_lvvit.py", "modeling_lvvit.py"}
MODEL = {"config.json", "model.safetensors", "README.md", *CODE}
PUSH = {"push_to_hub": True, "hub_model_id": "user/run", "hub_token": "hf_test"}


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")


@pytest.fixture
def processor():
    return evaluation_image_processor((32, 48), 0.9)


def test_end_of_training_publishes_the_average_once(hub, tiny_model, labelled_rows, processor, tmp_path):
    options = {
        **PUSH,
        "max_steps": 3,
        "ema_decay": 0.5,
        "save_strategy": "steps",
        "save_steps": 1,
        "hub_strategy": "end",
    }
    trainer = trainer_for(tiny_model, labelled_rows, tmp_path, **options)
    trainer.processing_class = processor
    trainer.train()
    assert len(hub.history("user/run")) == 1  # made when the Trainer was, and empty until the end
    push_finished_run(trainer, "a program")
    files = hub.files("user/run")
    assert MODEL | {"preprocessor_config.json", "arguments.json"} <= set(files)
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth")) or "checkpoint" in name]
    assert [commit.message for commit in hub.history("user/run")][1:] == ["End of training"]
    average = load_file(tmp_path / "checkpoint-3" / "ema.safetensors")
    raw = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    for name, value in load_tensors(files["model.safetensors"]).items():
        torch.testing.assert_close(value, average[name])
    assert any(not torch.equal(average[name], raw[name]) for name in raw)
    arguments = json.loads(files["arguments.json"])
    assert (arguments["ema_decay"], arguments["hub_token"]) == (0.5, "<HUB_TOKEN>")
    assert b"hf_test" not in b"".join(files.values())


def test_every_checkpoint_is_published_with_the_average_of_its_step(
    hub, tiny_model, labelled_rows, processor, tmp_path
):
    options = {**PUSH, "max_steps": 3, "ema_decay": 0.5, "save_strategy": "steps", "save_steps": 1}
    options |= {"hub_strategy": "every_save", "hub_always_push": True, "hub_private_repo": True, "hub_revision": "wip"}
    trainer = trainer_for(tiny_model, labelled_rows, tmp_path, **options)
    trainer.processing_class = processor
    trainer.train()
    trainer.push_to_hub()
    history = hub.history("user/run", branch="wip")[1:]
    assert [commit.message for commit in history] == [
        *(f"Training in progress, step {step}" for step in (1, 2, 3)),
        "End of training",
    ]
    assert hub.is_private("user/run") and hub.files("user/run") == {}
    for step, commit in enumerate(history[:3], start=1):
        average = load_file(tmp_path / f"checkpoint-{step}" / "ema.safetensors")
        for name, value in load_tensors(commit.files["model.safetensors"].content).items():
            torch.testing.assert_close(value, average[name])
        assert f"step {step} of 3" in commit.files["README.md"].content.decode()
        assert MODEL | {"preprocessor_config.json"} <= set(commit.files)
        assert "ema.safetensors" not in commit.files
    assert not (tmp_path / "_published").exists()


def test_failed_push_in_training_is_a_warning_and_the_end_sends_all(
    hub, tiny_model, labelled_rows, tmp_path, monkeypatch
):
    options = {**PUSH, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "hub_strategy": "every_save"}
    trainer = trainer_for(tiny_model, labelled_rows, tmp_path, **options, hub_always_push=True)
    hub.faults.append(Fault("POST", ".*/commit/main", status=503, times=2))
    warnings = []
    monkeypatch.setattr(publishing.logger, "warning", lambda message, *values: warnings.append(message % values))
    trainer.train()
    trainer.push_to_hub()
    assert [commit.message for commit in hub.history("user/run")][1:] == ["End of training"]
    failures = [message for message in warnings if message.startswith("An upload in training failed. The upload of ")]
    assert len(failures) == 2 and all("(status 503" in message and "\n" not in message for message in failures)


def test_failed_push_at_the_end_says_how_to_repeat_it(hub, tiny_model, labelled_rows, processor, tmp_path, capsys):
    trainer = trainer_for(tiny_model, labelled_rows, tmp_path / "run", **PUSH, max_steps=1)
    trainer.processing_class = processor
    trainer.train()
    hub.faults.append(Fault("PUT", "/lfs/.*", drop_after=1000, times=None))
    with pytest.raises(SystemExit, match="a program: The upload of .* failed: .*it broke off") as caught:
        push_finished_run(trainer, "a program")
    assert hub.files("user/run") == {}
    AutoModelForImageClassification.from_pretrained(tmp_path / "run")  # complete
    hub.faults.clear()
    command = str(caught.value).rpartition("lvvit publish ")[2].split()
    publish.main(command)
    assert "published: http" in capsys.readouterr().out
    assert set(hub.files("user/run")) >= MODEL


def test_without_permission_nothing_is_trained(hub, tiny_model, labelled_rows, tmp_path):
    with pytest.raises(HubError, match=r"stranger/run cannot be opened for an upload: the token may not write there"):
        trainer_for(tiny_model, labelled_rows, tmp_path, **{**PUSH, "hub_model_id": "stranger/run"})


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_strategies_that_publish_pickles_are_refused(strategy, tmp_path):
    with pytest.raises(ValueError, match="which is a pickle. Use `end`, or `every_save`"):
        TokenLabelTrainingArguments(str(tmp_path), **PUSH, hub_strategy=strategy)


def test_training_arguments_are_no_pickle(tiny_model, labelled_rows, tmp_path):
    trainer = trainer_for(tiny_model, labelled_rows, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    assert not list(tmp_path.rglob("training_args.bin"))
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        assert json.loads((folder / "arguments.json").read_text())["max_steps"] == 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """LV-ViT-T as the authors' code stores it."""
    path = tmp_path_factory.mktemp("authors") / "best.pth"
    torch.save({"state_dict": original_state_dict(variant_config("lvvit_t_224"))}, path)
    return path


def test_authors_checkpoint_to_a_complete_repository_in_one_command(hub, checkpoint, tmp_path, capsys):
    options = ["--variant", "lvvit_t_224", "--checkpoint", str(checkpoint), "--repo_id", "team/lvvit-t"]
    publish.main([*options, "--output_dir", str(tmp_path / "out"), "--private", "--revision", "candidate"])
    files = hub.files("team/lvvit-t", revision="candidate")
    assert set(files) == MODEL | {"preprocessor_config.json", "SHA256SUMS"}
    assert hub.is_private("team/lvvit-t") and hub.files("team/lvvit-t") == {}
    assert "published: " in capsys.readouterr().out
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", "image-classification")
    assert {result.metric_value for result in card.data.eval_results} == {0.791}
    assert 'name = "team/lvvit-t"' in card.text and "file `best.pth` (SHA-256 `" in card.text
    auto_map = json.loads(files["config.json"])["auto_map"]
    assert set(auto_map) == {
        "AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoModelForSemanticSegmentation", "AutoBackbone"
    }  # fmt: skip


def test_wrong_row_and_missing_file_leave_no_trace(hub, checkpoint, tmp_path):
    options = ["--repo_id", "user/none", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"best.pth is lvvit_t_224 \(12 layers.*not lvvit_s_224"):
        publish.main(["--variant", "lvvit_s_224", "--checkpoint", str(checkpoint), *options])
    with pytest.raises(SystemExit, match="No checkpoint file at"):
        publish.main(["--variant", "lvvit_s_224", "--checkpoint", "nowhere.pth", *options])
    with pytest.raises(KeyError):
        hub.files("user/none")
    assert not (tmp_path / "out").exists()


def test_converter_publishes(hub, tmp_path, capsys):
    """Five classes at 32 pixels are no published row: the card claims no accuracy."""
    config = variant_config("lvvit_t_224", image_size=32, num_labels=5)
    torch.save(original_state_dict(config), tmp_path / "mine.pth")
    convert([str(tmp_path / "mine.pth"), str(tmp_path / "out"), "--push_to_hub", "mine"])
    files = hub.files("user/mine")
    assert set(files) == MODEL | {"preprocessor_config.json", "SHA256SUMS"}
    card = ModelCard(files["README.md"].decode())
    assert card.data.eval_results is None and card.data.license is None and 'name = "user/mine"' in card.text
    assert "published: http" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "README.md", "modeling_lvvit.py"])
def test_incomplete_folders_are_refused(missing, tiny_model, processor, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# Model")
    (tmp_path / missing).unlink()
    with pytest.raises(SystemExit, match=f"is no complete model: it lacks .*{missing}"):
        publish.main(["--folder", str(tmp_path), "--repo_id", "user/net"])


@pytest.mark.parametrize(
    "options", [[], ["--variant", "lvvit_s_224"], ["--folder", "a", "--checkpoint", "b", "--variant", "lvvit_s_224"]]
)
def test_options_that_do_not_fit(options):
    with pytest.raises(SystemExit, match="Give --variant and --checkpoint, or --folder"):
        publish.main([*options, "--repo_id", "user/net"])


def test_weights_in_another_number_of_files_replace_the_old_ones(hub, processor, tmp_path):
    model = LVViTForImageClassification(tiny_config())
    for name, size in (("shards", "20KB"), ("whole", "1GB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        processor.save_pretrained(tmp_path / name)
        (tmp_path / name / "README.md").write_text("# Model")
        publish.main(["--folder", str(tmp_path / name), "--repo_id", "user/net"])
    assert [name for name in hub.files("user/net") if "safetensors" in name] == ["model.safetensors"]
    assert "model.safetensors.index.json" in hub.history("user/net")[1].files


def test_card_names_data_base_model_and_its_licence(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Start\n")
    HubTarget("user/start", token="hf_test").open().upload(tmp_path / "start", "First")
    HubTarget("user/bare", token="hf_test").open()
    args = ModelArguments(model_name_or_path="user/start")
    provenance = find_provenance(args, "user/images", "user/labels", "digit_scenes")
    assert provenance == Provenance(
        "user/images", ("user/images", "user/labels"), "user/start", "user/start", {"license": "cc-by-4.0"}
    )
    data = run_metadata("mine", "image-classification", provenance, ["accuracy"], ["lvvit"], [])
    assert (data.datasets, data.base_model) == (["user/images", "user/labels"], "user/start")
    for start, license_name in (("user/bare", None), (str(tmp_path / "nowhere"), None), (None, None)):
        found = find_provenance(ModelArguments(model_name_or_path=start), None, None, "digit_scenes").license
        assert found.get("license") == license_name
    args = ModelArguments(model_name_or_path=str(tmp_path / "start"), license="mit")
    provenance = find_provenance(args, str(tmp_path / "images"), None, "digit_scenes")
    assert provenance == Provenance("images", (), "start", None, {"license": "mit"})


def test_training_table_is_short_and_ends_with_the_last_evaluation():
    history = []
    for epoch in range(1, 101):
        history.append({"loss": 1 / epoch, "epoch": epoch, "step": 10 * epoch})
        history.append({"eval_raw_accuracy": 0.5, "epoch": epoch, "step": 10 * epoch})
        history.append({"eval_accuracy": epoch / 100, "eval_runtime": 3.0, "epoch": epoch, "step": 10 * epoch})
    history += [
        {"train_runtime": 60.0, "epoch": 100, "step": 1000},
        {"eval_accuracy": 0.0, "epoch": 100, "step": 1000},
    ]
    lines = training_table(history).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        "Epoch", "Step", "Training loss", "Evaluation raw accuracy", "Evaluation accuracy"
    ]  # fmt: skip
    assert len(lines) == 2 + 25 and lines[-1].split() == [
        "|",
        "100",
        "|",
        "1000",
        "|",
        "0.01",
        "|",
        "0.5",
        "|",
        "1.0",
        "|",
    ]
    assert "Training loss" in training_table([{"loss": 2.0, "epoch": 1, "step": 1}]) and training_table([]) == ""


def test_data_in_a_folder_with_two_names_is_no_data_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    (tmp_path / "runs" / "base" / "README.md").write_text(
        "---\nlicense: other\nlicense_name: house-rules\nlicense_link: LICENSE\n---\n# Base\n"
    )
    provenance = find_provenance(ModelArguments(model_name_or_path="runs/base"), "data/images", None, "digit_scenes")
    expected = {"license": "other", "license_name": "house-rules", "license_link": "LICENSE"}
    assert provenance == Provenance("images", (), "base", None, expected)


def test_card_in_the_repository_names_it_and_the_local_one_stays(hub, tmp_path):
    cards = {
        'classify = pipeline("image-classification", model="run", trust_remote_code=True)': (
            'classify = pipeline("image-classification", model="user/net", revision="wip", trust_remote_code=True)'
        ),
        'segment = pipeline("image-segmentation", model="a/b", revision="old", trust_remote_code=True)': (
            'segment = pipeline("image-segmentation", model="user/net", revision="wip", trust_remote_code=True)'
        ),
        'name = "lvvit_s_224"\nother = 1': 'name = "user/net"\nother = 1',
        "lvvit train --dataset_name x --token_labels THIS_FOLDER --variant v": (
            "lvvit train --dataset_name x --token_labels user/net --variant v"
        ),
    }
    target = HubTarget("user/net", revision="wip", token="hf_test").open()
    for text, expected in cards.items():
        (tmp_path / "README.md").write_text(text)
        target.upload(tmp_path, "Card")
        assert hub.files("user/net", revision="wip")["README.md"].decode() == expected
        assert (tmp_path / "README.md").read_text() == text


def test_own_script_gets_a_card_with_its_results(hub, tiny_model, labelled_rows, tmp_path):
    """`save_model` pushes, as in the library; a draft of it is written again, a card that somebody wrote is kept."""
    options = {**PUSH, "max_steps": 1}
    trainer = trainer_for(tiny_model, labelled_rows, tmp_path, **options)
    trainer.train()
    trainer.save_model()
    draft = hub.files("user/run")["README.md"].decode()
    trainer.evaluate(trainer.train_dataset)
    trainer.push_to_hub()
    assert (
        hub.files("user/run")["README.md"].decode() != draft
        and "Accuracy" in hub.files("user/run")["README.md"].decode()
    )
    (tmp_path / "README.md").write_text("# My own words\n")
    trainer.push_to_hub()
    assert hub.files("user/run")["README.md"] == b"# My own words\n"


def test_what_an_older_push_left_there_goes_or_is_named(hub, processor, tiny_model, tmp_path, monkeypatch):
    api = HfApi(token="hf_test")
    api.create_repo("user/net")
    for name in (
        "training_args.bin",
        "pytorch_model.bin",
        "model-00001-of-00002.safetensors",
        "models/model.safetensors",
        "old.pkl",
    ):
        api.upload_file(repo_id="user/net", path_or_fileobj=b"x" * 10, path_in_repo=name)
    tiny_model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# Model")
    warnings = []
    monkeypatch.setattr(hub_uploads.logger, "warning", lambda message, *values: warnings.append(message % values))
    publish.main(["--folder", str(tmp_path), "--repo_id", "user/net"])
    assert set(hub.files("user/net")) == MODEL | {"preprocessor_config.json", "models/model.safetensors", "old.pkl"}
    assert warnings == ["user/net also holds old.pkl, which may be pickles."]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", r"config.json must hold a JSON object, got list"),
        ("{", r"config.json is no whole json file"),
        ('{"auto_map": {"AutoTokenizer": ["tok.A", null], "AutoConfig": "me/other--conf.C"}}', r"it lacks tok.py\."),
    ],
)
def test_odd_configurations(content, message, tiny_model, processor, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# Model")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(SystemExit, match=message):
        publish.main(["--folder", str(tmp_path), "--repo_id", "user/net"])


def test_missing_shard_is_named(processor, tmp_path):
    LVViTForImageClassification(tiny_config()).save_pretrained(tmp_path, max_shard_size="20KB")
    processor.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# Model")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(SystemExit, match=f"it lacks {shard.name}"):
        publish.main(["--folder", str(tmp_path), "--repo_id", "user/net"])


def test_a_repository_holds_one_split_of_labels(hub, tmp_path):
    for split in ("train", "extra"):
        maps = random_maps(6)
        write_label_set(tmp_path / split, table_of(maps), layout_of(maps), split=split)
    publish.main(["--folder", str(tmp_path / "train"), "--repo_id", "user/labels"])
    before = hub.files("user/labels", "dataset")
    with pytest.raises(
        SystemExit, match="holds data/train-00000.parquet, of another split.*Publish the split 'extra' under another"
    ):
        publish.main(["--folder", str(tmp_path / "extra"), "--repo_id", "user/labels"])
    assert hub.files("user/labels", "dataset") == before
    maps = random_maps(3)  # a smaller set in the place of the larger one: no shard is left of that
    write_label_set(tmp_path / "small", table_of(maps), layout_of(maps))
    publish.main(["--folder", str(tmp_path / "small"), "--repo_id", "user/labels"])
    assert [name for name in hub.files("user/labels", "dataset") if name.startswith("data/")] == [
        "data/train-00000.parquet"
    ]
    (tmp_path / "train" / "data" / "train-00001.parquet").unlink()
    with pytest.raises(SystemExit, match="data/train-00001.parquet is missing"):
        publish.main(["--folder", str(tmp_path / "train"), "--repo_id", "user/labels"])


@pytest.mark.parametrize("has_digests", [True, False])
@pytest.mark.parametrize("name", ["data/train-00001.parquet", "token_labels.json"])
def test_damaged_files_of_label_sets_are_named(name, has_digests, tmp_path):
    maps = random_maps(6)
    folder = write_label_set(tmp_path / "set", table_of(maps), layout_of(maps))
    (folder / name).write_bytes((folder / name).read_bytes()[:-60])
    if not has_digests:
        (folder / DIGESTS).unlink()
    with pytest.raises(SystemExit, match=f"{name} is damaged"):
        publish.main([str(folder), "user/labels"])
