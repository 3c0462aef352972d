"""Dense classifiers and annotators: tiny networks, each map against the network's own head, each image by its stripes."""

import functools
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from timm.models import save_for_hf
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.annotators import annotator as annotator_module
from modeling_lvvit.annotators.annotator import Annotator, PatchClassifier, Preprocessing, load_annotator
from modeling_lvvit.backbones import dense_classifier
from modeling_lvvit.backbones.dense_classifier import DenseClassifier
from modeling_lvvit.backbones.feature_layout import token_grid
from modeling_lvvit.backbones.loading import fingerprint
from modeling_lvvit.data.classes.class_matching import ClassMap
from support.models import tiny_config


NUM_CLASSES = 7
SIZE = (32, 48)
TRANSFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "patch_size": 8,
    "num_labels": NUM_CLASSES,
}
CONVOLUTION = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": NUM_CLASSES}
SWIN = {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
NAMES = ["ant", "bee", "cat", "dog", "eel"]


# ---- networks of transformers and timm, and what their heads say at each cell, computed by hand


def of_transformers(name: str, **settings) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, f"{name}ForImageClassification")(config)


def of_timm(name: str, **settings) -> nn.Module:
    model = timm.create_model(name, num_classes=NUM_CLASSES, **settings)
    nn.init.normal_(model.get_classifier().weight, std=0.1)  # some heads of timm start at zero
    return model


