"""Any backbone: a patch head on classifiers of transformers and timm, their training, saving and loading."""

import copy
import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import timm
import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)
from transformers.modeling_outputs import ImageClassifierOutput

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.backbones.patch_head import exchange_pixels, get_patch_head, load_patch_head
from modeling_lvvit.cli.build_backbone import random_classifier
from modeling_lvvit.cli.model_arguments import ModelArguments
from modeling_lvvit.token_labeling import (
    TokenLabelTrainer,
    add_patch_head,
)
from modeling_lvvit.training.fsdp import layer_class_names
from support.classifiers import SIZE, TRANSFORMERS, samples_of, transformers_model
from support.images import labelled_table
from support.models import NUM_CLASSES, tiny_config
from support.trainers import arguments


# of timm those that are small at 64 pixels, and what makes the others small
TIMM = {
    "resnet18": ({}, (2, 2)),
    "test_vit": ({"img_size": 64}, (4, 4)),
    "test_convnext": ({}, (2, 2)),
    "test_efficientnet": ({}, (2, 2)),
    "mobilenetv3_small_050": ({}, (2, 2)),
    "mixer_s32_224": ({"img_size": 64}, (2, 2)),
    "cait_xxs24_224": ({"img_size": 64}, (4, 4)),
    "volo_d1_224": ({"img_size": 64}, (4, 4)),
    "xcit_nano_12_p16_224": ({}, (4, 4)),
}


def timm_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=NUM_CLASSES, **TIMM[name][0])


ALL = [*(("transformers", name) for name in TRANSFORMERS), *(("timm", name) for name in TIMM)]
PLAIN = """
import json, sys
import torch
from transformers import AutoModelForImageClassification
for folder in sys.argv[2:]:
    pixel_values = torch.load(sys.argv[1], weights_only=True)
    model, loading = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        print(json.dumps([sorted(loading["missing_keys"]), model.eval()(pixel_values).logits.tolist()]))
assert "modeling_lvvit" not in sys.modules
"""


