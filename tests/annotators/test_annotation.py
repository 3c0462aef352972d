"""From images to label maps: reading, preparing in order, encoding; rows in batches."""

import io
import pickle
import time
import warnings
from contextlib import nullcontext

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import ExifTags, Image, features
from torchvision.transforms.v2 import functional as F

from modeling_lvvit.annotators import pipeline as annotation
from modeling_lvvit.annotators.image_batches import ImageBatch, ImageBatches, StreamedImageBatches
from modeling_lvvit.annotators.pipeline import (
    PreparedImage,
    Scorer,
    ShardBuilder,
    annotate_batches,
    encode_scores,
    prepare_image,
)
from modeling_lvvit.annotators.prefetch import BATCHES_AHEAD, _Loads, prepared_ahead
from modeling_lvvit.data import loaders
from modeling_lvvit.data.decoding import EncodedImage
from modeling_lvvit.data.image_keys import read_keys
from modeling_lvvit.data.images import content_hash, decode_image, examine_image
from modeling_lvvit.labels.label_maps import decode, mass_outside
from modeling_lvvit.labels.storage import LabelSetLayout, read_maps


# ---- encoding


def score_maps(num_classes: int = 11, offset: float = 0.0, scale: float = 3.0) -> torch.Tensor:
    """Logits `(2, num_classes, 3, 4)`."""
    return torch.randn(2, num_classes, 3, 4, generator=torch.Generator().manual_seed(0)) * scale + offset


