"""Rules of the code base that a test can see."""

import ast
import re
import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "modeling_lvvit"
LIGHT = {"torch", "transformers", "copy", "math", "dataclasses", "collections", "types", "typing"}
# file -> the modules of the package that it may import
HUB_FILES = {
    "configuration_lvvit.py": set(),
    "modeling_lvvit.py": {"configuration_lvvit"},
}
TOKEN_LABELING = {
    "label_maps.py": set(),
    "label_columns.py": set(),
    "label_crops.py": {"label_maps"},
    "pictures.py": set(),
    "randomness.py": set(),
    "rand_augment.py": set(),
    "transforms.py": {"rand_augment"},
    "feature_layout.py": set(),
    "feature_search.py": {"feature_layout"},
    "dense_classifier.py": {"feature_search"},
    "input_size.py": {"feature_layout", "feature_search"},
    "class_matching.py": set(),
    "class_labels.py": {"class_matching"},
    "whole_files.py": set(),
    "published_files.py": set(),
    "hub.py": {"published_files"},
    "publishing.py": {"hub", "published_files", "whole_files"},
    "label_sets.py": {"label_columns", "label_maps", "whole_files"},
    "label_source.py": {"label_columns", "label_sets"},
    "image_keys.py": set(),
    "label_join.py": {"class_matching", "image_keys", "label_sets", "label_source", "pictures"},
    "label_set_writer.py": {"image_keys", "label_sets", "whole_files"},
    "label_set_publishing.py": {
        "hub",
        "image_keys",
        "label_columns",
        "label_set_writer",
        "label_sets",
        "published_files",
        "whole_files",
    },
    "label_set_check.py": {
        "annotation",
        "image_keys",
        "label_columns",
        "label_crops",
        "label_maps",
        "label_set_writer",
        "label_sets",
        "label_source",
    },
    "image_rows.py": {"image_keys"},
    "annotation.py": {"label_maps", "label_sets", "pictures"},
    "preprocessing.py": set(),
    "annotators.py": {
        "class_matching",
        "data_sources",
        "dense_classifier",
        "input_size",
        "patch_head",
        "preprocessing",
    },
    "feature_tap.py": {"feature_layout", "feature_search"},
    "patch_head.py": {"feature_search", "feature_tap", "input_size"},
    "live_labels.py": {"annotators", "class_labels", "label_crops", "label_maps", "sides"},
    "collator.py": {"label_maps", "randomness"},
    "losses.py": {"label_maps"},
    "objective.py": {"arguments", "label_crops", "label_maps", "losses"},
    "counted_metric.py": set(),
    "shared_rows.py": set(),
    "sides.py": set(),
    "metrics.py": set(),
    "batch_norm.py": set(),
    "schedule.py": {"arguments"},
    "throughput.py": set(),
    "sharding.py": {"run_arguments"},
    "model_fit.py": {"arguments", "dataset", "input_size", "live_labels", "patch_head", "stream"},
    "run_arguments.py": {"batch_norm"},
    "arguments.py": {"collator", "label_crops", "run_arguments"},
    "callbacks.py": set(),
    "ema.py": {"schedule"},
    "picture_dataset.py": {"pictures", "randomness"},
    "dataset.py": {"label_columns", "label_sets", "label_source", "picture_dataset", "pictures"},
    "data_sources.py": set(),
    "data_arguments.py": {"label_columns", "live_labels", "transforms"},
    "data.py": {
        "class_labels",
        "data_arguments",
        "data_sources",
        "label_columns",
        "label_crops",
        "label_join",
        "label_set_writer",
        "label_source",
        "published_files",
    },
    "stream.py": {"image_keys", "image_rows", "label_columns", "label_join", "label_source", "pictures", "randomness"},
    "run_trainer.py": {
        "batch_norm",
        "callbacks",
        "patch_head",
        "picture_dataset",
        "publishing",
        "randomness",
        "run_arguments",
        "schedule",
        "sharding",
        "throughput",
    },
    "trainer.py": {
        "arguments",
        "callbacks",
        "collator",
        "ema",
        "live_labels",
        "metrics",
        "model_fit",
        "objective",
        "run_trainer",
        "schedule",
        "stream",
        "throughput",
    },
    "__init__.py": {
        "arguments",
        "collator",
        "dataset",
        "input_size",
        "live_labels",
        "patch_head",
        "stream",
        "trainer",
        "transforms",
    },
}
WITHOUT_TRANSFORMERS = {
    "label_maps.py",
    "label_crops.py",
    "label_columns.py",
    "label_sets.py",
    "label_source.py",
    "pictures.py",
    "randomness.py",
    "rand_augment.py",
    "transforms.py",
    "annotation.py",
    "collator.py",
    "losses.py",
}
WITH_TIMM = {"annotators.py", "class_matching.py", "live_labels.py", "rand_augment.py", "transforms.py"}


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """Absolute roots and relative modules that a file imports."""
    roots, relative = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots.add(node.module.partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            relative.add("." * (node.level - 1) + (node.module or ""))
    return roots, relative


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_files_need_only_torch_and_transformers(name):
    roots, relative = imports_of(PACKAGE / name)
    assert roots <= LIGHT
    assert relative <= HUB_FILES[name]


def test_every_token_labeling_file_has_a_rule():
    assert {path.name for path in (PACKAGE / "token_labeling").glob("*.py")} == set(TOKEN_LABELING)


@pytest.mark.parametrize("name", TOKEN_LABELING)
def test_token_labeling_imports_no_model(name):
    roots, relative = imports_of(PACKAGE / "token_labeling" / name)
    assert relative <= TOKEN_LABELING[name]
    assert not roots & {"modeling_lvvit", "dataset_scripts"}
    assert "timm" not in roots or name in WITH_TIMM
    if name in WITHOUT_TRANSFORMERS:
        assert "transformers" not in roots


def test_dataset_scripts_import_no_model():
    for path in (ROOT / "dataset_scripts").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("modeling_lvvit"):
                rooms = ["token_labeling", "launching", "visualization"]
                rooms += [f"segmentation.{part}" for part in ("class_names", "masks", "set_writer")]
                assert node.module.startswith(tuple(f"modeling_lvvit.{room}" for room in rooms)), path


def python_files() -> list[Path]:
    folders = [PACKAGE, ROOT / "dataset_scripts", ROOT / "tests"]
    return [*(path for folder in folders for path in folder.rglob("*.py")), ROOT / "train_tl.py", ROOT / "setup.py"]


def test_functions_are_at_most_sixty_lines():
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                docstring = ast.get_docstring(node, clean=False) or ""
                assert node.end_lineno - node.lineno - docstring.count("\n") <= 60, f"{path.name}: {node.name}"


def test_every_file_and_public_name_has_a_docstring():
    for path in [path for path in python_files() if "tests" not in path.parts]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree) or not tree.body, path
        for node in tree.body:
            if (
                isinstance(node, (ast.FunctionDef, ast.ClassDef))
                and not node.name.startswith("_")
                and node.name != "main"
            ):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_nothing_loads_pickles_unsafely():
    for path in python_files():
        for call in re.findall(r"torch\.load\([^)]*\)", path.read_text(encoding="utf-8")):
            assert "weights_only=True" in call or path.parent.name == "tests", path


def test_top_level_is_as_agreed():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    allowed = {"modeling_lvvit", "dataset_scripts", "tests", "model_cards", "train_tl.py", "setup.py"}
    allowed |= {"README.md", "LICENSE", "CONTRIBUTING.md", "pyproject.toml"}
    assert {name.split("/")[0] for name in tracked if not name.startswith(".")} <= allowed


def test_readme_names_the_command_that_ci_runs():
    command = (ROOT / ".ci" / "run").read_text(encoding="utf-8").strip().splitlines()[-1]
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
