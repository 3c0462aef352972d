"""How fast images reach a device: a loader with workers, the copy, and JPEG files that the device decodes itself."""

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, RandomSampler
from torchvision.io import decode_jpeg

from ..data.images import JPEG_START
from ..launching import num_cpu_cores, start_worker
from ..token_labeling import finish_images
from .measure import synchronize, time_call


LOADER, COPY = "loader", "copy to the device"  # what names begin with
# small enough that the wait for a whole batch of one worker does not count
LOADER_BATCH_SIZE = 64
ENDLESS = 10**8  # samples that a sampler draws, more than any measurement takes
DECODED_TOGETHER = 128
# edges of a cut, as fractions: about the mean area of random resized crops
REGION = (0.15, 0.15, 0.9, 0.9)


def image_supplies(
    loader: DataLoader, device: torch.device, seconds: float
) -> Iterator[tuple[str, Callable[[], float]]]:
    """What supplies a device with images, by name, and a function that measures it for so many seconds: images a second.

    Args:
        loader: Of a `TokenLabelDataset`.
    """
    for workers in dict.fromkeys((num_cpu_cores(), 1)):
        name = f"{LOADER}, {workers} worker{'s' if workers > 1 else ''}"
        yield name, partial(loader_rate, loader, workers, device, seconds)
    yield COPY, partial(copy_rate, loader, device)
    files = jpeg_files(loader.dataset.rows)
    for name, make_decoder in jpeg_decoders(device):
        yield name, lambda make_decoder=make_decoder: decoding_rate(make_decoder(), files, device, seconds)


def load_gpu_decoders() -> None:
    """Loads all that nvImageCodec has, where it is installed: `data.decoding` would load its decoder for CPUs alone."""
    with suppress(ImportError):
        importlib.import_module("nvidia.nvimgcodec")


def device_batch(loader: DataLoader, device: torch.device) -> dict[str, Any]:
    """The first batch of a loader, on a device; `finish_images` is left for each step."""
    return send_to_device(next(iter(loader)), device)


def loader_rate(loader: DataLoader, num_workers: int, device: torch.device, seconds: float) -> float:
    """Images a second that reach the device through worker processes.

    Args:
        loader: Whose dataset and collator are taken, drawn with replacement without end.
        seconds: Time for which batches are counted, after every worker has given two.
    """
    samples, batch_size = loader.dataset, min(LOADER_BATCH_SIZE, len(loader.dataset))
    is_pinned = device.type == "cuda"
    supply = iter(
        DataLoader(
            samples,
            batch_size,
            sampler=RandomSampler(samples, replacement=True, num_samples=ENDLESS),
            collate_fn=loader.collate_fn,
            num_workers=num_workers,
            persistent_workers=True,
            pin_memory=is_pinned,
            worker_init_fn=start_worker,
        )
    )
    for _ in range(2 * num_workers):
        next(supply)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        finish_images(send_to_device(next(supply), device, non_blocking=is_pinned))
        count += batch_size
    synchronize(device)
    return count / (time.perf_counter() - start)


def copy_rate(loader: DataLoader, device: torch.device, repeats: int = 20) -> float:
    """Images a second that are copied from pinned memory to the device, in batches of a loader.

    Raises:
        RuntimeError: If the device is the CPU.
    """
    if device.type == "cpu":
        raise RuntimeError("the device is the CPU")
    batch = next(iter(loader))
    pinned = {name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    call = lambda: send_to_device(pinned, device, non_blocking=True)  # noqa: E731
    time_call(call, device)  # allocates
    return len(batch["labels"]) / time_call(call, device, repeats)


def jpeg_files(rows: datasets.Dataset) -> list[bytes]:
    """Contents of the image files of rows that are JPEG; the others are left out."""
    stored = rows.with_format(None).cast_column("image", datasets.Image(decode=False))["image"]
    files = (value["bytes"] or Path(value["path"]).read_bytes() for value in stored)
    return [file for file in files if file.startswith(JPEG_START)]


def jpeg_decoders(device: torch.device) -> Iterator[tuple[str, Callable[[], Callable[[list[bytes]], int]]]]:
    """Names of decoders and functions that make them: a decoder takes files and returns how many of them it could decode.

    On a GPU nvImageCodec's hardware decoder and its CUDA kernels, each for whole images and for a region of each, and torchvision's
    nvJPEG for whole images. On a CPU nvImageCodec's and torchvision's libjpeg-turbo, so that the code can be tried without a GPU.
    """
    kinds = {"hardware": ["HW_GPU_ONLY"], "CUDA kernels": ["GPU_ONLY", "HYBRID_CPU_GPU"]}
    for name, backends in kinds.items() if device.type == "cuda" else [("CPU", ["CPU_ONLY"])]:
        for has_regions in (False, True):
            part = "regions" if has_regions else "whole images"
            yield (
                f"nvimgcodec, {name}, {part}",
                lambda backends=backends, has_regions=has_regions: _nvimgcodec(backends, has_regions, device),
            )
    yield "torchvision, whole images", lambda: lambda files: len(_decode_with_torchvision(files, device))


def _nvimgcodec(backends: list[str], has_regions: bool, device: torch.device) -> Callable[[list[bytes]], int]:
    from nvidia import nvimgcodec

    device_id = (device.index or 0) if device.type == "cuda" else nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY
    kinds = [nvimgcodec.Backend(getattr(nvimgcodec.BackendKind, name)) for name in backends]
    try:
        decoder = nvimgcodec.Decoder(device_id=device_id, backends=kinds)
    except RuntimeError as error:
        advice = 'pip install "nvidia-nvimgcodec-cu13[nvjpeg]", or -cu12 where PyTorch is of CUDA 12, installs the nvJPEG library'
        raise RuntimeError(f"there is no decoder of kind {' or '.join(backends)}; {advice} ({error})") from error

    def decode(files: list[bytes]) -> int:
        streams = [nvimgcodec.CodeStream(file) for file in files]
        if has_regions:
            streams = [stream.get_sub_code_stream(region=_region(nvimgcodec, stream)) for stream in streams]
        return sum(image is not None for image in decoder.decode(streams))

    return decode


def _region(nvimgcodec, stream):
    top, left, bottom, right = np.multiply(REGION, [stream.height, stream.width] * 2).astype(int).tolist()
    return nvimgcodec.Region(top, left, bottom, right)


def _decode_with_torchvision(files: list[bytes], device: torch.device) -> list[torch.Tensor]:
    return decode_jpeg([torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files], device=str(device))


def decoding_rate(
    decode: Callable[[list[bytes]], int], files: list[bytes], device: torch.device, seconds: float
) -> float:
    """Images a second that a decoder gives, a batch at a time, reading of the file headers included.

    Raises:
        RuntimeError: If there are none, or it could not decode some of them.
    """
    if not files:
        raise RuntimeError("there are no JPEG files among the images")
    batches = [files[start : start + DECODED_TOGETHER] for start in range(0, len(files), DECODED_TOGETHER)]
    for batch in batches[:2]:
        if (decoded := decode(batch)) < len(batch):
            raise RuntimeError(f"{len(batch) - decoded} of {len(batch)} files were not decoded")
    synchronize(device)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for batch in batches:
            count += decode(batch)
    synchronize(device)
    return count / (time.perf_counter() - start)
