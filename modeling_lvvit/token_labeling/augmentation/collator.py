"""Stacks samples and draws how the images of a batch are mixed."""

import random
from dataclasses import dataclass
from typing import Any

import torch

from ...data.sampling import fold_in, temporary_seed
from ...labels.label_crops import CropGeometry
from ...labels.label_maps import pad_palettes


MIX_METHODS = ("token", "cutmix", "mixup")


def draw_mix_box(grid_size: tuple[int, int], alpha: float) -> tuple[int, int, int, int]:
    """Box to exchange: area share `1 - lambda` with `lambda ~ Beta(alpha, alpha)`, center uniform over the grid of tokens or
    pixels, clipped at its border (the box rule of CutMix, Yun et al. 2019, which MixToken applies to tokens). It reaches half
    its size, rounded down, to both sides of the center.

    Returns:
        Left, top, right, bottom; right and bottom excluded. The box can be empty.
    """
    rows, columns = grid_size
    share = 1.0 - torch.distributions.Beta(alpha, alpha).sample().item()
    box_rows, box_columns = int(rows * share**0.5), int(columns * share**0.5)
    row, column = torch.randint(rows, ()).item(), torch.randint(columns, ()).item()
    left, right = max(column - box_columns // 2, 0), min(column + box_columns // 2, columns)
    top, bottom = max(row - box_rows // 2, 0), min(row + box_rows // 2, rows)
    return left, top, right, bottom


@dataclass
class TokenLabelCollator:
    """Makes a batch for `TokenLabelTrainer`.

    A sample that a training transform made carries a `crop_box`; only a batch of such samples is mixed. Image b is mixed with
    image B-1-b, so that the middle one of an odd batch stays as it is.

    Args:
        grid_size: Token rows and columns of the model.
        mix_probability: Probability that a batch is mixed, in [0, 1] (published recipe: 1).
        mix_alpha: Parameter of the Beta distribution of the kept share, for boxes (published recipe: 1).
        mix_methods: How; one is drawn for each batch. `"token"`: MixToken, the model exchanges a box of tokens.
            `"cutmix"`: a box of pixels is exchanged (Yun et al. 2019). `"mixup"`: pixels are averaged (Zhang et al. 2018).
        mixup_alpha: Parameter of the Beta distribution for Mixup (DeiT: 0.8).

    Returns (from the call):
        `pixel_values` `[B, 3, H, W]`, where they are uint8 with what `finish_images` needs: `normalization`, `erased`, `pixel_share`;
        `labels` int64 `[B]`, or float32 `[B, C]` of images with several classes; for training samples `crop_box` `[B, 4]`, with RandAugment also
        `label_affine` `[B, 2, 3]` and `image_box` `[B, 4]`; when mixed by tokens `mix_mask` bool `[B, rows, columns]`, the
        same box for every sample; when mixed by pixels `mix_share` float32 `[B, rows, columns]`, how much of each token
        shows the other image; with dense labels `token_label_palette` int64 `[B, U]`, the classes that each map names, padded
        with 0; `token_label_index` `[B, K, rows, columns]`, positions in the palette; and `token_label_scores` float16 of the same shape;
        where RandAugment's crops are larger than the maps, `crop_cells` (`CropGeometry`).

    Example: two samples with palettes `[7]` and `[3, 8]` give palette `[[7, 0], [3, 8]]`.
    """

    grid_size: tuple[int, int]
    mix_probability: float = 1.0
    mix_alpha: float = 1.0
    mix_methods: tuple[str, ...] = ("token",)
    mixup_alpha: float = 0.8

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        images = [sample["pixel_values"] for sample in samples]
        if (
            images[0].dtype == torch.uint8
        ):  # the channels of a pixel lie next to each other in memory, as decoders give them
            batch = {"pixel_values": torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)}
        else:
            batch = {"pixel_values": torch.stack(images)}
        if "normalization" in samples[0]:
            batch["normalization"] = samples[0]["normalization"]
        if "labels" in samples[0]:
            labels = [sample["labels"] for sample in samples]
            batch["labels"] = torch.stack(labels) if isinstance(labels[0], torch.Tensor) else torch.as_tensor(labels)
        if "crop_box" not in samples[0]:
            return batch
        for name in ("crop_box", "label_affine", "image_box", "token_label_index", "token_label_scores"):
            if name in samples[0]:
                batch[name] = torch.stack([sample[name] for sample in samples])
        if "token_label_palette" in samples[0]:
            batch["token_label_palette"] = pad_palettes([sample["token_label_palette"] for sample in samples])
        if "token_label_index" in batch and "label_affine" in batch:
            map_size = batch["token_label_index"].shape[-2:]
            geometry = CropGeometry(batch["crop_box"], batch["label_affine"])
            if crop_cells := geometry.cells_beyond_map(map_size, self.grid_size):
                batch["crop_cells"] = crop_cells
        seed = samples[0].get("seed")
        with temporary_seed(None if seed is None else fold_in(seed, len(samples))):
            if self.mix_probability and torch.rand(()).item() < self.mix_probability:
                batch |= getattr(self, f"_mix_by_{random.choice(self.mix_methods)}")(batch["pixel_values"])
        if erased := [sample["erased"].at(row) for row, sample in enumerate(samples) if "erased" in sample]:
            batch["erased"] = erased
        return batch

    def _mix_by_token(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        left, top, right, bottom = draw_mix_box(self.grid_size, self.mix_alpha)
        mix_mask = torch.zeros(len(pixel_values), *self.grid_size, dtype=torch.bool)
        mix_mask[:, top:bottom, left:right] = True
        return {"mix_mask": mix_mask}

    def _mix_by_cutmix(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        size = tuple(pixel_values.shape[-2:])
        left, top, right, bottom = draw_mix_box(size, self.mix_alpha)
        shown = torch.zeros(1, 1, *size)
        shown[..., top:bottom, left:right] = 1.0
        share = torch.nn.functional.adaptive_avg_pool2d(shown, self.grid_size)[:, 0]
        return {"pixel_share": shown, "mix_share": share.expand(len(pixel_values), -1, -1)}

    def _mix_by_mixup(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        own_share = torch.distributions.Beta(self.mixup_alpha, self.mixup_alpha).sample().item()
        share = torch.full((1, 1, 1, 1), 1.0 - own_share)
        return {"pixel_share": share, "mix_share": share[0].expand(len(pixel_values), *self.grid_size)}