@pytest.mark.parametrize("offset", [0.0, -40.0, 25.0])
@pytest.mark.parametrize("k", [1, 4, 10])
def test_relative_scores_give_back_the_softmax_of_the_annotator(k, offset):
    maps = score_maps(offset=offset)
    ids, scores, outside = encode_scores(maps, k, "relative")
    stored = decode(torch.from_numpy(ids), torch.from_numpy(scores), 11).softmax(dim=1)
    best = torch.from_numpy(ids).long()
    expected = maps.softmax(dim=1).gather(1, best)
    torch.testing.assert_close(stored.gather(1, best), expected, rtol=0.01, atol=1e-4)
    torch.testing.assert_close(
        torch.from_numpy(outside), 1 - expected.sum(dim=1).mean(dim=(1, 2)), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(mass_outside(scores, 11).mean(axis=(1, 2)), outside, rtol=0.01)


def test_relative_scores_by_hand():
    """exp gives 8, 4 and, for the others, 3 and 1 with mean 2: log 4 and log 2; the others have 4 of 16."""
    maps = torch.tensor([3.0, 8.0, 1.0, 4.0]).log().view(1, 4, 1, 1)
    ids, scores, outside = encode_scores(maps, 2, "relative")
    assert ids.flatten().tolist() == [1, 3]
    np.testing.assert_allclose(scores.flatten(), np.log([4, 2]), rtol=1e-3)
    assert outside == pytest.approx([0.25])


@pytest.mark.parametrize("offset", [0.0, 25.0])
def test_logits_are_stored_as_they_are(offset):
    maps = score_maps(offset=offset)
    best = maps.topk(3, dim=1)
    ids, scores, outside = encode_scores(maps, 3)
    assert np.array_equal(ids, best.indices.numpy())
    assert np.array_equal(scores, best.values.half().numpy())
    expected = 1 - maps.softmax(dim=1).gather(1, best.indices).sum(dim=1).mean(dim=(1, 2))
    torch.testing.assert_close(torch.from_numpy(outside), expected, rtol=1e-4, atol=1e-6)
    assert outside.dtype == np.float32


@pytest.mark.parametrize("kind", ["logits", "relative"])
def test_all_classes_kept_leave_nothing_outside(kind):
    maps = score_maps(num_classes=3)
    ids, scores, outside = encode_scores(maps, 3, kind)
    assert outside.tolist() == [0.0, 0.0]
    assert outside.dtype == np.float32
    torch.testing.assert_close(decode(torch.from_numpy(ids), torch.from_numpy(scores), 3), maps.half().float())


@pytest.mark.parametrize("kind", ["logits", "relative"])
def test_bfloat16_scores_are_encoded_in_float32(kind):
    maps = score_maps().bfloat16()
    for given, expected in zip(encode_scores(maps, 4, kind), encode_scores(maps.float(), 4, kind)):
        assert np.array_equal(given, expected)


def stored(*scores: float) -> np.ndarray:
    return np.float16(scores).reshape(1, -1, 1, 1)


def test_mass_outside_by_hand():
    """exp gives 3 and 1, and 1 for each of three others: 3 of 7. At half the temperature 9 and 1: 3 of 13."""
    scores = stored(np.log(3), 0)
    assert mass_outside(scores, 5).item() == pytest.approx(3 / 7, rel=1e-3)
    assert mass_outside(scores, 5, temperature=0.5).item() == pytest.approx(3 / 13, rel=1e-3)
    assert mass_outside(scores, 2).tolist() == [[[0.0]]]


def test_mass_outside_tells_images_and_cells_apart():
    scores = np.zeros((2, 1, 2, 3), dtype=np.float16)
    scores[1, 0, 0, 2] = np.log(2)
    expected = np.full((2, 2, 3), 0.75)
    expected[1, 0, 2] = 3 / 5
    np.testing.assert_allclose(mass_outside(scores, 4), expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("scores", "expected"), [((65504.0, -65504.0), 0.0), ((-65504.0, -65504.0), 1.0), ((200.0, 100.0), 0.0)]
)
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_mass_outside_of_very_large_scores_warns_of_nothing(scores, expected, temperature):
    with warnings.catch_warnings(), np.errstate(over="raise", invalid="raise", divide="raise"):
        warnings.simplefilter("error")
        mass = mass_outside(stored(*scores), 1000, temperature)
    assert mass.item() == pytest.approx(expected, abs=1e-30)


def test_mass_outside_is_float32():
    assert mass_outside(np.zeros((1, 2, 3, 4), dtype=np.float16), 7).dtype == np.float32


def test_batches_are_annotated_one_after_another():
    maps = score_maps()
    ids, scores = annotate_batches(lambda pixels: pixels.neg(), [-maps[:1], -maps], 2)
    assert ids.shape == scores.shape == (3, 2, 3, 4)
    assert np.array_equal(ids[0], ids[1])
    assert np.array_equal(ids[1:], maps.topk(2, dim=1).indices.numpy())


# ---- images


def noise(height: int = 9, width: int = 7, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def as_it_is(image: EncodedImage) -> tuple[torch.Tensor, tuple[float, float, float, float]]:
    """Preprocessing that changes nothing."""
    image = image.decode()
    assert image.mode == "RGB"
    return F.pil_to_tensor(image), (0.0, 0.25, 1.0, 0.75)


def prepared(content: bytes) -> PreparedImage:
    return prepare_image({"bytes": content, "path": None}, as_it_is)


def shown(image: PreparedImage) -> np.ndarray:
    """`(height, width, 3)`."""
    return image.pixels.permute(1, 2, 0).numpy()


def test_plain_image_has_no_note():
    content = encoded(Image.fromarray(noise()), "PNG")
    image = prepared(content)
    assert np.array_equal(shown(image), noise())
    assert image.note == ""
    assert image.box == (0.0, 0.25, 1.0, 0.75)
    assert image.content_hash == content_hash(content)


def test_content_hash_fills_int64_and_tells_files_apart():
    hashes = [content_hash(bytes([value])) for value in range(100)]
    assert len(set(hashes)) == 100
    assert min(hashes) < -(2**61)
    assert max(hashes) > 2**61
    assert pa.array(hashes, pa.int64()).to_pylist() == hashes


@pytest.mark.parametrize(
    ("mode", "file_format", "note"),
    [
        ("L", "PNG", "grayscale"),
        ("1", "PNG", "grayscale"),
        ("CMYK", "JPEG", "CMYK, converted to RGB"),
        ("RGBA", "PNG", "transparency dropped"),
        ("LA", "PNG", "transparency dropped"),
        ("P", "GIF", ""),
    ],
)
def test_other_colors_are_converted_and_noted(mode, file_format, note):
    content = encoded(Image.fromarray(noise()).convert(mode), file_format)
    image = prepared(content)
    assert image.note == note
    assert np.array_equal(shown(image), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def test_transparent_pixels_keep_their_color():
    array = np.dstack([noise(), np.uint8(np.indices((9, 7)).sum(axis=0) % 2 * 255)])  # every other pixel is invisible
    assert np.array_equal(shown(prepared(encoded(Image.fromarray(array), "PNG"))), noise())


def test_sixteen_bit_images_are_scaled():
    values = np.uint16([[0, 256, 257], [32896, 65278, 65535]])
    image = prepared(encoded(Image.fromarray(values), "PNG"))
    assert image.note == "16-bit, scaled to 8"
    assert image.pixels.shape == (3, 2, 3)
    assert shown(image)[..., 1].tolist() == [[0, 0, 1], [128, 254, 255]]


def frames() -> list[Image.Image]:
    return [Image.fromarray(np.roll(noise(), shift, axis=0)) for shift in range(3)]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "GIF"])
def test_first_frame_of_an_animation_is_used(file_format):
    first, *others = frames()
    content = encoded(first, file_format, save_all=True, append_images=others)
    image = prepared(content)
    assert image.note == "animation, first frame used"
    expected = np.asarray(Image.open(io.BytesIO(encoded(first, file_format))).convert("RGB"))
    assert np.array_equal(shown(image), expected)


def turned_image(orientation: int) -> bytes:
    """24 pixels wide, 16 high as stored: red on the left, blue on the right."""
    array = np.zeros((16, 24, 3), dtype=np.uint8)
    array[:, :12, 0], array[:, 12:, 2] = 255, 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(Image.fromarray(array), "JPEG", exif=exif, quality=95, subsampling=0)


@pytest.mark.parametrize(("orientation", "red"), [(6, "top"), (8, "bottom")])
def test_images_lying_on_their_side_are_turned_upright(orientation, red):
    image = prepared(turned_image(orientation))
    assert image.note == "turned upright as its Exif orientation says"
    assert image.pixels.shape == (3, 24, 16)
    halves = shown(image).reshape(2, 12, 16, 3).mean(axis=(1, 2))  # (half, color)
    assert halves[:, 0].argmax() == ("top", "bottom").index(red)
    assert halves[:, 2].argmin() == ("top", "bottom").index(red)


@pytest.mark.parametrize("orientation", [0, 9])
def test_unknown_orientation_is_not_noted(orientation):
    assert prepared(turned_image(orientation)).pixels.shape == (3, 16, 24)
    assert prepared(turned_image(orientation)).note == ""


def test_several_notes_are_joined():
    first, *others = [frame.convert("L") for frame in frames()]
    content = encoded(first, "TIFF", save_all=True, append_images=others)
    assert prepared(content).note == "animation, first frame used; grayscale"


UNREADABLE = {
    "truncated": encoded(Image.fromarray(noise(40, 30)), "JPEG")[:-200],
    "half a PNG": encoded(Image.fromarray(noise(40, 30)), "PNG")[:1000],
    "text": b"this is no image",
    "empty": b"",
    "floating point": encoded(Image.fromarray(noise()[..., 0].astype(np.float32)), "TIFF"),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_damaged_files_are_told_by_their_note(what):
    image = prepared(UNREADABLE[what])
    assert image.pixels is None
    assert image.box == (0.0, 0.0, 1.0, 1.0)
    assert image.content_hash == content_hash(UNREADABLE[what])
    assert image.note.startswith("unreadable: ")
    assert len(image.note) > len("unreadable: ")
    assert " at 0x" not in image.note
    assert prepared(UNREADABLE[what]).note == image.note


def test_missing_files_are_told_without_their_folder(tmp_path):
    image = prepare_image({"bytes": None, "path": str(tmp_path / "cat.jpg")}, as_it_is)
    assert image.pixels is None
    assert image.content_hash is None
    assert image.note == "unreadable: [Errno 2] No such file or directory"


def test_missing_file_with_an_apostrophe_is_told_without_its_folder(tmp_path):
    image = prepare_image({"bytes": None, "path": str(tmp_path / "cat's.jpg")}, as_it_is)
    assert image.note == "unreadable: [Errno 2] No such file or directory"


@pytest.mark.parametrize("value", [None, {"bytes": None, "path": None}])
def test_row_without_a_image_is_told_by_its_note(value):
    image = prepare_image(value, as_it_is)
    assert image.pixels is None
    assert image.content_hash is None
    assert image.note in ("unreadable: no image", "unreadable: it has neither content nor path")


def test_file_on_the_disk_is_read(tmp_path):
    path = tmp_path / "cat.png"
    path.write_bytes(encoded(Image.fromarray(noise()), "PNG"))
    image = prepare_image({"bytes": None, "path": str(path)}, as_it_is)
    assert np.array_equal(shown(image), noise())
    assert image.content_hash == content_hash(path.read_bytes())


def test_remote_file_that_cannot_be_fetched_is_no_fault_of_the_image(monkeypatch):
    def refuse(value):
        raise ConnectionError("no network")

    monkeypatch.setattr(annotation, "read_content", refuse)
    with pytest.raises(OSError, match="no network"):
        prepare_image({"bytes": None, "path": "https://example.org/cat.jpg"}, as_it_is)
    with pytest.raises(OSError, match="no network"):  # a file server that does not answer is no fault either
        prepare_image({"bytes": None, "path": "/a/cat.jpg"}, as_it_is)


def animation(file_format: str) -> bytes:
    first, *others = frames()
    return encoded(first, file_format, save_all=True, append_images=others)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("file_format", ["GIF", "TIFF"])
def test_animation_cut_off_anywhere_is_read_or_told_by_its_note(file_format):
    content = animation(file_format)
    for length in range(0, len(content), 3):
        image = prepared(content[:length])
        assert (image.pixels is None) == image.note.startswith("unreadable: ")


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_damaged_avif_is_told_by_its_note():
    content = encoded(Image.fromarray(noise(40, 30)), "AVIF").replace(b"iloc", b"lost")  # where the image lies
    assert prepared(content).note.startswith("unreadable: ")


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP"])
def test_image_with_changed_bytes_is_read_or_told_by_its_note(file_format):
    rng = np.random.default_rng(0)
    content = np.frombuffer(encoded(Image.fromarray(noise()), file_format), dtype=np.uint8)
    for _ in range(60):
        damaged = content.copy()
        damaged[rng.integers(0, len(damaged), 3)] = rng.integers(0, 256, 3)
        image = prepared(damaged[: rng.integers(1, len(damaged) + 1)].tobytes())
        assert (image.pixels is None) == image.note.startswith("unreadable: ")


@pytest.mark.parametrize("what", [name for name in UNREADABLE if name != "floating point"])
def test_check_before_training_and_annotation_refuse_the_same_files(what):
    value = {"bytes": UNREADABLE[what], "path": None}
    scalar = pa.scalar(value, datasets.Image().pa_type)
    assert "cannot be decoded" in examine_image(scalar).problem
    with pytest.raises((OSError, SyntaxError)):
        decode_image(value)


# ---- preparing ahead


def tiny_image(number: int) -> dict:
    return {"bytes": encoded(Image.new("RGB", (3, 2), (number, 0, 0)), "PNG"), "path": None}


def number_of(image: PreparedImage) -> int:
    return int(image.pixels[0, 0, 0])


@pytest.mark.parametrize("num_workers", [0, 1, 5])
def test_images_prepared_ahead_keep_their_order(num_workers):
    def slow_at_first(image):
        time.sleep(0.02 if image.decode().getpixel((0, 0))[0] % 7 == 0 else 0)
        return as_it_is(image)

    batches = [("a", range(3)), ("b", range(3, 4)), ("c", []), ("d", range(4, 9)), ("e", range(9, 20)), ("f", [20])]
    given = [(about, [tiny_image(number) for number in numbers]) for about, numbers in batches]
    result = list(prepared_ahead(given, slow_at_first, num_workers))
    assert [(about, [number_of(image) for image in images]) for about, images in result] == [
        (about, list(numbers)) for about, numbers in batches
    ]


@pytest.mark.parametrize(("num_workers", "ahead"), [(2, BATCHES_AHEAD), (5, 5)])
def test_only_few_batches_are_prepared_ahead(num_workers, ahead):
    taken = []

    def batches():
        for number in range(40):
            taken.append(number)
            yield number, [tiny_image(number)]

    stream = prepared_ahead(batches(), as_it_is, num_workers)
    assert next(stream)[0] == 0
    assert taken == list(range(ahead + 1)) and ahead <= BATCHES_AHEAD
    stream.close()
    assert len(taken) == ahead + 1


def test_workers_know_the_limit_of_pixels(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    content = pickle.dumps(_Loads(len))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    pickle.loads(content)  # as a process that does not start by `fork` gets it
    assert Image.MAX_IMAGE_PIXELS == 50


def test_workers_need_shared_memory(monkeypatch, caplog):
    monkeypatch.setattr(loaders, "lacks_shared_memory", lambda: True)
    with caplog.at_level("WARNING"):
        assert loaders.num_preparing_workers(None) == 0
    assert "--shm-size" in caplog.text and loaders.num_preparing_workers(3) == 3


def test_errors_of_workers_reach_the_caller():
    def fail(image):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(prepared_ahead([("a", [tiny_image(0)])], fail, 2))


# ---- scorer and shards


LAYOUT = LabelSetLayout(tuple("abcdefghijk"), k=2, map_size=(2, 3))


def scores_of_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Scores `(B, 11, 2, 3)`: class 9 and, where red says so, another class."""
    scores = torch.zeros(len(pixels), 11, 2, 3)
    scores[:, 9] = 1.0
    for image, number in enumerate(pixels[:, 0, 0, 0].tolist()):
        scores[image, number, 1, 2] = 5.0
    return scores


def scorer(score_map=scores_of_pixels, kind="logits") -> Scorer:
    return Scorer(score_map, LAYOUT, kind, torch.device("cpu"), nullcontext)


def ready(*numbers: int) -> list[PreparedImage]:
    return [prepare_image(tiny_image(number), as_it_is) for number in numbers]


def test_shard_is_complete_with_its_last_batch():
    builder = ShardBuilder(scorer(), LAYOUT, keep_damaged=False)
    assert builder.add(["x", "y"], ready(3, 5), is_last=False) is None
    table = builder.add(["z"], ready(4), is_last=True)
    maps = read_maps(table, 11)
    assert table["image_key"].to_pylist() == ["x", "y", "z"]
    best = np.take_along_axis(maps.ids, maps.scores.argmax(axis=1, keepdims=True), axis=1)[:, 0]  # (3, 2, 3)
    assert best[:, 1, 2].tolist() == [3, 5, 4]
    assert (best.reshape(3, 6)[:, :5] == 9).all()
    assert maps.boxes.tolist() == [[0.0, 0.25, 1.0, 0.75]] * 3
    second = builder.add(["u"], ready(2), is_last=True)  # the next shard starts empty
    assert second["image_key"].to_pylist() == ["u"]


def test_damaged_image_stops_the_shard_by_name():
    builder = ShardBuilder(scorer(), LAYOUT, keep_damaged=False)
    images = [*ready(3), prepared(b"no image")]
    with pytest.raises(ValueError, match="Image b/2.jpg is unreadable: cannot identify.*`on_error` empty"):
        builder.add(["b/1.jpg", "b/2.jpg"], images, is_last=True)


def test_damaged_image_gets_an_empty_label_on_demand():
    builder = ShardBuilder(scorer(), LAYOUT, keep_damaged=True)
    builder.add(["x"], [prepared(b"no image")], is_last=False)  # a batch without any image
    table = builder.add(["y", "z"], [prepared(b""), *ready(6)], is_last=True)
    assert [len(palette) > 0 for palette in table["token_label_palette"].to_pylist()] == [False, False, True]
    assert [mass is None for mass in table["outside_mass"].to_pylist()] == [True, True, False]
    assert table["image_note"].to_pylist()[0] == "unreadable: cannot identify image file"
    maps = read_maps(table.slice(2), 11)
    assert 6 in maps.ids[0, :, 1, 2]


def test_scorer_warns_once_of_labels_that_get_flat(monkeypatch):
    """Logits around -20: stored as they are, a softmax gives nearly all to the classes that are not kept."""
    messages = []
    monkeypatch.setattr(annotation.logger, "warning", lambda text, *values: messages.append(text % values))
    pixels = torch.stack([image.pixels for image in ready(1, 2)])
    for kind, expected in (("relative", 0), ("logits", 1)):
        low = scorer(lambda pixels: 8 * scores_of_pixels(pixels) - 30, kind)
        low(pixels, ["1.jpg", "2.jpg"])
        low(pixels, ["1.jpg", "2.jpg"])
        assert len(messages) == expected
    assert "labels get flat" in messages[0]


# ---- rows in batches


PATHS = [f"data/{folder}/{number}.png" for number, folder in enumerate("aabbbccddddee")]


def rows_of(paths: list[str | None], missing: tuple[int, ...] = ()) -> datasets.Dataset:
    """Images that hold their number, with columns that could be keys; those in `missing` have no image."""
    columns = {
        "image": [
            None if number in missing else {**tiny_image(number), "path": path} for number, path in enumerate(paths)
        ],
        "number": [10 * number for number in range(len(paths))],
        "half": [number / 2 for number in range(len(paths))],
        "name": [None if number == 3 else f"name {number}" for number in range(len(paths))],
    }
    columns["copy"] = columns["image"]
    kinds = {"number": datasets.Value("int64"), "half": datasets.Value("float64"), "name": datasets.Value("string")}
    images = datasets.Image()
    return datasets.Dataset.from_dict(columns, datasets.Features({"image": images, **kinds, "copy": images}))


def stored_rows(rows, rows_per_shard=5, batch_size=2, key_column=None, number_rows=False) -> ImageBatches:
    keys = read_keys(rows, "image", key_column, number_rows)
    return ImageBatches(rows, "image", keys, rows_per_shard, batch_size)


def streamed_rows(rows, rows_per_shard=5, batch_size=2, key_column=None, number_rows=False) -> StreamedImageBatches:
    stream = rows.to_iterable_dataset(num_shards=min(3, len(rows)))
    return StreamedImageBatches(stream, "image", key_column, number_rows, rows_per_shard, batch_size)


# what `batches` takes to give every shard of thirteen rows, five to a shard
ALL = {stored_rows: range(3), streamed_rows: lambda shard: True}


def both_ways(rows: datasets.Dataset, **settings) -> tuple[list, list]:
    stored, streamed = stored_rows(rows, **settings), streamed_rows(rows, **settings)
    stored_batches = list(stored.batches(range(stored.num_shards)))
    streamed_batches = list(streamed.batches(lambda shard: True))
    assert streamed.num_shards == stored.num_shards
    return stored_batches, streamed_batches


def keys_of(batches) -> list[str]:
    return [key for about, _ in batches for key in about.keys]


def sizes_by_hand(num_rows: int, rows_per_shard: int, batch_size: int) -> list[tuple[int, int, bool]]:
    """Shard, number of rows and whether the shard ends, of each batch."""
    expected = []
    for shard, first in enumerate(range(0, num_rows, rows_per_shard)):
        left = min(rows_per_shard, num_rows - first)
        while left:
            number = min(batch_size, left)
            left -= number
            expected.append((shard, number, not left))
    return expected


@pytest.mark.parametrize("num_rows", [1, 5, 10, 11, 13])
@pytest.mark.parametrize(("rows_per_shard", "batch_size"), [(5, 2), (5, 5), (4, 7), (20, 3), (1, 1), (13, 13)])
def test_stored_and_streamed_rows_give_the_same_batches(num_rows, rows_per_shard, batch_size):
    rows = rows_of(PATHS[:num_rows])
    stored, streamed = both_ways(rows, rows_per_shard=rows_per_shard, batch_size=batch_size)
    assert stored == streamed
    assert [(about.shard, len(values), about.is_last) for about, values in stored] == sizes_by_hand(
        num_rows, rows_per_shard, batch_size
    )
    values = [value for _, values in stored for value in values]
    assert values == [{**tiny_image(number), "path": path} for number, path in enumerate(PATHS[:num_rows])]
    assert keys_of(stored) == [path.removeprefix("data/") for path in PATHS[:num_rows]]


@pytest.mark.parametrize(
    ("settings", "paths", "third"),
    [
        ({"number_rows": True}, PATHS, "row:2"),
        ({}, [None] * 7, "row:2"),
        ({"key_column": "number"}, PATHS, "20"),
        ({}, [f"zip://x/a/{number}.png::https://example.org/a.zip" for number in range(7)], "a/2.png"),
        ({}, [f"C:\\x\\a\\{number}.png" for number in range(7)], "a/2.png"),
        ({}, [f"{number}.png" for number in range(7)], "2.png"),
    ],
)
def test_stored_and_streamed_rows_have_the_same_keys(settings, paths, third):
    stored, streamed = both_ways(rows_of(paths), **settings)
    assert stored == streamed
    assert stored[1][0].keys[0] == third


def test_rows_of_plain_paths_are_read():
    rows = datasets.Dataset.from_dict({"image": [f"/x/a/{number}.png" for number in range(7)]})
    stored, streamed = both_ways(rows)
    assert stored == streamed
    assert stored[0] == (
        ImageBatch(0, ["a/0.png", "a/1.png"], False),
        [{"bytes": None, "path": f"/x/a/{number}.png"} for number in range(2)],
    )


def test_chosen_shards_are_read_alone():
    rows = rows_of(PATHS)
    stored = list(stored_rows(rows, 4, 3).batches([1, 3]))
    streamed = list(streamed_rows(rows, 4, 3).batches(lambda shard: shard in (1, 3)))
    assert stored == streamed
    assert [(about.shard, len(about.keys)) for about, _ in stored] == [(1, 3), (1, 1), (3, 1)]
    assert stored[0][0].keys[0] == "b/4.png"
    assert stored_rows(rows, 4, 3).shard_size(3) == 1


def test_processes_share_shards_without_gaps():
    rows = rows_of(PATHS)
    parts = [list(streamed_rows(rows, 2, 3).batches(lambda shard, rank=rank: shard % 3 == rank)) for rank in range(3)]
    together = sorted((batch for part in parts for batch in part), key=lambda batch: batch[0].shard)
    assert together == both_ways(rows, rows_per_shard=2, batch_size=3)[0]


@pytest.mark.parametrize("way", [stored_rows, streamed_rows])
def test_first_image_without_a_path_among_others_is_refused(way):
    rows = rows_of([None, *PATHS[1:]])
    with pytest.raises(ValueError, match="path"):
        list(way(rows).batches(ALL[way]))


@pytest.mark.parametrize("way", [stored_rows, streamed_rows])
def test_image_without_a_path_among_others_is_refused(way):
    rows = rows_of([*PATHS[:4], None, *PATHS[5:]])
    with pytest.raises(ValueError, match="path"):
        list(way(rows).batches(ALL[way]))


@pytest.mark.parametrize("way", [stored_rows, streamed_rows])
def test_row_without_a_image_among_paths_is_refused(way):
    with pytest.raises(ValueError, match="path"):
        list(way(rows_of(PATHS, missing=(4, 7))).batches(ALL[way]))


def test_numbered_rows_without_a_image_are_passed_on():
    stored, streamed = both_ways(rows_of(PATHS, missing=(4, 7)), number_rows=True)
    assert stored == streamed
    values = [value for _, values in stored for value in values]
    assert [number for number, value in enumerate(values) if value is None] == [4, 7]


def test_streamed_keys_are_written_like_stored_ones():
    stored, streamed = both_ways(rows_of(PATHS), key_column="half")
    assert keys_of(streamed) == keys_of(stored)


@pytest.mark.parametrize("way", [stored_rows, streamed_rows])
@pytest.mark.parametrize("key_column", ["name", "no such column"])
def test_missing_keys_are_refused(way, key_column):
    with pytest.raises(ValueError, match=key_column):
        list(way(rows_of(PATHS), key_column=key_column).batches(ALL[way]))
