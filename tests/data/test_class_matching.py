"""Which class of an annotator is which class of a dataset."""

import functools
import random
from pathlib import Path

import pytest
import torch
from timm.data import ImageNetInfo
from torchvision.models import ResNet50_Weights

from modeling_lvvit.data.classes.class_matching import (
    ClassMap,
    all_names,
    imagenet_class_names,
    match_classes,
    normalized,
    read_class_map,
    same_classes,
    shown_names,
    wordnet_names,
)


ANNOTATOR = ["cat", "dog", "wolf", "eel"]
DATASET = ["eel", "dog", "cat"]


def pairs_of(class_map: ClassMap) -> list[int]:
    """The one annotator class of each class of the dataset."""
    assert all(len(group) == 1 for group in class_map.groups)
    return [group[0] for group in class_map.groups]


@pytest.mark.parametrize(
    ("annotator", "dataset", "expected"),
    [
        (["cat", "dog", "eel"], ["cat", "dog", "eel"], [0, 1, 2]),
        (["cat", "dog", "eel"], ["eel", "cat", "dog"], [2, 0, 1]),
        (["Great_White-Shark", "sea  horse"], ["SEA HORSE ", "great white shark"], [1, 0]),
        (["tench, Tinca tinca", "goldfish, Carassius auratus"], ["Goldfish", "tench"], [1, 0]),
        (["goldfish", "tench"], ["tench, Tinca tinca", "goldfish, Carassius auratus"], [1, 0]),
        (["eel, Anguilla", "tench, Tinca"], ["tinca", "anguilla"], [1, 0]),
        (["maillot, tank suit", "maillot"], ["maillot", "tank_suit"], [1, 0]),  # the whole name settles it
        (["big cat, lion", "cat, lion"], ["lion", "cat"], [0, 1]),  # so does what the others leave over
        (["LABEL_0", "LABEL_1"], ["LABEL_0", "LABEL_1"], [0, 1]),
    ],
)
def test_names_are_matched(annotator, dataset, expected):
    class_map = match_classes(annotator, dataset)
    assert pairs_of(class_map) == expected
    assert class_map.num_annotator_classes == len(annotator)


def test_normalized_names_lose_case_and_separators_only():
    assert normalized("  Jack-o'-Lantern__Größe ") == "jack o' lantern grösse"
    assert normalized("cats") != normalized("cat")


def test_names_of_a_wordnet_id_are_its_synonyms():
    wordnet = {"n00000001": "tench, Tinca tinca"}
    assert all_names("n00000001", wordnet) == {"n00000001", "tench", "tinca tinca"}
    assert all_names("n00000002", wordnet) == {"n00000002"}
    assert all_names("Eel, ,sea_eel", {}) == {"eel, ,sea eel", "eel", "sea eel"}


def test_wordnet_ids_match_names_in_another_order():
    wordnet = {"n00000001": "tench, Tinca tinca", "n00000002": "goldfish", "n00000003": "eel"}
    names = ["n00000003", "n00000001", "n00000002"]
    assert pairs_of(match_classes(["Tinca tinca", "goldfish", "eel"], names, wordnet)) == [2, 0, 1]
    assert pairs_of(match_classes(names, ["tench", "eel", "goldfish"], wordnet)) == [1, 0, 2]


