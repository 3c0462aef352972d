"""Cards: their commands can be copied as they stand, and they list what had an effect."""

from types import SimpleNamespace

import pytest

from modeling_lvvit.cli.model_card import model_location, reported_options
from modeling_lvvit.data.files.shard_folder import package_versions
from modeling_lvvit.labels import publishing
from modeling_lvvit.labels.publishing import finish_label_set
from modeling_lvvit.labels.writer import LabelSetWriter
from support.label_sets import layout_of, random_maps, table_of


@pytest.mark.parametrize(
    ("is_pushed", "folder", "location"),
    [(False, "runs/my cats", '"runs/my cats"'), (False, 'a"b', r'"a\"b"'), (True, "runs/cats", '"user/cats"')],
)
def test_example_loads_the_folder_as_given_or_the_repository(is_pushed, folder, location):
    args = SimpleNamespace(push_to_hub=is_pushed, hub_model_id="user/cats" if is_pushed else None, output_dir=folder)
    assert model_location(SimpleNamespace(hub_model_id=None, args=args)) == location


@pytest.mark.parametrize("trains_patches", [True, False])
def test_plain_runs_list_no_options_of_patches(trains_patches):
    trainer = SimpleNamespace(trains_patches=trains_patches, args=SimpleNamespace(mix_probability=0.0))
    listed = reported_options(trainer)
    assert {"dense_weight", "patch_target", "cls_target"} & {*listed} == (
        {"dense_weight", "patch_target", "cls_target"} if trains_patches else set()
    )
    assert "mix_probability" in listed and "mix_methods" not in listed


@pytest.mark.parametrize(
    ("few", "model_options"), [(50_000, "--preset own_images --variant auto"), (3, "--variant lvvit_s_224")]
)
def test_command_of_a_label_set_quotes_names_and_fits_the_number_of_images(few, model_options, tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "FEW_IMAGES", few)
    maps = random_maps(3)
    layout = layout_of(maps)
    writer = LabelSetWriter(tmp_path, "train", layout, {"dataset": "solar cells"}, package_versions(), 3)
    writer.begin()
    writer.write(0, table_of(maps, layout))
    finish_label_set(writer, 1, "Dice", None)
    writer.release()
    command = f"lvvit train --dataset_name 'solar cells' --token_labels THIS_FOLDER {model_options} --output_dir run"
    assert command in (tmp_path / "README.md").read_text()