def features(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Last features of transformers, tokens `(B, N, C)` or cells `(B, rows * columns, C)`."""
    values = model.base_model(pixels).last_hidden_state
    return values.flatten(2).mT if values.ndim == 4 else values


def linear_at_cells(model, pixels):
    return model.classifier[-1](features(model, pixels))


def convnext_at_cells(model, pixels):
    return model.classifier(model.convnext.layernorm(features(model, pixels)))


def tokens_from(first: int):
    return lambda model, pixels: model.classifier(features(model, pixels)[:, first:])


def beit_at_cells(model, pixels):
    return model.classifier(model.beit.pooler.layernorm(features(model, pixels)[:, 1:]))


def dinov2_at_cells(prefix: int):
    def head(model, pixels):
        tokens = features(model, pixels)
        patches = tokens[:, prefix:]
        return model.classifier(torch.cat([tokens[:, :1].expand_as(patches), patches], dim=2))

    return head


def timm_resnet_at_cells(model, pixels):
    return model.fc(model.forward_features(pixels).flatten(2).mT)


def timm_convnext_at_cells(model, pixels):
    return model.head.fc(model.head.norm(model.forward_features(pixels)).flatten(2).mT)


def timm_vit_at_cells(model, pixels):
    return model.head(model.forward_features(pixels)[:, 1:])


# name: (constructor, head at each cell, height and width, rows and columns)
NETWORKS = {
    "ResNet": (
        lambda: of_transformers("ResNet", embedding_size=8, layer_type="basic", **CONVOLUTION),
        linear_at_cells, (96, 144), (12, 18),
    ),
    "RegNet": (
        lambda: of_transformers("RegNet", embedding_size=8, groups_width=8, **CONVOLUTION),
        linear_at_cells, (96, 144), (12, 18),
    ),
    "ConvNext": (
        lambda: of_transformers("ConvNext", num_stages=2, **CONVOLUTION), convnext_at_cells, SIZE, (4, 6),
    ),
    "ViT": (lambda: of_transformers("ViT", image_size=SIZE, **TRANSFORMER), tokens_from(1), SIZE, (4, 6)),
    "DeiT": (lambda: of_transformers("DeiT", image_size=SIZE, **TRANSFORMER), tokens_from(2), SIZE, (4, 6)),
    "Beit": (lambda: of_transformers("Beit", image_size=SIZE, **TRANSFORMER), beit_at_cells, SIZE, (4, 6)),
    # these two resize their position table, and only from a square one
    "Dinov2": (lambda: of_transformers("Dinov2", image_size=32, **TRANSFORMER), dinov2_at_cells(1), SIZE, (4, 6)),
    "Dinov2WithRegisters": (
        lambda: of_transformers("Dinov2WithRegisters", image_size=32, **TRANSFORMER),
        dinov2_at_cells(5), SIZE, (4, 6),
    ),
    "Swin": (
        lambda: of_transformers("Swin", image_size=SIZE, num_labels=NUM_CLASSES, **SWIN), tokens_from(0), SIZE, (4, 6),
    ),
    "timm resnet": (lambda: of_timm("test_resnet"), timm_resnet_at_cells, (64, 96), (2, 3)),
    "timm convnext": (lambda: of_timm("test_convnext"), timm_convnext_at_cells, (64, 96), (2, 3)),
    "timm vit": (lambda: of_timm("test_vit", img_size=(64, 96)), timm_vit_at_cells, (64, 96), (4, 6)),
}  # fmt: skip
MEAN_POOLING = ["ResNet", "RegNet", "Swin", "timm resnet"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Networks as small as these are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def network(name: str) -> tuple[nn.Module, DenseClassifier]:
    torch.manual_seed(0)
    model = NETWORKS[name][0]().eval().requires_grad_(False)
    return model, DenseClassifier(model, NETWORKS[name][2])


def noise(size: tuple[int, int], batch_size: int = 2) -> torch.Tensor:
    return torch.randn(batch_size, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_map_equals_the_head_at_each_cell(name):
    _, head, size, grid_size = NETWORKS[name]
    model, dense = network(name)
    pixels = noise(size)
    scores = dense(pixels)
    assert dense.grid_size == grid_size
    assert scores.shape == (2, NUM_CLASSES, *grid_size)
    torch.testing.assert_close(scores, head(model, pixels).mT.unflatten(2, grid_size), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MEAN_POOLING)
def test_mean_of_cells_equals_the_logits_of_a_mean_pooling_network(name):
    model, dense = network(name)
    pixels = noise(NETWORKS[name][2])
    logits = model(pixels)
    logits = logits if isinstance(logits, torch.Tensor) else logits.logits
    torch.testing.assert_close(dense(pixels).mean(dim=(2, 3)), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
@pytest.mark.parametrize("bottom", [False, True], ids=["top", "bottom"])
@pytest.mark.parametrize("name", NETWORKS)
def test_painted_corner_changes_its_own_region_most(name, bottom, right):
    """Regions are cells; 3 x 3 cells where a cell of a convolution sees far beyond its borders."""
    _, _, (height, width), grid_size = NETWORKS[name]
    _, dense = network(name)
    rows, columns = min(grid_size[0], 4), min(grid_size[1], 6)
    plain = noise((height, width), 1)
    painted = plain.clone()
    top, left = bottom * (height - height // rows), right * (width - width // columns)
    painted[..., top : top + height // rows, left : left + width // columns] = 0
    change = (dense(painted) - dense(plain)).square().sum(dim=1)
    change = nn.functional.adaptive_avg_pool2d(change, (rows, columns))[0]
    assert divmod(change.argmax().item(), columns) == (bottom * (rows - 1), right * (columns - 1))


def test_map_of_a_image_does_not_depend_on_its_batch():
    _, dense = network("Dinov2")
    pixels = noise(SIZE, 3)
    torch.testing.assert_close(dense(pixels)[1:2], dense(pixels[1:2]), rtol=1e-4, atol=1e-5)


def num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("name", ["ResNet", "ViT"])
def test_hooks_are_removed(name):
    model, dense = network(name)
    pixels = noise(NETWORKS[name][2])
    before = model(pixels).logits
    dense(pixels)
    with pytest.raises((RuntimeError, ValueError)):
        dense(pixels[:, :2])  # two channels
    assert num_hooks(model) == 0
    assert torch.equal(model(pixels).logits, before)


@pytest.mark.parametrize("name", ["ResNet", "ViT", "Dinov2", "Swin"])
def test_bfloat16_autocast_gives_nearly_the_same_map(name):
    _, dense = network(name)
    pixels = noise(NETWORKS[name][2])
    expected = dense(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        scores = dense(pixels)
    assert scores.shape == expected.shape
    assert (scores - expected).abs().max() < 0.05 * expected.abs().max()


class SharedLayer(nn.Module):
    """Calls one layer twice; the second output is the last feature map, the first has twice its rows and columns."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, NUM_CLASSES)

    def features(self, pixels):
        return self.shared(nn.functional.avg_pool2d(self.shared(self.stem(pixels)).relu(), 2))

    def forward(self, pixels):
        return self.head(self.features(pixels).mean(dim=(2, 3)))


class TwoWays(SharedLayer):
    """A part of the scores passes every feature map by."""

    def __init__(self):
        super().__init__()
        self.colors = nn.Linear(3, NUM_CLASSES)

    def forward(self, pixels):
        return super().forward(pixels) + self.colors(pixels.mean(dim=(2, 3)))


class MeanOfAllTokens(nn.Module):
    """Pools patches and class token together: in a single cell the class token would have half of the weight."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 8, 8, stride=8), nn.LayerNorm(8)
        self.class_token, self.head = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, NUM_CLASSES)

    def forward(self, pixels):
        patches = self.patches(pixels).flatten(2).mT
        return self.head(
            self.norm(torch.cat([self.class_token.expand(len(patches), 1, 8), patches], dim=1)).mean(dim=1)
        )


def flattening_network() -> nn.Module:
    """Each cell has weights of its own in the head, so a cell alone has no scores."""
    return nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 24, NUM_CLASSES))


def test_second_call_of_a_shared_layer_is_the_feature_map():
    torch.manual_seed(0)
    model = SharedLayer().eval()
    scores = DenseClassifier(model, SIZE)(noise(SIZE))
    expected = model.head(model.features(noise(SIZE)).flatten(2).mT).mT.unflatten(2, (4, 6))
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("make", [flattening_network, TwoWays, MeanOfAllTokens])
def test_network_whose_head_does_not_pool_one_map_is_refused(make):
    torch.manual_seed(0)
    model = make().eval()
    with pytest.raises(ValueError, match="has no feature map from which its head reads"):
        DenseClassifier(model, SIZE)
    assert num_hooks(model) == 0


@pytest.mark.parametrize("name", ["ResNet", "ViT"])
def test_network_with_the_same_scores_for_all_images_is_refused(name):
    model = NETWORKS[name][0]().eval()
    nn.init.zeros_([layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1].weight)
    with pytest.raises(ValueError, match="gives every image the same scores"):
        DenseClassifier(model, SIZE)


@pytest.mark.parametrize(
    ("num_tokens", "image_size", "grid_size"),
    [
        (197, (224, 224), (14, 14)),  # class token, patches of 16
        (196, (224, 224), (14, 14)),
        (261, (224, 224), (16, 16)),  # class token and four registers, patches of 14
        (26, (32, 48), (4, 6)),
        (26, (48, 32), (6, 4)),
        (25, (33, 49), (4, 6)),  # the patch embedding drops a row and a column of pixels
        (50, (224, 224), (7, 7)),
        (1, (224, 224), None),
        (213, (224, 224), None),  # 17 left over
    ],
)
def test_token_grid_by_hand(num_tokens, image_size, grid_size):
    assert token_grid(num_tokens, image_size) == grid_size


def vit_with_registers() -> nn.Module:
    torch.manual_seed(0)
    settings = {"embed_dim": 32, "depth": 1, "num_heads": 4, "num_classes": NUM_CLASSES, "reg_tokens": 4}
    model = timm.models.VisionTransformer(img_size=(64, 96), patch_size=16, **settings)
    nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize(
    ("make", "image_size", "grid_size"),
    [
        (lambda: of_transformers("DeiT", **{**TRANSFORMER, "image_size": SIZE, "patch_size": 16}), SIZE, (2, 3)),
        (vit_with_registers, (64, 96), (4, 6)),
    ],
    ids=["DeiT", "registers"],
)
def test_grid_of_few_cells_leaves_prefix_tokens_out(make, image_size, grid_size):
    torch.manual_seed(0)
    assert DenseClassifier(make().eval(), image_size).grid_size == grid_size


def test_grid_of_patches_that_leave_a_rest_of_the_image_is_found():
    torch.manual_seed(0)
    model = of_transformers("ViT", **{**TRANSFORMER, "image_size": (18, 72)}).eval()
    dense = DenseClassifier(model, (18, 72))
    expected = tokens_from(1)(model, noise((18, 72))).mT.unflatten(2, (2, 9))
    assert dense.grid_size == (2, 9)
    torch.testing.assert_close(dense(noise((18, 72))), expected, rtol=1e-4, atol=1e-5)


# ---- annotators: folders of transformers, timm and this project


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("annotators")
    torch.manual_seed(0)
    id2label = dict(enumerate(NAMES))
    save(
        of_transformers("ViT", **{**TRANSFORMER, "num_labels": 5}, image_size=32, id2label=id2label),
        root / "vit",
        (32, 32),
    )
    for name, weight in (("patch head", 0.5), ("class token", 0.0)):
        save(LVViTForImageClassification(tiny_config(patch_logits_weight=weight)), root / name, SIZE)
    model = timm.create_model("test_resnet", num_classes=5)
    save_for_hf(model, root / "timm", model_config={"label_names": NAMES}, safe_serialization=True)
    return {path.name: path for path in root.iterdir()}


def save(model: nn.Module, folder: Path, size: tuple[int, int]) -> None:
    model.save_pretrained(folder)
    processor = transformers.ViTImageProcessor(
        size={"height": size[0], "width": size[1]}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25]
    )
    processor.save_pretrained(folder)


def image(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("name", "size"), [("vit", (32, 32)), ("class token", SIZE)])
def test_preprocessing_equals_the_image_processor(folders, name, size):
    preprocessing = load_annotator(str(folders[name])).preprocessing
    processor = transformers.AutoImageProcessor.from_pretrained(folders[name])
    pixels, box = preprocessing(image(*size))
    expected = processor(images=image(*size), return_tensors="pt")["pixel_values"]
    assert preprocessing.image_size == size
    assert box == (0.0, 0.0, 1.0, 1.0)
    assert pixels.dtype == torch.uint8
    torch.testing.assert_close(preprocessing.normalize(pixels[None]), expected, rtol=1e-5, atol=1e-5)


def test_transformers_folder_gives_its_own_scores(folders):
    annotator = load_annotator(str(folders["vit"]))
    model = transformers.ViTForImageClassification.from_pretrained(folders["vit"]).eval()
    pixels, _ = annotator.preprocessing(image(40, 50))
    inputs = annotator.preprocessing.normalize(pixels[None])
    expected = model.classifier(model.vit(inputs).last_hidden_state[:, 1:]).mT.unflatten(2, (4, 4))
    torch.testing.assert_close(annotator.score_map(pixels[None]), expected, rtol=1e-4, atol=1e-5)
    assert annotator.class_names == NAMES
    assert not annotator.dense.model.training
    assert annotator.provenance["annotator"] == "vit"
    assert annotator.provenance["annotator_weights"] == f"sha256 {fingerprint(model)}"


def test_timm_folder_gives_its_own_scores_and_names(folders):
    annotator = load_annotator(str(folders["timm"]), image_size=(64, 96))
    model = timm.create_model(f"local-dir:{folders['timm']}", pretrained=True).eval()
    pixels, _ = annotator.preprocessing(image(64, 96))
    inputs = (pixels[None] / 255.0 - 0.5) / 0.5
    expected = timm_resnet_at_cells(model, inputs).mT.unflatten(2, (2, 3))
    torch.testing.assert_close(annotator.score_map(pixels[None]), expected, rtol=1e-4, atol=1e-5)
    assert annotator.class_names == NAMES
    assert annotator.provenance["annotator_library"] == "timm"


def test_timm_folder_is_recorded_by_its_name(folders):
    assert load_annotator(str(folders["timm"])).provenance["annotator"] == "timm"


def test_patch_head_is_used_where_it_was_trained(folders):
    annotator = load_annotator(str(folders["patch head"]))
    model = LVViTForImageClassification.from_pretrained(folders["patch head"]).eval()
    pixels, _ = annotator.preprocessing(image(50, 40))
    expected = model(annotator.preprocessing.normalize(pixels[None])).patch_logits.mT.unflatten(2, (4, 6))
    assert isinstance(annotator.dense, PatchClassifier)
    assert annotator.provenance["map_size"] == [4, 6]
    torch.testing.assert_close(annotator.score_map(pixels[None]), expected)


def test_class_token_head_is_used_where_the_patch_head_has_no_weight(folders):
    annotator = load_annotator(str(folders["class token"]))
    model = LVViTForImageClassification.from_pretrained(folders["class token"]).eval()
    pixels, _ = annotator.preprocessing(image(50, 40))
    tokens = model.lvvit(annotator.preprocessing.normalize(pixels[None])).last_hidden_state
    expected = model.classifier(tokens[:, 1:]).mT.unflatten(2, (4, 6))
    torch.testing.assert_close(annotator.score_map(pixels[None]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "image_size", "grid_size"),
    [
        ("vit", (48, 32), (6, 4)),
        ("vit", (24, 64), (3, 8)),
        ("patch head", (48, 32), (6, 4)),
        ("class token", (40, 64), (5, 8)),
        ("timm", (96, 160), (3, 5)),
    ],
)
def test_image_size_is_taken_over(folders, name, image_size, grid_size):
    annotator = load_annotator(str(folders[name]), image_size)
    pixels, _ = annotator.preprocessing(image(30, 70))
    scores = annotator.score_map(pixels[None])
    assert pixels.shape == (3, *image_size)
    assert scores.shape == (1, len(annotator.class_names), *grid_size)
    assert annotator.provenance["image_size"] == list(image_size)
    assert tuple(annotator.dense.grid_size) == grid_size


@pytest.mark.parametrize(("name", "image_size"), [("vit", (4, 4)), ("class token", (50, 32))])
def test_image_size_that_does_not_fit_is_refused(folders, name, image_size):
    with pytest.raises(ValueError, match=str(image_size[0])):
        load_annotator(str(folders[name]), image_size)


def test_image_size_that_does_not_fit_the_patch_head_is_refused(folders):
    with pytest.raises(ValueError, match="50"):
        load_annotator(str(folders["patch head"]), (50, 32))


@pytest.mark.parametrize("size", [(32, 48), (16, 64)])
def test_vit_with_a_table_that_is_not_square_gives_its_own_scores(tmp_path, size):
    torch.manual_seed(0)
    model = of_transformers("ViT", image_size=size, initializer_range=0.2, **TRANSFORMER).eval()
    save(model, tmp_path, size)
    annotator = load_annotator(str(tmp_path))
    pixels, _ = annotator.preprocessing(image(*size))
    inputs = annotator.preprocessing.normalize(pixels[None])
    expected = tokens_from(1)(model, inputs).mT.unflatten(2, (size[0] // 8, size[1] // 8))
    torch.testing.assert_close(annotator.score_map(pixels[None]), expected, rtol=1e-4, atol=1e-5)


def test_random_weights_are_the_same_each_time_and_leave_the_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = load_annotator("timm/test_resnet", image_size=(64, 96), random_weights=True)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    second = load_annotator("timm/test_resnet", image_size=(64, 96), random_weights=True)
    assert fingerprint(first.dense.model) == fingerprint(second.dense.model)
    assert first.provenance["annotator_weights"] == "random, seed 0"
    assert first.dense.grid_size == (2, 3)


def test_published_timm_networks_have_the_class_names_of_imagenet():
    names = load_annotator("timm/test_resnet", image_size=(64, 96), random_weights=True).class_names
    assert len(names) == 1000
    assert names[:2] == ["n01440764", "n01443537"]


def test_timm_folder_without_names_has_numbered_classes(tmp_path):
    save_for_hf(timm.create_model("test_resnet", num_classes=3), tmp_path, safe_serialization=True)
    assert load_annotator(str(tmp_path), image_size=(64, 96)).class_names == ["LABEL_0", "LABEL_1", "LABEL_2"]


@pytest.mark.parametrize(
    "name", ["./nothing/here", "a b//c", "timm/no_such_network", "timm/test_resnet.no_such_tag", "timm/"]
)
def test_unknown_names_are_refused_in_one_line(name):
    with pytest.raises(ValueError, match=name) as error:
        load_annotator(name, random_weights=name == "timm/no_such_network")
    assert "\n" not in str(error.value)
    if not name.startswith("timm/"):
        assert "there is no such folder" in str(error.value)


@pytest.mark.parametrize("config", [None, {"model_type": "no_such_type"}, {"model_type": "bert"}])
def test_message_of_a_library_is_put_into_one_line(tmp_path, config):
    name = "no one/no_such_model" if config is None else str(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"annotator {name} cannot be loaded") as error:
        load_annotator(name)
    assert "\n" not in str(error.value)


def rewritten(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "vit": {
        "no weights": lambda folder: (folder / "model.safetensors").unlink(),
        "no preprocessing": lambda folder: (folder / "preprocessor_config.json").unlink(),
        "no JSON": lambda folder: (folder / "config.json").write_text("{"),
        "no JSON of preprocessing": lambda folder: (folder / "preprocessor_config.json").write_text("{"),
        "other shapes": lambda folder: rewritten(folder / "config.json", intermediate_size=24),
        "constant head": lambda folder: rewrite_head(folder, lambda head: head.fill_(0)),
        "NaN": lambda folder: rewrite_head(folder, lambda head: head.fill_(float("nan"))),
    },
    "timm": {
        "no weights": lambda folder: [path.unlink() for path in folder.glob("*model*")],
        "unknown architecture": lambda folder: rewritten(folder / "config.json", architecture="no_such_network"),
    },
}


def rewrite_head(folder: Path, change) -> None:
    model = transformers.ViTForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        change(model.classifier.weight)
    model.save_pretrained(folder)


@pytest.mark.parametrize(("library", "damage"), [(name, damage) for name in DAMAGE for damage in DAMAGE[name]])
def test_damaged_folder_is_refused_in_one_line(folders, tmp_path, library, damage):
    folder = shutil.copytree(folders[library], tmp_path / "copy")
    DAMAGE[library][damage](folder)
    with pytest.raises(ValueError) as error:
        load_annotator(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no weights", None], ids=["empty", "text", "truncated"])
@pytest.mark.parametrize("library", ["vit", "timm"])
def test_damaged_weights_are_refused_in_one_line(folders, tmp_path, library, content):
    folder = shutil.copytree(folders[library], tmp_path / "copy")
    for weights in folder.glob("*model*"):
        weights.write_bytes(weights.read_bytes()[:1000] if content is None else content)
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        load_annotator(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [TypeError, KeyError, AttributeError, IndexError])
def test_bugs_of_this_package_are_not_told_as_damaged_folders(folders, monkeypatch, error):
    def fail(model):
        raise error("a bug")

    for library in ("timm", "transformers"):
        monkeypatch.setattr(annotator_module, f"{library}_class_names", fail)
        with pytest.raises(error, match="a bug"):
            load_annotator(str(folders["vit" if library == "transformers" else "timm"]))


def test_checkpoint_without_a_head_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["vit"], tmp_path / "copy")
    transformers.ViTForImageClassification.from_pretrained(folder).vit.save_pretrained(folder)
    rewritten(folder / "config.json", architectures=["ViTModel"])
    with pytest.raises(ValueError, match="classifier"):
        load_annotator(str(folder))


def test_fingerprint_changes_with_any_weight():
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)).bfloat16()
    before = fingerprint(model)
    assert fingerprint(model) == before
    model[1].running_mean[3] += 1e-3
    assert fingerprint(model) != before
    assert fingerprint(nn.Sequential(model[1])) != before


def test_score_map_is_in_the_classes_of_the_data_set():
    plain = Preprocessing((1, 2), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    annotator = Annotator("channels", nn.Identity(), ["r", "g", "b"], plain, class_map=ClassMap(((2,), (0,)), 3))
    pixels = torch.tensor([[[1, 2]], [[3, 4]], [[5, 6]]], dtype=torch.uint8)  # (3, 1, 2)
    assert annotator.score_map(pixels[None]).tolist() == [[[[5.0, 6.0]], [[1.0, 2.0]]]]


# ---- images of another shape: four stripes, 24 x 8 pixels or 8 x 24, in an input of 8 rows and 12 columns

COLORS = np.uint8([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0]])
BORDER, MEAN = 4, (10, 20, 30)


def striped(is_wide: bool) -> Image.Image:
    rows = COLORS.repeat(6, axis=0)[:, None].repeat(8, axis=1)  # (24, 8, 3)
    return Image.fromarray(rows.transpose(1, 0, 2).copy() if is_wide else rows)


def stripes_of(pixels: torch.Tensor) -> np.ndarray:
    """Which stripe each pixel shows, `(rows, columns)`; `BORDER` for the mean color."""
    palette = np.concatenate([COLORS, np.uint8([MEAN])])
    same = (pixels.permute(1, 2, 0).numpy()[:, :, None] == palette).all(axis=-1)
    assert same.any(axis=-1).all()
    return same.argmax(axis=-1)


def fitted(fit: str, is_wide: bool) -> tuple[np.ndarray, tuple[float, ...]]:
    offset = tuple(-value / 64 for value in MEAN)
    preprocessing = Preprocessing((8, 12), (1 / 64,) * 3, offset, Image.Resampling.NEAREST, fit)
    pixels, box = preprocessing(striped(is_wide))
    return stripes_of(pixels), box


def test_squashed_images_are_whole():
    wide, box = fitted("squash", True)
    assert (wide == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]).all()
    assert box == (0, 0, 1, 1)
    tall, box = fitted("squash", False)
    assert (tall.T == [0, 0, 1, 1, 2, 2, 3, 3]).all()
    assert box == (0, 0, 1, 1)


def test_padded_images_are_whole_and_have_borders():
    wide, box = fitted("pad", True)  # 12 x 4 pixels in the middle
    assert (wide[2:6] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]).all()
    assert (wide[[0, 1, 6, 7]] == BORDER).all()
    assert box == pytest.approx((0, -0.5, 1, 1.5))
    tall, box = fitted("pad", False)  # 8 / 3, rounded 3, x 8 pixels
    assert (tall[:, 4:7].T == [0, 0, 1, 1, 2, 2, 3, 3]).all()
    assert (np.delete(tall, [4, 5, 6], axis=1) == BORDER).all()
    assert box == pytest.approx((-1.75, 0, 2.75, 1))


def test_cropped_images_are_their_center():
    wide, box = fitted("center_crop", True)  # columns 6 to 18 of 24
    assert (wide == [1] * 6 + [2] * 6).all()
    assert box == pytest.approx((0.25, 0, 0.75, 1))
    tall, box = fitted("center_crop", False)  # rows 9 1/3 to 14 2/3 of 24
    assert (tall.T == [1] * 4 + [2] * 4).all()
    assert box == pytest.approx((0, 7 / 18, 1, 11 / 18))


@pytest.mark.parametrize("fit", ["squash", "pad", "center_crop"])
@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (16, 24)])
def test_images_of_any_shape_get_the_input_size(fit, size):
    preprocessing = Preprocessing((8, 12), (1 / 255,) * 3, (0.0,) * 3, fit=fit)
    pixels, (left, top, right, bottom) = preprocessing(image(*size))
    assert pixels.shape == (3, 8, 12)
    if fit != "squash":  # the region has the shape of the input
        assert (right - left) * size[1] * 8 == pytest.approx((bottom - top) * size[0] * 12)
    if size == (16, 24):  # the shape of the input already
        assert (left, top, right, bottom) == pytest.approx((0, 0, 1, 1))


def test_fit_is_recorded(folders):
    annotator = load_annotator(str(folders["vit"]), fit="center_crop")
    assert annotator.preprocessing.fit == annotator.provenance["fit"] == "center_crop"
    assert annotator.provenance["resample"] == "bilinear"


@pytest.mark.parametrize("is_lvvit", [True, False])
def test_class_token_classifiers_are_warned_of(is_lvvit, caplog):
    torch.manual_seed(0)
    if is_lvvit:
        model = LVViTForImageClassification(tiny_config(patch_logits_weight=0.0))
    else:
        config = ViTConfig(image_size=(32, 48), patch_size=8, num_labels=3, hidden_size=32, num_hidden_layers=1)
        config.update({"num_attention_heads": 4, "intermediate_size": 48})
        model = ViTForImageClassification(config)
    logger = logging.getLogger(dense_classifier.__name__)
    logger.addHandler(caplog.handler)
    try:
        DenseClassifier(model.eval(), (32, 48))
    finally:
        logger.removeHandler(caplog.handler)
    assert "has never seen single patches" in caplog.text
    assert "self_emerging/labeler" in caplog.text
    assert ("patch head of this LV-ViT was not trained" in caplog.text) == is_lvvit
