"""Numbers of the authors' implementation (see parity/README.md)."""

import numpy as np
import pytest
import torch

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.labels.label_crops import CropGeometry, crop_label_maps, pool_label_maps
from modeling_lvvit.labels.label_maps import build_palette, decode
from modeling_lvvit.labels.sparse_targets import SparseTargets
from modeling_lvvit.original.convert import convert_state_dict
from modeling_lvvit.token_labeling.losses import blend_weight
from modeling_lvvit.variants import variant_config
from support.original_layout import original_state_dict, recipe_images
from support.programs import ROOT


PARITY = ROOT / "tests" / "parity"
SMOOTHING = 0.1


def load_arrays(name: str) -> dict[str, torch.Tensor]:
    with np.load(PARITY / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files if arrays[key].dtype.kind != "U"}


def load_names(name: str, key: str) -> list[str]:
    with np.load(PARITY / f"{name}.npz") as arrays:
        return [str(value) for value in arrays[key]]


def recipe_model(variant: str) -> LVViTForImageClassification:
    config = variant_config(variant)
    model = LVViTForImageClassification(config)
    model.load_state_dict(convert_state_dict(original_state_dict(config)))
    return model


def largest(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return (actual.detach() - expected).abs().max().item()


@pytest.fixture(scope="module")
def evaluation():
    model = recipe_model("lvvit_s_224").eval()
    with torch.no_grad():
        output = model(recipe_images(2, 224), output_hidden_states=True)
        tokens = model.lvvit(recipe_images(2, 224)).last_hidden_state
        stem = model.lvvit.embeddings.patch_embeddings(recipe_images(2, 224))
    return output, tokens, stem, load_arrays("lvvit_s_224")


def test_evaluation_logits_equal_the_authors(evaluation):
    output, _, _, expected = evaluation
    assert largest(output.logits, expected["logits"]) < 5e-5
    assert largest(output.cls_logits, expected["cls_logits"]) < 5e-5
    assert largest(output.patch_logits.amax(dim=1), expected["aux_max"]) < 5e-5
    assert largest(output.patch_logits[:, ::7, ::13], expected["aux_sub"]) < 5e-5
    assert (output.patch_logits.argmax(dim=1) != expected["aux_argmax_token"]).sum() <= 5 * 2


def test_evaluation_tokens_equal_the_authors(evaluation):
    output, tokens, stem, expected = evaluation
    assert largest(stem[:, ::7, ::13], expected["patch_embed_sub"]) < 5e-5
    assert largest(tokens[:, ::7, ::13], expected["features_sub"]) < 5e-5
    blocks = torch.stack(output.hidden_states[1:], dim=1)  # (B, layers, tokens, hidden)
    assert largest(blocks[:, :, 0, ::13], expected["block_cls"]) < 1e-4
    assert torch.allclose(blocks.abs().double().mean(dim=(0, 2, 3)), expected["block_abs_mean"].double(), rtol=1e-5)


def authors_smoothing(probabilities: torch.Tensor) -> torch.Tensor:
    return probabilities * (1 - SMOOTHING + SMOOTHING / 1000) + SMOOTHING / 1000


def label_case(case: str):
    """Palette, index, scores and boxes of a reference case, and the arrays."""
    arrays = load_arrays("label_pipeline")
    count, grid = (2, 24) if "size24" in case else (4, 14)
    ids, scores = arrays["classes"][:count].clone(), arrays["scores"][:count].clone()
    if "flip" in case:
        mirrored = arrays["flip"][:count].bool()
        ids[mirrored], scores[mirrored] = ids[mirrored].flip(-1), scores[mirrored].flip(-1)
    top, left, height, width = arrays["coords"][:count].unbind(1)
    crop_box = torch.stack((left, top, left + width, top + height), dim=1)
    return ids, scores, crop_box, (grid, grid), arrays


LABEL_CASES = [
    ("crop_s1", "authors"),
    ("crop_s1_xy", "correct"),
    ("cropflip_s1", "authors"),
    ("cropflip_s1_xy", "correct"),
    ("crop_s1_size24", "authors"),
]


@pytest.mark.parametrize(("case", "label_crop"), LABEL_CASES)
def test_pooled_scores_give_the_authors_targets(case, label_crop):
    """Pooling followed by the softmax kernel that made the reference. A last-bit difference of a pooled score can move
    that kernel's result by its own error, up to 4.6e-5: allowed for one value in a thousand."""
    ids, scores, crop_box, grid, arrays = label_case(case)
    dense = decode(ids, scores, 1000)
    columns = [
        pool_label_maps(dense, CropGeometry(crop_box), size, label_crop).softmax(dim=1).flatten(2)
        for size in ((1, 1), grid)
    ]
    targets = authors_smoothing(torch.cat(columns, dim=2).mT)  # (B, 1 + N, classes)
    top = targets.gather(-1, arrays[f"{case}_top20_classes"][:, 1:].long())
    expected = arrays[f"{case}_top20_values"][:, 1:]
    torch.testing.assert_close(top, expected, rtol=4.6e-5, atol=1e-7)
    assert torch.isclose(top, expected, rtol=2e-5, atol=1e-7).float().mean() > 0.999
    torch.testing.assert_close(targets.sum(-1), arrays[f"{case}_sum"][:, 1:], rtol=4.6e-5, atol=1e-7)
    torch.testing.assert_close(targets.amin(-1), arrays[f"{case}_min"][:, 1:], rtol=4.6e-5, atol=1e-7)


def test_pooled_scores_equal_the_authors():
    ids, scores, crop_box, grid, arrays = label_case("crop_s1")
    pooled = pool_label_maps(decode(ids, scores, 1000), CropGeometry(crop_box), grid, "authors")
    assert largest(pooled[:, ::17, ::3, ::3], arrays["crop_pooled_logits_sub"]) < 4e-6


@pytest.mark.parametrize(("case", "label_crop"), LABEL_CASES)
def test_sparse_targets_equal_the_authors(case, label_crop):
    """The whole sparse path; the bound adds the 4.6e-5 by which the reference's own softmax is off."""
    ids, scores, crop_box, grid, arrays = label_case(case)
    cls, tokens = crop_label_maps(*build_palette(ids), scores, CropGeometry(crop_box), grid, 1000, label_crop)
    targets = authors_smoothing(torch.cat((cls.to_dense().unsqueeze(1), tokens.to_dense()), dim=1))
    top = targets.gather(-1, arrays[f"{case}_top20_classes"][:, 1:].long())
    torch.testing.assert_close(top, arrays[f"{case}_top20_values"][:, 1:], rtol=7e-5, atol=1e-7)
    assert torch.allclose(cls.to_dense().sum(-1), torch.ones(len(ids)), atol=2e-6)


def dense_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -(targets * logits.log_softmax(dim=-1)).sum(dim=-1).mean()


@pytest.fixture(scope="module")
def training():
    """One forward and backward pass of T with the reference's mix box and targets."""
    model = recipe_model("lvvit_t_224").train()
    expected = load_arrays("lvvit_t_train")
    ids, scores, crop_box, grid, labels = label_case("crop_s1")
    cls, tokens = crop_label_maps(*build_palette(ids), scores, CropGeometry(crop_box), grid, 1000, "authors")
    mix_mask = torch.zeros(4, 14, 14, dtype=torch.bool)
    row0, column0, row1, column1 = expected["box_row0_col0_row1_col1"].tolist()
    mix_mask[:, row0:row1, column0:column1] = True
    output = model(recipe_images(4, 224), mix_mask=mix_mask)
    kept = 1 - mix_mask[0].float().mean()

    def mixed(target):
        return kept * target + (1 - kept) * target.flip(0)

    cls_target, token_targets = authors_smoothing(cls.to_dense()), authors_smoothing(tokens.to_dense())
    one_hot = SparseTargets.from_labels(labels["ground_truth"], 1000).smooth(SMOOTHING).to_dense()
    share = blend_weight(cls, labels["ground_truth"]).unsqueeze(1)
    token_loss = dense_cross_entropy(output.patch_logits, token_targets)
    hard_token_loss = dense_cross_entropy(output.patch_logits, one_hot.unsqueeze(1).expand_as(token_targets))
    losses = {
        "loss_dense1": dense_cross_entropy(output.cls_logits, mixed(cls_target)) + token_loss,
        "loss_dense05": dense_cross_entropy(output.cls_logits, mixed(cls_target)) + 0.5 * token_loss,
        "loss_dense0": dense_cross_entropy(output.cls_logits, mixed(cls_target)),
        "loss_cls0": token_loss,
        "loss_dense05_ground_truth": dense_cross_entropy(
            output.cls_logits, mixed(cls_target * share + one_hot * (1 - share))
        ) + 0.5 * token_loss,
        "loss_hard_dense05": dense_cross_entropy(output.cls_logits, mixed(one_hot)) + 0.5 * hard_token_loss,
    }  # fmt: skip
    losses["loss_dense05"].backward()
    return model, output, losses, expected


def test_training_outputs_equal_the_authors(training):
    model, output, _, expected = training
    assert largest(output.cls_logits, expected["cls_logits"]) < 1e-4
    assert largest(output.patch_logits[:, ::7, ::13], expected["aux_sub"]) < 1e-4
    grid = output.patch_logits.unflatten(1, (14, 14))[:, 1:11, 1:13, ::97]
    assert largest(grid, expected["aux_box_edge"]) < 1e-4
    stem = model.lvvit.embeddings.patch_embeddings
    for index in (1, 2, 3):
        norm = getattr(stem, f"norm{index}")
        assert largest(norm.running_mean, expected[f"bn{index}_running_mean"]) < 1e-5
        assert largest(norm.running_var, expected[f"bn{index}_running_var"]) < 1e-5


def test_training_losses_equal_the_authors(training):
    _, _, losses, expected = training
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-5), name


def test_training_gradients_equal_the_authors(training):
    model, _, _, expected = training
    names = load_names("lvvit_t_train", "grad_all_names")
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    ours = [next(iter(convert_state_dict({name: None}))) for name in names]
    norms = torch.stack([gradients[name].norm() for name in ours])
    torch.testing.assert_close(norms, expected["grad_all_norms_dense05"].float(), rtol=1e-3, atol=0)
    slices = {
        "grad_pos_embed_sub": gradients[ours[names.index("pos_embed")]][:, ::13, ::17],
        "grad_qkv0_sub": gradients[ours[names.index("blocks.0.attn.qkv.weight")]][::29, ::17],
        "grad_head_bias": gradients["classifier.bias"],
        "grad_aux_bias": gradients["patch_classifier.bias"],
    }
    for name, actual in slices.items():
        assert largest(actual, expected[name]) < 1e-3 * expected[name].abs().max(), name
    conv1 = gradients["lvvit.embeddings.patch_embeddings.conv1.weight"][::8]
    assert largest(conv1, expected["grad_conv1_sub"]) < 5e-3 * expected["grad_conv1_sub"].abs().max()
