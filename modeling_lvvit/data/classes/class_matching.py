"""Which class of an annotator is which class of a dataset: by name, by synonym, by WordNet id, or by a file.

A model card writes "tench, Tinca tinca", a folder "tench" or "n01440764"; all three name one class. Nothing is guessed by
number: where names do not settle it, the user's class map does.
"""

import csv
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch


WORDNET_ID = re.compile(r"n\d{8}")
GENERIC_NAME = re.compile(r"(label|class)?[ _-]?\d+", re.IGNORECASE)
MAX_NAMES_SHOWN = 10
# names that torchvision alone has, and models that were converted here, before those of timm
TORCHVISION_NAMES = {"n02012849": "crane bird, ", "n03710721": "maillot tank suit, "}


@dataclass(frozen=True)
class ClassMap:
    """For each class of the dataset, the annotator's classes that stand for it.

    Args:
        groups: One tuple of annotator class ids for each dataset class.
    """

    groups: tuple[tuple[int, ...], ...]
    num_annotator_classes: int
    _made: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def is_identity(self) -> bool:
        """Whether both number their classes alike."""
        return self.groups == tuple((index,) for index in range(self.num_annotator_classes))

    def apply(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (logits) `(B, classes, rows, columns)` of the dataset's classes from those of the annotator's.

        Several annotator classes that stand for one class add their probabilities, `log sum exp` of their logits.
        """
        if self.is_identity:
            return scores
        index, is_padding = self._members(scores.device)
        if index.shape[1] == 1:
            return scores[:, index[:, 0]]
        members = scores[:, index.flatten()].unflatten(1, index.shape)  # (B, classes, width, rows, columns)
        members = members.masked_fill(is_padding[None, :, :, None, None], -torch.inf)
        return members.logsumexp(dim=2)

    def _members(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Classes of the annotator `(classes, width)`, and which of them only fill a group up; made once for each device: a processor
        that copies them there for every batch would wait for the device."""
        if device not in self._made:
            width = max(len(group) for group in self.groups)
            padded = [[*group, *[group[0]] * (width - len(group))] for group in self.groups]
            is_padding = [[place >= len(group) for place in range(width)] for group in self.groups]
            with torch.inference_mode(False):  # whoever asks first, all may use them
                self._made[device] = (torch.tensor(padded, device=device), torch.tensor(is_padding, device=device))
        return self._made[device]


def normalized(name: str) -> str:
    """A name without the differences that do not matter: case, underscores, hyphens, repeated blanks."""
    return " ".join(re.sub(r"[_\-\s]+", " ", unicodedata.normalize("NFC", name).casefold()).split())


def wordnet_names(class_names: Sequence[str]) -> dict[str, str]:
    """Names of the WordNet ids among class names, from timm's list of the 21,841 classes of ImageNet, and `TORCHVISION_NAMES`."""
    synsets = {synset for name in class_names for synset in WORDNET_ID.findall(name)}
    if not synsets:
        return {}
    from timm.data import ImageNetInfo  # takes a second to import, and most datasets have no WordNet ids

    info, names = ImageNetInfo("imagenet-22k"), {}
    for synset in synsets:
        with suppress(KeyError):  # not a class of ImageNet
            names[synset] = TORCHVISION_NAMES.get(synset, "") + info.label_name_to_description(synset, detailed=False)
    return names


def readable_names(class_names: Sequence[str]) -> list[str]:
    """Class names with what WordNet ids stand for in their place, all synonyms."""
    described = wordnet_names(class_names)
    return [described.get(name, name) for name in class_names]


def shown_names(class_names: Sequence[str]) -> list[str]:
    """Class names for figures: the first of their synonyms, those of WordNet for its ids. Where several classes would be called alike,
    all of their synonyms or, where these are the same too, the number of the class behind it."""
    whole = readable_names(class_names)
    first = [name.split(",")[0].strip() or name for name in whole]
    names = [name if first.count(name) == 1 else full for name, full in zip(first, whole)]
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} [{index}]" for index, name in enumerate(names)]


def imagenet_class_names() -> list[str]:
    """WordNet ids of the 1,000 classes of ImageNet-1k, in the order of their ids."""
    from timm.data import ImageNetInfo  # see `wordnet_names`

    return ImageNetInfo("imagenet-1k").label_names()


