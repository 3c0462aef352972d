"""Token-labeling losses: pure functions of logits and targets."""

from collections.abc import Iterable
from itertools import repeat

import torch

from .label_maps import SparseTargets


# elements of the logits that are taken to float32 at a time
CHUNK_ELEMENTS = 2**24


class _SoftCrossEntropy(torch.autograd.Function):
    """Cross-entropy of rows of logits, whose only tensor of their size is the gradient, in the type of the logits.

    Written with differentiable operations, the cast, the sum, the gathered logits and the log-sum-exp would each have a gradient
    of that size, in float32.
    """

    @staticmethod
    def forward(
        ctx, logits: torch.Tensor, class_ids: torch.Tensor | None, excess: torch.Tensor, other: torch.Tensor
    ) -> torch.Tensor:
        """`(R, C)`, `(R, U)` (`None`: all classes in order), `(R, U)`, `(R,)` -> `(R,)` float32."""
        log_sums, losses = [], []
        for part, ids, extra, rest in zip(*_chunks(logits, class_ids, excess, other)):
            part = part.float()
            log_sums.append(part.logsumexp(dim=-1))
            named = (extra * (part if ids is None else part.gather(-1, ids))).sum(dim=-1)
            losses.append(log_sums[-1] - rest * part.sum(dim=-1) - named)
        ctx.save_for_backward(logits, class_ids, excess, other, torch.cat(log_sums))
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_losses: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Softmax minus target, times the gradient of each row."""
        logits = ctx.saved_tensors[0]
        grad_logits = torch.empty_like(logits)
        for grad, part, ids, extra, rest, log_sum, weight in zip(
            *_chunks(grad_logits, *ctx.saved_tensors, grad_losses)
        ):
            weight = weight.unsqueeze(-1)
            wide = grad if grad.dtype == torch.float32 else torch.empty_like(grad, dtype=torch.float32)
            torch.sub(part.float(), log_sum.unsqueeze(-1), out=wide).exp_().sub_(rest.unsqueeze(-1)).mul_(weight)
            if ids is None:
                wide.addcmul_(extra, weight, value=-1)
            else:
                wide.scatter_add_(-1, ids, -extra * weight)
            if wide is not grad:
                grad.copy_(wide)
        return grad_logits, None, None, None


def _chunks(logits: torch.Tensor, *others: torch.Tensor | None) -> list[Iterable[torch.Tensor | None]]:
    """Rows in equal parts of at most `CHUNK_ELEMENTS` logits, of every tensor."""
    rows = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    return [repeat(None) if tensor is None else tensor.split(rows) for tensor in (logits, *others)]


def soft_cross_entropy(logits: torch.Tensor, targets: SparseTargets) -> torch.Tensor:
    """Cross-entropy with sparse soft targets, for each sample or token.

        H = logsumexp(z) - other * sum_c z_c - sum_u excess_u * z[class_ids_u]

    which equals `-sum_c p(c) log softmax(z)_c` because the targets sum to 1. Only the logits and their gradient have the size
    of all classes.

    Args:
        logits: `(batch_size, C)` or `(batch_size, N, C)`; computed in float32. Only they get a gradient.
        targets: With `other` of the shape of `logits` without its last axis.

    Returns:
        `(batch_size,)` or `(batch_size, N)` float32.

    Worked number: logits (0, log 2), target (0.25, 0.75): logsumexp = log 3, so H = log 3 - 0.75 log 2 = 0.5788.
    """
    class_ids = None
    if not targets.names_all:
        class_ids = targets.class_ids
        if logits.ndim == 3:
            class_ids = class_ids.unsqueeze(1).expand(-1, logits.shape[1], -1)  # (B, N, U)
        class_ids = class_ids.reshape(-1, class_ids.shape[-1])
    logits_rows, excess_rows = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (logits, targets.excess))
    losses = _SoftCrossEntropy.apply(logits_rows, class_ids, excess_rows, targets.other.flatten())
    return losses.view(logits.shape[:-1])


def mixed_cross_entropy(
    logits: torch.Tensor,
    targets: SparseTargets,
    weight: torch.Tensor | float = 1.0,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted cross-entropy of a class token whose image may be mixed with its flip partner.

    Cross-entropy is linear in the target, so `H(z, k p + (1 - k) p') = k H(z, p) + (1 - k) H(z, p')`, and a weight that
    belongs to an image goes where its target goes.

    Args:
        logits: `(batch_size, C)`.
        targets: Targets of the unmixed images, `excess` `(batch_size, U)`.
        weight: `(batch_size,)` weight of the unmixed images, or one number.
        kept: `(batch_size,)` share of tokens that each image kept, in [0, 1]; `None` for an unmixed batch.

    Returns:
        `(batch_size,)` float32.
    """
    own = weight * soft_cross_entropy(logits, targets)
    if kept is None:
        return own
    partner_weight = weight.flip(0) if isinstance(weight, torch.Tensor) else weight
    return kept * own + (1 - kept) * partner_weight * soft_cross_entropy(logits, targets.flip())


