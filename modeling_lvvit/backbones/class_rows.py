"""Heads of a trained model for the classes of other data: each class keeps the rows that a class of its name had."""

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..data.classes.class_matching import find_namesakes, has_names, listed


@dataclass(frozen=True)
class ClassRows:
    """Which class of a trained model becomes which class of the data.

    Args:
        old_names, new_names: Class names of the model and of the data, by id.
        sources: For each class of the data the class id in the model, `None` for a class that the model does not know.
        by_position: Whether ids decided, because the data only numbers its classes.
    """

    old_names: tuple[str, ...]
    new_names: tuple[str, ...]
    sources: tuple[int | None, ...]
    by_position: bool = False

    @classmethod
    def match(cls, old_names: Sequence[str], new_names: Sequence[str]) -> "ClassRows":
        """Pairs classes by name, synonym or WordNet id; by position where the data has as many classes without names."""
        partners = find_namesakes(old_names, new_names)
        sources = tuple(partners.get(index) for index in range(len(new_names)))
        as_many = len(old_names) == len(new_names)
        by_position = as_many and None in sources and not has_names(new_names)
        return cls(
            tuple(old_names), tuple(new_names), tuple(range(len(new_names))) if by_position else sources, by_position
        )

    @property
    def is_identity(self) -> bool:
        """Whether the heads fit as they are."""
        return self.sources == tuple(range(len(self.old_names)))

    @property
    def are_new(self) -> bool:
        """Whether the model knows no class of the data."""
        return all(source is None for source in self.sources)

    def merged(self, old: torch.Tensor, new: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """A tensor for the classes of the data: rows of `old`, along `dim`, for classes that the model knows, else those of `new`."""
        targets = [index for index, source in enumerate(self.sources) if source is not None]
        rows = old.index_select(dim, torch.tensor([self.sources[index] for index in targets], dtype=torch.long))
        return new.index_copy(dim, torch.tensor(targets, dtype=torch.long), rows.to(new))

    def describe(self) -> str | None:
        """What becomes of the heads, `None` where there is nothing to say."""
        new = [name for name, source in zip(self.new_names, self.sources) if source is None]
        if self.by_position:
            if self.old_names == self.new_names:
                return None
            return (
                f"the heads are taken over by the position of the classes, because the data only numbers its own: {self.old_names[0]!r} "
                f"is now {self.new_names[0]!r}, ...: if these are other classes, name them"
            )
        if self.are_new:
            advice = (
                ""
                if has_names(self.old_names)
                else "; its own have no names, `id2label` in its config.json can tell them"
            )
            return (
                f"the heads are new, because none of its {len(self.old_names)} classes ({self.old_names[0]!r}, ...) has the name of one "
                f"of the data ({self.new_names[0]!r}, ...){advice}"
            )
        if new:
            same = [name for name, source in zip(self.new_names, self.sources) if source is not None]
            return (
                f"the rows of the heads are kept for {len(same)} of {len(self.new_names)} classes, by their names{listed('', same)}; new for "
                f"{len(new)}{listed('', new)}"
            )
        if self.is_identity:
            return None
        left_out = [name for index, name in enumerate(self.old_names) if index not in self.sources]
        return (
            f"the rows of the heads follow the class names ({self.new_names[0]!r} was class {self.sources[0]}, ...)"
            + listed("; left out", left_out)
        )


def find_head_tensors(model: PreTrainedModel) -> dict[str, tuple[int, torch.Tensor]]:
    """The tensors of a model that have a row for each class: along which axis, and random values that they could start from.

    They are those that another number of classes would change.
    """
    config = copy.deepcopy(model.config)
    num_classes = config.num_labels
    config.num_labels = num_classes + 1
    with torch.device("cpu"):
        larger = type(model)(config).state_dict()
    tensors = {}
    for name, value in model.state_dict().items():
        differing = [dim for dim, sizes in enumerate(zip(value.shape, larger[name].shape)) if sizes[0] != sizes[1]]
        if differing:
            tensors[name] = differing[0], larger[name].narrow(differing[0], 0, num_classes).to(value)
    return tensors


@torch.no_grad()
def fit_heads(
    model: PreTrainedModel,
    rows: ClassRows,
    missing_keys: Collection[str],
    load_trained: Callable[[], PreTrainedModel],
) -> tuple[str | None, set[str]]:
    """Gives a model the rows of its trained heads that belong to its classes, and new ones for the other classes.

    Args:
        model: With the classes of the data, its other weights loaded; where the number of classes is that of the checkpoint, the heads
            too.
        missing_keys: Weights that the checkpoint lacks.
        load_trained: Loads the model with the classes of the checkpoint; called where the number of classes is another one.

    Returns:
        What became of the heads, `None` where there is nothing to say; and the names of the tensors that were changed.
    """
    has_other_number = len(rows.old_names) != len(rows.new_names)
    if rows.is_identity or (rows.are_new and has_other_number):
        return None if missing_keys else rows.describe(), set()
    tensors = {name: value for name, value in find_head_tensors(model).items() if name not in missing_keys}
    if not tensors:
        return None, set()
    state = model.state_dict()
    trained = load_trained().state_dict() if has_other_number else state
    for name, (dim, new) in tensors.items():
        state[name].copy_(rows.merged(trained[name], new, dim))
    return rows.describe(), set(tensors)
