"""Scores of texts at every cell of an image.

The image towers of image-text models are trained for one embedding of the whole image. The last attention over all cells, which gathers
it, spreads what lies anywhere over all cells: plain patch tokens name the right thing at the wrong place. Every cell therefore takes the
path that its own value takes through this attention, as if it attended to itself alone (MaskCLIP: Zhou, Loy, Dai, "Extract Free Dense
Labels from CLIP", ECCV 2022, arXiv:2112.01071, section 3.2).
"""

from typing import Any

import torch
from torch import nn


class ValuePath(nn.Module):
    """A self-attention in which each token attends to itself alone: `out_proj(v_proj(x))`; tokens `(B, N, D)` to the same shape."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.v_proj, self.out_proj = attention.v_proj, attention.out_proj

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        return self.out_proj(self.v_proj(hidden_states)), None


class CLIPCells(nn.Module):
    """Embeddings of the cells by CLIP: images `(B, 3, height, width)` to `(B, N, projection)`.

    With x the tokens before the last layer,

        h = x + out_proj(v_proj(norm1(x)))
        y = h + mlp(norm2(h))
        embedding = visual_projection(post_layernorm(y))

    for each patch token. The residual and the MLP of the layer stay, as in the code of MaskCLIP (`mmseg/models/backbones/vit.py`); its
    paper derives the path for the attention pooling of a ResNet, which has neither.

    Args:
        model: `CLIPModel`; its last attention of the image tower is replaced.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection
        layer = self.vision_model.encoder.layers[-1]
        layer.self_attn = ValuePath(layer.self_attn)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        output = self.vision_model(pixel_values, interpolate_pos_encoding=True)
        tokens = output.last_hidden_state[:, 1:]  # (B, N, D), without the class token
        return self.visual_projection(self.vision_model.post_layernorm(tokens))


class SiglipCells(nn.Module):
    """Embeddings of the cells by SigLIP: images `(B, 3, height, width)` to `(B, N, D)`.

    SigLIP has no class token: a learned query attends to all final tokens x (after `post_layernorm`) in an attention-pooling head. The
    softmax over a single token is 1, so the head of one token is its value path:

        h = out_proj(v_proj(x));  embedding = h + mlp(layernorm(h))

    Args:
        model: `SiglipModel`.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.vision_model = model.vision_model
        if not self.vision_model.use_head:
            raise ValueError(
                "its image tower has no pooling head (`vision_use_head`), so no cell can be compared with texts."
            )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        tokens = self.tokens(pixel_values)
        single = tokens.flatten(0, 1).unsqueeze(1)  # (B * N, 1, D): sequences of one token
        return self.vision_model.head(single).unflatten(0, tokens.shape[:2])  # (B, N, D)

    def tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Final tokens `(B, N, D)`."""
        return self.vision_model(pixel_values, interpolate_pos_encoding=True).last_hidden_state