def has_names(class_names: Sequence[str]) -> bool:
    """Whether class names are more than numbers."""
    return not all(GENERIC_NAME.fullmatch(name) for name in class_names)


def find_namesakes(old_names: Sequence[str], new_names: Sequence[str]) -> dict[int, int]:
    """For classes of a dataset those of a model with the same name, synonym or WordNet id: their ids."""
    if list(old_names) == list(new_names):
        return {index: index for index in range(len(new_names))}
    return _partners(old_names, new_names, wordnet_names([*old_names, *new_names]))


def same_classes(left: Sequence[str], right: Sequence[str]) -> bool:
    """Whether two lists name the same classes in the same order, synonyms and WordNet ids allowed."""
    if len(left) != len(right):
        return False
    if list(left) == list(right):
        return True
    try:
        return match_classes(left, right, wordnet_names([*left, *right])).is_identity
    except ValueError:
        return False


def all_names(name: str, wordnet: Mapping[str, str]) -> set[str]:
    """All normalized names that a class name stands for: itself, its comma-separated synonyms, those of its WordNet id."""
    names = {normalized(name)} | {normalized(part) for part in name.split(",")}
    for synset in WORDNET_ID.findall(name):
        names |= {synset, *(normalized(part) for part in wordnet.get(synset, "").split(","))}
    return names - {""}


def match_classes(
    annotator_names: Sequence[str],
    dataset_names: Sequence[str],
    wordnet: Mapping[str, str] | None = None,
    ignore_extra_classes: bool = False,
) -> ClassMap:
    """Pairs classes by their names.

    Args:
        annotator_names, dataset_names: Class names in the order of their ids.
        wordnet: WordNet ids to comma-separated names; default: none.
        ignore_extra_classes: Whether the annotator may have classes that the dataset lacks; their scores are dropped.

    Raises:
        ValueError: If classes have no partner or more than one; the message names them.
    """
    wordnet = wordnet or {}
    if len(annotator_names) == len(dataset_names) and all(
        normalized(a) == normalized(b) for a, b in zip(annotator_names, dataset_names)
    ):
        return ClassMap(tuple((index,) for index in range(len(dataset_names))), len(annotator_names))
    if not has_names(annotator_names):
        raise ValueError(
            f"The annotator's {len(annotator_names)} classes have no names ({annotator_names[0]!r}, ...), the dataset has "
            f"{len(dataset_names)} classes ({dataset_names[0]!r}, ...). Say which is which with `class_map` FILE, or "
            "`class_map` identity if they are numbered alike."
        )
    partner = _partners(annotator_names, dataset_names, wordnet)
    missing = [name for index, name in enumerate(dataset_names) if index not in partner]
    used = set(partner.values())
    extra = [name for index, name in enumerate(annotator_names) if index not in used]
    if missing or (extra and not ignore_extra_classes):
        raise ValueError(
            f"The annotator's {len(annotator_names)} classes are not the dataset's {len(dataset_names)}."
            + listed("\n  only in the dataset", missing)
            + listed("\n  only in the annotator", extra)
            + "\nSay which is which with `class_map` FILE"
            + ("" if missing else ", or drop the annotator's other classes with `ignore_extra_classes`")
            + "."
        )
    # classes whose whole name is also one of a class that would be dropped: "cardigan" is a garment and a dog, and a dataset with
    # one of the two may mean either
    dropped = {name for extra_name in extra for name in all_names(extra_name, wordnet)}
    contested = [name for name in dataset_names if not WORDNET_ID.search(name) and normalized(name) in dropped]
    if contested:
        raise ValueError(
            f"Several classes of the annotator have the names of classes of the dataset{listed('', contested)}. Say which "
            "is meant with `class_map` FILE."
        )
    return ClassMap(tuple((partner[index],) for index in range(len(dataset_names))), len(annotator_names))


