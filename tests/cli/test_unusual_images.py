"""Programs on images that are too large, of 16 bits, damaged or transparent: what they say, and with which option they go on."""

import datasets
import numpy as np
import pytest
from PIL import Image

import train_tl
from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.annotators import annotate
from modeling_lvvit.data import image_dataset
from modeling_lvvit.evaluate.__main__ import main as evaluate
from modeling_lvvit.segmentation import train as segmentation
from modeling_lvvit.variants import evaluation_image_processor
from modeling_lvvit.visualization.__main__ import main as visualize
from support.image_files import COLORS, DEEP, encode
from support.images import encode_image
from support.models import tiny_config
from support.programs import TINY, options
from support.segmentation_rows import masked_rows


ALLOWED = ["--max_image_pixels", str(COLORS.shape[0] * COLORS.shape[1])]
LARGE = r"exceeds limit of 800 pixels; --max_image_pixels allows more"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    LVViTForImageClassification(tiny_config(image_size=32, num_labels=2)).save_pretrained(folder)
    evaluation_image_processor((32, 32), 0.8).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def large(tmp_path, monkeypatch):
    """Rows with images above the limit, and one as a file."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    (tmp_path / "large.png").write_bytes(encode_image(COLORS, "PNG"))
    write_rows(tmp_path / "test.parquet", [encode_image(COLORS, "PNG")] * 4)
    return tmp_path


def write_rows(path, files: list[bytes]) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    images = [{"bytes": file, "path": f"{row}.img"} for row, file in enumerate(files)]
    labels = [row % 2 for row in range(len(files))]
    datasets.Dataset.from_dict({"image": images, "label": labels}, features).to_parquet(path)


def test_evaluation_of_large_images(large, model):
    command = ["--model", model, "--dataset", str(large / "test.parquet"), "--class_map", "identity"]
    with pytest.raises(SystemExit, match=LARGE):
        evaluate(command)
    evaluate([*command, *ALLOWED])


def test_annotation_of_large_images(large, model):
    command = ["--dataset", str(large / "test.parquet"), "--split", "test", "--annotator", model, "--top_k", "1"]
    command += ["--output_dir", str(large / "labels"), "--class_map", "identity"]
    with pytest.raises(SystemExit, match=LARGE):
        annotate.main(command)
    annotate.main([*command, *ALLOWED])
    assert (large / "labels" / "README.md").is_file()


def test_visualization_of_large_images(large, model):
    command = [str(large / "large.png"), "--model", model, "--output", str(large / "out.png")]
    with pytest.raises(SystemExit, match=LARGE):
        visualize(command)
    visualize([*command, *ALLOWED])


def test_training_on_large_images(large, capsys):
    (large / "train.parquet").write_bytes((large / "test.parquet").read_bytes())
    command = [*options(large, large / "run"), "--max_steps", "1", "--save_picture", "false", "--disable_tqdm", "true"]
    with pytest.raises(SystemExit, match=LARGE):
        train_tl.main(command)
    train_tl.main([*command, *ALLOWED, "--overwrite_output_dir", "true"])
    assert "top-1" in capsys.readouterr().out


def test_segmentation_of_large_images(large):
    folder = large / "masked"
    folder.mkdir()
    masked_rows(4).to_parquet(folder / "train.parquet")  # 1320 to 1517 pixels
    shape = TINY.replace("num_hidden_layers: 2", "num_hidden_layers: 4, neck_channels: 8, decoder_channels: 8")
    command = [
        "--dataset_name",
        str(folder),
        "--output_dir",
        str(large / "run"),
        "--image_size",
        "32",
        "--max_steps",
        "1",
    ]
    command += [
        "--config_overrides",
        shape,
        "--report_to",
        "none",
        "--save_picture",
        "false",
        "--disable_tqdm",
        "true",
    ]
    command += ["--per_device_train_batch_size", "2", "--class_names", "sky", "road", "car", "tree"]
    with pytest.raises(SystemExit, match=LARGE):
        segmentation.main(command)
    segmentation.main([*command, "--max_image_pixels", "2000", "--overwrite_output_dir", "true"])
    assert (large / "run" / "README.md").is_file()


def test_training_says_what_other_readers_see_and_what_is_damaged(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    whole = encode(Image.fromarray(noise), "JPEG", quality=90)
    damaged = whole[: len(whole) // 2] + whole[len(whole) // 2 + 512 :]
    write_rows(tmp_path / "train.parquet", [encode_image(DEEP, "PNG"), damaged, whole, whole])
    write_rows(tmp_path / "test.parquet", [whole] * 2)
    texts: list[str] = []
    monkeypatch.setattr(image_dataset.logger, "warning", lambda text, *values: texts.append(text % values))
    train_tl.main([*options(tmp_path, tmp_path / "run"), "--max_steps", "1", "--save_picture", "false"])
    assert len(texts) == 2 and "row 1 (1.img): Corrupt JPEG data" in texts[0]
    card = (tmp_path / "run" / "README.md").read_text()
    assert texts[1].startswith("16-bit grayscale (1 of 4 training images)") and texts[1] in card
    train_tl.main(
        [
            *options(tmp_path, tmp_path / "other"),
            "--max_steps",
            "1",
            "--decode_data",
            "false",
            "--save_picture",
            "false",
        ]
    )
    assert len(texts) == 3


def test_the_check_can_be_interrupted(large, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_tl.TokenLabelDataset, "check_rows", interrupt)
    (large / "train.parquet").write_bytes((large / "test.parquet").read_bytes())
    with pytest.raises(SystemExit, match="130"):
        train_tl.main(options(large, large / "run"))
    assert "lvvit train: interrupted before training. --decode_data false" in capsys.readouterr().err
    assert not (large / "run").exists()  # the Trainer had made it
