"""Texts of classes: templates, synonyms, files of prompts, and what is refused."""

import json
import re

import pytest

from modeling_lvvit.annotators.arguments import AnnotateArguments
from modeling_lvvit.annotators.text.prompts import DEFAULT_TEMPLATES, Prompts, read_prompts
from modeling_lvvit.cli.data_arguments import DataArguments
from modeling_lvvit.launching import name_options


def test_each_template_names_each_synonym():
    prompts = Prompts(("a {}.", "{} and another {}"))
    assert prompts.of_classes(["tench, Tinca_tinca", "red_fox"]) == [
        ["a tench.", "tench and another tench", "a Tinca tinca.", "Tinca tinca and another Tinca tinca"],
        ["a red fox.", "red fox and another red fox"],
    ]


def test_wordnet_ids_are_read_as_their_names():
    texts = Prompts(("a {}.",)).of_classes(["n01443537", "cat"])
    assert texts == [["a goldfish.", "a Carassius auratus."], ["a cat."]]


def test_file_of_prompts_replaces_templates_and_names(tmp_path):
    content = {
        "templates": ["the {}"],
        "classes": {"Red Fox": ["a fox", "it"], "owl": "an owl {}"},
        "background": ["sky"],
    }
    (tmp_path / "prompts.json").write_text(json.dumps(content))
    prompts = read_prompts(tmp_path / "prompts.json")
    assert prompts.of_classes(["cat", "red_fox", "owl"]) == [["the cat"], ["a fox", "it"], ["an owl {}"]]
    assert prompts.background == ("sky",)
    assert read_prompts(None).templates == DEFAULT_TEMPLATES and all("{}" in each for each in DEFAULT_TEMPLATES)


def test_record_has_what_was_given_and_a_digest_of_the_texts():
    prompts = Prompts(("a {}",), {"cat": ("it",)}, ("sky",))
    record = prompts.record(prompts.of_classes(["cat", "dog"]))
    assert record["prompts"] == {"templates": ["a {}"], "classes": {"cat": ["it"]}, "background": ["sky"]}
    assert len(record["prompts_sha256"]) == 64
    assert record["prompts_sha256"] != prompts.record(prompts.of_classes(["cat", "owl"]))["prompts_sha256"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no valid JSON"),
        ('{"classes": {"cat": ["a"], "cat": ["b"]}}', "'cat'. more than once"),
        ("[]", "must be a JSON object.*got list"),
        ('{"template": ["a {}"]}', r"keys of templates, classes, background; got \['template'\]"),
        ('{"templates": ["a photo"]}', "template needs {} where the class name belongs: 'a photo'"),
        ('{"templates": []}', "templates must be a list of texts, at least one"),
        ('{"classes": ["cat"]}', "object from class to prompts, got list"),
        ('{"classes": {"cat": [" "]}}', "class 'cat' must be a list of texts"),
        ('{"background": [3]}', "background must be a list of texts"),
    ],
)
def test_files_that_are_no_prompts_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "prompts.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(tmp_path / "prompts.json")
    assert "prompts.json" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file of prompts .*none.json"):
        read_prompts(tmp_path / "none.json")


@pytest.mark.parametrize("classes", [{"yak": ("a yak",)}, {"red fox": ("a",), "Red-Fox": ("b",)}])
def test_prompts_of_no_class_or_of_one_twice_are_refused(classes):
    with pytest.raises(ValueError, match="not one class of the data.*: '(yak|Red-Fox)'.*3 classes: 'cat', 'red_fox'"):
        Prompts(classes=classes).of_classes(["cat", "red_fox", "owl"])


def test_numbers_need_prompts_of_their_own():
    with pytest.raises(ValueError, match=r"only numbers.*: '1'\. Name the classes.*`prompts`"):
        Prompts(classes={"0": ("a cat",)}).of_classes(["0", "1"])
    assert Prompts(classes={"0": ("a cat",), "1": ("a dog",)}).of_classes(["0", "1"]) == [["a cat"], ["a dog"]]


def test_classes_of_one_name_are_told(caplog):
    with caplog.at_level("WARNING"):
        Prompts().of_classes(["crane", "Crane", "cat"])
    assert "same texts, so that no text tells them apart: 'crane', 'Crane'." in caplog.text


@pytest.mark.parametrize("arguments", [AnnotateArguments, DataArguments])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"annotator_class_map": "map.json"}, "--annotator_class_map has no use with text:clip"),
        ({"annotator_ignore_extra_classes": True}, "--annotator_ignore_extra_classes has no use"),
        (
            {"annotator": "timm/resnet18", "prompts": "p.json"},
            "--prompts are for image-text models.*got timm/resnet18",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, options, message):
    with pytest.raises(ValueError) as caught:
        arguments(**{"annotator": "text:clip", **options})
    assert re.search(message, name_options(caught.value, arguments))


def test_scores_of_texts_are_stored_relative_unless_told():
    assert AnnotateArguments(annotator="text:clip").scores == "relative"
    assert AnnotateArguments(annotator="text:clip", scores="logits").scores == "logits"
    assert AnnotateArguments(annotator="timm/resnet18").scores == "logits"
