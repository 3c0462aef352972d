"""Image-text models in the programs: annotate, check, train with live labels; what is refused, and when."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from transformers import BitImageProcessor, ResNetConfig, ResNetForImageClassification
from transformers.utils import is_sentencepiece_available

import train_tl
from modeling_lvvit.annotators import annotate
from modeling_lvvit.annotators.annotator import load_annotator
from modeling_lvvit.annotators.online import open_annotator
from modeling_lvvit.cli.data_arguments import DataArguments
from modeling_lvvit.labels.label_set import LabelSet
from modeling_lvvit.visualization import check_labels, photographs
from modeling_lvvit.visualization.__main__ import main as visualize
from support.images import encode_image
from support.models import save_tiny_lvvit
from support.programs import options as training_options
from support.text_models import CLASSES, save_text_model, tiny_text_model


NAMES = ["cat", "dog", "owl", "red", "green", "blue", "sky"]
MEAN, STD = [0.5] * 3, [0.5] * 3


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return save_text_model(tmp_path_factory.mktemp("clip"), "clip")


def save_images(folder: Path, labels: pa.Array | None = None, count: int = 12, with_labels: bool = True) -> Path:
    """A Parquet file of images of different sizes, whose labels are `NAMES`, or the given ones, or none."""
    rng = np.random.default_rng(0)
    contents = [
        encode_image(rng.integers(0, 256, (*rng.integers(20, 70, 2), 3), dtype=np.uint8)) for _ in range(count)
    ]
    features = {"image": datasets.Image()}
    columns = [pa.array([{"bytes": content, "path": f"{row}.img"} for row, content in enumerate(contents)])]
    if with_labels:
        features["label"] = datasets.ClassLabel(names=NAMES) if labels is None else datasets.Value(str(labels.type))
        columns.append(pa.array(np.arange(count) % len(NAMES)) if labels is None else labels)
    schema = datasets.Features(features).arrow_schema
    columns = [column.cast(entry.type) for column, entry in zip(columns, schema)]
    folder.mkdir()
    parquet.write_table(pa.Table.from_arrays(columns, schema=schema), folder / "train.parquet")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return save_images(tmp_path_factory.mktemp("images") / "data")


def write_prompts(folder: Path, **content: object) -> str:
    (folder / "prompts.json").write_text(json.dumps(content))
    return str(folder / "prompts.json")


def command(images: Path, model: Path, output: Path, *more: str) -> list[str]:
    return [str(images), "--annotator", f"text:{model}", "--output_dir", str(output), *more]


def test_stored_targets_are_the_models_probabilities(clip, images, tmp_path, capsys):
    """Seven classes, three of them kept: each has its own probability, the others share the rest."""
    prompts = write_prompts(tmp_path, background=["grass"])
    annotate.main(command(images, clip, tmp_path / "set", "--top_k", "3", "--prompts", prompts))
    with pytest.raises(SystemExit) as end:
        check_labels.main([str(tmp_path / "set"), str(images), "--contact_sheet", str(tmp_path / "sheet.png")])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "12 label maps, 0 of them empty" in printed and "3 of 7 classes in each" in printed
    settings = json.loads((tmp_path / "set" / "token_labels.json").read_text())["settings"]
    assert settings["annotator"] == f"text:{clip.name}" and settings["annotator_model_type"] == "clip"
    assert settings["prompts"]["background"] == ["grass"] and len(settings["prompts_sha256"]) == 64
    assert settings["scores"] == "relative"

    annotator = load_annotator(f"text:{clip}", class_names=NAMES, prompts=prompts)
    rows = datasets.load_dataset(str(images), split="train")
    label_set = LabelSet.open(str(tmp_path / "set"), "train")
    assert label_set.class_names == NAMES
    stored = datasets.load_dataset(str(tmp_path / "set"), split="train")
    for row, image in zip(stored, rows["image"]):
        probabilities = annotator.score_map(annotator.preprocessing(image.convert("RGB"))[0][None]).softmax(1)[0]
        ids = np.array(row["token_label_palette"])[np.array(row["token_label_index"])]
        scores = torch.tensor(row["token_label_scores"])
        expected = probabilities.gather(0, torch.from_numpy(ids))  # (3, rows, columns)
        total = scores.exp().sum(0) + len(NAMES) - 3
        torch.testing.assert_close(scores.exp() / total, expected, atol=3e-3, rtol=0)


def test_a_live_step_trains_with_the_models_labels(clip, images, tmp_path):
    more = ["--annotator", f"text:{clip}", "--max_steps", "1", "--logging_steps", "1", "--eval_fraction", "0.4"]
    train_tl.main(training_options(images, tmp_path / "run", *more))
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert any("token_loss" in entry for entry in log)
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"text:{clip.name}" in card


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_live_labels_are_the_scores_of_the_crop(tmp_path, kind, dtype):
    folder = save_text_model(tmp_path, kind)
    args = DataArguments(annotator=f"text:{folder}", annotator_dtype=dtype)
    labels = open_annotator(args, NAMES, MEAN, STD, torch.device("cpu"))
    assert labels.num_classes == len(NAMES)
    pixels = torch.randint(0, 256, (2, 3, *labels.annotator.preprocessing.image_size)).float()
    token_targets = labels.label((pixels / 255 - 0.5) / 0.5, labels.annotator.dense.grid_size)[1].to_dense()
    expected = load_annotator(f"text:{folder}", class_names=NAMES).score_map(pixels).softmax(1)
    difference = (token_targets - expected.flatten(2).mT).abs()
    assert difference.max() < 1e-4 if dtype == "float32" else difference.mean() < 0.03


def test_autocast_keeps_cosines_exact(clip):
    """In bfloat16 a cosine of 0.25 at a scale of 100 would be rounded to a tenth."""
    annotator = load_annotator(f"text:{clip}", class_names=NAMES)
    with torch.autocast("cpu", torch.bfloat16):
        scores = annotator.score_map(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert scores.dtype == torch.float32


def test_images_without_labels_get_the_classes_of_the_prompts(clip, tmp_path):
    data = save_images(tmp_path / "data", with_labels=False)
    with pytest.raises(SystemExit, match="there are none. Name the column.*--label_column.*--prompts"):
        annotate.main(command(data, clip, tmp_path / "set"))
    prompts = write_prompts(tmp_path, classes={"owl": "an owl", "dog": ["a dog", "dog"]})
    annotate.main(command(data, clip, tmp_path / "set", "--prompts", prompts))
    assert LabelSet.open(str(tmp_path / "set"), "train").class_names == ["owl", "dog"]


def test_numbers_are_refused_with_the_remedy_before_anything_is_written(clip, tmp_path):
    data = save_images(tmp_path / "data", pa.array([0, 1, 2] * 4))
    with pytest.raises(SystemExit, match="only numbers, which no text describes: '0', '1', '2'. .*--prompts"):
        annotate.main(command(data, clip, tmp_path / "set"))
    assert not (tmp_path / "set").exists()
    with pytest.raises(ValueError, match="only numbers"):
        open_annotator(DataArguments(annotator=f"text:{clip}"), ["0", "1"], MEAN, STD, torch.device("cpu"))
    prompts = write_prompts(tmp_path, classes={"0": "a cat", "1": "a dog", "2": "an owl"})
    annotate.main(command(data, clip, tmp_path / "set", "--prompts", prompts))
    assert LabelSet.open(str(tmp_path / "set"), "train").class_names == ["0", "1", "2"]


def test_a_missing_or_wrong_file_of_prompts_stops_the_program(clip, images, tmp_path):
    with pytest.raises(SystemExit, match="There is no file of prompts .*none.json"):
        annotate.main(command(images, clip, tmp_path / "set", "--prompts", str(tmp_path / "none.json")))
    prompts = write_prompts(tmp_path, classes={"yak": ["a yak"]})
    with pytest.raises(SystemExit, match="not one class of the data.*'yak'.*7 classes: 'cat'"):
        annotate.main(command(images, clip, tmp_path / "set", "--prompts", prompts))


def test_another_set_of_prompts_is_another_label_set(clip, images, tmp_path):
    annotate.main(command(images, clip, tmp_path / "set"))
    prompts = write_prompts(tmp_path, classes={"sky": ["a blue sky"]})
    with pytest.raises(SystemExit, match="other settings(.|\n)*prompts_sha256"):
        annotate.main(command(images, clip, tmp_path / "set", "--prompts", prompts))


def test_image_size_in_whole_patches(clip):
    assert load_annotator(f"text:{clip}", (40, 48), class_names=NAMES).dense.grid_size == (5, 6)
    with pytest.raises(ValueError, match="`annotator_image_size` must be multiples of .* 8 pixels.*got 40 x 50"):
        load_annotator(f"text:{clip}", (40, 50), class_names=NAMES)


def test_a_size_of_its_own_that_patches_do_not_fill_is_made_whole(tmp_path, caplog):
    """SigLIP has checkpoints of 384 pixels with patches of 14, which would leave a border unseen."""
    folder = save_text_model(tmp_path, "siglip", tiny_text_model("siglip", image_size=34))
    (folder / "preprocessor_config.json").write_text(
        (folder / "preprocessor_config.json")
        .read_text()
        .replace('"height": 32', '"height": 34')
        .replace('"width": 32', '"width": 34')
    )
    with caplog.at_level("WARNING"):
        annotator = load_annotator(f"text:{folder}", class_names=NAMES)
    assert annotator.preprocessing.image_size == (32, 32) and annotator.dense.grid_size == (4, 4)
    assert "images become 32 x 32 pixels, not 34 x 34" in caplog.text


def test_clipseg_refuses_images_that_are_not_square(tmp_path):
    folder = save_text_model(tmp_path, "clipseg")
    with pytest.raises(ValueError, match="cannot label cells: CLIPSeg takes square images only"):
        load_annotator(f"text:{folder}", (32, 48), class_names=NAMES)


def test_other_models_are_refused_with_the_list_of_types(tmp_path):
    ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(
        tmp_path
    )
    BitImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model type is 'resnet'.*clip, siglip, siglip2, clipseg.*without `text:`"):
        load_annotator(f"text:{tmp_path}", class_names=NAMES)
    with pytest.raises(ValueError, match="no such folder"):
        load_annotator(f"text:{tmp_path}/none/at/all", class_names=NAMES)


@pytest.mark.parametrize("kind", CLASSES)
def test_an_image_text_model_given_as_a_classifier_gets_a_hint(tmp_path, kind):
    folder = save_text_model(tmp_path, kind)
    with pytest.raises(ValueError, match=f"It is an image-text model: give it as text:{folder}"):
        load_annotator(str(folder))


def test_damaged_models_and_texts_that_are_too_long_are_refused(tmp_path):
    folder = save_text_model(tmp_path, "clip")
    with pytest.raises(ValueError, match="has 4[0-9] tokens, the model takes 40. Shorten it"):
        load_annotator(f"text:{folder}", class_names=["cat", " ".join(["red"] * 40)])
    weights = load_file(folder / "model.safetensors")
    projection = weights.pop("visual_projection.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"no trained CLIPModel, its weights lack \['visual_projection.weight'\]"):
        load_annotator(f"text:{folder}", class_names=NAMES)
    weights["visual_projection.weight"] = projection * torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="NaN or infinite values, in visual_projection.weight"):
        load_annotator(f"text:{folder}", class_names=NAMES)
    (folder / "tokenizer.json").unlink()
    weights["visual_projection.weight"] = projection
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="cannot label cells"):
        load_annotator(f"text:{folder}", class_names=NAMES)


def test_a_tokenizer_that_needs_sentencepiece_says_so(tmp_path):
    if is_sentencepiece_available():
        pytest.skip("it is installed")
    folder = save_text_model(tmp_path, "siglip")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "SiglipTokenizer"}))
    with pytest.raises(ValueError, match="pip install sentencepiece"):
        load_annotator(f"text:{folder}", class_names=NAMES)


def test_pictures_show_cells_scored_by_texts(clip, tmp_path, monkeypatch):
    """`lvvit visualize` scores the classes of its first model, photographs those of the prompts; both say what they were given."""
    asked = []

    def load(name, *args, class_names=None, prompts=None, **more):
        annotator = load_annotator(name, *args, class_names=class_names, prompts=prompts, **more)
        asked.append(annotator.class_names)
        return annotator

    for module in ("__main__", "photographs"):
        monkeypatch.setattr(f"modeling_lvvit.visualization.{module}.load_annotator", load)
    image, text, output = str(tmp_path / "image.png"), f"text:{clip}", ["--output_file", str(tmp_path / "shown.png")]
    Image.effect_noise((40, 40), 80).convert("RGB").save(image)
    model = str(save_tiny_lvvit(tmp_path / "model", NAMES[:3]))
    visualize([image, model, "--annotator", text, *output])
    prompts = write_prompts(tmp_path, classes={"dog": ["dog"], "owl": ["owl"]})
    photographs.main([image, "--annotator", text, "--prompts", prompts, *output])
    assert asked == [NAMES[:3], ["dog", "owl"]]
    for main, inputs in ((visualize, [image, model]), (photographs.main, [image])):
        with pytest.raises(SystemExit, match="--prompts are for image-text models"):
            main([*inputs, "--annotator", model, "--prompts", prompts])


def test_random_weights_try_out_the_architecture(clip):
    first, second = (load_annotator(f"text:{clip}", class_names=NAMES, random_weights=True) for _ in range(2))
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert torch.equal(first.score_map(pixels), second.score_map(pixels))
    assert first.provenance["annotator_weights"] == "random, seed 0"
