"""Label maps cut to crops: what each token of an augmented image, and its class token, should learn."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import nn

from .axis_weights import axis_weights
from .label_maps import decode, pad_palettes
from .sparse_targets import SparseTargets
from .storage import PaletteMaps


LabelCrop = Literal["correct", "authors"]


@dataclass
class CropGeometry:
    """Where the crops of a batch lie in the label maps.

    Args:
        crop_box: `(batch_size, 4)` float32, (left, top, right, bottom). Without `label_affine` as fractions of the region
            that the map covers; with it as fractions of the image after its geometric augmentation.
        label_affine: `(batch_size, 2, 3)` float32: takes (x, y, 1), fractions of the image after geometric augmentation,
            to fractions of the region that the map covers. `None` if no image was sheared, moved or rotated.
        image_box: `(batch_size, 4)` float32, the borders of the image before that augmentation as fractions of the region
            that the map covers. What lies outside is filled with one color. Given with `label_affine`.
        crop_cells: Result of `cells_beyond_map`, so that nothing need wait for the device to know it; default: it is measured. Only needed with `label_affine`.
    """

    crop_box: torch.Tensor
    label_affine: torch.Tensor | None = None
    image_box: torch.Tensor | None = None
    crop_cells: list[tuple[int, int]] | None = None

    def measure_cells(self, map_size: tuple[int, int]) -> list[tuple[int, int]]:
        """Cells of the map that each crop would span from top to bottom and from left to right, if the map went on. `label_affine` must
        be given.

        Args:
            map_size: Rows and columns of the map.
        """
        left, top, right, bottom = self.crop_box.float().unsqueeze(2).unbind(1)  # (B, 1) each
        along_x, along_y, _ = self.label_affine.float().unbind(2)  # (B, 2) each
        cells = torch.tensor(map_size[::-1], device=left.device)
        spans = [(cells * side).norm(dim=1) for side in ((bottom - top) * along_y, (right - left) * along_x)]
        return [(math.ceil(down), math.ceil(across)) for down, across in torch.stack(spans, dim=1).tolist()]

    def cells_beyond_map(self, map_size: tuple[int, int], grid_size: tuple[int, int]) -> list[tuple[int, int]]:
        """`measure_cells` where a crop is so large that the tokens of the model need more points, else none."""
        crop_cells = self.measure_cells(map_size)
        room = [tokens * points for tokens, points in zip(grid_size, _usual_points(map_size, grid_size))]
        return crop_cells if any(down > room[0] or across > room[1] for down, across in crop_cells) else []

    def select(self, rows: list[int]) -> "CropGeometry":
        """The crops of some samples, without `crop_cells`."""
        parts = (self.crop_box, self.label_affine, self.image_box)
        return CropGeometry(*(part if part is None else _select(part, rows) for part in parts))

    def points(self, grid_size: tuple[int, int], points_per_token: tuple[int, int]) -> torch.Tensor:
        """Equidistant points of every token, as fractions of the region that the map covers.

        Returns:
            `(batch_size, token_rows * points, token_columns * points, 2)` float32, the last axis (x, y).
        """
        left, top, right, bottom = self.crop_box.float().unsqueeze(2).unbind(1)  # (B, 1) each
        count_y, count_x = (tokens * points for tokens, points in zip(grid_size, points_per_token))
        y = (top + (bottom - top) * _centers(count_y, top.device)).unsqueeze(2)  # (B, count_y, 1)
        x = (left + (right - left) * _centers(count_x, left.device)).unsqueeze(1)  # (B, 1, count_x)
        if self.label_affine is None:
            return torch.stack(torch.broadcast_tensors(x, y), dim=-1)
        along_x, along_y, offset = self.label_affine.float()[:, :, None, None].unbind(4)  # (B, 2, 1, 1) each
        return (along_x * x.unsqueeze(1) + along_y * y.unsqueeze(1) + offset).movedim(1, -1)

    def covered_tokens(self, grid_size: tuple[int, int]) -> torch.Tensor:
        """Which tokens have their center in the region that the map covers, bool `(batch_size, N)`, row-major."""
        points = self.points(grid_size, (1, 1))  # (B, rows, columns, 2)
        return ((points >= 0) & (points <= 1)).all(dim=-1).flatten(1)


def _select(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """`tensor[rows]`, without a copy of the numbers to the device, for which the processor would wait."""
    return torch.cat([tensor[row : row + 1] for row in rows])


def _usual_points(map_size: tuple[int, int], grid_size: tuple[int, int]) -> tuple[int, int]:
    """Points for each token, rows and columns, that are at most a cell apart in a crop as large as the map."""
    return tuple(math.ceil(cells / tokens) for cells, tokens in zip(map_size, grid_size))


def _centers(count: int, device: torch.device) -> torch.Tensor:
    """Centers of `count` equal parts of [0, 1]."""
    return (torch.arange(count, device=device) + 0.5) / count


def pool_label_maps(
    palette_scores: torch.Tensor,
    geometry: CropGeometry,
    grid_size: tuple[int, int],
    label_crop: LabelCrop = "correct",
    covered_only: bool = False,
) -> torch.Tensor:
    """Mean scores of the crop on a grid of tokens.

    A place in the image that the map does not cover has the scores of the nearest cell. A place outside the image, which
    only geometric augmentation shows, has score 0 for every class: nothing is known of it.

    Args:
        palette_scores: `(batch_size, U, rows, columns)` float32.
        grid_size: Token rows and columns.
        label_crop: `"correct"`; or `"authors"`, which reproduces their exchange of rows and columns: their box is stored
            top first and handed to RoIAlign, which expects left first, so that the top half of an image gets the
            labels of its left half. That RoIAlign call also widens a crop of less than one cell to one (here only without
            `label_affine`).
        covered_only: Whether to take the mean over the places in the image that the map covers.

    Returns:
        `(batch_size, U, token_rows, token_columns)` float32.
    """
    if label_crop not in ("correct", "authors"):
        raise ValueError(f"label_crop must be 'correct' or 'authors', got {label_crop!r}.")
    is_correct = label_crop == "correct"
    if not is_correct:
        geometry = replace(geometry, crop_box=geometry.crop_box[:, [1, 0, 3, 2]])
    if geometry.label_affine is not None:
        return _pool_warped(palette_scores, geometry, grid_size, covered_only)
    crop_box = geometry.crop_box.clamp(0, 1) if covered_only else geometry.crop_box
    left, top, right, bottom = crop_box.float().unbind(1)
    min_cells = 0.0 if is_correct else 1.0
    rows, columns = palette_scores.shape[-2:]
    row_weights = axis_weights(top, bottom, rows, grid_size[0], min_cells)
    column_weights = axis_weights(left, right, columns, grid_size[1], min_cells)
    pooled = palette_scores @ column_weights.mT.unsqueeze(1)  # (B, U, rows, token_columns)
    return row_weights.unsqueeze(1) @ pooled  # (B, U, token_rows, token_columns)


def _pool_warped(
    palette_scores: torch.Tensor, geometry: CropGeometry, grid_size: tuple[int, int], covered_only: bool
) -> torch.Tensor:
    """`pool_label_maps` where images were sheared, moved or rotated: each token is the mean of a square of points.

    The map is read once, at the composition of all operations, with linear interpolation. Reading it once for each operation,
    to the nearest cell, as the authors do, moves labels by up to half a cell every time. Points are at most a cell apart. Crops that are
    larger than the map have 2, 4, 8, ... times as many: how many depends on the crop alone, not on the others of the batch.
    """
    map_size = palette_scores.shape[-2:]
    base = _usual_points(map_size, grid_size)
    finer = 2 if covered_only else 1  # whole points are left out at the border of the covered part
    crop_cells = geometry.measure_cells(map_size) if geometry.crop_cells is None else geometry.crop_cells
    groups: dict[int, list[int]] = {}
    for row, spanned in enumerate(crop_cells):
        times = max(math.ceil(cells / (tokens * points)) for cells, tokens, points in zip(spanned, grid_size, base))
        groups.setdefault(max(finer, 1 << (times - 1).bit_length()), []).append(row)
    # the coarsest is computed for all, then the rest anew; rows are taken by slices, as a list of numbers would be copied to the device
    coarsest, *others = sorted(groups) or [finer]
    points = [coarsest * points for points in base]
    pooled = _mean_of_points(palette_scores, geometry, grid_size, points, covered_only)
    for times in others:
        points = [times * points for points in base]
        part = _select(palette_scores, groups[times]), geometry.select(groups[times])
        for row, value in zip(groups[times], _mean_of_points(*part, grid_size, points, covered_only)):
            pooled[row] = value
    return pooled


def _mean_of_points(
    palette_scores: torch.Tensor,
    geometry: CropGeometry,
    grid_size: tuple[int, int],
    points_per_token: list[int],
    covered_only: bool,
) -> torch.Tensor:
    """`_pool_warped` with a given number of points, rows and columns, for each token."""
    points = geometry.points(grid_size, points_per_token)  # (B, P, Q, 2)
    sampled = nn.functional.grid_sample(
        palette_scores, 2 * points - 1, mode="bilinear", padding_mode="border", align_corners=False
    )  # (B, U, P, Q)
    low, high = geometry.image_box.float()[:, None, None].split(2, dim=-1)
    shown = ((points >= low) & (points <= high)).all(dim=-1).unsqueeze(1)  # (B, 1, P, Q)
    if not covered_only:
        return nn.functional.avg_pool2d(sampled * shown, points_per_token)  # (B, U, token_rows, token_columns)
    covered = shown & ((points >= 0) & (points <= 1)).all(dim=-1).unsqueeze(1)
    (covered_mean, covered_share), (shown_mean, shown_share) = (
        (nn.functional.avg_pool2d(part, points_per_token) for part in (sampled * counted, counted.float()))
        for counted in (covered, shown)
    )
    # a crop that shows nothing that the map covers has the scores of the nearest cells, one that shows nothing at all has none
    return torch.where(
        covered_share > 0, covered_mean / covered_share.clamp(min=1e-6), shown_mean / shown_share.clamp(min=1e-6)
    )


def softmax_over_all_classes(pooled: torch.Tensor, palette: torch.Tensor, num_classes: int) -> SparseTargets:
    """Softmax over `num_classes` classes of which only the palette has scores other than 0.

    Where the palette is all classes, none has a score of 0 but its own, so that the targets do not depend on a common offset.

    Args:
        pooled: `(batch_size, U)` or `(batch_size, N, U)` scores; padding has score 0, like an unnamed class.
        palette: `(batch_size, U)` int64.
    """
    pooled, num_unnamed = pooled.float(), num_classes - pooled.shape[-1]
    shift = pooled.amax(dim=-1, keepdim=True)
    if num_unnamed:
        shift = shift.clamp(min=0)
    exponentials = (pooled - shift).exp()
    # below a shift of 0 there is neither padding nor an unnamed class, which would have at least that
    unnamed = torch.where(shift >= 0, (-shift).exp(), 0)
    total = exponentials.sum(dim=-1, keepdim=True) + num_unnamed * unnamed
    return SparseTargets(palette, (exponentials - unnamed) / total, (unnamed / total).squeeze(-1), num_classes)


@torch.no_grad()
def crop_label_maps(
    palette: torch.Tensor,
    palette_index: torch.Tensor,
    scores: torch.Tensor,
    geometry: CropGeometry,
    grid_size: tuple[int, int],
    num_classes: int,
    label_crop: LabelCrop = "correct",
    temperature: float = 1.0,
) -> tuple[SparseTargets, SparseTargets]:
    """Targets of the class token and of every patch token for a crop of each image. A pure function; any device.

    Args:
        palette: `(batch_size, U)` int64, the classes that each map names, padded with 0.
        palette_index: `(batch_size, K, rows, columns)` integers, positions in the palette.
        scores: `(batch_size, K, rows, columns)`.
        grid_size: Token rows and columns of the model.
        label_crop: See `pool_label_maps`.
        temperature: Divides the pooled scores before softmax; below 1 sharpens the targets of an annotator whose
            logits are small.

    Returns:
        Class-token targets (`excess` `(batch_size, U)`) and patch-token targets (`(batch_size, N, U)`, row-major).
    """
    palette_scores = decode(palette_index, scores, palette.shape[1])
    return crop_palette_scores(palette_scores, palette, geometry, grid_size, num_classes, label_crop, temperature)


@torch.no_grad()
def crop_palette_scores(
    palette_scores: torch.Tensor,
    palette: torch.Tensor,
    geometry: CropGeometry,
    grid_size: tuple[int, int],
    num_classes: int,
    label_crop: LabelCrop = "correct",
    temperature: float = 1.0,
) -> tuple[SparseTargets, SparseTargets]:
    """`crop_label_maps` for maps whose classes stand in the order of a palette, `(batch_size, U, rows, columns)` float32."""
    pooled_tokens = pool_label_maps(palette_scores, geometry, grid_size, label_crop).flatten(2).mT  # (B, N, U)
    # the class token is told what the map knows of the crop: the part that both cover
    pooled_crop = pool_label_maps(palette_scores, geometry, (1, 1), label_crop, covered_only=True).flatten(1)  # (B, U)
    return (
        softmax_over_all_classes(pooled_crop / temperature, palette, num_classes),
        softmax_over_all_classes(pooled_tokens / temperature, palette, num_classes),
    )


def top_classes(maps: PaletteMaps, num_classes: int) -> np.ndarray:
    """Most probable class of each whole map, as the class token learns it from an uncropped image, `(n,)`."""
    return whole_image_classes(maps, num_classes)[0]


def whole_image_classes(maps: PaletteMaps, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """`top_classes`, and their probabilities, `(n,)` float32."""
    palette = pad_palettes([torch.from_numpy(classes) for classes in maps.palettes])
    index, scores = torch.from_numpy(maps.index), torch.tensor(maps.scores)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(palette), 4)
    target, _ = crop_label_maps(palette, index, scores, CropGeometry(whole), (1, 1), num_classes)
    return target.top_class().numpy(), target.top_probability().numpy()
