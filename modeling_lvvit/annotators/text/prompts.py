"""Prompts of image-text models: texts that stand for each class, and texts for what is none of them."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...data.classes.class_matching import has_names, listed, normalized, readable_names


logger = logging.get_logger(__name__)
TEXT_PREFIX = "text:"  # of the name of an annotator
PLACE = "{}"  # where a template has the class name
# Several templates whose embeddings are averaged name a class better than one (Radford et al. 2021, section 3.1.4). These are for
# photographs, and for cells that see a part of a thing.
DEFAULT_TEMPLATES = (
    "a photo of a {}.",
    "a {} seen from nearby.",
    "a {} in the distance.",
    "a part of a {}.",
    "an image with a {} in it.",
)
PROMPTS_HELP = "JSON file of an annotator text:MODEL: templates, classes, background (see README)."


@dataclass(frozen=True)
class Prompts:
    """What a user says of the texts.

    Args:
        templates: Texts with a class name in place of `{}`.
        classes: Class -> its prompts, which are used as they are. Other classes get the templates with their names.
        background: Prompts of what is no class, used as they are.
    """

    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    background: tuple[str, ...] = ()

    def of_classes(self, class_names: Sequence[str]) -> list[list[str]]:
        """The texts of each class, in the order of `class_names`: its own prompts; else the templates with each of its
        comma-separated synonyms, underscores as blanks, WordNet ids by their names.

        Raises:
            ValueError: If there are prompts of a class that the data lacks, or the classes are numbers without prompts.
        """
        given = self._by_class(class_names)
        numbers = [name for name in class_names if name not in given]
        if numbers and not has_names(class_names):
            raise ValueError(
                f"the classes are only numbers, which no text describes{listed('', numbers)}. Name the classes in the data, or give "
                'each its prompts in a JSON file (`prompts`): {"classes": {"0": ["a cat"]}}.'
            )
        texts = [
            list(given[name]) if name in given else self._from_templates(readable)
            for name, readable in zip(class_names, readable_names(class_names))
        ]
        _warn_of_equal_texts(class_names, texts)
        return texts

    def record(self, texts: Sequence[Sequence[str]]) -> dict[str, Any]:
        """What a label set records: templates and prompts as they were given, and the SHA-256 of all texts, those of the classes
        first."""
        given = {"templates": self.templates, "classes": self.classes, "background": self.background}
        digest = hashlib.sha256(json.dumps([texts, self.background]).encode())
        return {"prompts": json.loads(json.dumps(given)), "prompts_sha256": digest.hexdigest()}

    def _from_templates(self, name: str) -> list[str]:
        synonyms = [" ".join(synonym.replace("_", " ").split()) for synonym in name.split(",")]
        names = list(dict.fromkeys(filter(None, synonyms))) or [name]
        return [template.replace(PLACE, synonym) for synonym in names for template in self.templates]

    def _by_class(self, class_names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Prompts by the names of the data, which may differ in case, hyphens and underscores from those of the file."""
        similar = defaultdict(list)
        for name in class_names:
            similar[normalized(name)].append(name)
        given: dict[str, tuple[str, ...]] = {}
        unknown = []
        for name, texts in self.classes.items():
            matches = [name] if name in class_names else similar[normalized(name)]
            if len(matches) != 1 or matches[0] in given:
                unknown.append(name)
            else:
                given[matches[0]] = texts
        if unknown:
            raise ValueError(
                f"the file of prompts describes what is not one class of the data, or is one twice{listed('', unknown)}. "
                f"The data has {len(class_names)} classes{listed('', list(class_names))}."
            )
        return given


def _warn_of_equal_texts(class_names: Sequence[str], texts: Sequence[Sequence[str]]) -> None:
    alike = defaultdict(list)
    for name, group in zip(class_names, texts):
        alike[frozenset(text.casefold() for text in group)].append(name)
    if groups := [names for names in alike.values() if len(names) > 1]:
        logger.warning(
            "Classes have the same texts, so that no text tells them apart: %s. Give them prompts of their own (`prompts`).",
            "; ".join(", ".join(map(repr, names)) for names in groups[:10]),
        )


def check_text_options(
    annotator: str | None, prompts: str | None, class_map: str | None = None, ignore_extra: bool = False
) -> None:
    """Raises a `ValueError` if options do not go together: prompts of an annotator that reads none, or pairs of classes for one that
    has the classes of the data."""
    if annotator is None or not annotator.startswith(TEXT_PREFIX):
        if prompts is not None:
            raise ValueError(
                f"`prompts` are for image-text models, given as `annotator` {TEXT_PREFIX}MODEL; got {annotator}."
            )
        return
    name = "annotator_class_map" if class_map is not None else "annotator_ignore_extra_classes"
    if class_map is not None or ignore_extra:
        raise ValueError(
            f"`{name}` has no use with {annotator}: an image-text model has no classes of its own, it scores those of the data. What a "
            "class means to it can be said with `prompts`."
        )


def read_prompts(path: str | Path | None) -> Prompts:
    """Prompts from a JSON file with any of the keys `templates`, `classes` and `background`; the default ones without a file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else, or a template has no place for the class name.
    """
    if path is None:
        return Prompts()
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of prompts {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repetition)
    except ValueError as error:
        raise ValueError(f"The prompts {path} are no valid JSON: {error}") from error
    allowed = ("templates", "classes", "background")
    if not isinstance(content, dict) or set(content) - set(allowed):
        had = sorted(set(content) - set(allowed)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"The prompts {path} must be a JSON object with keys of {', '.join(allowed)}; got {had}.")
    templates = _texts(content["templates"], f"{path}: templates") if "templates" in content else DEFAULT_TEMPLATES
    if missing := [template for template in templates if PLACE not in template]:
        raise ValueError(f"{path}: a template needs {PLACE} where the class name belongs{listed('', missing)}.")
    classes = content.get("classes", {})
    if not isinstance(classes, dict):
        raise ValueError(f"{path}: classes must be an object from class to prompts, got {type(classes).__name__}.")
    classes = {name: _texts(texts, f"{path}: class {name!r}") for name, texts in classes.items()}
    background = content.get("background", [])
    return Prompts(templates, classes, _texts(background, f"{path}: background") if background != [] else ())


def _texts(value: Any, where: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{where} must be a list of texts, at least one and none empty; got {value!r}.")
    return tuple(texts)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{repeated} more than once in one object")
    return dict(pairs)
