"""Regions of JPEG files by nvImageCodec, where it is installed (`nvidia-nvimgcodec-cu13`, on the CPU): what lies around a region is
parsed, but not transformed and converted. The values are those of Pillow bit for bit: both decode with libjpeg-turbo.
"""

import functools
import importlib.util
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np


NARROWEST = 16  # pixels
VARIABLE = "NVIMGCODEC_EXTENSIONS_PATH"
_decoders = threading.local()
if hasattr(os, "register_at_fork"):  # a process has decoders of its own
    os.register_at_fork(after_in_child=lambda: _decoders.__dict__.clear())


@functools.cache
def library() -> Any | None:
    """The module `nvidia.nvimgcodec`, `None` where it is not installed or has no decoder for the CPU.

    Of its extensions only libjpeg-turbo is loaded, unless the program has imported it before. The others would look for libraries of
    CUDA, and say at length that there are none.
    """
    try:
        spec = importlib.util.find_spec("nvidia.nvimgcodec")
    except ModuleNotFoundError:
        return None
    extensions = (
        []
        if spec is None or spec.origin is None
        else sorted((Path(spec.origin).parent / "extensions").glob("*jpeg_turbo_ext*"))
    )
    if not extensions:
        return None
    before = os.environ.get(VARIABLE)
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            shutil.copy2(extensions[0], folder)  # no link, which Windows allows to few users only
            os.environ[VARIABLE] = folder
            from nvidia import nvimgcodec

            _make_decoder(nvimgcodec)  # loads the extension
    except (ImportError, OSError, RuntimeError):
        return None
    finally:
        os.environ.pop(VARIABLE, None)  # not set where the folder found no room
        if before is not None:
            os.environ[VARIABLE] = before
    return nvimgcodec


def is_used() -> bool:
    """Whether regions are decoded without the rest of their files."""
    return library() is not None


def read_region(content: bytes, box: tuple[int, int, int, int], image_width: int) -> np.ndarray | None:
    """A region of a JPEG file with three channels, as it is stored: Exif turns nothing.

    Args:
        content: The file.
        box: Left, top, right and bottom in pixels.
        image_width: Of the whole image in pixels.

    Returns:
        uint8 `[height, width, 3]`, RGB; `None` without the library, or for a file that it does not read to the end of the region.
    """
    nvimgcodec = library()
    if nvimgcodec is None:
        return None
    if not hasattr(_decoders, "decoder"):
        _decoders.decoder, _decoders.params = _make_decoder(nvimgcodec)
    left, top, right, bottom = box
    # a narrower region has a single value of color for its pixels, which libjpeg then does not mix with those next to it
    end = min(image_width, max(right, left + NARROWEST))
    start = max(0, min(left, end - NARROWEST))
    region = nvimgcodec.Region(top, start, bottom, end)
    try:
        stream = nvimgcodec.CodeStream(content).get_sub_code_stream(region=region)
        image = _decoders.decoder.decode(stream, params=_decoders.params)
    except RuntimeError:  # no JPEG after all
        return None
    return None if image is None else np.asarray(image.cpu())[:, left - start : right - start]


def _make_decoder(nvimgcodec: Any) -> tuple[Any, Any]:
    backends = [nvimgcodec.Backend(nvimgcodec.CPU_ONLY)]
    device = nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY
    decoder = nvimgcodec.Decoder(device_id=device, max_num_cpu_threads=1, backends=backends)
    return decoder, nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB)