def blend_weight(dense: SparseTargets, labels: torch.Tensor) -> torch.Tensor:
    """Weight of the dense target when it is blended with the human label, `(batch_size,)`.

    0.5 where both agree on the top class, else 0.9 (`ground_truth` option of the authors' `TokenLabelCrossEntropy`).
    """
    agree = dense.top_class() == labels
    return torch.where(agree, 0.5, 0.9)


def token_cross_entropy(
    patch_logits: torch.Tensor,
    targets: SparseTargets,
    counted_tokens: torch.Tensor | None = None,
    partner_share: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean cross-entropy of patch tokens, a scalar in float32.

    Args:
        patch_logits: `(batch_size, N, C)`.
        targets: Targets of the patch tokens of the unmixed images, `excess` `(batch_size, N, U)`.
        counted_tokens: Bool `(batch_size, N)`, tokens of the unmixed images over which the mean is taken; `None` for all.
        partner_share: `(batch_size, N)` in [0, 1]: how much of each token shows the image of the flip partner (CutMix, Mixup);
            a token then learns both targets in that proportion. `None` where every token shows one image.
    """
    losses = soft_cross_entropy(patch_logits, targets)  # (B, N)
    weights = torch.ones_like(losses) if counted_tokens is None else counted_tokens.float()
    if partner_share is None:
        return losses.mean() if counted_tokens is None else (losses * weights).sum() / weights.sum().clamp(min=1)
    own = (1 - partner_share) * weights
    partner = partner_share * weights.flip(0)
    total = own * losses + partner * soft_cross_entropy(patch_logits, targets.flip())
    return total.sum() / (own + partner).sum().clamp(min=1)


def token_labeling_loss(
    patch_logits: torch.Tensor,
    cls_losses: torch.Tensor,
    token_targets: SparseTargets | None,
    cls_weight: float = 1.0,
    dense_weight: float = 1.0,
    counted_tokens: torch.Tensor | None = None,
    partner_share: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Sum of the class-token loss and the mean patch-token loss (paper, section 3.2):

        L = cls_weight * mean_b H(X_cls, y_cls) + dense_weight * mean_{b, i} H(X_i, y_i)

    The paper states `dense_weight` 0.5; the published training commands use 1.0, the default here.

    Args:
        patch_logits: `(batch_size, N, C)`, put back after mixing tokens.
        cls_losses: `(batch_size,)` losses of the class token.
        token_targets: Targets of the patch tokens; `None` trains with plain labels.
        counted_tokens, partner_share: See `token_cross_entropy`.

    Returns:
        `loss`, `cls_loss` and `token_loss`, scalars in float32. Without token targets `token_loss` is an exact zero that
        still depends on `patch_logits`, so that distributed training sees a gradient for every parameter.
    """
    cls_loss = cls_losses.mean()
    if token_targets is None:
        token_loss = 0.0 * patch_logits.float().mean()
    else:
        token_loss = token_cross_entropy(patch_logits, token_targets, counted_tokens, partner_share)
    return {
        "loss": cls_weight * cls_loss + dense_weight * token_loss,
        "cls_loss": cls_loss,
        "token_loss": token_loss,
    }
