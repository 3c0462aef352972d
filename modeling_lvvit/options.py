"""Options of all programs: dataclasses whose fields are described once, in their `help`, and read in one way.

The same option has the same name, type and default in every program (`tests/cli/test_options.py`): the names of the transformers examples
and of `TrainingArguments`, where they have one. Older names are `aliases` of a field: they work, and are said.
"""

import argparse
import difflib
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from .data.failures import FAILURES, describe_failure, ignore_ended_workers, tell_uncaught_failures
from .launching import is_main_process, name_options


METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
HELP_ALL = "--help_all"


class OptionError(ValueError):
    """A command line that cannot be read."""


class OptionFormatter(argparse.RawDescriptionHelpFormatter):
    """Help with the first name of each option, the type of its value, and its default where that says something."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = next((text for text in action.option_strings if text.startswith("--")), action.option_strings[0])
        metavar = self._get_default_metavar_for_optional(action)
        return name if action.nargs == 0 else f"{name} {self._format_args(action, metavar)}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return METAVARS.get(action.type, "true|false" if action.type is string_to_bool else "VALUE")

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default in (None, False, argparse.SUPPRESS) or default == [] or "default" in text:
            return text
        value = " ".join(map(str, default)) if isinstance(default, list) else getattr(default, "value", default)
        return f"{text} (default: {value})"


class OptionParser(HfArgumentParser):
    """Reads options: booleans bare or with a value, older names with a note; what cannot be read is an `OptionError`.

    Args:
        shown: Options of the short help; `None` for all. The others are listed by `--help_all`.
    """

    noted: ClassVar[set[str]] = set()  # older names that were said

    def __init__(self, arguments: tuple[type, ...], shown: tuple[str, ...] | None = None, **settings: Any):
        settings = {"formatter_class": OptionFormatter, "allow_abbrev": False} | settings
        super().__init__(arguments, **settings)
        self.shown = shown
        if shown is not None:
            self.add_argument(HELP_ALL, action=HelpAll, nargs=0, dest=argparse.SUPPRESS, default=argparse.SUPPRESS)
        for action in self._actions:
            if action.type is string_to_bool:
                action.nargs, action.const = "?", True
        self.renamed = {
            alias: entry.name
            for part in arguments
            for entry in fields(part)
            for alias in _plain_names(entry.metadata.get("aliases", ()))
        }

    def error(self, message: str) -> None:
        """Raises an `OptionError` in place of the usage and exit code 2 of argparse."""
        raise OptionError(re.sub(r"argument (--\w+)[^:]*: ", r"\1: ", message))

    def parse_known_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None):
        """As in `argparse.ArgumentParser`, with older names."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args(list(self._with_present_names(words)), namespace)

    def _with_present_names(self, words: list[str]) -> Iterator[str]:
        previous = None
        for word in words:
            name, sign, value = word.partition("=")
            plain = name.removeprefix("--").replace("-", "_")
            if name.startswith("--") and plain in self.renamed:
                self._note(f"--{plain} is now called --{self.renamed[plain]}.")
                yield f"--{self.renamed[plain]}{sign}{value}"
            elif previous == "--push_to_hub" and _names_repository(word):
                self._note(f"--push_to_hub {word} is now written --push_to_hub --hub_model_id {word}.")
                yield from ("--hub_model_id", word)
            else:
                yield word
            previous = name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else None

    def _note(self, text: str) -> None:
        if text not in self.noted and is_main_process():
            self.noted.add(text)
            print(f"note: {text}", file=sys.stderr)

    def format_help(self, everything: bool = False) -> str:
        """The description and the options by groups, see `Program`."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        shown = None if everything else self.shown
        actions = {action.dest: action for action in reversed(self._actions) if not action.dest.startswith("no_")}
        for title, names in self._groups():
            listed = [actions[name] for name in names if shown is None or name in shown]
            if listed:
                formatter.start_section(title)
                formatter.add_arguments(listed)
                formatter.end_section()
        if shown is not None:
            number = sum(len(names) for _, names in self._groups()) - len(shown)
            formatter.add_text(f"{number:,} further options: {HELP_ALL}")
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def _groups(self) -> Iterator[tuple[str, list[str]]]:
        """Titles and names: a group begins at each field of `option_groups` of a dataclass, in the order of this mapping."""
        for part in self.dataclass_types:
            titles, title = getattr(part, "option_groups", {}), "options"
            groups: dict[str, list[str]] = {title: [], **{name: [] for name in titles.values()}}
            for entry in fields(part):
                title = titles.get(entry.name, title)
                if entry.init:
                    groups[title].append(entry.name)
            yield from groups.items()


class HelpAll(argparse.Action):
    """Prints the help with every option."""

    def __call__(self, parser: OptionParser, *_: Any) -> None:
        print(parser.format_help(everything=True), end="")
        parser.exit()


def _plain_names(aliases: str | list[str]) -> list[str]:
    names = [aliases] if isinstance(aliases, str) else aliases
    return [name.removeprefix("--").replace("-", "_") for name in names]


def _names_repository(word: str) -> bool:
    if word.startswith("-"):
        return False
    try:
        string_to_bool(word)
    except argparse.ArgumentTypeError:
        return True
    return False


@dataclass(frozen=True)
class Program:
    """A program and its options.

    Args:
        name: How it is called, and what its messages start with.
        description: What it does, with examples.
        arguments: Dataclasses of its options. A mapping `option_groups` of such a class says at which field a group of the help begins.
        positional: Options whose values may stand first, without a name; one that ends in `*` takes all that are left.
        required: Options that must be given.
        shown: Options of the short help; `None` for all.
        may_be_empty: Lists that may be given without a value.
    """

    name: str
    description: str
    arguments: tuple[type, ...]
    positional: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    shown: tuple[str, ...] | None = None
    may_be_empty: tuple[str, ...] = ()

    @property
    def usage(self) -> str:
        """How it is called."""
        names = [f"{name[:-1].upper()} ..." if name.endswith("*") else name.upper() for name in self.positional]
        return " ".join([self.name, *names, "[--option value ...]"])

    def parser(self, **settings: Any) -> OptionParser:
        """A new parser of its options; `settings` are those of `argparse.ArgumentParser`."""
        texts = {"prog": self.name, "usage": self.usage, "description": self.description}
        parser = OptionParser(self.arguments, self.shown, **texts | settings)
        for action in parser._actions:
            if action.dest in self.may_be_empty:
                action.nargs = "*"
        return parser

    @cached_property
    def types(self) -> dict[str, Any]:
        """Option -> type."""
        hints = {name: hint for part in self.arguments for name, hint in get_type_hints(part).items()}
        return {entry.name: hints[entry.name] for part in self.arguments for entry in fields(part) if entry.init}

    def named(self, words: list[str]) -> list[str]:
        """A command line whose first words have their options in front of them."""
        first = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
        options: list[str] = []
        left = first
        for name in self.positional:
            if left:
                count = len(left) if name.endswith("*") else 1
                options += [f"--{name.removesuffix('*')}", *left[:count]]
                left = left[count:]
        if left:
            raise OptionError(f"Unexpected: {' '.join(left)}. Expected: {self.usage}.")
        return [*options, *words[len(first) :]]

    def parse(self, words: list[str]) -> tuple[Any, ...]:
        """One object of each class of `arguments`; an `OptionError` that names the nearest options if one is unknown."""
        parser = self.parser()
        *parsed, rest = parser.parse_args_into_dataclasses(
            self.named(words), return_remaining_strings=True, look_for_args_file=False
        )
        self.check_unknown(rest)
        values = {name: value for part in parsed for name, value in vars(part).items()}
        if missing := [f"--{name}" for name in self.required if values[name] in (None, [])]:
            raise OptionError(f"Give {' and '.join(missing)}. Usage: {self.usage}")
        return tuple(parsed)

    def check_unknown(self, rest: list[str], further: Iterable[str] = ()) -> None:
        """Raises an `OptionError` if a command line had words that no option took; it names the nearest options, also of `further` ones."""
        unknown = [word for word in rest if word.startswith("-")]
        if unknown:
            names = {f"--{name}" for name in (*self.types, *further)}
            given = [word.partition("=")[0].replace("-", "_").replace("__", "--", 1) for word in unknown]
            described = "; ".join(with_nearest(word, names) for word in given)
            raise OptionError(f"Unknown options: {described}. See --help.")
        if rest:
            raise OptionError(f"Unexpected: {' '.join(rest)}. Expected: {self.usage}.")

    def message(self, error: object) -> str:
        """A message that the program ends with; parameters of the library become its options."""
        return f"{self.name}: {name_options(error, *self.arguments)}"

    def failure_message(self, failure: str) -> str:
        """What the program ends with after a failure that `failures.describe_failure` tells."""
        return self.message(f"{failure}. What was finished before is kept; start the same command again.")

    @contextmanager
    def refusals(self, *exceptions: type[Exception], of_all_processes: bool = True) -> Iterator[None]:
        """Ends the program with one message after a `ValueError`, `OSError` or one of `exceptions`, and after a full disk or the end of a
        worker process (`failures.describe_failure`), of which only one process may know.

        Args:
            of_all_processes: Whether all processes meet the same error, so that one of them speaks.
        """
        tell_uncaught_failures(self.failure_message)
        try:
            yield
        except (ValueError, *FAILURES, *exceptions) as error:
            ignore_ended_workers()
            if (failure := describe_failure(error)) is not None:
                sys.exit(self.failure_message(failure))
            if not isinstance(error, (ValueError, OSError, *exceptions)):
                raise
            sys.exit(self.message(error) if is_main_process() or not of_all_processes else 1)


def with_nearest(key: str, names: set[str]) -> str:
    """A name that is not one of `names`, with those of them that are near."""
    nearest = difflib.get_close_matches(key, names, n=3, cutoff=0.8) or difflib.get_close_matches(key, names, n=1)
    return f"{key} (did you mean {' or '.join(nearest)}?)" if nearest else key
