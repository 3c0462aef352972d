"""The shipped recipes: what they say, which models they make, and that each of them runs."""

import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch
from transformers import AutoModelForImageClassification

import train_tl
from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.cli.build_model import build_model
from modeling_lvvit.cli.parser import RECIPES, parse, recipe_names
from modeling_lvvit.original.convert import convert_state_dict
from modeling_lvvit.token_labeling import TokenLabelTrainer
from modeling_lvvit.training.schedule import published_factor, scaled_ema_decay
from modeling_lvvit.variants import VARIANTS, variant_config
from support.programs import ROOT


PARITY = ROOT / "tests" / "parity"
SELF_EMERGING = ("self_emerging/labeler", "self_emerging/student")
PARTS = (
    "imagenet_base",
    "try_out",
    "cifar10",
    "small_ablation/cifar10",
    *SELF_EMERGING,
)  # to be combined with others
PUBLISHED = [name for name in recipe_names() if name.startswith(("lvvit", "ablation"))]
FINE_TUNED = {
    name: name.removesuffix("_plain")
    for name in PUBLISHED
    if name.startswith("lvvit") and "224" not in name and "288" not in name
}
STUDIES = [
    name
    for name in recipe_names()
    if name.startswith(("architectures/", "architectures_cifar10/", "annotator_study/"))
]
# one of each kind; the others differ in numbers
RUN_STUDIES = [name for name in STUDIES if name.startswith("architectures/") or name.endswith(("cifar10/swin", "_1"))]
THOUSAND = [f"class {index}" for index in range(1000)]


@pytest.mark.parametrize("name", [name for name in recipe_names() if name not in PARTS])
def test_recipe_headers_say_what_to_expect(name):
    head = [line for line in (RECIPES / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    for field in ("command:", "expected:", "duration:"):
        assert any(field in line for line in head), field
    assert any("devices:" in line or "hardware:" in line for line in head)
    assert any(f"lvvit train {name}" in line for line in head) or name == "digit_scenes"


@pytest.mark.parametrize("name", [name for name in recipe_names() if name not in PARTS])
def test_recipes_for_gpus_compile_and_those_for_cpus_do_not(name):
    """What is compiled has full batches only: another shape is another graph."""
    head = (RECIPES / f"{name}.yaml").read_text()
    training_args = parse([name, "--output_dir", "run"])[2]
    assert training_args.torch_compile == training_args.dataloader_drop_last == ("devices:   8 GPUs" in head)
    assert not parse([name, "try_out"])[2].torch_compile


def test_every_published_row_has_its_recipe_and_a_plain_baseline():
    rows = {name for name in VARIANTS if VARIANTS[name].published_top1} - {
        "lvvit_m_448"
    }  # that one is the repository's only
    assert rows <= set(recipe_names())
    assert {f"{name}_plain" for name in rows} <= set(recipe_names())
    assert sum(name.startswith("ablation/") for name in PUBLISHED) == 7


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in FINE_TUNED])
def test_recipes_instantiate_the_exact_model(name):
    model_args, _, training_args = parse([name])
    with torch.device("meta"):
        model, processor = build_model(model_args, THOUSAND)
    variant = model_args.variant or "lvvit_s_224"
    if not name.startswith("ablation") or name >= "ablation/5":
        assert model.num_parameters() == VARIANTS[variant].num_parameters
        assert processor.size["shortest_edge"] == int(model.config.image_height_width[0] / VARIANTS[variant].crop_pct)
    rates = {"t": 0.0, "s": 0.1, "m": 0.2, "l": 0.3}
    assert model.config.drop_path_rate == rates[variant[6]]
    assert training_args.num_train_epochs == 310


def test_ablation_starts_at_deit_s():
    """22.05 million parameters (Touvron et al. 2021), next to the auxiliary head that plain labels leave alone."""
    with torch.device("meta"):
        model, _ = build_model(parse(["ablation/1_deit_s"])[0], THOUSAND)
    assert model.num_parameters() - model.patch_classifier.weight.numel() - 1000 == 22_050_664