def test_wordnet_names_knows_ids_of_imagenet_only():
    names = wordnet_names(["n01440764", "a folder n01443537", "n99999999", "tench"])
    assert names == {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish, Carassius auratus"}


@pytest.mark.parametrize("names", [["LABEL_0", "LABEL_1"], ["0", "1"], ["class 0", "class-1"], ["Label3", "7"]])
def test_numbered_names_are_refused(names):
    with pytest.raises(ValueError, match="have no names.*`class_map` identity"):
        match_classes(names, ["cat", "dog"])


def test_missing_and_extra_classes_are_named():
    with pytest.raises(ValueError) as error:
        match_classes(["cat", "wolf", "fox"], ["owl", "cat"], ignore_extra_classes=True)
    assert "only in the dataset: 'owl'\n" in str(error.value)
    assert "only in the annotator: 'wolf', 'fox'\n" in str(error.value)
    assert "ignore_extra_classes" not in str(error.value)  # it would not help


def test_long_lists_of_classes_are_cut_and_counted():
    with pytest.raises(ValueError, match=r"'class a9', \.\.\. \(12\)") as error:
        match_classes([f"class a{index}" for index in range(12)], ["owl"])
    assert "'class a10'" not in str(error.value)


def test_extra_classes_of_the_annotator_are_dropped_on_demand():
    with pytest.raises(ValueError, match="only in the annotator: 'wolf'\n.*`ignore_extra_classes`"):
        match_classes(ANNOTATOR, DATASET)
    class_map = match_classes(ANNOTATOR, DATASET, ignore_extra_classes=True)
    assert pairs_of(class_map) == [3, 1, 0]
    assert class_map.num_annotator_classes == 4
    assert not class_map.is_identity


def test_first_classes_of_a_longer_list_are_no_identity():
    assert not match_classes(["cat", "dog", "eel"], ["cat", "dog"], ignore_extra_classes=True).is_identity


@pytest.mark.parametrize(
    ("annotator", "dataset"),
    [
        (["dog", "cat"], ["dog", "Dog"]),  # two claim one
        (["big cat, lion", "cat, tiger", "lion, tiger"], ["tiger", "lion", "cat"]),  # each has two candidates
        (["cat", "owl"], ["cat", "owls"]),
    ],
)
def test_names_that_do_not_settle_it_are_refused(annotator, dataset):
    with pytest.raises(ValueError, match="only in the dataset"):
        match_classes(annotator, dataset)


def test_namesakes_are_paired_in_order_where_all_others_keep_theirs():
    annotator = ["eel", "crane", "cat", "Crane"]
    assert pairs_of(match_classes(annotator, ["crane, bird", "eel", "crane, machine", "cat"])) == [1, 0, 3, 2]
    with pytest.raises(ValueError, match="only in the dataset: 'crane, bird', 'crane, machine'\n"):
        match_classes(annotator, ["crane, bird", "cat", "crane, machine", "eel"])


# ---- the 1,000 classes of ImageNet


@functools.cache
def imagenet() -> tuple[list[str], dict[str, list[str]]]:
    """WordNet ids, and names of the same classes as they come in model cards and folders."""
    info, ids = ImageNetInfo("imagenet-1k"), imagenet_class_names()
    long = [info.index_to_description(index) for index in range(1000)]
    return ids, {
        "synonyms": long,
        "first": [name.split(",")[0] for name in long],
        "folders": [name.split(",")[0].lower().replace(" ", "_") for name in long],
        "torchvision": ResNet50_Weights.IMAGENET1K_V2.meta["categories"],
    }


def shuffled() -> list[int]:
    return random.Random(0).sample(range(1000), 1000)


@pytest.mark.parametrize("form", ["synonyms", "first", "folders", "torchvision"])
def test_all_imagenet_classes_match_their_wordnet_ids_both_ways(form):
    ids, names = imagenet()
    assert ids[:2] == ["n01440764", "n01443537"]
    assert match_classes(names[form], ids, wordnet_names(ids)).is_identity
    assert match_classes(ids, names[form], wordnet_names(ids)).is_identity
    assert same_classes(ids, names[form])


@pytest.mark.parametrize("ids_of_annotator", [False, True])
@pytest.mark.parametrize(
    ("form", "namesakes"), [("synonyms", {134, 517}), ("first", {134, 517, 264, 474, 638, 639})]
)  # crane twice; Cardigan and cardigan, maillot twice, where their synonyms are cut off
def test_shuffled_imagenet_classes_match_but_for_namesakes(form, namesakes, ids_of_annotator):
    ids, names = imagenet()
    order = [index for index in shuffled() if index not in namesakes]
    annotator, dataset = [names[form][index] for index in order], [ids[index] for index in sorted(order)]
    expected = [order.index(index) for index in sorted(order)]
    if ids_of_annotator:
        annotator, dataset = [ids[index] for index in order], [names[form][index] for index in sorted(order)]
    assert pairs_of(match_classes(annotator, dataset, wordnet_names(ids))) == expected


def test_shuffled_namesakes_of_imagenet_are_refused_by_name():
    ids, names = imagenet()
    with pytest.raises(ValueError) as error:
        match_classes([names["synonyms"][index] for index in shuffled()], ids, wordnet_names(ids))
    assert "only in the dataset: 'n02012849', 'n03126707'\n" in str(error.value)
    assert "only in the annotator: 'crane', 'crane'\n" in str(error.value)


def test_folders_with_id_and_name_match_shuffled_ids():
    ids, names = imagenet()
    both = [f"{synset} {name}" for synset, name in zip(ids, names["synonyms"])]
    order = shuffled()
    class_map = match_classes([ids[index] for index in order], both, wordnet_names(ids))
    assert pairs_of(class_map) == [order.index(index) for index in range(1000)]


def test_same_classes_asks_for_the_same_order():
    ids, names = imagenet()
    assert same_classes(["cat", "dog"], ["cat", "dog"])
    assert same_classes(["LABEL_0", "LABEL_0"], ["LABEL_0", "LABEL_0"])
    assert same_classes(["tench, Tinca tinca", "eel"], ["Tench", "EEL"])
    assert not same_classes(["cat", "dog"], ["dog", "cat"])
    assert not same_classes(["cat", "dog"], ["cat", "dog", "eel"])
    assert not same_classes(["LABEL_0", "LABEL_1"], ["cat", "dog"])
    assert not same_classes(ids, [*names["synonyms"][1:], names["synonyms"][0]])


# ---- applying a class map


def asymmetric_scores(num_classes: int) -> torch.Tensor:
    """`(2, num_classes, 2, 3)`, all values different."""
    return torch.randn(2, num_classes, 2, 3, generator=torch.Generator().manual_seed(0))


def test_identity_leaves_scores_as_they_are():
    scores = asymmetric_scores(3)
    assert ClassMap(((0,), (1,), (2,)), 3).apply(scores) is scores


def test_one_to_one_map_reorders_classes_and_nothing_else():
    scores = asymmetric_scores(4)
    mapped = ClassMap(((3,), (0,), (3,)), 4).apply(scores)
    assert mapped.shape == (2, 3, 2, 3)
    assert torch.equal(mapped[:, 0], scores[:, 3])
    assert torch.equal(mapped[:, 1], scores[:, 0])
    assert torch.equal(mapped[:, 2], scores[:, 3])


def test_several_annotator_classes_add_their_probabilities():
    scores = asymmetric_scores(5)
    groups = ((4,), (0, 2, 3), (1,))
    mapped = ClassMap(groups, 5).apply(scores)
    by_hand = [scores[:, list(group)].exp().sum(dim=1).log() for group in groups]
    torch.testing.assert_close(mapped, torch.stack(by_hand, dim=1))
    probabilities = scores.softmax(dim=1)
    expected = torch.stack([probabilities[:, list(group)].sum(dim=1) for group in groups], dim=1)
    torch.testing.assert_close(mapped.softmax(dim=1), expected)


def test_joined_classes_by_hand():
    """exp gives 1, 2, 3: the first two together 3, their logarithm log 3."""
    scores = torch.tensor([1.0, 2.0, 3.0]).log().view(1, 3, 1, 1)
    mapped = ClassMap(((2,), (0, 1)), 3).apply(scores).flatten()
    torch.testing.assert_close(mapped, torch.tensor([3.0, 3.0]).log())


def test_very_large_scores_are_joined_without_overflow():
    scores = torch.tensor([1e4, 1e4, -1e4]).view(1, 3, 1, 1)
    mapped = ClassMap(((0, 1), (2,)), 3).apply(scores).flatten()
    torch.testing.assert_close(mapped, torch.tensor([1e4 + torch.log(torch.tensor(2.0)).item(), -1e4]))


# ---- class maps in files


def write(folder: Path, text: str, name: str = "map.csv", encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def test_json_map_takes_names_ids_and_lists(tmp_path):
    path = write(tmp_path, '{"Cat": 0, "1": ["dog", 2, "WOLF"], "eel": "3"}', "map.json")
    class_map = read_class_map(path, ANNOTATOR, DATASET)
    assert class_map == ClassMap(((3,), (1, 2), (0,)), 4)  # eel, dog, cat; the wolf once


def test_csv_map_takes_names_ids_repeated_rows_and_quotes(tmp_path):
    annotator = ["cat, Felis catus", "dog", "wolf", "eel"]
    path = write(tmp_path, 'dog,wolf\n0, eel\n\ndog , 1\ncat,"Cat, Felis catus"\n')
    assert read_class_map(path, annotator, DATASET) == ClassMap(((3,), (2, 1), (0,)), 4)


def test_one_annotator_class_may_stand_for_two(tmp_path):
    path = write(tmp_path, "eel,eel\ndog,wolf\ncat,wolf\n")
    assert read_class_map(path, ANNOTATOR, DATASET).groups == ((3,), (2,), (2,))


def test_names_come_before_ids(tmp_path):
    path = write(tmp_path, '{"0": "1", "1": "0"}', "map.json")
    assert read_class_map(path, ["1", "0"], ["1", "0"]).groups == ((1,), (0,))


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("eel,eel\ndog,fox\ncat,cat", "map.csv", r"annotator: 'fox': no class of 4 has this name or id"),
        ("eel,eel\ndog,4\ncat,cat", "map.csv", r"annotator: '4': no class of 4"),
        ("eel,eel\ndog,-1\ncat,cat", "map.csv", r"annotator: '-1': no class of 4"),
        ("eel,eel\nfox,dog\ncat,cat", "map.csv", r"dataset: 'fox': no class of 3"),
        ("dog,dog", "map.csv", r"leaves classes .* without a partner: 'eel', 'cat'"),
        ('{"eel": "eel", "dog": [], "cat": "cat"}', "map.json", r"without a partner: 'dog'"),
        ('{"eel": "eel", "dog": null, "cat": "cat"}', "map.json", r"annotator: None"),
        ("", "map.csv", r"without a partner: 'eel', 'dog', 'cat'"),
        ("eel", "map.csv", r"must be a JSON object, or CSV rows"),
        ("eel;eel\ndog;dog", "map.csv", r"must be a JSON object, or CSV rows"),
        ('{"eel": ', "map.json", r"must be a JSON object, or CSV rows"),
        ('["eel"]', "map.json", r"must be a JSON object, or CSV rows"),
    ],
)
def test_map_with_mistakes_is_refused(tmp_path, text, name, message):
    path = write(tmp_path, text, name)
    with pytest.raises(ValueError, match=message) as error:
        read_class_map(path, ANNOTATOR, DATASET)
    assert str(path) in str(error.value)


