"""The arms of a study: ways of training that are compared."""

import shlex
from dataclasses import dataclass

from ..cli.parser import TRAIN_TL


@dataclass(frozen=True)
class Arm:
    """One way of training; `options` of `train_tl.py` tell it from the others. The name is that of its folder, the title stands in
    tables."""

    name: str
    title: str
    options: tuple[str, ...] = ()


REQUIRED = ("--require_token_labels", "true")
ARMS = {
    arm.name: arm
    for arm in (
        Arm("token_labels", "token labels", REQUIRED),
        Arm("plain_labels", "plain labels", ("--use_token_labels", "false")),
        Arm("authors_crop", "token labels, authors' crop", ("--label_crop", "authors", *REQUIRED)),
    )
}
STUDY_OPTIONS = {"output_dir", "seed", "overwrite_output_dir", "resume_from_checkpoint", "push_to_hub"}


def parse_arm(text: str) -> Arm:
    """Reads the name of one of `ARMS`, or `NAME=--option value ...`.

    Raises:
        ValueError: If the name is unknown or cannot be that of a folder, or an option belongs to the study.
    """
    name, has_options, options = text.partition("=")
    if not has_options:
        if name not in ARMS:
            raise ValueError(
                f"Unknown arm {name!r}; expected {', '.join(ARMS)}, or one of your own, written 'NAME=--option value'."
            )
        return ARMS[name]
    if name in ARMS:
        raise ValueError(f"{name} is an arm that the study has already; give yours another name.")
    if not name.replace("_", "").replace("-", "").isalnum():
        raise ValueError(f"The name of an arm has letters, digits, _ and - only, got {name!r}.")
    try:
        words = tuple(shlex.split(options))
    except ValueError as error:
        raise ValueError(f"The options of arm {name} cannot be read ({error}): {options}") from error
    check_options(words)
    return Arm(name, name.replace("_", " "), words)


def check_options(words: tuple[str, ...]) -> None:
    """Raises a `ValueError` if an option of `train_tl.py` is one that the study sets for each run."""
    given, _ = TRAIN_TL.given_options(list(words))
    if reserved := sorted(STUDY_OPTIONS & given.keys()):
        raise ValueError(f"--{reserved[0]} is set by the study for each run: leave it out.")
