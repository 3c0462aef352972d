"""Stacks samples, lists the classes of their label maps and draws the MixToken box."""

from dataclasses import dataclass

import torch

from .label_maps import build_palette


def draw_mix_box(grid_size: tuple[int, int], alpha: float) -> tuple[int, int, int, int]:
    """Box of tokens to exchange: area share `1 - lambda` with `lambda ~ Beta(alpha, alpha)`, centre uniform over the
    grid, clipped at its border (the box rule of CutMix, Yun et al. 2019, on tokens).

    Returns:
        Left, top, right, bottom in tokens; right and bottom excluded. The box can be empty.
    """
    rows, columns = grid_size
    share = 1.0 - torch.distributions.Beta(alpha, alpha).sample().item()
    box_rows, box_columns = int(rows * share**0.5), int(columns * share**0.5)
    row, column = torch.randint(rows, ()).item(), torch.randint(columns, ()).item()
    left, top = column - box_columns // 2, row - box_rows // 2
    return (
        max(left, 0),
        max(top, 0),
        min(left + box_columns, columns),
        min(top + box_rows, rows),
    )


@dataclass
class TokenLabelCollator:
    """Makes a batch for `TokenLabelTrainer`.

    A sample that a training transform made carries a `crop_box`; only a batch of such samples is mixed.

    Args:
        grid_size: Token rows and columns of the model.
        mix_probability: Probability that a batch is mixed, in [0, 1] (published recipe: 1).
        mix_alpha: Parameter of the Beta distribution of the kept share (published recipe: 1).

    Returns (from the call):
        `pixel_values` `[B, 3, H, W]`; `labels` int64 `[B]`; for training samples `crop_box` `[B, 4]` and, when mixed,
        `mix_mask` bool `[B, rows, columns]`, the same box for every sample; with dense labels
        `token_label_palette` int64 `[B, U]`, `token_label_index` int16 and `token_label_scores` float16
        `[B, K, S, S]` (see `label_maps.build_palette`).

    Example: two samples whose one-cell maps name the classes 7 and 3 give palette `[[7], [3]]` and index
    `[[[[0]]], [[[0]]]]`.
    """

    grid_size: tuple[int, int]
    mix_probability: float = 1.0
    mix_alpha: float = 1.0

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        batch = {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples])}
        if "labels" in samples[0]:
            batch["labels"] = torch.as_tensor([sample["labels"] for sample in samples])
        if "crop_box" not in samples[0]:
            return batch
        batch["crop_box"] = torch.stack([sample["crop_box"] for sample in samples])
        if "token_label_ids" in samples[0]:
            ids = torch.stack([sample["token_label_ids"] for sample in samples])
            batch["token_label_palette"], batch["token_label_index"] = build_palette(ids)
            batch["token_label_scores"] = torch.stack([sample["token_label_scores"] for sample in samples])
        if self.mix_probability and torch.rand(()).item() < self.mix_probability:
            left, top, right, bottom = draw_mix_box(self.grid_size, self.mix_alpha)
            mix_mask = torch.zeros(len(samples), *self.grid_size, dtype=torch.bool)
            mix_mask[:, top:bottom, left:right] = True
            batch["mix_mask"] = mix_mask
        return batch
