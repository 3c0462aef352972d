"""Scores of texts at every cell, against matrix products that are written out here from the saved weights."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPModel,
    CLIPSegForImageSegmentation,
    Siglip2ImageProcessor,
    Siglip2Model,
    SiglipModel,
)

from modeling_lvvit.annotators.annotator import load_annotator
from modeling_lvvit.annotators.text.cells import absorb_background
from support.text_models import (
    CLASSES,
    END,
    MAX_TOKENS,
    PAD,
    START,
    WORDS,
    save_text_model,
    tiny_text_model,
)


NAMES = ["cat", "red_owl", "dog, blue"]
# of `NAMES`, by the templates of `PROMPTS`: underscores are blanks, and synonyms count alike
TEXTS = [
    ["a photo of the cat.", "cat"],
    ["a photo of the red owl.", "red owl"],
    ["a photo of the dog.", "dog", "a photo of the blue.", "blue"],
]
PROMPTS = {"templates": ["a photo of the {}.", "{}"]}
PATCH, HEADS = 8, 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_text_model(folder / kind, kind) for kind in CLASSES}


def write_prompts(folder: Path, content: dict) -> str:
    (folder / "prompts.json").write_text(json.dumps(content))
    return str(folder / "prompts.json")


def random_pixels(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, height, width), generator=generator, dtype=torch.uint8)


class Reference:
    """A tower of saved weights in float64, one matrix product after another."""

    def __init__(self, folder: Path, prefix: str, activation, eps: float):
        weights = load_file(folder / "model.safetensors")
        self.weights = {name: value.double() for name, value in weights.items()}
        self.prefix, self.activation, self.eps = prefix, activation, eps

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.weights[f"{self.prefix}.{name}"]

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self[f"{name}.weight"].T + self[f"{name}.bias"]

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        centered = x - x.mean(-1, keepdim=True)
        scale = (centered.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return centered / scale * self[f"{name}.weight"] + self[f"{name}.bias"]

    def mlp(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self.linear(self.activation(self.linear(x, f"{name}.fc1")), f"{name}.fc2")

    def attention(self, x: torch.Tensor, name: str, causal: bool) -> torch.Tensor:
        queries, keys, values = (self.linear(x, f"{name}.{part}_proj") for part in "qkv")
        size, outputs = x.shape[-1] // HEADS, []
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            scores = queries[..., part] @ keys[..., part].mT / math.sqrt(size)
            if causal:
                scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
            outputs.append(scores.softmax(-1) @ values[..., part])
        return self.linear(torch.cat(outputs, -1), f"{name}.out_proj")

    def layer(self, x: torch.Tensor, index: int, causal: bool = False, by_value: bool = False) -> torch.Tensor:
        name = f"encoder.layers.{index}"
        inner = self.norm(x, f"{name}.layer_norm1")
        if by_value:
            inner = self.linear(self.linear(inner, f"{name}.self_attn.v_proj"), f"{name}.self_attn.out_proj")
        else:
            inner = self.attention(inner, f"{name}.self_attn", causal)
        x = x + inner
        return x + self.mlp(self.norm(x, f"{name}.layer_norm2"), f"{name}.mlp")

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, height, width)` to patches `(B, rows, columns, D)`, without positions."""
        kernel = self["embeddings.patch_embedding.weight"].flatten(1)
        windows = pixels.double().unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # (B, 3, rows, columns, 8, 8)
        return windows.permute(0, 2, 3, 1, 4, 5).flatten(3) @ kernel.T


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.gelu(x, approximate="tanh")


