"""Recipes and options."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from modeling_lvvit.cli.data_arguments import DataArguments
from modeling_lvvit.cli.model_arguments import ModelArguments
from modeling_lvvit.cli.parser import find_recipe, parse, recipe_names
from modeling_lvvit.token_labeling import TokenLabelTrainingArguments
from modeling_lvvit.training.checkpoints.output_dir import discard_overwritten_checkpoints, prepare_output_dir


def write_recipe(folder, **options) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(options))
    return str(path)


def test_no_arguments_mean_the_embedded_recipe():
    model_args, data_args, training_args = parse([])
    assert data_args.dataset_name is None
    assert model_args.image_height_width == (64, 64)
    assert training_args.output_dir == "outputs/digit_scenes"


def test_options_override_the_embedded_recipe():
    model_args, _, training_args = parse(["--bf16", "--max_steps", "7"])
    assert training_args.max_steps == 7
    assert training_args.bf16 is True
    assert model_args.config_overrides is not None


def test_options_that_are_not_given_have_the_defaults_of_their_classes():
    given = ["--dataset_name", "pets", "--output_dir", "runs/a"]
    defaults = (
        ModelArguments(),
        DataArguments(dataset_name="pets"),
        TokenLabelTrainingArguments(output_dir="runs/a"),
    )
    for parsed, default in zip(parse(given), defaults):
        for entry in dataclasses.fields(default):
            assert getattr(parsed, entry.name) == getattr(default, entry.name), entry.name
    assert parse([*given, "--no_use_token_labels"])[1].use_token_labels is False


def test_own_data_start_from_the_defaults():
    model_args, data_args, training_args = parse(["--dataset_name", "pets", "--variant", "lvvit_t_224"])
    assert (data_args.dataset_name, data_args.horizontal_flip) == ("pets", 0.5)
    assert model_args.config_overrides is None
    assert training_args.weight_decay == 0.05


def test_options_override_a_recipe_file(tmp_path):
    recipe = write_recipe(tmp_path, dataset_name="pets", learning_rate="2e-3", num_train_epochs=3, seed=5)
    _, data_args, training_args = parse([recipe, "--num_train_epochs", "9"])
    assert data_args.dataset_name == "pets"
    assert (training_args.learning_rate, training_args.num_train_epochs, training_args.seed) == (2e-3, 9, 5)


@pytest.mark.parametrize("text", ['{"hidden_size": 64}', "{hidden_size: 64}"])
def test_configuration_overrides_are_a_mapping(text):
    assert parse(["--dataset_name", "pets", "--config_overrides", text])[0].config_overrides == {"hidden_size": 64}


def test_unknown_recipe_key_is_named_with_the_nearest_one(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"recipe.yaml has unknown options: learning_rat \(did you mean learning_rate or base_learning_rate\?\)",
    ):
        parse([write_recipe(tmp_path, learning_rat=1e-3)])


def test_unknown_option_is_named_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"--dense_wieght \(did you mean --dense_weight\?\)"):
        parse(["--dense_wieght", "1"])


def test_missing_and_malformed_recipes_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="ships only: ablation.1_deit_s.*digit_scenes"):
        parse(["nowhere.yaml"])
    with pytest.raises(FileNotFoundError, match=r"own_image \(did you mean own_images\?\)"):
        parse(["--preset", "own_image", "--dataset_name", "pets"])
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1")
    with pytest.raises(ValueError, match="not valid YAML"):
        parse([str(bad)])
    bad.write_text("- a\n- b")
    with pytest.raises(ValueError, match="must be a mapping"):
        parse([str(bad)])


def test_unknown_variants_are_named_with_the_nearest_ones():
    with pytest.raises(ValueError, match=r"'lvvit_s' \(did you mean lvvit_s_224 or lvvit_s_384\?\).*, auto"):
        parse(["--variant", "lvvit_s"])
    with pytest.raises(ValueError, match=r"'lvvit_t224' \(did you mean lvvit_t_224"):
        parse(["--variant", "lvvit_t224"])


def test_two_sources_of_the_model_are_refused():
    with pytest.raises(ValueError, match="Give one of"):
        parse(["--variant", "lvvit_t_224", "--model_name_or_path", "x"])


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_parses(name):
    assert find_recipe(name).is_file()
    parse([name])


def test_output_directory_of_another_run_is_refused(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    model_args, _, training_args = parse(["--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="holds another run"):
        prepare_output_dir(training_args, None, model_args.overwrite_output_dir)
    model_args, _, training_args = parse(["--output_dir", str(tmp_path), "--overwrite_output_dir"])
    prepare_output_dir(training_args, None, model_args.overwrite_output_dir)


def test_resuming_finds_the_last_checkpoint(tmp_path):
    model_args, _, training_args = parse(["--output_dir", str(tmp_path), "--resume_from_checkpoint", "last"])
    with pytest.raises(ValueError, match="no whole checkpoint"):
        prepare_output_dir(training_args, None, model_args.overwrite_output_dir)
    for step in (9, 10, 11):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
        torch.save({}, folder / "scheduler.pt")
        (folder / "trainer_state.json").write_text("{}" if step < 11 else "{cut o")
    model_args, _, training_args = parse(["--output_dir", str(tmp_path), "--resume_from_checkpoint", "last"])
    prepare_output_dir(training_args, None, model_args.overwrite_output_dir)
    assert training_args.resume_from_checkpoint.endswith("checkpoint-10")


def test_resuming_elsewhere_does_not_open_the_way_into_another_run(tmp_path):
    checkpoint = tmp_path / "mine" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.zeros(1)}, checkpoint / "model.safetensors")
    torch.save({}, checkpoint / "scheduler.pt")
    (checkpoint / "trainer_state.json").write_text("{}")
    (tmp_path / "other").mkdir()
    save_file({"weight": torch.zeros(1)}, tmp_path / "other" / "model.safetensors")
    options = ["--output_dir", str(tmp_path / "other"), "--resume_from_checkpoint", str(checkpoint)]
    model_args, _, training_args = parse(options)
    with pytest.raises(ValueError, match="holds another run"):
        prepare_output_dir(training_args, None, model_args.overwrite_output_dir)


@pytest.mark.parametrize("was_sharded", [True, False])
def test_sharded_and_whole_optimizer_states_are_not_mixed(was_sharded, tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    save_file({"weight": torch.zeros(1)}, checkpoint / "model.safetensors")
    for name in ("scheduler.pt", *(["pytorch_model_fsdp.bin"] if was_sharded else [])):
        torch.save({}, checkpoint / name)
    (checkpoint / "trainer_state.json").write_text("{}")
    model_args, _, training_args = parse(["--output_dir", str(tmp_path), "--resume_from_checkpoint", str(checkpoint)])
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(not was_sharded).lower())
    words = ("with", "without") if was_sharded else ("without", "with")
    with pytest.raises(ValueError, match="was written {} FSDP and cannot be continued {} it".format(*words)):
        prepare_output_dir(training_args, None, model_args.overwrite_output_dir)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(was_sharded).lower())
    prepare_output_dir(training_args, None, model_args.overwrite_output_dir)


def test_later_recipes_override_earlier_ones_and_merge_configurations(tmp_path):
    first = write_recipe(tmp_path, dataset_name="pets", seed=5, config_overrides={"hidden_size": 64, "patch_size": 8})
    second = tmp_path / "second.yaml"
    second.write_text(f"base: {first}\nseed: 6\nconfig_overrides:\n  patch_size: 4\n")
    third = tmp_path / "third.yaml"
    third.write_text("config_overrides:\n  num_hidden_layers: 3\n")
    model_args, data_args, training_args = parse([str(second), str(third), "--max_steps", "2"])
    assert (data_args.dataset_name, training_args.seed, training_args.max_steps) == ("pets", 6, 2)
    assert model_args.config_overrides == {"hidden_size": 64, "patch_size": 4, "num_hidden_layers": 3}


def test_of_several_bases_the_later_ones_hold(tmp_path):
    first, second, recipe = (tmp_path / name for name in ("first.yaml", "second.yaml", "recipe.yaml"))
    first.write_text("seed: 1\nlearning_rate: 0.1\nweight_decay: 0.1\nconfig_overrides:\n  patch_size: 4\n")
    second.write_text("seed: 2\nlearning_rate: 0.2\nconfig_overrides:\n  hidden_size: 8\n")
    recipe.write_text(f"base: [{first}, {second}]\nseed: 3\n")
    model_args, _, training_args = parse([str(recipe)])
    assert (training_args.seed, training_args.learning_rate, training_args.weight_decay) == (3, 0.2, 0.1)
    assert model_args.config_overrides == {"patch_size": 4, "hidden_size": 8}


def test_recipe_that_is_its_own_base_is_refused(tmp_path):
    loop = tmp_path / "loop.yaml"
    loop.write_text(f"base: {loop}\n")
    with pytest.raises(ValueError, match="is its own base"):
        parse([str(loop)])


@pytest.mark.parametrize("option", ["--dataset_name", "--dataset-name"])
def test_own_data_never_get_the_embedded_recipe(option):
    assert parse([option, "pets"])[1].horizontal_flip == 0.5


def test_another_model_replaces_the_shape_of_the_embedded_one():
    model_args, data_args, _ = parse(["--variant", "lvvit_t_224"])
    assert model_args.config_overrides is None
    assert model_args.image_size is None
    assert data_args.horizontal_flip == 0.0


BAD_VALUES = {
    "num_train_epochs": "many",
    "gradient_accumulation_steps": 2.5,
    "image_size": 32.5,
    "crop_scale_min": None,
    "seed": [1],
    "cls_target": "both",
    "use_token_labels": [1],
    "config_overrides": [1],
}


@pytest.mark.parametrize("option", BAD_VALUES)
def test_bad_recipe_values_are_named(option, tmp_path):
    with pytest.raises(ValueError, match=f"option {option} cannot be"):
        parse([write_recipe(tmp_path, **{option: BAD_VALUES[option]})])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{hiden_size: 32}", r"hiden_size \(did you mean hidden_size"),
        ("{image_size: 64}", "may not set"),
        ("{a: [", "neither"),
    ],
)
def test_bad_configuration_overrides_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse(["--config_overrides", text])


def test_one_of_two_alternatives_replaces_that_of_a_recipe(tmp_path):
    recipe = write_recipe(tmp_path, variant="lvvit_t_224", base_ema_decay=0.999)
    model_args, _, training_args = parse([recipe, "--model_name_or_path", "x", "--ema_decay", "0.5"])
    assert (model_args.variant, model_args.model_name_or_path) == (None, "x")
    assert (training_args.base_ema_decay, training_args.ema_decay) == (None, 0.5)
    later = tmp_path / "later.yaml"
    later.write_text("ema_decay: 0.9")
    assert parse([recipe, str(later)])[2].base_ema_decay is None


def test_configuration_fields_of_options_and_recipe_are_merged(tmp_path):
    recipe = write_recipe(tmp_path, config_overrides={"hidden_size": 64, "drop_path_rate": 0.1})
    model_args, _, _ = parse([recipe, "--config_overrides", "{drop_path_rate: 0.3}"])
    assert model_args.config_overrides == {"hidden_size": 64, "drop_path_rate": 0.3}


def test_lists_of_loggers_and_an_unquoted_no_are_understood(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("report_to: [tensorboard, wandb]\neval_strategy: no\n")
    training_args = parse([str(recipe)])[2]
    assert (training_args.report_to, training_args.eval_strategy.value) == (["tensorboard", "wandb"], "no")


def test_checkpoints_of_a_run_that_is_written_over_are_discarded(tmp_path):
    (tmp_path / "checkpoint-120").mkdir()
    for options, remains in (
        (["--resume_from_checkpoint", "x"], True),
        ([], True),
        (["--overwrite_output_dir"], False),
    ):
        model_args, _, training_args = parse(["--output_dir", str(tmp_path), *options])
        discard_overwritten_checkpoints(training_args, model_args.overwrite_output_dir)
        assert (tmp_path / "checkpoint-120").exists() == remains


def test_folders_that_cannot_be_written_are_named_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    model_args, _, training_args = parse(["--output_dir", str(tmp_path / "new" / "run")])
    with pytest.raises(ValueError, match=f"cannot be written: {tmp_path} is read-only"):
        prepare_output_dir(training_args, None, model_args.overwrite_output_dir)