@pytest.mark.parametrize("name", FINE_TUNED)
def test_fine_tuning_recipes_resize_to_the_published_model(name):
    model_args, _, training_args = parse([name])
    start = Path(model_args.model_name_or_path).name.removesuffix("_plain")
    assert model_args.model_name_or_path.endswith("_plain") == name.endswith("_plain")
    with torch.device("meta"):
        model = LVViTForImageClassification(variant_config(start))
    model.to_empty(device="cpu").resize_position_embeddings(model_args.image_size[0])
    assert model.num_parameters() == VARIANTS[FINE_TUNED[name]].num_parameters
    images = 8 * training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    assert images == 512
    assert training_args.base_learning_rate * images / 1024 == 5e-6


def test_plain_recipes_differ_in_the_labels_only():
    for name in PUBLISHED:
        if name.endswith("_plain"):
            parts = zip(parse([name]), parse([name.removesuffix("_plain")]))
            changed = {
                entry.name
                for plain, dense in parts
                for entry in dataclasses.fields(plain)
                if getattr(plain, entry.name) != getattr(dense, entry.name)
            }
            assert changed <= {"use_token_labels", "output_dir", "model_name_or_path"}


@pytest.mark.parametrize("folder", ["architectures", "architectures_cifar10"])
def test_architectures_differ_in_the_model_only(folder):
    """Equal budget: data, augmentation and schedule are those of the LV-ViT."""
    of_model = {"architecture", "config_overrides", "image_size"}
    for name in [name for name in STUDIES if name.startswith(f"{folder}/")]:
        changed = {
            entry.name
            for ours, others in zip(parse([f"{folder}/lvvit"]), parse([name]))
            for entry in dataclasses.fields(ours)
            if getattr(ours, entry.name) != getattr(others, entry.name)
        }
        assert changed - of_model <= {"output_dir"}, name


def test_annotators_of_the_study_differ_in_what_they_have_seen():
    """Each student names the annotator of its number."""
    budgets = []
    for number in range(1, 5):
        _, data, training = parse([f"annotator_study/annotator_{number}"])
        assert not data.use_token_labels
        budgets.append((data.max_train_samples, data.max_train_samples * training.num_train_epochs))
        assert parse([f"annotator_study/student_{number}"])[1].annotator == training.output_dir
    assert budgets == sorted(budgets)


@pytest.mark.parametrize(
    ("name", "millions"), [("deit_s", 22.05), ("swin_t", 28.29), ("resnet50", 25.56), ("mixer_b16", 59.88)]
)
def test_architectures_at_full_size(name, millions):
    """The published numbers of parameters: DeiT 22.1, Swin 28.3, ResNet 25.6, Mixer 59.9 million."""
    model_args, _, _ = parse([f"architectures_imagenet/{name}"])
    assert model_args.image_size == [224] and model_args.variant is None
    with torch.device("meta"):
        model = timm.create_model(model_args.architecture.removeprefix("timm/"))
    assert sum(value.numel() for value in model.parameters()) == pytest.approx(1e6 * millions, rel=1e-3)


def test_published_schedule_has_the_published_values():
    """Learning rates of the authors' run at 1.6e-3 (timm 0.4.5), epoch by epoch."""
    expected = {0: 1e-6, 1: 3.208e-4, 2: 6.406e-4, 3: 9.604e-4, 4: 1.2802e-3, 5: 1.598910e-3, 50: 1.493490e-3}
    expected |= {150: 8.05e-4, 250: 1.165098e-4, 299: 1.00436e-5, 300: 1e-5, 309: 1e-5}
    for epoch, value in expected.items():
        assert 1.6e-3 * published_factor(epoch, 300, 5, 1e-6 / 1.6e-3, 1e-5 / 1.6e-3) == pytest.approx(value, rel=1e-5)


