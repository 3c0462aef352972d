"""A demo as a folder that can be uploaded as a Space."""

import re
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from huggingface_hub import RepoCard, SpaceCardData

from ..data.files.atomic_files import atomic_directory
from ..hub.file_checks import CARD, published_files


PACKAGE = Path(__file__).parents[1]
MODEL_FOLDER = "model"
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")
LOGS = "runs/"
APP = '''"""Starts the page."""

from pathlib import Path

from modeling_lvvit.demo.__main__ import main


if __name__ == "__main__":
    main(["--model", {model}, "--host", "0.0.0.0"{options}])
'''
TEXT = """
# {title}

Drop an image to see what the model finds in it. The model is {model}.

Upload this folder with `hf upload NAME . --repo-type space`, or start it here: `pip install -r requirements.txt && python app.py`.
"""


def export_space(model: str, folder: Path, trust_remote_code: bool = False) -> None:
    """Writes a folder with everything that a Space needs: program, this package, requirements, card, and the model if it is a folder.

    Args:
        model: Hub name or folder.
        folder: New or empty.
        trust_remote_code: Whether the Space may run code of the model's repository.

    Raises:
        ValueError: If the folder holds something or lies in the model or the package, a file of the model is damaged, or the
            requirements are not known.
    """
    folder, model_folder = folder.expanduser().resolve(), Path(model).expanduser().resolve()
    is_folder = model_folder.is_dir()
    for source in (PACKAGE, model_folder):
        if folder.is_relative_to(source) or source.is_relative_to(folder):
            raise ValueError(f"{folder} and {source}, which is copied, lie in one another. Name another folder.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: there is something already. Name a new folder.")
    requirements = space_requirements()
    with atomic_directory(folder) as space:
        shutil.copytree(PACKAGE, space / PACKAGE.name, ignore=LEFT_OUT)
        for name in published_files(model_folder)[0] if is_folder else ():
            if not name.startswith(LOGS):
                (space / MODEL_FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(model_folder / name, space / MODEL_FOLDER / name)
        location = f'str(Path(__file__).parent / "{MODEL_FOLDER}")' if is_folder else repr(model)
        options = ', "--trust_remote_code"' if trust_remote_code else ""
        (space / "app.py").write_text(APP.format(model=location, options=options), encoding="utf-8")
        (space / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
        _card(model_folder.name if is_folder else model, None if is_folder else model).save(space / CARD)


def space_requirements() -> list[str]:
    """Those of this package and of its extra `demo`; gradio in the version that is installed, if one is.

    Raises:
        ValueError: If the package is not installed, so that no one knows them.
    """
    try:
        lines = requires("modeling-lvvit") or []
    except PackageNotFoundError as error:
        raise ValueError(
            "The requirements of a Space are those of this package: install it first (`pip install -e .`)."
        ) from error
    plain = [line for line in lines if "extra ==" not in line]
    installed = gradio_version()
    demo = [line.partition(";")[0].strip() for line in lines if re.search(r"""extra == ["']demo["']""", line)]
    return [*sorted(plain), *(demo if installed is None else [f"gradio=={installed}"])]


def gradio_version() -> str | None:
    """The version of gradio that is installed; `None` if none is: a Space can be written without it."""
    try:
        return version("gradio")
    except PackageNotFoundError:
        return None


def _card(title: str, model_id: str | None) -> RepoCard:
    data = SpaceCardData(
        title=re.sub(r"[^\w .-]+", " ", title)[-40:],
        sdk="gradio",
        sdk_version=gradio_version(),
        app_file="app.py",
        models=[model_id] if model_id else None,
    )
    return RepoCard(f"---\n{data.to_yaml()}\n---\n" + TEXT.format(title=title, model=f"`{model_id or MODEL_FOLDER}`"))