def _partners(
    annotator_names: Sequence[str], dataset_names: Sequence[str], wordnet: Mapping[str, str]
) -> dict[int, int]:
    """Dataset class to annotator class, for those that names settle."""
    partner: dict[int, int] = {}
    # the whole name first ("maillot" is not "maillot, tank suit"), then the first of several, then any synonym
    for part in (slice(None), slice(1)):
        ours = _unique_names(dataset_names, part, wordnet, partner.keys())
        theirs = _unique_names(annotator_names, part, wordnet, set(partner.values()))
        partner |= {ours[name]: theirs[name] for name in ours.keys() & theirs.keys()}
    holders = defaultdict(set)
    for index in set(range(len(annotator_names))) - set(partner.values()):
        for synonym in all_names(annotator_names[index], wordnet):
            holders[synonym].add(index)
    candidates = {}
    for index in sorted(set(range(len(dataset_names))) - partner.keys()):
        names = all_names(dataset_names[index], wordnet)
        synsets = {name for name in names if WORDNET_ID.fullmatch(name)} & holders.keys()
        candidates[index] = set().union(*(holders[name] for name in (synsets or names) if name in holders))
    wanted = Counter(candidate for matches in candidates.values() for candidate in matches)
    for index, matches in candidates.items():
        if len(matches) == 1 and wanted[candidate := next(iter(matches))] == 1:
            partner[index] = candidate
    return partner | _namesakes(candidates, partner)


def _unique_names(
    names: Sequence[str], part: slice, wordnet: Mapping[str, str], settled: Collection[int]
) -> dict[str, int]:
    """Class ids by a part of their names, of those classes that are not settled and share it with no other."""
    classes = defaultdict(list)
    for index, name in enumerate(names):
        if index not in settled:
            classes[normalized(",".join(wordnet.get(name, name).split(",")[part]))].append(index)
    return {name: indices[0] for name, indices in classes.items() if len(indices) == 1}


def _namesakes(candidates: dict[int, set[int]], partner: dict[int, int]) -> dict[int, int]:
    """Pairs classes of one name ("crane" is a bird and a machine) in their order, where all others keep theirs."""
    ordered = [partner[index] for index in sorted(partner)]
    if ordered != sorted(ordered):
        return {}
    groups = defaultdict(list)
    for index, matches in sorted(candidates.items()):
        if index not in partner and matches:
            groups[frozenset(matches)].append(index)
    return {
        index: candidate
        for matches, indices in groups.items()
        if len(matches) == len(indices)
        for index, candidate in zip(indices, sorted(matches))
    }


def listed(title: str, names: Sequence[str]) -> str:
    """The first names after a title and a colon, with the number of all if there are more; nothing without names."""
    if not names:
        return ""
    more = f", ... ({len(names)})" if len(names) > MAX_NAMES_SHOWN else ""
    return f"{title}: " + ", ".join(repr(name) for name in names[:MAX_NAMES_SHOWN]) + more


def read_class_map(path: Path, annotator_names: Sequence[str], dataset_names: Sequence[str]) -> ClassMap:
    """A class map from a file.

    Args:
        path: JSON object, dataset class to annotator class or to a list of them; or CSV rows `dataset class, annotator
            class` without a header, where a dataset class may come more than once. Classes are names or ids.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it cannot be read, names an unknown class, or leaves out a class of the dataset.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no class map {path}.")
    pairs: list[tuple[object, object]] = []
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
        if path.suffix == ".json":
            for name, values in json.loads(text).items():
                pairs += [(name, value) for value in (values if isinstance(values, list) else [values])]
        else:
            pairs = [(row[0].strip(), row[1].strip()) for row in csv.reader(text.splitlines()) if row]
    except (ValueError, AttributeError, IndexError, csv.Error) as error:
        raise ValueError(
            f"Class map {path} must be a JSON object, or CSV rows of two columns, dataset class and annotator class: {error}"
        ) from error
    groups: dict[int, list[int]] = {index: [] for index in range(len(dataset_names))}
    for dataset_class, annotator_class in pairs:
        group = groups[_class_id(dataset_class, dataset_names, f"{path}, dataset")]
        group.append(_class_id(annotator_class, annotator_names, f"{path}, annotator"))
    if missing := [dataset_names[index] for index, group in groups.items() if not group]:
        raise ValueError(f"Class map {path} leaves classes of the dataset without a partner" + listed("", missing))
    return ClassMap(tuple(tuple(dict.fromkeys(group)) for group in groups.values()), len(annotator_names))


def _class_id(value: object, names: Sequence[str], source: str) -> int:
    matches = [index for index, name in enumerate(names) if normalized(name) == normalized(str(value))]
    if len(matches) == 1:
        return matches[0]
    if not matches and str(value).isdecimal() and int(value) < len(names):
        return int(value)
    if matches:
        raise ValueError(f"{source}: {value!r}: more than one class has this name; give its id.")
    raise ValueError(f"{source}: {value!r}: no class of {len(names)} has this name or id.")