def normalized(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def token_ids(text: str) -> list[int]:
    words = text.replace(".", " .").split()
    return [START, *(4 + WORDS.index(word) for word in words), END]


def clip_texts(folder: Path, texts: list[str]) -> torch.Tensor:
    tower = Reference(folder, "text_model", quick_gelu, 1e-5)
    rows = []
    for text in texts:
        ids = token_ids(text)
        x = tower["embeddings.token_embedding.weight"][ids] + tower["embeddings.position_embedding.weight"][: len(ids)]
        for index in range(3):
            x = tower.layer(x, index, causal=True)
        rows.append(tower.norm(x, "final_layer_norm")[-1] @ tower.weights["text_projection.weight"].T)
    return torch.stack(rows)


def clip_tokens(folder: Path, pixels: torch.Tensor, positions: torch.Tensor, by_value: bool) -> torch.Tensor:
    """Embeddings of class token and cells, `(B, 1 + N, projection)`."""
    tower = Reference(folder, "vision_model", quick_gelu, 1e-5)
    patches = tower.patches(pixels).flatten(1, 2)
    first = tower["embeddings.class_embedding"].expand(len(patches), 1, -1)
    x = tower.norm(torch.cat([first, patches], 1) + positions, "pre_layrnorm")
    for index in range(3):
        x = tower.layer(x, index, by_value=by_value and index == 2)
    return tower.norm(x, "post_layernorm") @ tower.weights["visual_projection.weight"].T


def test_the_reference_is_clip(folders):
    """With ordinary attention its class token is what transformers gives."""
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = CLIPModel.from_pretrained(folders["clip"])
    positions = model.vision_model.embeddings.position_embedding.weight.detach().double()
    expected = model.get_image_features(pixels).pooler_output.detach().double()
    embeds = clip_tokens(folders["clip"], pixels, positions, by_value=False)
    torch.testing.assert_close(embeds[:, 0], expected, atol=1e-4, rtol=1e-4)
    by_value = clip_tokens(folders["clip"], pixels, positions, by_value=True)
    assert (by_value[:, 1:] - embeds[:, 1:]).abs().mean() > 0.1


@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
def test_clip_scores_are_cosines_of_the_value_path(folders, tmp_path, size):
    folder = folders["clip"]
    annotator = load_annotator(f"text:{folder}", size, class_names=NAMES, prompts=write_prompts(tmp_path, PROMPTS))
    pixels = random_pixels(*size)
    weights = load_file(folder / "model.safetensors")
    table = weights["vision_model.embeddings.position_embedding.weight"].double()
    grid = (size[0] // PATCH, size[1] // PATCH)
    cells = table[1:].T.reshape(1, -1, 4, 4)
    if grid != (4, 4):
        cells = nn.functional.interpolate(cells, grid, mode="bicubic", align_corners=False)
    positions = torch.cat([table[:1], cells.flatten(2)[0].T])
    embeds = clip_tokens(folder, annotator.preprocessing.normalize(pixels), positions, by_value=True)[:, 1:]
    means = [normalized(normalized(clip_texts(folder, group)).mean(0)) for group in TEXTS]
    logits = weights["logit_scale"].double().exp() * normalized(embeds) @ torch.stack(means).T  # (B, N, 3)
    scores = annotator.score_map(pixels)
    assert scores.shape == (2, 3, *grid) and annotator.dense.grid_size == grid
    expected = logits.softmax(-1).mT.unflatten(2, grid)
    torch.testing.assert_close(scores.double().softmax(1), expected, atol=2e-5, rtol=1e-4)
    assert len(expected.argmax(1).unique()) == 3  # cells differ


def siglip_texts(folder: Path, rows: list[list[int]]) -> torch.Tensor:
    """Of token ids: all tokens see each other, padding too, and the last one, which is padding, is read."""
    tower = Reference(folder, "text_model", tanh_gelu, 1e-6)
    embeds = []
    for ids in rows:
        ids = ids + [PAD] * (MAX_TOKENS - len(ids))
        x = tower["embeddings.token_embedding.weight"][ids] + tower["embeddings.position_embedding.weight"]
        for index in range(3):
            x = tower.layer(x, index)
        embeds.append(tower.linear(tower.norm(x, "final_layer_norm")[-1], "head"))
    return torch.stack(embeds)


def pooled_by_value(tower: Reference, tokens: torch.Tensor) -> torch.Tensor:
    width = tokens.shape[-1]
    weight, bias = tower["head.attention.in_proj_weight"][-width:], tower["head.attention.in_proj_bias"][-width:]
    h = tower.linear(tokens @ weight.T + bias, "head.attention.out_proj")
    return h + tower.mlp(tower.norm(h, "head.layernorm"), "head.mlp")


def siglip_probabilities(folder: Path, tokens: torch.Tensor, tokenize: Callable = token_ids) -> torch.Tensor:
    """`(B, N, 3)`, with the bias of the model, from the final tokens."""
    tower = Reference(folder, "vision_model", tanh_gelu, 1e-6)
    rows = [[tokenize(text) for text in group] for group in TEXTS]
    means = [normalized(normalized(siglip_texts(folder, group)).mean(0)) for group in rows]
    scale, bias = (tower.weights[f"logit_{part}"] for part in ("scale", "bias"))
    embeds = normalized(pooled_by_value(tower, tokens))
    return (scale.exp() * embeds @ torch.stack(means).T + bias).softmax(-1)


def test_siglip_scores_are_cosines_of_the_heads_value_path(folders, tmp_path):
    folder = folders["siglip"]
    annotator = load_annotator(f"text:{folder}", class_names=NAMES, prompts=write_prompts(tmp_path, PROMPTS))
    pixels = random_pixels(32, 32)
    tower = Reference(folder, "vision_model", tanh_gelu, 1e-6)
    patches = tower.patches(annotator.preprocessing.normalize(pixels)).flatten(1, 2)
    x = patches + tower["embeddings.patch_embedding.bias"] + tower["embeddings.position_embedding.weight"]
    for index in range(3):
        x = tower.layer(x, index)
    expected = siglip_probabilities(folder, tower.norm(x, "post_layernorm"))
    scores = annotator.score_map(pixels).double().softmax(1)
    torch.testing.assert_close(scores, expected.mT.unflatten(2, (4, 4)), atol=2e-5, rtol=1e-4)
    assert expected.amax(-1).std() > 0.01


def test_siglip_reads_texts_in_lower_case_and_clip_as_its_tokenizer_does(folders):
    pixels, capitals = random_pixels(32, 32), ["CAT", "Red_Owl", "Dog, Blue"]
    for kind in ("siglip", "clip"):
        lower, upper = (load_annotator(f"text:{folders[kind]}", class_names=names) for names in (NAMES, capitals))
        difference = (lower.score_map(pixels) - upper.score_map(pixels)).abs().max()
        assert difference == 0 if kind == "siglip" else difference > 0.1


def test_siglip_head_of_an_image_of_one_cell_is_its_pooled_output(tmp_path):
    """What the value path means: with one cell there is nothing to attend to but itself."""
    model = tiny_text_model("siglip", image_size=8)
    annotator = load_annotator(f"text:{save_text_model(tmp_path, 'siglip', model)}", (8, 8), class_names=NAMES)
    values = annotator.preprocessing.normalize(random_pixels(8, 8))
    expected = SiglipModel.from_pretrained(tmp_path).get_image_features(values).pooler_output
    torch.testing.assert_close(annotator.dense.scores.cells(values)[:, 0], expected.detach(), atol=1e-5, rtol=1e-4)


def test_siglip2_reads_patches_as_its_image_processor_makes_them(folders, tmp_path):
    folder = folders["siglip2"]
    prompts = write_prompts(tmp_path, PROMPTS)
    annotator = load_annotator(f"text:{folder}", (24, 40), class_names=NAMES, prompts=prompts)
    pixels = random_pixels(24, 40)
    processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=15, do_resize=False)
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    inputs = processor(images, return_tensors="pt")
    tokens = Siglip2Model.from_pretrained(folder).vision_model(**inputs).last_hidden_state.detach().double()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = siglip_probabilities(folder, tokens, lambda text: tokenizer(text)["input_ids"]).mT.unflatten(2, (3, 5))
    torch.testing.assert_close(annotator.score_map(pixels).double().softmax(1), expected, atol=2e-5, rtol=1e-4)


def test_clipseg_scores_are_means_of_its_segmentation_logits(folders, tmp_path):
    content = {"classes": {"cat": ["a cat"], "red owl": ["a red owl", "red"], "dog, blue": ["it"]}}
    folder = folders["clipseg"]
    annotator = load_annotator(f"text:{folder}", class_names=NAMES, prompts=write_prompts(tmp_path, content))
    assert annotator.preprocessing.image_size == (48, 48) and annotator.dense.grid_size == (6, 6)
    pixels = random_pixels(48, 48)
    model = CLIPSegForImageSegmentation.from_pretrained(folder).eval()
    values, maps = annotator.preprocessing.normalize(pixels), []
    for texts in content["classes"].values():
        embeds = [model.clip.get_text_features(torch.tensor([token_ids(text)])).pooler_output for text in texts]
        condition = torch.cat(embeds).mean(0).expand(2, -1)
        maps.append(model(pixel_values=values, conditional_embeddings=condition).logits.detach())
    cells = torch.stack(maps, 1).unflatten(3, (6, 8)).unflatten(2, (6, 8)).mean((3, 5))
    torch.testing.assert_close(annotator.score_map(pixels).softmax(1), cells.softmax(1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def color_model() -> CLIPModel:
    """Its texts are the colors that they name, its cells have their color in channels 0 to 2. The last attention is uniform, and alone
    moves colors to the channels that are projected: 4 to 6."""
    model = tiny_text_model("clip", num_hidden_layers=1)
    for name, parameter in model.named_parameters():
        is_scale = "norm" in name and name.endswith("weight")
        parameter.fill_(1.0 if is_scale else 0.0)
    model.logit_scale.fill_(math.log(20))
    for channel, color in enumerate(("red", "green", "blue")):
        model.text_model.embeddings.token_embedding.weight[4 + WORDS.index(color), channel] = 1.0
        model.vision_model.embeddings.patch_embedding.weight[channel, channel] = 1.0
        model.visual_projection.weight[channel, 4 + channel] = 1.0
        model.text_projection.weight[channel, channel] = 1.0
        model.vision_model.encoder.layers[0].self_attn.v_proj.weight[4 + channel, channel] = 9.0
    model.vision_model.encoder.layers[0].self_attn.out_proj.weight.copy_(torch.eye(16))
    for layer in model.text_model.encoder.layers:  # the end token gathers the words before it
        layer.self_attn.v_proj.weight.copy_(torch.eye(16))
        layer.self_attn.out_proj.weight.copy_(torch.eye(16))
    return model


def test_the_value_path_finds_colors_where_they_are(tmp_path):
    model = color_model()
    save_text_model(tmp_path, "clip", model)
    colors = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0], [1, 0, 0, 2], [0, 1, 2, 1]])  # of the cells
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    for row in range(4):
        for column in range(4):
            pixels[0, colors[row, column], row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 255
    annotator = load_annotator(f"text:{tmp_path}", class_names=["red", "green", "blue"])
    probabilities = annotator.score_map(pixels).softmax(1)[0]
    assert torch.equal(probabilities.argmax(0), colors)
    assert probabilities.amax(0).min() > 0.9
    # what the last attention has mixed is the same everywhere
    tokens = model.vision_model(annotator.preprocessing.normalize(pixels)).last_hidden_state[:, 1:]
    plain = nn.functional.normalize(model.visual_projection(model.vision_model.post_layernorm(tokens)), dim=-1)
    assert plain.argmax(-1).unique().numel() == 1


def test_background_makes_cells_flat_by_its_probability():
    """The cell of the docstring: 0.3 and 0.1 with 0.6 of background; and one without background."""
    scores = torch.tensor([[0.3, 0.1, 0.6], [0.75, 0.25, 0.0]]).log().T.reshape(1, 3, 1, 2) + 5
    logits = absorb_background(scores, 2)
    torch.testing.assert_close(logits.softmax(1)[0, :, 0, 0], torch.tensor([0.6, 0.4]))
    torch.testing.assert_close(logits.softmax(1)[0, :, 0, 1], torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(logits.exp().sum(1), torch.full((1, 1, 2), 2.0))  # 0 is the score of 1 / C


def test_background_follows_its_formula_and_may_be_several_texts():
    generator = torch.Generator().manual_seed(0)
    scores = 8 * torch.randn(2, 7, 3, 4, generator=generator).double()
    everything = scores.softmax(1)
    background = everything[:, 5:].sum(1, keepdim=True)
    expected = (1 - background) * scores[:, :5].softmax(1) + background / 5
    torch.testing.assert_close(absorb_background(scores, 5).softmax(1), expected, atol=1e-6, rtol=1e-5)
    extreme = torch.tensor([0.0, -900.0, 900.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(absorb_background(extreme, 2), torch.zeros(1, 2, 1, 1))
    assert absorb_background(-extreme, 2).isfinite().all()


def test_background_prompts_take_their_cells_from_the_classes(tmp_path):
    """A blue cell names red or green for want of a better class; with the background "blue" it names nothing."""
    save_text_model(tmp_path, "clip", color_model())
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    pixels[0, 0, :, :16], pixels[0, 2, :, 16:] = 255, 255
    prompts = write_prompts(tmp_path, {"background": ["blue"]})
    annotator = load_annotator(f"text:{tmp_path}", class_names=["red", "green"], prompts=prompts)
    probabilities = annotator.score_map(pixels).softmax(1)[0]
    assert probabilities[0, :, :2].min() > 0.9
    assert (probabilities[:, :, 2:] - 0.5).abs().max() < 0.05
