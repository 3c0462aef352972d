"""The options of all programs: one set of names, one way of reading them."""

import re
from collections import defaultdict
from dataclasses import dataclass, field, fields
from typing import ClassVar, get_type_hints

import pytest
from transformers.hf_argparser import HfArg

from modeling_lvvit.cli import digit_scenes
from modeling_lvvit.cli.command import COMMANDS
from modeling_lvvit.options import OptionError, OptionParser, Program
from modeling_lvvit.original import label_import
from modeling_lvvit.segmentation.conversion import ade20k
from modeling_lvvit.visualization import localization
from support.programs import ROOT


# defaults of the published recipes, which differ between classification and segmentation
RECIPES = {
    "base_learning_rate", "weight_decay", "warmup_steps", "lr_schedule", "lr_scheduler_type", "label_smoothing_factor",
    "dataloader_drop_last",
}  # fmt: skip
SHOWN = ("modeling_lvvit", "model_cards", "dataset_scripts")  # and the files at the top


def programs() -> list[Program]:
    further = [digit_scenes, label_import, ade20k, localization]
    return [*(command.load_program() for command in COMMANDS.values()), *(module.PROGRAM for module in further)]


def default_of(entry) -> object:
    return entry.default_factory() if callable(entry.default_factory) else entry.default


def test_an_option_is_the_same_in_every_program():
    meanings = defaultdict(dict)
    for program in programs():
        for part in program.arguments:
            hints = get_type_hints(part)
            for entry in fields(part):
                if entry.init:
                    default = None if entry.name in RECIPES else default_of(entry)
                    meanings[entry.name].setdefault(f"{hints[entry.name]} {default!r}", []).append(program.name)
    differing = {name: uses for name, uses in meanings.items() if len(uses) > 1}
    assert not differing
    shared = [name for name, uses in meanings.items() if sum(map(len, uses.values())) > 1]
    assert len(shared) > 30


def test_an_older_name_is_no_option_of_another_program():
    names = {name for program in programs() for name in program.types}
    for program in programs():
        for alias, name in program.parser().renamed.items():
            assert name in program.types and alias not in program.types, (program.name, alias)
    assert "image_column" not in names and "split" not in names


def test_commands_that_are_shown_have_no_older_names():
    parsers = {name: command.load_program().parser() for name, command in COMMANDS.items()}
    older, seen = [], set()
    for path in [*ROOT.glob("*.md"), *(path for folder in SHOWN for path in (ROOT / folder).rglob("*"))]:
        if path.suffix in (".md", ".py", ".yaml"):
            text = re.sub(r"\\\n\s*", "", path.read_text(encoding="utf-8"))  # lines that go on
            for name, options in re.findall(r"lvvit ([\w-]+)([^\n`#|]*)", text):
                seen.add(name)
                words = re.findall(r"--(\w+)", options) if name in parsers else []
                older += [(path.name, name, word) for word in words if word in parsers[name].renamed]
    assert older == [] and seen > set(COMMANDS)


@pytest.mark.parametrize("program", programs(), ids=lambda program: program.name)
def test_help_has_every_option_and_a_short_one_where_there_are_many(program):
    parser = program.parser()
    text = parser.format_help(everything=True)
    assert all(f"  --{name} " in text for name in program.types)
    assert len(parser.format_help().splitlines()) < 160


@dataclass
class Options:
    option_groups: ClassVar[dict[str, str]] = {"is_fast": "speed"}

    dataset_name: str | None = HfArg(default=None, help="Data.", aliases=["--dataset"])
    models: list[str] | None = HfArg(default=None, help="Models.")
    is_fast: bool = HfArg(default=False, help="Fast.")
    check: bool = HfArg(default=True, help="Check.")
    private: bool | None = HfArg(default=None, help="Private.")
    push_to_hub: bool = HfArg(default=False, help="Upload.")
    hub_model_id: str | None = HfArg(default=None, help="Where.")
    table: list[str] | None = field(default=None, metadata={"help": "Table."})


PROGRAM = Program("a program", "Does it.", (Options,), ("dataset_name", "models*"), may_be_empty=("table",))


def parse(text: str) -> Options:
    OptionParser.noted.clear()
    return PROGRAM.parse(text.split())[0]


@pytest.mark.parametrize("name", ["is_fast", "check", "private"])
def test_booleans_work_bare_and_with_a_value(name):
    values = [getattr(parse(f"--{name}{word}"), name) for word in ("", " true", "=yes", " false", "=0")]
    assert values == [True, True, True, False, False]


def test_a_boolean_that_is_on_can_be_switched_off_by_name():
    assert parse("--no_check").check is False and parse("--no-check").check is False


def test_first_words_are_the_options_that_a_program_names_by_place():
    args = parse("data one two --is_fast")
    assert (args.dataset_name, args.models, args.is_fast) == ("data", ["one", "two"], True)


def test_lists_may_be_empty_where_the_program_says_so():
    assert parse("--table").table == []
    with pytest.raises(OptionError, match="--models: expected at least one argument"):
        parse("--models")


@pytest.mark.parametrize("word", ["--dataset data", "--dataset=data"])
def test_an_older_name_works_and_is_said_once(word, capsys):
    assert parse(word).dataset_name == "data"
    assert PROGRAM.parse(word.split())[0].dataset_name == "data"
    assert capsys.readouterr().err == "note: --dataset is now called --dataset_name.\n"


def test_a_repository_behind_push_to_hub_is_its_name(capsys):
    args = parse("--push_to_hub owner/name")
    assert (args.push_to_hub, args.hub_model_id) == (True, "owner/name")
    assert "--push_to_hub --hub_model_id owner/name" in capsys.readouterr().err
    assert parse("--push_to_hub false").hub_model_id is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--is_fats", r"Unknown options: --is_fats \(did you mean --is_fast\?\)"),
        ("--dataset-nme x", r"--dataset_nme \(did you mean --dataset_name\?\)"),
        ("--private maybe", "--private: .*maybe"),
        ("data --is_fast true more", "Unexpected: more. Expected: a program DATASET_NAME MODELS ..."),
    ],
)
def test_what_cannot_be_read_is_one_message(text, message):
    with pytest.raises(OptionError, match=message):
        parse(text)


def test_required_options_are_named():
    program = Program("a program", "Does it.", (Options,), required=("dataset_name", "models"))
    with pytest.raises(OptionError, match="Give --dataset_name and --models. Usage: a program"):
        program.parse([])


def test_refusals_end_with_one_message_and_name_options():
    with pytest.raises(SystemExit, match="^a program: Give --dataset_name.$"), PROGRAM.refusals():
        raise ValueError("Give `dataset_name`.")


def test_help_has_groups():
    text = PROGRAM.parser().format_help()
    assert text.index("speed:") > text.index("options:") > text.index("Does it.")
    assert "--check [true|false]  Check. (default: True)" in text
