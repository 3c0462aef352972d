"""The published LV-ViT family: architecture, preprocessing and published figures of every size and resolution."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import BitImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from .configuration_lvvit import LVViTConfig


DEFAULT_CROP_PCT = 0.9
ADE20K_CLASSES = 150


@dataclass(frozen=True)
class LVViTVariant:
    """One row of the published family.

    Args:
        architecture: Keyword arguments of `LVViTConfig` that tell the sizes apart.
        image_size: Side of the square test image in pixels.
        crop_pct: Share of the resized shorter side that the evaluation crop keeps (`crop_pct` of the authors' code).
        num_parameters: Parameters with 1000 classes, both classifiers included.
        published_gmacs: Multiply-adds in 10^9 as published, `None` where none is.
        published_top1, published_real_top1: ImageNet top-1 in percent as published, `None` where none is.
        counted_gmacs: Multiply-adds of convolutions and matrix products in 10^9, counted here.
        checkpoint: Address of the authors' weights below `RELEASES`, `None` where they released none.
    """

    architecture: dict[str, Any]
    image_size: int
    crop_pct: float
    num_parameters: int
    published_gmacs: float | None
    published_top1: float | None
    published_real_top1: float | None
    counted_gmacs: float
    checkpoint: str | None


@dataclass(frozen=True)
class LVViTSegmenter:
    """One of the published UperNets: ADE20K, 150 classes, crops of 512 pixels.

    Args:
        backbone: The row of `VARIANTS` that has the architecture of its backbone.
        decoder_channels: See `LVViTConfig`.
        num_parameters: With a position table for 512 pixels and the auxiliary head.
        published_millions: Parameters in 10^6 as published.
        published_miou, published_multi_scale_miou: Mean intersection over union in percent as published.
        published_multi_scale_accuracy: Pixel accuracy in percent as published.
        checkpoint: Address of the authors' weights below `RELEASES`.
    """

    backbone: str
    decoder_channels: int
    num_parameters: int
    published_millions: int
    published_miou: float
    published_multi_scale_miou: float
    published_multi_scale_accuracy: float
    checkpoint: str


def _architecture(layers: int, width: int, heads: int, residual_divisor: float, stem: int = 64) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 3 * width,
        "residual_divisor": residual_divisor,
        "stem_hidden_size": stem,
    }


_TINY = _architecture(layers=12, width=240, heads=4, residual_divisor=1.0)
_SMALL = _architecture(layers=16, width=384, heads=6, residual_divisor=2.0)
_MEDIUM = _architecture(layers=20, width=512, heads=8, residual_divisor=2.0)
_LARGE = _architecture(layers=24, width=768, heads=12, residual_divisor=3.0, stem=128)

# Sources: tables of the paper (NeurIPS 2021) and, for M at 448 and the single-scale figures of M and L on ADE20K, the authors'
# repository (README), which also names the files. The paper gives 16.0 G for M at 224; the model has 12.7 G.
# Crop fractions: `default_cfgs` of the authors' models, one value per size.
RELEASES = "https://github.com/zihangJiang/TokenLabeling/releases/download"
VARIANTS: dict[str, LVViTVariant] = {
    "lvvit_t_224": LVViTVariant(_TINY, 224, 0.9, 8_534_720, None, 79.1, None, 2.87, "v0.2.0/lvvit_t.pth"),
    "lvvit_s_224": LVViTVariant(
        _SMALL, 224, 0.9, 26_151_824, 6.6, 83.3, 88.1, 6.55, "1.0/lvvit_s-26M-224-83.3.pth.tar"
    ),
    "lvvit_s_384": LVViTVariant(
        _SMALL, 384, 0.9, 26_297_744, 22.2, 84.4, 88.9, 21.9, "1.0/lvvit_s-26M-384-84.4.pth.tar"
    ),
    "lvvit_m_224": LVViTVariant(
        _MEDIUM, 224, 1.0, 55_830_544, 16.0, 84.1, 88.4, 12.7, "1.0/lvvit_m-56M-224-84.0.pth.tar"
    ),
    "lvvit_m_384": LVViTVariant(
        _MEDIUM, 384, 1.0, 56_025_104, 42.2, 85.4, 89.5, 41.6, "1.0/lvvit_m-56M-384-85.4.pth.tar"
    ),
    "lvvit_m_448": LVViTVariant(
        _MEDIUM, 448, 1.0, 56_131_600, None, 85.5, None, 60.0, "1.1/lvvit_m-56M-448-85.5.pth.tar"
    ),
    "lvvit_l_288": LVViTVariant(_LARGE, 288, 1.0, 150_120_272, 59.0, 85.3, 89.3, 58.7, None),
    "lvvit_l_448": LVViTVariant(
        _LARGE, 448, 1.0, 150_473_552, 157.2, 86.2, 89.9, 155.1, "1.0/lvvit_l-150M-448-86.2.pth.tar"
    ),
    "lvvit_l_512": LVViTVariant(
        _LARGE, 512, 1.0, 150_657_872, 214.8, 86.4, 90.1, 211.6, "1.0/lvvit_l-150M-512-86.4.pth.tar"
    ),
}
SEGMENTERS: dict[str, LVViTSegmenter] = {
    "upernet_s": LVViTSegmenter("lvvit_s_224", 256, 44_452_076, 44, 47.9, 48.6, 83.1, "v1.1-seg/upernet_lvvit_s.pth"),
    "upernet_m": LVViTSegmenter("lvvit_m_224", 256, 77_274_988, 77, 49.4, 50.6, 83.5, "v1.1-seg/upernet_lvvit_m.pth"),
    "upernet_l": LVViTSegmenter(
        "lvvit_l_288", 512, 208_738_476, 209, 50.9, 51.8, 84.1, "v1.1-seg/upernet_lvvit_l.pth"
    ),
}


@dataclass(frozen=True)
class AutoSize:
    """One of the sizes among which `choose_variant` chooses.

    Args:
        name: What it is called.
        settings: Fields of `LVViTConfig`.
        min_images: From how many training images on it is chosen.
        num_parameters: Without classifiers, rounded.
        training_mib: What the backward pass of an image of 196 patches of 16 pixels keeps, in MiB, in float32 (counted with
            `torch.autograd.graph.saved_tensors_hooks`; smaller patches need up to a third less).
    """

    name: str
    settings: dict[str, Any]
    min_images: int
    num_parameters: float
    training_mib: float


@dataclass(frozen=True)
class VariantChoice:
    """What `choose_variant` chose.

    Args:
        image_size: Height and width of the input in pixels.
        settings: Fields of `LVViTConfig` besides the input size.
        reason: Size, input and what they were chosen by, in one or two lines.
    """

    image_size: tuple[int, int]
    settings: dict[str, Any]
    reason: str


AUTO = "auto"
_MINI = _architecture(layers=4, width=96, heads=3, residual_divisor=1.0, stem=16) | {"initializer_range": 0.12}
_COMPACT = _architecture(layers=8, width=192, heads=3, residual_divisor=1.0, stem=32)
AUTO_SIZES = (
    AutoSize("mini", _MINI, 0, 0.5e6, 6),
    AutoSize("compact", _COMPACT, 0, 3.4e6, 26),
    AutoSize("the architecture of lvvit_t_224", _TINY | {"drop_path_rate": 0.1}, 20_000, 8.1e6, 50),
    AutoSize("the architecture of lvvit_s_224", _SMALL | {"drop_path_rate": 0.1}, 200_000, 25.4e6, 85),
)
AUTO_PATCHES = (
    (160, 16),
    (64, 8),
    (0, 4),
)  # from which side on, in pixels, patches of which side: 8 to 20 tokens a row
LARGEST_INPUT, LARGEST_CPU_INPUT, SMALLEST_INPUT = 224, 96, 32  # pixels
MEMORY_SHARE = (
    0.6  # of a device, for weights, gradients, optimizer and activations; the rest is for what libraries take
)


def choose_variant(
    num_images: int,
    num_classes: int,
    side: int,
    memory: int | None,
    batch_size: int,
    image_size: tuple[int, int] | None = None,
    patch_size: int | None = None,
) -> VariantChoice:
    """Size of the model and of its input for a dataset, to be trained from random weights. The rules:

    1. Input: the typical shorter side of the images, never enlarged beyond 32 pixels; at most 224 pixels, without an accelerator 96.
    2. Patches: 16 pixels for inputs from 160 on, 8 from 64 on, else 4, so that there are 8 to 20 tokens a row (published: 14); the input is
       a multiple of them.
    3. Model: without an accelerator the size of the embedded job; else by the number of images. The published sizes were made for 1.28
       million images: T from 20,000 on, S from 200,000 on, and M and L are never chosen.
    4. The next smaller model where a batch does not fit into `MEMORY_SHARE` of the memory.

    Args:
        num_images, num_classes: Of the training data.
        side: Typical shorter side of its images in pixels.
        memory: Bytes of the accelerator; `None` without one.
        batch_size: Images of a step on a device.
        image_size, patch_size: Height and width of the input, and side of the patches, where the user fixed them.
    """
    if image_size is None:
        largest = LARGEST_CPU_INPUT if memory is None else LARGEST_INPUT
        length = max(SMALLEST_INPUT, min(largest, side))
        patch_size = patch_size or _auto_patch(length)
        image_size = (max(patch_size, length // patch_size * patch_size),) * 2
    else:
        wanted = _auto_patch(min(image_size))
        fitting = [patch for _, patch in AUTO_PATCHES if patch <= wanted and not any(x % patch for x in image_size)]
        patch_size = patch_size or (fitting or [wanted])[0]
    num_tokens = image_size[0] * image_size[1] // patch_size**2
    fitting = AUTO_SIZES[:1]
    if memory is not None:
        sizes = [size for size in AUTO_SIZES[1:] if num_images >= size.min_images]
        fitting = [size for size in sizes if _training_bytes(size, num_tokens, batch_size) <= MEMORY_SHARE * memory]
    chosen = (fitting or AUTO_SIZES)[-1 if fitting else 0]
    device = "no accelerator" if memory is None else f"an accelerator of {memory / 2**30:.0f} GiB"
    reason = (
        f"{chosen.name} ({chosen.num_parameters / 1e6:.1f} M parameters), input {image_size[0]} x {image_size[1]} pixels, patches of "
        f"{patch_size}, for {num_images:,} training images of {num_classes} classes, shorter side typically {side} pixels, and {device}"
    )
    return VariantChoice(image_size, chosen.settings | {"patch_size": patch_size}, reason)


def _auto_patch(side: int) -> int:
    return next(patch for smallest, patch in AUTO_PATCHES if side >= smallest)


def _training_bytes(size: AutoSize, num_tokens: int, batch_size: int) -> float:
    """Weights, gradients and two moments of AdamW, 16 bytes a parameter, and what the backward pass of a batch keeps."""
    return 16 * size.num_parameters + size.training_mib * 2**20 * batch_size * num_tokens / 196


def check_variant(name: str, *further: str) -> None:
    """Raises a `ValueError` with the nearest names if a size is neither published nor one of `further`."""
    names = [*VARIANTS, *further]
    if name not in names:
        nearest = [other for other in VARIANTS if other.startswith(name)] or difflib.get_close_matches(name, VARIANTS)
        meant = f" (did you mean {' or '.join(nearest)}?)" if nearest else ""
        raise ValueError(f"Unknown LV-ViT variant {name!r}{meant}; expected one of {', '.join(names)}.")


def variant_config(name: str, **overrides: Any) -> LVViTConfig:
    """Configuration of a published size with 1000 classes, changed by `overrides`; a `ValueError` if there is none of this name."""
    check_variant(name)
    variant = VARIANTS[name]
    settings = {**variant.architecture, "image_size": variant.image_size, **overrides}
    if "id2label" not in settings:
        settings.setdefault("num_labels", 1000)
    return LVViTConfig(**settings)


def find_variant(config: LVViTConfig) -> str | None:
    """Name of the published row with the architecture of `config`; its own resolution, else the nearest one."""
    names = [n for n, v in VARIANTS.items() if all(getattr(config, k) == x for k, x in v.architecture.items())]
    side = max(config.image_height_width)
    return min(names, key=lambda name: abs(VARIANTS[name].image_size - side), default=None)


def published_row(config: LVViTConfig, is_segmenter: bool) -> str | None:
    """Name in `VARIANTS`, or for a segmentation model in `SEGMENTERS`, of the row that a configuration is exactly, classes included."""
    backbone = find_variant(config)
    if backbone is None or config.patch_size != 16 or not config.conv_stem:
        return None
    if is_segmenter:
        is_published = config.segmentation_head == "upernet" and config.num_labels == ADE20K_CLASSES
        sizes = {VARIANTS[row.backbone].architecture["hidden_size"]: name for name, row in SEGMENTERS.items()}
        return sizes.get(config.hidden_size) if is_published else None
    side = VARIANTS[backbone].image_size
    return backbone if config.num_labels == 1000 and config.image_height_width == (side, side) else None


def evaluation_image_processor(
    image_size: tuple[int, int],
    crop_pct: float,
    image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
    resample: int = PILImageResampling.BICUBIC,
) -> BitImageProcessor:
    """Preprocessing of the published evaluation: shorter side to `side / crop_pct`, bicubic, center crop.

    Args:
        image_size: Height and width of the model input in pixels. For a rectangle the image is resized so that its
            shorter side covers the longer side of the crop.
        crop_pct: In (0, 1].
        image_mean, image_std: Normalization for images in [0, 1].
    """
    height, width = image_size
    return BitImageProcessor(
        size={"shortest_edge": int(max(height, width) / crop_pct)},
        resample=PILImageResampling(resample),
        crop_size={"height": height, "width": width},
        image_mean=list(image_mean),
        image_std=list(image_std),
    )
