"""Rules of the code base that a test can see."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.programs import ROOT


PACKAGE = ROOT / "modeling_lvvit"
# package -> the packages that it may import; the root of `modeling_lvvit` holds the model and thin programs
LAYERS = {
    "data": "",
    "hub": "data",
    "backbones": "data",
    "labels": "data hub",
    "training": "data hub backbones",
    "per_class": "data training",
    "annotators": "data hub backbones labels per_class",
    "token_labeling": "data labels backbones annotators training per_class",
    "cli": "data hub labels backbones annotators token_labeling training per_class",
    "evaluate": "data backbones training per_class token_labeling cli",
    "visualization": "data labels backbones annotators token_labeling training cli evaluate",
    "segmentation": "data hub backbones training per_class cli visualization",
    "study": "data training cli",
    "original": "data hub backbones labels",
    "export": "data backbones",
    "benchmark": "data labels token_labeling original export",
    "demo": "data hub backbones annotators evaluate visualization segmentation export",
}
PROGRAMS = {
    "options": "data",
    "publish": "original hub labels",
    "convert_original_checkpoint": "original",
    "family_cards": "original",
}
TRAVELS = ("configuration_lvvit", "modeling_lvvit")  # what every saved model carries


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports, absolute names."""
    package, modules = path.relative_to(ROOT).parent.parts, set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            modules |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return modules


def test_packages_import_only_the_layers_below():
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == set(LAYERS)
    for path in PACKAGE.rglob("*.py"):
        inside = path.relative_to(PACKAGE).parts
        allowed = [*LAYERS[inside[0]].split(), inside[0]] if len(inside) > 1 else PROGRAMS.get(path.stem, "").split()
        modules = imports_of(path)
        packages = {name.split(".")[1] for name in modules if name.startswith("modeling_lvvit.")} & set(LAYERS)
        assert packages <= set(allowed), f"{path.relative_to(ROOT)} imports {packages - set(allowed)}"
        assert not {name.split(".")[0] for name in modules} & {"dataset_scripts", "train_tl", "support"}, path


def test_layers_have_no_circles():
    order = list(LAYERS)
    below = {name: set(allowed.split()) for name, allowed in LAYERS.items()}
    while order:
        lowest = [name for name in order if not below[name] & set(order)]
        assert lowest, f"circle among {order}"
        order = [name for name in order if name not in lowest]


@pytest.mark.parametrize("name", TRAVELS)
def test_model_files_need_only_torch_and_transformers(name):
    allowed = {"torch", "transformers", "modeling_lvvit", *sys.stdlib_module_names}
    modules = imports_of(PACKAGE / f"{name}.py")
    assert {module.split(".")[0] for module in modules} <= allowed
    assert {module.split(".")[1] for module in modules if module.startswith("modeling_lvvit.")} <= set(TRAVELS)


def test_folders_have_at_most_twelve_files():
    folders = [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())]
    assert [folder for folder in folders if len(list(folder.glob("*.py"))) > 12] == []


def test_test_modules_import_no_test_module():
    for path in (ROOT / "tests").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (test_|conftest)", path.read_text(encoding="utf-8"), re.MULTILINE), (
            path
        )


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
            assert "weights_only=True" in call or "tests" in path.parts, path


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


def test_links_between_documents_lead_somewhere():
    tracked = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    dead = []
    for name in tracked.stdout.split():
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (ROOT / name).read_text(encoding="utf-8")):
            if "://" not in link and "{" not in link and not ((ROOT / name).parent / link).exists():
                dead.append(f"{name}: {link}")
    assert dead == []