def test_average_follows_batch_size_and_length():
    assert scaled_ema_decay(0.99992, 1024, 387_810) == pytest.approx(0.99992)
    assert scaled_ema_decay(0.99992, 512, 775_620) == pytest.approx(0.99996)
    assert scaled_ema_decay(0.99992, 1024, 1000) == pytest.approx(0.99)
    assert scaled_ema_decay(0.99992, 32, 5) == 0.0


@pytest.mark.parametrize("size", ["t_224", "s_224", "m_224", "l_288"])
def test_parameter_groups_are_the_authors(size):
    groups = json.loads((PARITY / "parameter_groups.json").read_text())
    with torch.device("meta"):
        model = LVViTForImageClassification(variant_config(f"lvvit_{size}"))
    depth = groups["depths"][f"lvvit_{size[0]}"]
    names = {group: [name.replace("*", str(index)) for name in groups[group] for index in range(depth if "*" in name else 1)]
             for group in ("decay", "no_decay")}  # fmt: skip
    ours = {group: set(convert_state_dict(dict.fromkeys(theirs))) for group, theirs in names.items()}
    decayed = set(TokenLabelTrainer.get_decay_parameter_names(None, model))
    assert decayed == ours["decay"]
    assert {name for name, _ in model.named_parameters()} - decayed == ours["no_decay"]


@pytest.fixture(scope="module")
def start_folder(tmp_path_factory) -> Path:
    """A small model that fine-tuning recipes start from."""
    folder = tmp_path_factory.mktemp("start") / "model"
    train_tl.main(
        ["lvvit_s_224", "try_out", "--output_dir", str(folder), "--report_to", "none", "--save_picture", "False"]
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*PUBLISHED, *(name for name in recipe_names() if name.startswith("small_ablation/"))]
)
def test_every_recipe_runs_three_steps(name, start_folder, tmp_path):
    options = ["--output_dir", str(tmp_path / "run"), "--report_to", "none", "--save_picture", "False"]
    if name in FINE_TUNED:
        options += ["--model_name_or_path", str(start_folder), "--image_size", "96"]
    if name in PARTS:
        pytest.skip("belongs to another recipe")
    train_tl.main([name, "try_out", *options])
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    side = 96 if name in FINE_TUNED else 64
    assert model.config.image_height_width == (side, side)
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_STUDIES)
def test_studies_run_three_steps(name, start_folder, tmp_path, capsys):
    """On the embedded data, also those that are meant for CIFAR-10; an annotator with the right classes is at hand."""
    options = ["--dataset_name", "digit_scenes", "--output_dir", str(tmp_path / "run"), "--report_to", "none"]
    options += ["--max_steps", "3", "--max_train_samples", "64", "--max_eval_samples", "32", "--save_picture", "False"]
    if "student" in name:
        options += ["--annotator", str(start_folder)]
    train_tl.main([name, *options])
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 3
    assert "eval_accuracy" in json.loads((tmp_path / "run" / "eval_results.json").read_text())
    if "student" in name:
        assert "of 64 crops have the human label as their first class" in capsys.readouterr().out


def test_self_emerging_recipes_stand_behind_own_images():
    """As in the README of the annotators."""
    images = ["--dataset_name", "path/to/images", "--variant", "auto"]
    recipes = ["own_images", "self_emerging/labeler"]
    model_args, data_args, training_args = parse([*recipes, *images, "--output_dir", "runs/labeler"])
    assert (model_args.preset, model_args.variant, data_args.rand_augment) == ("own_images", "auto", "none")
    assert (training_args.patch_target, training_args.cls_target, data_args.use_token_labels) == (
        "image",
        "label",
        False,
    )
    assert (training_args.output_dir, training_args.min_steps) == ("runs/labeler", 4000)
    recipes = ["own_images", "self_emerging/student"]
    options = [*images, "--annotator", "runs/labeler", "--output_dir", "runs/student"]
    model_args, data_args, training_args = parse([*recipes, *options])
    assert (data_args.annotator, data_args.annotator_sampling) == ("runs/labeler", "hard")
    assert (training_args.patch_target, training_args.cls_target) == ("dense", "label")
    assert (model_args.variant, training_args.output_dir) == ("auto", "runs/student")
