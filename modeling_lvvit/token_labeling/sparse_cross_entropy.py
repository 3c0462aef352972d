"""Cross-entropy with sparse soft targets, without a tensor of all classes but the gradient."""

from collections.abc import Iterable
from itertools import repeat

import torch

from ..labels.sparse_targets import SparseTargets


# elements of the logits that are taken to float32 at a time
CHUNK_ELEMENTS = 2**24


class _SoftCrossEntropy(torch.autograd.Function):
    """Cross-entropy of rows of logits, whose only tensor of their size is the gradient, in the type of the logits.

    Written with differentiable operations, the cast, the sum, the gathered logits and the log-sum-exp would each have a gradient
    of that size, in float32.
    """

    @staticmethod
    def forward(
        ctx,
        logits: torch.Tensor,
        class_ids: torch.Tensor | None,
        excess: torch.Tensor,
        other: torch.Tensor,
        total: torch.Tensor | None,
        class_weights: torch.Tensor | None,
    ) -> torch.Tensor:
        """`(R, C)`, `(R, U)` (`None`: all classes in order), `(R, U)`, `(R,)` and, both with class weights or neither, the sum of each
        row's target `(R,)` and the weights `(C,)` of `other` -> `(R,)` float32."""
        log_sums, losses = [], []
        for part, ids, extra, rest, whole in zip(*_chunks(logits, class_ids, excess, other, total)):
            part = part.float()
            log_sums.append(part.logsumexp(dim=-1))
            named = (extra * (part if ids is None else part.gather(-1, ids))).sum(dim=-1)
            if whole is None:
                losses.append(log_sums[-1] - rest * part.sum(dim=-1) - named)
            else:
                losses.append(whole * log_sums[-1] - rest * (part @ class_weights) - named)
        ctx.save_for_backward(logits, class_ids, excess, other, torch.cat(log_sums), total)
        ctx.class_weights = class_weights
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_losses: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Softmax (times the sum of the target) minus target, times the gradient of each row."""
        grad_logits = torch.empty_like(ctx.saved_tensors[0])
        chunks = _chunks(grad_logits, *ctx.saved_tensors, grad_losses)
        for grad, part, ids, extra, rest, log_sum, whole, weight in zip(*chunks):
            weight = weight.unsqueeze(-1)
            wide = grad if grad.dtype == torch.float32 else torch.empty_like(grad, dtype=torch.float32)
            torch.sub(part.float(), log_sum.unsqueeze(-1), out=wide).exp_()
            if whole is None:
                wide.sub_(rest.unsqueeze(-1))
            else:
                wide.mul_(whole.unsqueeze(-1)).addr_(rest, ctx.class_weights, alpha=-1)
            wide.mul_(weight)
            if ids is None:
                wide.addcmul_(extra, weight, value=-1)
            else:
                wide.scatter_add_(-1, ids, -extra * weight)
            if wide is not grad:
                grad.copy_(wide)
        return grad_logits, None, None, None, None, None


def _chunks(logits: torch.Tensor, *others: torch.Tensor | None) -> list[Iterable[torch.Tensor | None]]:
    """Rows in equal parts of at most `CHUNK_ELEMENTS` logits, of every tensor."""
    rows = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    return [repeat(None) if tensor is None else tensor.split(rows) for tensor in (logits, *others)]


def soft_cross_entropy(
    logits: torch.Tensor, targets: SparseTargets, class_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy with sparse soft targets, for each sample or token.

        H = logsumexp(z) - other * sum_c z_c - sum_u excess_u * z[class_ids_u]

    which equals `-sum_c p(c) log softmax(z)_c` because the targets sum to 1. Only the logits and their gradient have the size
    of all classes. With class weights w each class's term has its weight, as in `torch.nn.functional.cross_entropy` with
    probabilities as targets and `reduction="none"`:

        H_w = -sum_c w_c p(c) log softmax(z)_c
            = s logsumexp(z) - other * sum_c w_c z_c - sum_u w_u excess_u * z[class_ids_u],  s = sum_c w_c p(c)

    Args:
        logits: `(batch_size, C)` or `(batch_size, N, C)`; computed in float32. Only they get a gradient.
        targets: With `other` of the shape of `logits` without its last axis.
        class_weights: `(C,)` float32, or `None` for 1 each.

    Returns:
        `(batch_size,)` or `(batch_size, N)` float32.

    Worked number: logits (0, log 2), target (0.25, 0.75): logsumexp = log 3, so H = log 3 - 0.75 log 2 = 0.5788. With the weights
    (3, 1), s = 1.5 and H_w = 1.5 log 3 - 0.75 log 2 = 1.1281.
    """
    excess, total = targets.excess, None
    if class_weights is not None:
        ids = targets.class_ids if logits.ndim == 2 else targets.class_ids.unsqueeze(1)  # (B, U) or (B, 1, U)
        excess = excess * class_weights[ids]
        total = (targets.other * class_weights.sum() + excess.sum(dim=-1)).flatten()
    class_ids = None
    if not targets.names_all:
        class_ids = targets.class_ids
        if logits.ndim == 3:
            class_ids = class_ids.unsqueeze(1).expand(-1, logits.shape[1], -1)  # (B, N, U)
        class_ids = class_ids.reshape(-1, class_ids.shape[-1])
    logits_rows, excess_rows = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (logits, excess))
    losses = _SoftCrossEntropy.apply(
        logits_rows, class_ids, excess_rows, targets.other.flatten(), total, class_weights
    )
    return losses.view(logits.shape[:-1])
