"""With which weights the cells of a map enter the tokens of a crop, along one axis."""

import math

import torch


def axis_weights(
    start: torch.Tensor, end: torch.Tensor, map_size: int, num_bins: int, min_cells: float = 0.0
) -> torch.Tensor:
    """Weights with which the cells of one axis of a map enter the bins of a crop.

    The rule is that of RoIAlign (He et al. 2017) with adaptive sampling: a bin that spans up to n cells is sampled at
    n equidistant points, and each point interpolates linearly between the two nearest cell centers. A point outside the
    map has the value of the nearest cell; only with `min_cells`, the authors' crops, it has none, as in RoIAlign.

    Args:
        start, end: `(batch_size,)` float32, borders of the crop as fractions of the map; a crop may leave the map.
        map_size: Cells of the map along this axis.
        num_bins: Bins (token rows or columns) of the crop.
        min_cells: Smallest extent of a crop in cells; a shorter one is extended at its end.

    Returns:
        `(batch_size, num_bins, map_size)` float32; each row sums to 1.
    """
    first = start * map_size - 0.5  # coordinate 0 is the center of the first cell
    extent = (end * map_size - 0.5 - first).clamp(min=max(min_cells, 1e-6))
    bin_size = extent / num_bins
    # one more than a crop of the whole map needs: rounding can lift an extent over a whole number of bins
    max_samples = math.ceil(max(map_size, min_cells) / num_bins) + 1
    samples = bin_size.ceil().clamp(min=1, max=max_samples)
    bins = torch.arange(num_bins, device=start.device).view(-1, 1)
    steps = torch.arange(max_samples, device=start.device)
    first, bin_size, samples = (value.view(-1, 1, 1) for value in (first, bin_size, samples))
    points = first + bins * bin_size + (steps + 0.5) * bin_size / samples  # (B, num_bins, max_samples)
    counted = steps < samples
    if min_cells:
        counted = counted & (points >= -1.0) & (points <= map_size)
    cells = torch.arange(map_size, device=start.device)
    distance = (points.clamp(0, map_size - 1).unsqueeze(-1) - cells).abs()  # (B, num_bins, max_samples, map_size)
    weights = ((1 - distance).clamp(min=0) * counted.unsqueeze(-1)).sum(dim=2) / samples
    if min_cells:
        return weights
    # bins of a crop that is larger than the map may need more points: those are counted, not listed
    needed = bin_size.ceil()
    return torch.where(
        needed > max_samples, _many_point_weights(first + bins * bin_size, bin_size, needed, cells), weights
    )


def _many_point_weights(
    start: torch.Tensor, length: torch.Tensor, points: torch.Tensor, cells: torch.Tensor
) -> torch.Tensor:
    """`axis_weights` of bins whose points are not listed one by one, at a cost that does not depend on their number.

    Args:
        start: `(batch_size, num_bins, 1)`, border of each bin in coordinates in which the cell centers are `cells`.
        length, points: `(batch_size, 1, 1)`, length of a bin, and into how many equal parts its points divide it.
        cells: `(map_size,)`, 0, 1, 2, ...

    Returns:
        `(batch_size, num_bins, map_size)`.
    """
    step = length / points
    first = start + step / 2
    before = ((cells - first) / step).ceil().clamp(min=0).minimum(points)  # points on the left of each center
    between = before.diff(dim=-1)  # points between each center and the next, which share their weight
    nearest = first + before[..., :-1] * step - cells[:-1]  # distance of the first of them from the center on the left
    to_right = between * (nearest + (between - 1) * step / 2)
    from_left = torch.cat((before[..., :1], to_right), dim=-1)
    from_right = torch.cat((between - to_right, points - before[..., -1:]), dim=-1)
    return (from_left + from_right) / points