def test_map_that_is_no_text_is_refused(tmp_path):
    path = write(tmp_path, "eel,eel", encoding="utf-16")
    with pytest.raises(ValueError, match="must be a JSON object, or CSV rows"):
        read_class_map(path, ANNOTATOR, DATASET)


def test_ambiguous_name_asks_for_an_id(tmp_path):
    annotator = ["crane", "dog", "Crane"]
    with pytest.raises(ValueError, match="'crane': more than one class has this name; give its id"):
        read_class_map(write(tmp_path, "bird,crane\ndog,dog"), annotator, ["bird", "dog"])
    assert read_class_map(write(tmp_path, "bird,2\ndog,dog"), annotator, ["bird", "dog"]).groups == ((2,), (1,))


def test_map_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no class map"):
        read_class_map(tmp_path / "map.csv", ANNOTATOR, DATASET)


def test_map_of_a_spreadsheet_is_read(tmp_path):
    path = write(tmp_path, "eel,eel\ndog,dog\ncat,cat", encoding="utf-8-sig")
    assert pairs_of(read_class_map(path, ANNOTATOR, DATASET)) == [3, 1, 0]


@pytest.mark.parametrize("text", ["eel," + "x" * 200_000, "eel,²\ndog,dog\ncat,cat"], ids=["long", "power"])
def test_odd_text_is_refused_with_the_path(tmp_path, text):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=str(path)):
        read_class_map(path, ANNOTATOR, DATASET)


def test_name_that_a_dropped_class_has_too_is_refused():
    annotator = ["cardigan", "Cardigan, Cardigan Welsh corgi", "pug"]
    with pytest.raises(ValueError, match="Several classes of the annotator have the names.*'Cardigan'"):
        match_classes(annotator, ["Cardigan", "pug"], ignore_extra_classes=True)
    found = match_classes(annotator, ["Cardigan Welsh corgi", "pug"], ignore_extra_classes=True)
    assert [group[0] for group in found.groups] == [1, 2]


def test_figures_show_names_and_no_wordnet_ids():
    assert shown_names(["n01440764", "n02012849", "n03126707"]) == ["tench", "crane bird", "crane"]
    assert shown_names(["cat, house cat", "dog, small", "dog, large", "n99999999"]) == [
        "cat", "dog, small", "dog, large", "n99999999",
    ]  # fmt: skip
    assert shown_names(["crane", "n03126707"]) == ["crane [0]", "crane [1]"]
