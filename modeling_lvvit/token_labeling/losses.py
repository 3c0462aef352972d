"""Token-labeling losses: pure functions of logits and targets."""

from dataclasses import replace
from typing import Any

import torch

from ..labels.label_crops import CropGeometry, crop_label_maps
from ..labels.sparse_targets import SparseTargets
from .arguments import TokenLabelTrainingArguments
from .sparse_cross_entropy import soft_cross_entropy


def mixed_cross_entropy(
    logits: torch.Tensor,
    targets: SparseTargets,
    weight: torch.Tensor | float = 1.0,
    own_share: torch.Tensor | None = None,
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted cross-entropy of a class token whose image may be mixed with its flip partner.

    Cross-entropy is linear in the target, so `H(z, k p + (1 - k) p') = k H(z, p) + (1 - k) H(z, p')`, and a weight that
    belongs to an image goes where its target goes.

    Args:
        logits: `(batch_size, C)`.
        targets: Targets of the unmixed images, `excess` `(batch_size, U)`.
        weight: `(batch_size,)` weight of the unmixed images, or one number.
        own_share: `(batch_size,)` share of tokens that show the image itself, in [0, 1]; `None` for an unmixed batch.
        class_weights: See `soft_cross_entropy`.

    Returns:
        `(batch_size,)` float32.
    """
    losses = weight * soft_cross_entropy(logits, targets, class_weights)
    if own_share is None:
        return losses
    partner_weight = weight.flip(0) if isinstance(weight, torch.Tensor) else weight
    partner_losses = soft_cross_entropy(logits, targets.flip(), class_weights)
    return own_share * losses + (1 - own_share) * partner_weight * partner_losses


def blend_weight(dense: SparseTargets, labels: torch.Tensor) -> torch.Tensor:
    """Weight of the dense target when it is blended with the human label, `(batch_size,)`: 0.5 where both agree on the top class,
    else 0.9 (`ground_truth` option of the authors' `TokenLabelCrossEntropy`)."""
    return torch.where(dense.top_class() == labels, 0.5, 0.9)


def doubted_cells(
    targets: SparseTargets, labels: torch.Tensor, doubt: str = "contradiction", confidence: float = 0.5
) -> torch.Tensor:
    """Patch tokens whose label map is in doubt, bool `(batch_size, N)`.

    Args:
        targets: Of the patch tokens, not smoothed.
        labels: `(batch_size,)` class ids, negative without a human label.
        doubt: `"contradiction"`: the most probable class is not the label, where there is one. `"confidence"`: its probability is below
            `confidence`. `"either"`.
    """
    contradicts = (targets.top_class() != labels.unsqueeze(1)) & (labels >= 0).unsqueeze(1)
    if doubt == "contradiction":
        return contradicts
    is_unsure = targets.top_probability() < confidence
    return is_unsure if doubt == "confidence" else contradicts | is_unsure


def token_cross_entropy(
    patch_logits: torch.Tensor,
    targets: SparseTargets,
    counted_tokens: torch.Tensor | None = None,
    partner_share: torch.Tensor | None = None,
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean cross-entropy of patch tokens, a scalar in float32.

    Args:
        patch_logits: `(batch_size, N, C)`.
        targets: Targets of the patch tokens of the unmixed images, `excess` `(batch_size, N, U)`.
        counted_tokens: Bool `(batch_size, N)`, tokens of the unmixed images over which the mean is taken; `None` for all.
        partner_share: `(batch_size, N)` in [0, 1]: how much of each token shows the image of the flip partner (CutMix, Mixup);
            a token then learns both targets in that proportion. `None` where every token shows one image.
        class_weights: See `soft_cross_entropy`; the mean is over tokens, whatever their weights.
    """
    losses = soft_cross_entropy(patch_logits, targets, class_weights)  # (B, N)
    weights = torch.ones_like(losses) if counted_tokens is None else counted_tokens.float()
    if partner_share is None:
        return losses.mean() if counted_tokens is None else (losses * weights).sum() / weights.sum().clamp(min=1)
    own_weights = (1 - partner_share) * weights
    partner_weights = partner_share * weights.flip(0)
    partner_losses = soft_cross_entropy(patch_logits, targets.flip(), class_weights)
    total = own_weights * losses + partner_weights * partner_losses
    return total.sum() / (own_weights + partner_weights).sum().clamp(min=1)


def token_labeling_loss(
    patch_logits: torch.Tensor,
    cls_losses: torch.Tensor,
    token_targets: SparseTargets | None,
    cls_weight: float = 1.0,
    dense_weight: float = 1.0,
    counted_tokens: torch.Tensor | None = None,
    partner_share: torch.Tensor | None = None,
    class_weights: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Sum of the class-token loss and the mean patch-token loss (paper, section 3.2):

        L = cls_weight * mean_b H(X_cls, y_cls) + dense_weight * mean_{b, i} H(X_i, y_i)

    The paper states `dense_weight` 0.5; the published training commands use 1.0, the default here.

    Args:
        patch_logits: `(batch_size, N, C)`, put back after mixing tokens.
        cls_losses: `(batch_size,)` losses of the class token.
        token_targets: Targets of the patch tokens; `None` trains with plain labels.
        counted_tokens, partner_share, class_weights: See `token_cross_entropy`.

    Returns:
        `loss`, `cls_loss` and `token_loss`, scalars in float32. Without token targets `token_loss` is an exact zero that
        still depends on `patch_logits`, so that distributed training sees a gradient for every parameter.
    """
    cls_loss = cls_losses.mean()
    if token_targets is None:
        token_loss = 0.0 * patch_logits.float().mean()
    else:
        token_loss = token_cross_entropy(patch_logits, token_targets, counted_tokens, partner_share, class_weights)
    loss = cls_weight * cls_loss + dense_weight * token_loss
    return {"loss": loss, "cls_loss": cls_loss, "token_loss": token_loss}


# names that the collator adds for the losses and that no model takes
LABEL_FIELDS = (
    "labels", "crop_box", "label_affine", "image_box", "crop_cells", "mix_share",
    "token_label_palette", "token_label_index", "token_label_scores",
)  # fmt: skip


class TokenLabelingLoss:
    """The loss of a training batch, for a model of `grid_size` (rows, columns) tokens; `class_weights` `(C,)` float32 or `None`
    weigh the terms of class token and patch tokens alike (`soft_cross_entropy`), after smoothing."""

    def __init__(
        self,
        args: TokenLabelTrainingArguments,
        grid_size: tuple[int, int],
        num_classes: int,
        class_weights: torch.Tensor | None = None,
    ):
        self.args, self.grid_size, self.num_classes = args, grid_size, num_classes
        self.class_weights = class_weights

    def __call__(
        self,
        outputs: Any,
        labels: dict[str, torch.Tensor],
        mix_mask: torch.Tensor | None = None,
        online_targets: tuple[SparseTargets, SparseTargets] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Named components of the loss (see `token_labeling_loss`) from `cls_logits` and `patch_logits`.

        Args:
            labels: The fields of `LABEL_FIELDS` that the batch has.
            mix_mask: Bool `(B, rows, columns)`, or `None` where no tokens were mixed.
            online_targets: Instead of label maps, targets of class token and patch tokens from an annotator that saw the images of
                the batch (`OnlineAnnotator`), also as CutMix and Mixup left them.
        """
        args, smoothing = self.args, self.args.label_smoothing_factor
        partner_share = labels["mix_share"].flatten(1) if "mix_share" in labels else None  # (B, N)
        exchanged = mix_mask.flatten(1).float() if mix_mask is not None else partner_share
        own_share = 1.0 - exchanged.mean(dim=1) if exchanged is not None else None  # (B,)
        cls_dense = token_targets = counted = None
        dense_own_share = own_share
        if online_targets is not None:
            cls_dense, token_targets = online_targets
            if (
                mix_mask is None
            ):  # what was mixed in pixels the annotator has seen: its targets are those of the mixture
                partner_share = dense_own_share = None
        elif "token_label_palette" in labels and args.dense_weight > 0 and args.patch_target == "dense":
            geometry, cls_dense, token_targets = self.crop_targets(labels)
            if args.uncovered_tokens == "ignore":
                counted = geometry.covered_tokens(self.grid_size)
        cls_losses = 0
        for target, weight in self._cls_targets(cls_dense, labels.get("labels")):
            share = dense_own_share if target is cls_dense else own_share
            cls_losses = cls_losses + mixed_cross_entropy(
                outputs["cls_logits"], target.smooth(smoothing), weight, share, self.class_weights
            )
        patch_logits = outputs["patch_logits"]
        if args.patch_target == "image":
            # exchanged tokens were put back, so that their mean belongs to one image; that of mixed pixels belongs to both
            patch_logits = patch_logits.float().mean(dim=1, keepdim=True)
            image_targets = SparseTargets.from_labels(labels["labels"], self.num_classes)
            token_targets = replace(
                image_targets, excess=image_targets.excess.unsqueeze(1), other=image_targets.other.unsqueeze(1)
            )
            partner_share = None if partner_share is None else partner_share.mean(dim=1, keepdim=True)
        elif token_targets is not None and args.cell_target != "map":
            token_targets, counted = self._mend_cells(token_targets, labels["labels"], counted)
        token_targets = None if token_targets is None else token_targets.smooth(smoothing)
        options = (args.cls_weight, args.dense_weight, counted, partner_share, self.class_weights)
        return token_labeling_loss(patch_logits, cls_losses, token_targets, *options)

    def _mend_cells(
        self, targets: SparseTargets, labels: torch.Tensor, counted: torch.Tensor | None
    ) -> tuple[SparseTargets, torch.Tensor | None]:
        """Targets of patch tokens and which of them count, after `cell_target`."""
        args = self.args
        doubted = doubted_cells(targets, labels, args.cell_doubt, args.cell_confidence)
        if args.cell_target == "ignore":
            return targets, ~doubted if counted is None else counted & ~doubted
        share = 1.0 if args.cell_target == "label" else 0.5
        return targets.blend_with_labels(labels, share * (doubted & (labels >= 0).unsqueeze(1))), counted

    def crop_targets(self, labels: dict[str, torch.Tensor]) -> tuple[CropGeometry, SparseTargets, SparseTargets]:
        """Where the crops lie in the label maps, and the targets of class token and patch tokens, not smoothed."""
        places = (labels.get(name) for name in ("label_affine", "image_box"))
        # the collator says it where a crop is larger than its map
        geometry = CropGeometry(labels["crop_box"], *places, labels.get("crop_cells", []))
        maps = (labels[f"token_label_{part}"] for part in ("palette", "index", "scores"))
        options = (self.args.label_crop, self.args.label_temperature)
        return geometry, *crop_label_maps(*maps, geometry, self.grid_size, self.num_classes, *options)

    def _cls_targets(
        self, dense: SparseTargets | None, labels: torch.Tensor | None
    ) -> list[tuple[SparseTargets, torch.Tensor | float]]:
        """Targets of the class token with the weight of each for every sample."""
        if dense is not None and self.args.cls_target == "dense":
            return [(dense, 1.0)]
        human = SparseTargets.from_labels(labels.clamp(min=0), self.num_classes)
        if dense is None:
            return [(human, 1.0)]
        weight = torch.zeros_like(dense.other) if self.args.cls_target == "label" else blend_weight(dense, labels)
        weight = torch.where(labels < 0, 1.0, weight)  # without a human label the map is all there is
        return [(dense, weight), (human, 1.0 - weight)]
