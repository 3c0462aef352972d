"""Label sets of training crops: maps of what a run sees in each epoch, instead of one map of each whole image."""

from .crop_maps import CropMapReader, check_drawn, join_crops, with_crop_map
from .record import CropLabelSetWriter, CropRecord, read_record


__all__ = [
    "CropLabelSetWriter",
    "CropMapReader",
    "CropRecord",
    "check_drawn",
    "join_crops",
    "read_record",
    "with_crop_map",
]
