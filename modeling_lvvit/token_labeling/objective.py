"""From a batch and the model's output to the losses of token labeling."""

from typing import Any

import torch

from .arguments import TokenLabelTrainingArguments
from .label_crops import CropGeometry, crop_label_maps
from .label_maps import SparseTargets
from .losses import blend_weight, mixed_cross_entropy, token_labeling_loss


# names that the collator adds for the losses and that no model takes
LABEL_FIELDS = (
    "labels", "crop_box", "label_affine", "image_box", "mix_share",
    "token_label_palette", "token_label_index", "token_label_scores",
)  # fmt: skip


class TokenLabelingObjective:
    """The loss of a training batch.

    Args:
        args: Weights, targets and smoothing.
        grid_size: Token rows and columns of the model.
        num_classes: Classes of the model.
    """

    def __init__(self, args: TokenLabelTrainingArguments, grid_size: tuple[int, int], num_classes: int):
        self.args, self.grid_size, self.num_classes = args, grid_size, num_classes

    def __call__(
        self,
        outputs: Any,
        labels: dict[str, torch.Tensor],
        mix_mask: torch.Tensor | None = None,
        live_targets: tuple[SparseTargets, SparseTargets] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Named components of the loss (see `losses.token_labeling_loss`).

        Args:
            outputs: Output of the model, with `cls_logits` and `patch_logits`.
            labels: The fields of `LABEL_FIELDS` that the batch has.
            mix_mask: Bool `(B, rows, columns)`, or `None` where no tokens were mixed.
            live_targets: Instead of label maps, targets of class token and patch tokens from an annotator that saw the pictures of
                the batch (`LiveAnnotator`), also as CutMix and Mixup left them.
        """
        args, smoothing = self.args, self.args.label_smoothing_factor
        partner_share = labels["mix_share"].flatten(1) if "mix_share" in labels else None  # (B, N)
        exchanged = mix_mask.flatten(1).float() if mix_mask is not None else partner_share
        kept = 1.0 - exchanged.mean(dim=1) if exchanged is not None else None  # (B,)
        cls_dense = token_targets = counted = None
        dense_kept = kept
        if live_targets is not None:
            cls_dense, token_targets = live_targets
            if (
                mix_mask is None
            ):  # what was mixed in pixels the annotator has seen: its targets are those of the mixture
                partner_share = dense_kept = None
        elif "token_label_palette" in labels and args.dense_weight > 0 and args.patch_target == "dense":
            geometry, cls_dense, token_targets = self.crop_targets(labels)
            if args.uncovered_tokens == "ignore":
                counted = geometry.covered_tokens(self.grid_size)
        cls_losses = sum(
            mixed_cross_entropy(
                outputs["cls_logits"], target.smooth(smoothing), weight, dense_kept if target is cls_dense else kept
            )
            for target, weight in self._cls_targets(cls_dense, labels.get("labels"))
        )
        patch_logits = outputs["patch_logits"]
        if args.patch_target == "image":
            # exchanged tokens were put back, so that their mean belongs to one image; that of mixed pixels belongs to both
            patch_logits = patch_logits.float().mean(dim=1, keepdim=True)
            token_targets = SparseTargets.from_labels(labels["labels"], self.num_classes).of_single_token()
            partner_share = None if partner_share is None else partner_share.mean(dim=1, keepdim=True)
        return token_labeling_loss(
            patch_logits,
            cls_losses,
            None if token_targets is None else token_targets.smooth(smoothing),
            args.cls_weight,
            args.dense_weight,
            counted,
            partner_share,
        )

    def crop_targets(self, labels: dict[str, torch.Tensor]) -> tuple[CropGeometry, SparseTargets, SparseTargets]:
        """Where the crops lie in the label maps, and the targets of class token and patch tokens, not smoothed."""
        geometry = CropGeometry(labels["crop_box"], labels.get("label_affine"), labels.get("image_box"))
        return geometry, *crop_label_maps(
            labels["token_label_palette"],
            labels["token_label_index"],
            labels["token_label_scores"],
            geometry,
            self.grid_size,
            self.num_classes,
            self.args.label_crop,
            self.args.label_temperature,
        )

    def _cls_targets(
        self, dense: SparseTargets | None, labels: torch.Tensor | None
    ) -> list[tuple[SparseTargets, torch.Tensor | float]]:
        """Targets of the class token with the weight of each for every sample."""
        if dense is not None and self.args.cls_target == "dense":
            return [(dense, 1.0)]
        human = SparseTargets.from_labels(labels, self.num_classes)
        if dense is None or self.args.cls_target == "label":
            return [(human, 1.0)]
        weight = blend_weight(dense, labels)
        return [(dense, weight), (human, 1.0 - weight)]
