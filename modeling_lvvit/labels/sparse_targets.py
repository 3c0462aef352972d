"""Soft targets over all classes that are kept for a short list of them."""

from dataclasses import dataclass, replace

import torch


@dataclass
class SparseTargets:
    """Soft targets over all classes in which every class outside a short list has the same probability.

        p(c) = other + excess[u]  if c == class_ids[u],  else other

    Args:
        class_ids: `(batch_size, U)` int64. Padding repeats a class with excess 0.
        excess: `(batch_size, U)` or `(batch_size, N, U)` float32.
        other: `(batch_size,)` or `(batch_size, N)` float32.
        num_classes: Number of classes C.
        names_all: Whether `class_ids` of every image are all classes in order, so that no one need look them up.
    """

    class_ids: torch.Tensor
    excess: torch.Tensor
    other: torch.Tensor
    num_classes: int
    names_all: bool = False

    @classmethod
    def from_labels(cls, labels: torch.Tensor, num_classes: int) -> "SparseTargets":
        """One-hot targets of class ids `(batch_size,)`."""
        excess = torch.ones(len(labels), 1, device=labels.device)
        return cls(labels.long().unsqueeze(1), excess, torch.zeros_like(excess[:, 0]), num_classes)

    def smooth(self, smoothing: float) -> "SparseTargets":
        """Mixes with the uniform distribution, `(1 - s) p + s / C`. The sum stays 1; the authors' code adds `s / C` to
        a target scaled by `1 - s + s / C` and so reaches `1 + s / C`."""
        keep = 1.0 - smoothing
        return replace(self, excess=keep * self.excess, other=keep * self.other + smoothing / self.num_classes)

    def blend_with_labels(self, labels: torch.Tensor, share: torch.Tensor) -> "SparseTargets":
        """Mixes with one-hot targets, `(1 - share) p + share * onehot(label)`.

        Args:
            labels: `(batch_size,)` class ids; any number where `share` is 0.
            share: In [0, 1], of the shape of `other`.
        """
        keep, labels = (1.0 - share).to(self.other.dtype), labels.clamp(min=0).long()
        excess, other = keep.unsqueeze(-1) * self.excess, keep * self.other
        if self.names_all:
            ids = labels.view(-1, *[1] * (other.ndim - 1), 1).expand(*other.shape, 1)
            return replace(self, excess=excess.scatter_add(-1, ids, share.to(excess.dtype).unsqueeze(-1)), other=other)
        excess = torch.cat([excess, share.to(excess.dtype).unsqueeze(-1)], dim=-1)
        return replace(
            self, class_ids=torch.cat([self.class_ids, labels.unsqueeze(1)], dim=1), excess=excess, other=other
        )

    def flip(self) -> "SparseTargets":
        """Targets of the flipped batch: sample b gets those of sample B-1-b."""
        return replace(self, class_ids=self.class_ids.flip(0), excess=self.excess.flip(0), other=self.other.flip(0))

    def top_class(self) -> torch.Tensor:
        """Most probable class, of the shape of `other`, int64; the first class outside the list where none of it has more than
        those outside."""
        best, place = self.excess.max(dim=-1)
        ids = self.class_ids.view(len(self.class_ids), *[1] * (best.ndim - 1), -1).expand_as(self.excess)
        top = ids.gather(-1, place.unsqueeze(-1)).squeeze(-1)
        # U classes leave one of the first U + 1 out
        length = self.class_ids.shape[1] + 1
        is_named = torch.zeros(len(self.class_ids), length + 1, dtype=torch.bool, device=best.device)
        is_named.scatter_(1, self.class_ids.clamp(max=length), True)
        unnamed = (~is_named[:, :length]).int().argmax(dim=1).view(-1, *[1] * (best.ndim - 1))
        return torch.where((best <= 0) & (unnamed < self.num_classes), unnamed, top)

    def top_probability(self) -> torch.Tensor:
        """Probability of `top_class`, of the shape of `other`."""
        return self.excess.amax(dim=-1).clamp(min=0) + self.other

    def to_dense(self) -> torch.Tensor:
        """Probabilities of all classes, the shape of `other` with a last axis of C; for inspection and tests."""
        dense = self.other.unsqueeze(-1).repeat(*[1] * self.other.ndim, self.num_classes)
        ids = self.class_ids.view(len(self.class_ids), *[1] * (self.excess.ndim - 2), -1).expand_as(self.excess)
        return dense.scatter_add_(-1, ids, self.excess)