@dataclass
class Trained:
    """A model after one step, saved."""

    model: nn.Module
    before: dict[str, torch.Tensor]
    grid_size: tuple[int, int]
    folder: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains each architecture once."""
    rows = datasets.Dataset(labelled_table())

    @functools.cache
    def train(library: str, name: str) -> Trained:
        folder = tmp_path_factory.mktemp(name)
        model = transformers_model(name) if library == "transformers" else timm_model(name)
        trainer = TokenLabelTrainer(model, arguments(folder), train_dataset=samples_of(rows))
        before = {key: value.clone() for key, value in trainer.model.named_parameters()}
        trainer.train()
        trainer.save_model()
        return Trained(trainer.model.eval(), before, trainer.grid_size, folder)

    return train


@pytest.mark.parametrize(("library", "name"), ALL)
def test_architectures_train_and_save_their_patch_head(library, name, trained):
    """A step changes the weights, and the patch head comes back with its own."""
    done = trained(library, name)
    assert done.grid_size == (TRANSFORMERS if library == "transformers" else TIMM)[name][1]
    moved = {key for key, value in done.model.named_parameters() if not torch.equal(value, done.before[key])}
    heads = {key for key in done.before if "patch_head." in key and key.endswith("weight")}
    assert heads and heads <= moved and len(moved) > 0.5 * len(done.before)
    again = add_patch_head(AutoModelForImageClassification.from_pretrained(done.folder), SIZE).eval()
    assert load_patch_head(again, str(done.folder))
    pixel_values = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = done.model(pixel_values).patch_logits
        torch.testing.assert_close(again(pixel_values).patch_logits, expected, rtol=1e-4, atol=1e-5)


def test_a_fresh_process_loads_plain_models_with_the_same_logits(trained, tmp_path):
    """One process for all, which knows nothing of this package."""
    pixel_values = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    torch.save(pixel_values, tmp_path / "pixels.pt")
    models = [trained(*architecture) for architecture in ALL]
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "pixels.pt"), *(str(done.folder) for done in models)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for done, line in zip(models, lines, strict=True):
        missing, logits = json.loads(line)
        assert missing == []
        with torch.no_grad():
            expected = done.model(pixel_values).logits
        torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-4, atol=1e-5)


def test_patch_logits_are_the_head_on_the_normed_patch_tokens():
    model = add_patch_head(transformers_model("vit"), SIZE).eval()
    pixel_values = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        output = model(pixel_values)
        tokens = model.vit(pixel_values).last_hidden_state[:, 1:]
        torch.testing.assert_close(output.patch_logits, get_patch_head(model)(tokens))
        assert torch.equal(output.logits, model.classifier(model.vit(pixel_values).last_hidden_state[:, 0]))
    assert torch.equal(output.logits, output.cls_logits)


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "mixer_s32_224", "mobilenetv3_small_050"])
def test_features_of_timm_are_those_of_its_forward_features(name):
    model = add_patch_head(timm_model(name), SIZE).eval()
    pixel_values = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        features = model.timm_model.forward_features(pixel_values)
        cells = model.feature_hook.feature_map.flatten_cells(features)
        torch.testing.assert_close(model(pixel_values).patch_logits, get_patch_head(model)(cells))
        assert torch.equal(model(pixel_values).logits, model.timm_model.forward_head(features))


def test_rows_come_before_columns():
    """An image that is dark but for one cell changes the features of that cell most."""
    model = add_patch_head(transformers_model("resnet"), (64, 128)).eval()
    assert model.patch_grid_size == (2, 4)
    pixel_values = torch.zeros(1, 3, 64, 128)
    bright = pixel_values.clone()
    bright[:, :, 40:60, 8:24] = 3.0  # second row, first column
    with torch.no_grad():
        change = (model(bright).patch_logits - model(pixel_values).patch_logits).abs().sum(-1).view(2, 4)
    assert change.argmax() == 4


@pytest.mark.parametrize("kind", ["cvt", "donut-swin", "hiera", "pvt_v2"])
def test_maps_that_the_head_was_not_run_on_lie_over_the_image(kind):
    """As above, in the quarters of the image; the window of a Swin and the units of a Hiera keep tokens in another order inside."""
    model = add_patch_head(transformers_model(kind), SIZE).eval()
    rows, columns = model.patch_grid_size
    pixel_values = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(2))
    changed = pixel_values.clone()
    changed[:, :, 32:, :32] = 0.0  # lower left
    with torch.no_grad():
        change = (model(changed).patch_logits - model(pixel_values).patch_logits).abs().sum(-1).view(rows, columns)
    quarters = change.unflatten(1, (2, -1)).unflatten(0, (2, -1)).sum(dim=(1, 3))
    assert quarters.argmax() == 2


class Shuffled(nn.Module):
    """Puts the cells of a map into another order, or exchanges rows and columns."""

    def __init__(self, transposes: bool):
        super().__init__()
        self.transposes = transposes

    def forward(self, features):
        tokens = features.mT.flatten(2) if self.transposes else features.flatten(2)[..., [3, 1, 0, 2]]
        return tokens.mT, None


class Flattening(PreTrainedModel):
    """Four cells, which its head reads all at once."""

    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig, last: nn.Module):
        super().__init__(config)
        self.stem, self.last = nn.Conv2d(3, 8, kernel_size=32, stride=32), last
        self.head = nn.Linear(32, NUM_CLASSES)

    def forward(self, pixel_values):
        tokens, _ = self.last(self.stem(pixel_values))
        return ImageClassifierOutput(logits=self.head(tokens.flatten(1)))


@pytest.mark.parametrize("transposes", [False, True])
def test_cells_out_of_place_are_not_taken_for_a_map(transposes):
    """Labels would go to the wrong tokens; the map in front of the shuffling is found instead."""
    model = Flattening(PreTrainedConfig(num_labels=NUM_CLASSES), Shuffled(transposes))
    assert add_patch_head(model, SIZE).feature_hook.feature_map.module_name == "stem"


def test_exchanging_pixels_is_mixtoken_for_a_plain_patch_embedding():
    """The same tokens enter the first layer as if they had been exchanged after the embedding; rows 3 x 4 of an image 48 x 64."""
    torch.manual_seed(0)
    embedding = nn.Conv2d(3, 8, kernel_size=16, stride=16)
    pixel_values = torch.randn(4, 3, 48, 64)
    mix_mask = torch.zeros(4, 3, 4, dtype=torch.bool)
    mix_mask[:, 1:, 1:3] = True
    tokens = embedding(pixel_values)
    mixed = torch.where(mix_mask.unsqueeze(1), tokens.flip(0), tokens)
    torch.testing.assert_close(embedding(exchange_pixels(pixel_values, mix_mask)), mixed)
    assert torch.equal(exchange_pixels(exchange_pixels(pixel_values, mix_mask), mix_mask), pixel_values)


def test_mixed_patch_logits_are_put_back():
    """With all tokens exchanged every image is its partner, and what is put back belongs to itself."""
    model = add_patch_head(transformers_model("vit"), SIZE).eval()
    pixel_values = torch.randn(2, 3, *SIZE)
    everything = torch.ones(2, 4, 4, dtype=torch.bool)
    with torch.no_grad():
        plain, mixed = model(pixel_values), model(pixel_values, mix_mask=everything)
    torch.testing.assert_close(mixed.patch_logits, plain.patch_logits)
    torch.testing.assert_close(mixed.logits, plain.logits.flip(0))


def test_exchanged_pixels_give_what_tokens_exchanged_in_lvvit_give():
    """Without a convolutional stem, whose filters would see both images at the border of a box."""
    model = LVViTForImageClassification(tiny_config(conv_stem=False)).eval()
    rows, columns = model.config.grid_size
    pixel_values = torch.randn(2, 3, *model.config.image_height_width)
    mix_mask = torch.zeros(2, rows, columns, dtype=torch.bool)
    mix_mask[:, :2, 1:3] = True
    with torch.no_grad():
        inside = model(pixel_values, mix_mask=mix_mask)
        outside = model(exchange_pixels(pixel_values, mix_mask))
    torch.testing.assert_close(inside.cls_logits, outside.cls_logits)


@pytest.mark.parametrize(("library", "name"), [("timm", "test_convnext"), ("transformers", "vit")])
def test_resume_takes_every_weight_from_the_checkpoint(library, name, labelled_rows, tmp_path):
    """Stopped after one of two steps and continued from other weights, a run ends where an uninterrupted one does."""

    def run(folder):
        model = transformers_model(name) if library == "transformers" else timm_model(name)
        options = arguments(folder, max_steps=2, save_strategy="steps", save_steps=1)
        return TokenLabelTrainer(model, options, train_dataset=samples_of(labelled_rows))

    whole = run(tmp_path / "whole")
    whole.train()
    resumed = run(tmp_path / "whole")
    with torch.no_grad():
        for value in resumed.model.parameters():
            value.zero_()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    for (key, value), other in zip(whole.model.named_parameters(), resumed.model.parameters()):
        torch.testing.assert_close(value, other, msg=key)


def test_checkpoints_load_as_plain_models_too(labelled_rows, tmp_path):
    options = arguments(tmp_path, save_strategy="steps", save_steps=1)
    trainer = TokenLabelTrainer(transformers_model("vit"), options, train_dataset=samples_of(labelled_rows))
    trainer.train()
    plain, loading = AutoModelForImageClassification.from_pretrained(
        tmp_path / "checkpoint-1", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert torch.equal(plain.vit.layernorm.weight, trainer.model.vit.layernorm.weight)


def test_models_are_copied_and_pickled_with_their_patch_head(tmp_path):
    model = add_patch_head(transformers_model("resnet"), SIZE).eval()
    pixel_values = torch.randn(2, 3, *SIZE)
    model.resnet(pixel_values)  # outside of a forward pass nothing is kept
    assert model.feature_hook.features is None
    torch.save(model, tmp_path / "model.pt")
    with torch.no_grad():
        expected = model(pixel_values).patch_logits
        for copied in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
            torch.testing.assert_close(copied(pixel_values).patch_logits, expected)


def test_half_precision_weights_and_other_outputs():
    model = add_patch_head(transformers_model("vit").bfloat16(), SIZE).eval()
    output = model(torch.randn(2, 3, *SIZE).bfloat16(), output_hidden_states=True, return_dict=False)
    assert output.patch_logits.dtype == torch.bfloat16 and len(output.hidden_states) == 3


def test_patch_head_can_be_left_out(tmp_path):
    model = add_patch_head(transformers_model("vit"), SIZE)
    model.saves_patch_head = False
    model.save_pretrained(tmp_path)
    _, loading = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["unexpected_keys"] and not loading["missing_keys"]
    assert not load_patch_head(model, str(tmp_path))


def test_timm_models_that_cannot_be_built_again_are_refused():
    """Their arguments are not known any more, and the saved model could not be loaded."""
    for name, options in (("test_vit", {"img_size": 64, "depth": 1}), ("resnet18", {"global_pool": "max"})):
        model = timm.create_model(name, num_classes=NUM_CLASSES, **options)
        with pytest.raises(ValueError, match=r"was made with other arguments .* model_args"):
            add_patch_head(model, SIZE)


def test_weights_without_influence_are_frozen():
    model = add_patch_head(transformers_model("dinov2"), SIZE)
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    assert frozen == ["dinov2.embeddings.mask_token"]


def test_plain_labels_train_any_model(labelled_rows, tmp_path):
    samples = samples_of(labelled_rows, name="without maps")
    trainer = TokenLabelTrainer(transformers_model("resnet"), arguments(tmp_path), train_dataset=samples)
    assert not trainer.trains_patches
    trainer.train()


def test_evaluation_gathers_no_patch_logits(labelled_rows, tmp_path):
    samples = samples_of(labelled_rows)
    trainer = TokenLabelTrainer(
        transformers_model("vit"), arguments(tmp_path), train_dataset=samples, eval_dataset=samples
    )
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
    trainer.preprocess_logits_for_metrics = None
    assert trainer.predict(samples).predictions.shape == (len(samples), NUM_CLASSES)


class NoSpace(PreTrainedModel):
    """Averages colors and classifies them."""

    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.head = nn.Linear(3, NUM_CLASSES)

    def forward(self, pixel_values):
        return ImageClassifierOutput(logits=self.head(pixel_values.mean(dim=(2, 3))))


def test_models_without_spatial_features_are_refused():
    with pytest.raises(ValueError, match=r"cannot learn from token labels .* has no feature map"):
        add_patch_head(NoSpace(PreTrainedConfig(num_labels=NUM_CLASSES)), SIZE)
    with pytest.raises(ValueError, match="neither a model of transformers nor one of timm"):
        add_patch_head(nn.Linear(3, 2), SIZE)
    with pytest.raises(ValueError, match="has a patch head already"):
        add_patch_head(add_patch_head(transformers_model("vit"), SIZE), SIZE)


def test_grids_smaller_than_two_by_two_are_refused(labelled_rows, tmp_path):
    with pytest.raises(ValueError, match="on images of 64 x 64 it has 2 x 2 cells, on these fewer than the 2 x 2"):
        add_patch_head(transformers_model("resnet"), (32, 32))
    with pytest.raises(ValueError, match="1 x 2 cells on images of 32 x 64 pixels; token labels need at least 2 x 2"):
        add_patch_head(transformers_model("resnet"), (32, 64))


def test_failures_keep_their_own_reason():
    """A model of fixed size has enough cells on larger images, which says nothing of these."""
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_vit", num_labels=NUM_CLASSES))
    with pytest.raises(ValueError, match=r"60 x 60 pixels: Input height \(60\)"):
        add_patch_head(model, (60, 60))


def test_the_size_of_a_model_is_found_where_it_says_it(labelled_rows, tmp_path):
    """In a part of the configuration, or in a model of timm."""
    for model in (transformers_model("clip"), timm_model("test_vit")):
        trainer = TokenLabelTrainer(model, arguments(tmp_path), eval_dataset=samples_of(labelled_rows))
        assert trainer.grid_size == (4, 4)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (lambda: transformers_model("vit"), {"ViTLayer"}),
        (lambda: timm_model("test_vit"), {"Block"}),
        (lambda: timm_model("resnet18"), {"BasicBlock"}),
        (lambda: timm.create_model("regnetx_002"), {"RegStage", "ConvNormAct"}),
        (lambda: timm.create_model("vgg11"), set()),
    ],
)
def test_layers_to_shard(model, layers):
    """The outermost of those that come several times; without such a model is one unit."""
    with torch.device("meta"):
        assert layer_class_names(model()) == layers


def test_images_of_another_size_are_refused():
    model = add_patch_head(transformers_model("resnet"), SIZE)
    with pytest.raises(ValueError, match="made for images of 64 x 64 pixels, on which the model has 2 x 2 cells"):
        model(torch.zeros(1, 3, 96, 96))


def test_no_graph_breaks():
    model = add_patch_head(transformers_model("vit"), SIZE)
    mix_mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    pixel_values = torch.randn(2, 3, *SIZE)
    expected = model.eval()(pixel_values, mix_mask=mix_mask)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(pixel_values, mix_mask=mix_mask).patch_logits, expected.patch_logits, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("architecture", "overrides", "message"),
    [
        ("vitt", None, "no image classifier of type 'vitt' .did you mean vit"),
        ("timm/resnet1", None, "timm has no model 'resnet1'; near it: "),
        ("vit", {"hiden_size": 3}, "hiden_size .did you mean hidden_size"),
        ("timm/resnet18", {"hidden": 3}, "cannot be built"),
        ("lvvit", None, "chosen with `variant`"),
    ],
)
def test_wrong_architectures_are_named(architecture, overrides, message):
    with pytest.raises(ValueError, match=message):
        random_classifier(
            ModelArguments(architecture=architecture, config_overrides=overrides, image_size=[64]),
            {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}},
        )