class Siglip2Cells(SiglipCells):
    """As `SiglipCells`, for the SigLIP 2 that takes images of any shape as lists of patches (NaFlex). All images of a batch have one
    shape here, so no patch is padding."""

    def tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Final tokens `(B, N, D)`. A patch is a vector of (row, column, channel), as its image processor makes it."""
        side = self.vision_model.config.patch_size
        patches = pixel_values.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, 3, rows, side, columns, side)
        rows, columns = patches.shape[2], patches.shape[4]
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, N, side * side * 3)
        mask = torch.ones(patches.shape[:2], dtype=torch.int32, device=patches.device)
        shapes = torch.tensor([[rows, columns]], device=patches.device).expand(len(patches), -1)
        return self.vision_model(patches, mask, shapes).last_hidden_state


class EmbeddingScores(nn.Module):
    """Scaled cosine similarity of cells and texts: images to `(B, texts, rows, columns)`, float32.

    Args:
        cells: Images to embeddings `(B, N, D)`.
        text_embeds: `(texts, D)`, of length 1.
        scale: Factor of the cosine, `exp(logit_scale)`. A bias (SigLIP) is the same for all texts and changes no softmax.
        grid_size: Rows and columns of the N cells.
    """

    def __init__(self, cells: nn.Module, text_embeds: torch.Tensor, scale: float, grid_size: tuple[int, int]):
        super().__init__()
        self.cells, self.scale, self.grid_size = cells, scale, grid_size
        self.register_buffer("text_embeds", text_embeds)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        embeds = self.cells(pixel_values)
        # cosines differ by hundredths, which 8 bits of mantissa lose
        with torch.autocast(embeds.device.type, enabled=False):
            embeds = nn.functional.normalize(embeds.float(), dim=-1)
            scores = self.scale * embeds @ self.text_embeds.float().mT  # (B, N, texts)
        return scores.mT.unflatten(2, self.grid_size)


class CLIPSegScores(nn.Module):
    """Segmentation logits of CLIPSeg (Lüddecke and Ecker 2022, arXiv:2112.10003), a decoder pass for each text, mean over the
    pixels of each cell: images to `(B, texts, rows, columns)`.

    Args:
        model: `CLIPSegForImageSegmentation`.
        text_embeds: `(texts, D)`, as its text tower projects them, not normalized.
        grid_size: Rows and columns of the patches, which must be as many: its decoder takes all images for square ones.
    """

    def __init__(self, model: nn.Module, text_embeds: torch.Tensor, grid_size: tuple[int, int]):
        super().__init__()
        if grid_size[0] != grid_size[1]:
            raise ValueError("CLIPSeg takes square images only.")
        self.vision_model, self.decoder = model.clip.vision_model, model.decoder
        self.extract_layers, self.grid_size = model.config.extract_layers, grid_size
        self.register_buffer("text_embeds", text_embeds)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        options = {"interpolate_pos_encoding": True, "output_hidden_states": True}
        hidden_states = self.vision_model(pixel_values, **options).hidden_states
        activations = [hidden_states[index + 1] for index in self.extract_layers]  # 0 is what the first layer gets
        maps = [self.decoder(activations, text.expand(len(pixel_values), -1)).logits for text in self.text_embeds]
        return nn.functional.adaptive_avg_pool2d(torch.stack(maps, dim=1).float(), self.grid_size)


class TextScores(nn.Module):
    """Logits of classes at every cell: images `(B, 3, height, width)` to `(B, classes, rows, columns)`, float32.

    Args:
        scores: Images to scores of classes, then background texts, `(B, classes + background, rows, columns)`.
        num_classes: Number of classes.
    """

    def __init__(self, scores: EmbeddingScores | CLIPSegScores, num_classes: int):
        super().__init__()
        self.scores, self.num_classes, self.grid_size = scores, num_classes, scores.grid_size

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return absorb_background(self.scores(pixel_values).float(), self.num_classes)


def absorb_background(scores: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Logits whose softmax is flat where the background wins. With p the softmax of the scores s of all C classes and of the
    background texts b, and p_b the sum of the background's probabilities, a cell's target shall be

        (1 - p_b) softmax(s_1 ... s_C) + p_b / C

    Multiplied by the sum of all exponentials, that is `exp(s_c) + 1/C sum_b exp(s_b)` for class c, so its logarithm, up to a constant
    of the cell, is `logaddexp(s_c, logsumexp_b(s_b) - log C)`. The constant is chosen so that a class has score 0 where its
    probability is 1 / C.

    Example: two classes and one background text with probabilities 0.3, 0.1 and 0.6 give 0.3 + 0.3 = 0.6 and 0.1 + 0.3 = 0.4.

    Args:
        scores: `(B, C + background texts, rows, columns)`, the classes first.
        num_classes: C.

    Returns:
        Logits `(B, C, rows, columns)`.
    """
    log_probabilities = scores.log_softmax(dim=1)
    log_classes = torch.log(torch.tensor(float(num_classes)))
    classes = log_probabilities[:, :num_classes]
    if scores.shape[1] == num_classes:
        return classes + log_classes
    background = log_probabilities[:, num_classes:].logsumexp(dim=1, keepdim=True)  # (B, 1, rows, columns)
    return torch.logaddexp(classes, background - log_classes) + log_classes
