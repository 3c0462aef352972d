"""Decoding the part of an image that a crop shows, in the scale that it needs."""

from .crops import resized_box, resized_crop, warped_crop
from .encoded_image import EncodedImage, as_encoded


__all__ = ["EncodedImage", "as_encoded", "resized_box", "resized_crop", "warped_crop"]
