"""Label maps put together from several views of an image: the whole, and five overlapping windows.

A map of the whole image says too little of a crop: each of its cells was made to be averaged with all the others. The mean over views is
nearer to what the annotator says of crops, for the same bytes (README, Results). It is of no use where things mean something else when they
are enlarged, as textures do: hence the count of images whose class the windows change.
"""

from dataclasses import dataclass, replace

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from ..backbones.preprocessing import Preprocessing
from ..data.decoding import EncodedImage, as_encoded
from .annotator import Annotator


SIDE = 0.6  # of a window, as a share of the sides of the annotator's input
VIEWS = 6  # the whole, four corners, the center
# share of images whose class the windows change: 13 and 14 % where they made labels better, 34 % where they spoiled them (README, Results)
FAR = 0.2


@dataclass(frozen=True)
class FiveCropPreprocessing:
    """From an image to the six views that an annotator sees.

    Args:
        whole: From an image to the annotator's input.
        enlarged: The same for the larger input that windows are cut from.
    """

    whole: Preprocessing
    enlarged: Preprocessing

    def __call__(self, image: Image.Image | EncodedImage) -> tuple[torch.Tensor, tuple[float, float, float, float]]:
        """An RGB image to pixels uint8 `[6, 3, height, width]`, and the region that they show (see `Preprocessing`)."""
        image = as_encoded(image).loaded(self.enlarged.image_size[::-1])
        whole, box = self.whole(image)
        return torch.stack([whole, *F.five_crop(self.enlarged(image)[0], list(whole.shape[1:]))]), box


class FiveCrop:
    """Shows an annotator an image six times, and gives each cell the mean of the logits of all views at its place.

    Windows are enlarged to the input of the annotator. The map has the cells, and shows the region, of one of the whole image.

    Args:
        annotator: Sees the views.
        device: Where it runs.

    Attributes:
        prepare: Makes the views of an image.
        num_images, num_changed: Images so far, and those of them to which the windows gave another class than the whole.
    """

    def __init__(self, annotator: Annotator, device: torch.device | str = "cpu"):
        self.annotator, self.num_images = annotator, 0
        self._changed = torch.zeros(
            (), dtype=torch.int64, device=device
        )  # read at the end: no batch waits for the device
        sides = annotator.preprocessing.image_size
        self.enlarged = replace(annotator.preprocessing, image_size=tuple(round(side / SIDE) for side in sides))
        self.prepare = FiveCropPreprocessing(annotator.preprocessing, self.enlarged)
        ends = [large - side for large, side in zip(self.enlarged.image_size, sides)]
        # top and left of each view in pixels of the enlarged input, in the order of `five_crop`
        places = [(0, 0), (0, ends[1]), (ends[0], 0), tuple(ends), tuple(round(end / 2) for end in ends)]
        grid_size = annotator.dense.grid_size
        # of each view, how much its rows, and its columns, of cells cover of those of the map
        self.views = [tuple(_overlaps(0.0, 1.0, cells) for cells in grid_size)]
        for place in places:
            spans = zip(place, sides, self.enlarged.image_size, grid_size)
            self.views.append(
                tuple(_overlaps(start / large, (start + side) / large, cells) for start, side, large, cells in spans)
            )
        self.views = [(down.to(device), across.to(device)) for down, across in self.views]
        self.covered = sum(down.sum(1, keepdim=True) * across.sum(1) for down, across in self.views)  # (rows, columns)

    @property
    def num_changed(self) -> int:
        return int(self._changed)

    def score_map(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels `(B, 6, 3, height, width)` to logits `(B, classes, rows, columns)` float32; a forward pass for each view."""
        placed = []
        for view, (down, across) in zip(pixels.unbind(1), self.views):
            placed.append(down @ self.annotator.score_map(view).float() @ across.T)
        scores = sum(placed) / self.covered
        of_whole, of_all = (maps.mean(dim=(2, 3)).argmax(dim=1) for maps in (placed[0], scores))
        self.num_images += len(scores)
        self._changed += (of_whole != of_all).sum()
        return scores

    def describe(self) -> str:
        """How often the windows changed the class of an image, for people, with a warning where that is often."""
        share = self.num_changed / max(1, self.num_images)
        line = f"windows change the first class of {100 * share:.0f} % of {self.num_images:,} images"
        if share <= FAR:
            return line
        return f"WARNING: {line}: parts of them, enlarged, look like something else to this annotator. Compare with a label set without `five_crop`."


def _overlaps(start: float, end: float, cells: int) -> torch.Tensor:
    """How much of each cell of an axis `[0, 1]` those of a view from `start` to `end` cover, `(cells, cells of the view)` in cells of the axis."""
    borders = cells * torch.linspace(start, end, cells + 1)
    firsts = torch.arange(cells).unsqueeze(1)
    return (torch.minimum(borders[1:], firsts + 1) - torch.maximum(borders[:-1], firsts)).clamp(min=0)
