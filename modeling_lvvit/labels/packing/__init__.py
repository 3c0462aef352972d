"""How label maps are packed in Parquet files: classes as links to neighboring cells, scores as steps.

The columns of positions and scores (see `labels.storage`) become two columns of K maps `[rows][columns]` each, for the K classes of a cell in
the order of their scores, best first:

    token_label_links  uint16         1 to 2K: the first, second, ... of the classes of the left and the upper cell (first of the left,
                                      first of the upper, second of the left, ...; each class once) that the cell has not named yet.
                                      2K + 1: the next class of the palette that no link has named. 2K + 2 + p: position p of the palette.
                                      0: none, in an empty label
    token_label_steps  uint16, uint8  scores as integers that ascend with them: of the last class the difference to what its neighbors let
                                      expect (`steps.expect`), of every other one the step up from the class after it; modulo 2^16 (2^8)

The palette has the order in which links name its classes: in the map of first classes row after row, then in that of second classes, and
so on. Small numbers that come often are what an entropy coder shortens. No bit is lost. Opening a set undoes it: training pays nothing.
"""

from .links import follow_links, link_classes
from .steps import climb_steps, score_steps
from .tables import (
    LINKS_COLUMN,
    MAX_K,
    STEPS_COLUMN,
    is_packed,
    is_worth_packing,
    pack,
    packed_leaves,
    unpack,
    unpacked_rows,
)


__all__ = [
    "LINKS_COLUMN",
    "MAX_K",
    "STEPS_COLUMN",
    "climb_steps",
    "follow_links",
    "is_packed",
    "is_worth_packing",
    "link_classes",
    "pack",
    "packed_leaves",
    "score_steps",
    "unpack",
    "unpacked_rows",
]
