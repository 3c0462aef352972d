"""A demo as a folder of static files: the model runs in the browser."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import RepoCard, SpaceCardData

from ..console import require
from ..data.classes.class_matching import shown_names
from ..data.files.atomic_files import atomic_directory, check_new_directory, write_json, write_text
from ..data.files.digests import file_digests, write_digests
from ..data.sources import looks_local
from ..export.folder import ONNX, ONNX_FILES, ExportSettings, export_folder
from ..export.onnx_file import EXTRA
from ..hub.file_checks import CARD
from .browser_runtime import copy_runtime


PAGE = Path(__file__).with_name("static")
MODELS, LIST, RUNTIME = "models", "models.json", "runtime"
MAX_BYTES = 2**31  # of a model; browsers give a page 4 GB, and it needs twice its size while it is loaded
MULTI_LABEL = "multi_label_classification"
# with which browsers let pages compute in several threads
HEADERS = {
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "cross-origin",
}
TEXT = """
# {title}

Drop an image to see what the model finds in it. The model runs in the browser; images do not leave the machine.
Models: {models}.

Any web server shows this folder: `python -m http.server`, then open <http://localhost:8000>. As a Space: `hf upload NAME . --repo-type space`.
"""


def export_static_page(
    names: Sequence[str],
    folder: Path,
    settings: ExportSettings | None = None,
    trust_remote_code: bool = False,
    runtime: Path | None = None,
) -> None:
    """Writes a folder with everything that the page needs: the page, exported models, the runtime, a card and digests.

        folder/index.html, page.js, ...       the page, as in `demo/static/`
        folder/models.json                    what the page has to know of the models
        folder/models/NAME/                   an exported model
        folder/runtime/                       ONNX Runtime for browsers, with its license

    Args:
        names: Folders or Hub names of classifiers and segmentation models.
        folder: New or empty.
        settings: Of the export, with one type of numbers; default: float32.
        trust_remote_code: See `from_pretrained`.
        runtime: See `copy_runtime`.

    Raises:
        FileExistsError: If the folder holds something.
        ImportError: If a package for ONNX is missing.
        ValueError: If there are several types of numbers, a model cannot be exported or is too large for browsers, or the runtime cannot be had.
    """
    settings = settings or ExportSettings()
    if len(settings.dtypes) != 1:
        raise ValueError(f"The page takes one `dtype`, got {' '.join(settings.dtypes)}.")
    check_new_directory(folder)
    require(EXTRA, "onnx", "onnxscript", "onnxruntime")
    with atomic_directory(folder) as site:
        copy_runtime(site / RUNTIME, runtime)  # first: it may need the network
        shutil.copytree(PAGE, site, dirs_exist_ok=True)
        entries = []
        for title in (titles := model_titles(names)):
            place = f"{MODELS}/{re.sub(r'[^A-Za-z0-9._-]+', '-', title)}"
            export_folder(names[len(entries)], site / place, settings, trust_remote_code=trust_remote_code)
            entries.append(model_entry(title, site, place))
        write_json(site / LIST, entries)
        write_text(site / CARD, str(_card(titles, [name for name in names if not looks_local(name)])))
        paths = [path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()]
        write_digests(site, file_digests(site, paths))


def model_titles(names: Sequence[str]) -> list[str]:
    """What models are called on the page: Hub names, the last part of folders; with a number where they would be called alike."""
    titles = [Path(name).expanduser().resolve().name if looks_local(name) else name for name in names]
    return [
        title if titles.count(title) == 1 else f"{title} {1 + titles[:index].count(title)}"
        for index, title in enumerate(titles)
    ]


def model_entry(title: str, site: Path, place: str) -> dict[str, Any]:
    """What the page has to know of an exported model.

    Args:
        site: Folder of the page.
        place: Of the exported folder in it.
    """
    (path,) = (site / place / ONNX).glob("*.onnx")
    config = json.loads((site / place / "config.json").read_text(encoding="utf-8"))
    if (size := sum(file.stat().st_size for file in path.parent.iterdir())) > MAX_BYTES:
        raise ValueError(
            f"{title} has {size / 1e9:.1f} GB, more than the {MAX_BYTES / 1e9:.1f} GB that browsers can load. Choose a smaller `dtype`."
        )
    return {
        "name": title,
        "file": path.relative_to(site).as_posix(),
        "bytes": size,
        "dtype": next(dtype for dtype, (name, _) in ONNX_FILES.items() if name == path.name),
        "classes": shown_names([config["id2label"][key] for key in sorted(config["id2label"], key=int)]),
        "is_multi_label": config.get("problem_type") == MULTI_LABEL,
        "grid": config.get("patch_grid_size"),
    }


def _card(titles: Sequence[str], model_ids: Sequence[str]) -> RepoCard:
    title = re.sub(r"[^\w .-]+", " ", titles[0])[-40:]
    data = SpaceCardData(
        title=title, sdk="static", app_file="index.html", models=list(model_ids) or None, custom_headers=HEADERS
    )
    return RepoCard(f"---\n{data.to_yaml()}\n---\n" + TEXT.format(title=title, models=", ".join(titles)))
