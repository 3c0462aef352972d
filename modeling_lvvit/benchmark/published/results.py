"""The ImageNet comparison of the paper, as published, and which model is measured next to each row.

Sources: the comparison table of the paper (NeurIPS 2021, slides of the authors). VOLO, by the same group, is not in that table: sizes and
accuracies are those of its authors' repository (sail-sg/volo), FLOPs, where there are any, those of arXiv:2106.13112.
"""

from dataclasses import dataclass
from typing import Any

from ...variants import VARIANTS


# LV-ViT: trained on images of another size than tested on
TRAINED_AT = {"lvvit_s_384": 224, "lvvit_m_384": 224, "lvvit_m_448": 224, "lvvit_l_512": 448}
LVVIT_NOTES = {
    "lvvit_m_224": "the published 16.0 G does not follow from the published model",
    "lvvit_m_448": "only in the authors' repository",
}
T2T = "timm and transformers have no T2T-ViT; counted and timed: a plain ViT of its depth, width and MLP ratio, without the tokens-to-token module"
BOTNET = "timm and transformers have no BoTNet-S1-128; counted and timed: its nearest, BoTNet-50, with less than a third of the FLOPs"
CROSSVIT = "CrossViT-18 with convolutional embedding, both branches at 480 pixels"
DEEPVIT = "timm and transformers have no DeepViT, nor another model with re-attention"


@dataclass(frozen=True)
class PublishedRow:
    """A row of the table.

    Args:
        network: Its published name.
        million_parameters: As published.
        gmacs: Multiply-adds in 10^9 as published; the papers call them FLOPs.
        train_size, test_size: Height and width of the images in pixels.
        top1, real_top1: ImageNet accuracies in per cent as published.
        model: What is measured next to it, see `BenchmarkModel.parse`; `None` if neither timm nor transformers has it.
        arguments: Further ones for the constructor of timm, as pairs.
        note: What is to be said about it.
    """

    network: str
    million_parameters: float
    gmacs: float | None
    train_size: int
    test_size: int
    top1: float
    real_top1: float | None
    model: str | None
    arguments: tuple[tuple[str, Any], ...] = ()
    note: str = ""


_T2T = {"arguments": (("depth", 14), ("mlp_ratio", 3.0)), "note": T2T}
_CROSSVIT = {"arguments": (("img_scale", (1.0, 1.0)),), "note": CROSSVIT}
COMPETITORS = (
    PublishedRow("EfficientNet-B5", 30, 9.9, 456, 456, 83.6, 88.3, "timm/tf_efficientnet_b5"),
    PublishedRow("EfficientNet-B7", 66, 37.0, 600, 600, 84.3, None, "timm/tf_efficientnet_b7"),
    PublishedRow("Fix-EfficientNet-B8", 87, 89.5, 672, 800, 85.7, 90.0, "timm/tf_efficientnet_b8@800"),
    PublishedRow("NFNet-F3", 255, 114.8, 320, 416, 85.7, 89.4, "timm/dm_nfnet_f3@416"),
    PublishedRow("NFNet-F4", 316, 215.3, 384, 512, 85.9, 89.4, "timm/dm_nfnet_f4@512"),
    PublishedRow("NFNet-F5", 377, 289.8, 416, 544, 86.0, 89.2, "timm/dm_nfnet_f5@544"),
    PublishedRow("ViT-B/16", 86, 55.4, 224, 384, 77.9, 83.6, "timm/vit_base_patch16_384"),
    PublishedRow("ViT-L/16", 307, 190.7, 224, 384, 76.5, 82.2, "timm/vit_large_patch16_384"),
    PublishedRow("T2T-ViT-14", 22, 5.2, 224, 224, 81.5, None, "timm/vit_small_patch16_224", **_T2T),
    PublishedRow("T2T-ViT-14", 22, 17.1, 224, 384, 83.3, None, "timm/vit_small_patch16_224@384", **_T2T),
    PublishedRow("CrossViT", 45, 56.6, 224, 480, 84.1, None, "timm/crossvit_18_dagger_408@480", **_CROSSVIT),
    PublishedRow("Swin-B", 88, 47.0, 224, 384, 84.2, None, "timm/swin_base_patch4_window12_384"),
    PublishedRow("TNT-B", 66, 14.1, 224, 224, 82.8, None, "timm/tnt_b_patch16_224"),
    PublishedRow("DeepViT-S", 27, 6.2, 224, 224, 82.3, None, None, note=DEEPVIT),
    PublishedRow("DeepViT-L", 55, 12.5, 224, 224, 83.1, None, None, note=DEEPVIT),
    PublishedRow("DeiT-S", 22, 4.6, 224, 224, 79.9, 85.7, "timm/deit_small_patch16_224"),
    PublishedRow("DeiT-S distilled", 22, 4.6, 224, 224, 81.2, 86.8, "timm/deit_small_distilled_patch16_224"),
    PublishedRow("DeiT-B", 86, 17.5, 224, 224, 81.8, 86.7, "timm/deit_base_patch16_224"),
    PublishedRow("DeiT-B", 86, 55.4, 224, 384, 83.1, 87.7, "timm/deit_base_patch16_384"),
    PublishedRow("DeiT-B distilled", 87, 17.5, 224, 224, 83.4, 88.3, "timm/deit_base_distilled_patch16_224"),
    PublishedRow("BoTNet-S1-128", 79.1, 19.3, 256, 256, 84.2, None, "timm/botnet50ts_256", note=BOTNET),
    PublishedRow("BoTNet-S1-128", 79.1, 45.8, 256, 384, 84.7, None, "timm/botnet50ts_256@384", note=BOTNET),
    PublishedRow("CaiT-S36", 68, 48.0, 224, 384, 85.4, 89.8, "timm/cait_s36_384"),
    PublishedRow("CaiT-M36", 271, 53.7, 224, 224, 85.1, 89.3, "timm/cait_m36_384@224"),
    PublishedRow("CaiT-M36", 271, 247.8, 224, 448, 86.3, 90.2, "timm/cait_m36_384@448"),
    PublishedRow("VOLO-D1", 27, 6.8, 224, 224, 84.2, None, "timm/volo_d1_224"),
    PublishedRow("VOLO-D1", 27, None, 224, 384, 85.2, None, "timm/volo_d1_384"),
    PublishedRow("VOLO-D2", 59, 14.1, 224, 224, 85.2, None, "timm/volo_d2_224"),
    PublishedRow("VOLO-D2", 59, None, 224, 384, 86.0, None, "timm/volo_d2_384"),
    PublishedRow("VOLO-D3", 86, 20.6, 224, 224, 85.4, None, "timm/volo_d3_224"),
    PublishedRow("VOLO-D3", 86, None, 224, 448, 86.3, None, "timm/volo_d3_448"),
    PublishedRow("VOLO-D4", 193, 43.8, 224, 224, 85.7, None, "timm/volo_d4_224"),
    PublishedRow("VOLO-D4", 193, None, 224, 448, 86.8, None, "timm/volo_d4_448"),
    PublishedRow("VOLO-D5", 296, None, 224, 224, 86.1, None, "timm/volo_d5_224"),
    PublishedRow("VOLO-D5", 296, None, 224, 448, 87.0, None, "timm/volo_d5_448"),
    PublishedRow("VOLO-D5", 296, 412, 224, 512, 87.1, None, "timm/volo_d5_512"),
)
# parameters of the family in millions, as published
_LVVIT_PARAMETERS = {"t": 8.5, "s": 26, "m": 56, "l": 150}


def lvvit_rows() -> tuple[PublishedRow, ...]:
    """Those of LV-ViT, in the order of their FLOPs: one for each of `VARIANTS`, and the second of L at 448 pixels."""
    rows = [
        PublishedRow(
            f"LV-ViT-{name.split('_')[1].upper()}",
            151 if name == "lvvit_l_512" else _LVVIT_PARAMETERS[name.split("_")[1]],
            variant.published_gmacs,
            TRAINED_AT.get(name, variant.image_size),
            variant.image_size,
            variant.published_top1,
            variant.published_real_top1,
            name,
            note=LVVIT_NOTES.get(name, ""),
        )
        for name, variant in VARIANTS.items()
    ]
    fine_tuned = PublishedRow("LV-ViT-L", 150, 157.2, 288, 448, 85.9, 89.7, "lvvit_l_448")
    position = list(VARIANTS).index("lvvit_l_448")
    return (*rows[:position], fine_tuned, *rows[position:])


def published_rows(names: list[str]) -> tuple[PublishedRow, ...]:
    """All rows, or those whose network has one of `names` in it, in any case.

    Raises:
        ValueError: If a name fits no row.
    """
    rows = (*COMPETITORS, *lvvit_rows())
    for name in names:
        if not any(name.lower() in row.network.lower() for row in rows):
            networks = ", ".join(dict.fromkeys(row.network for row in rows))
            raise ValueError(f"--table {name}: no row is called so; there are {networks}.")
    return tuple(row for row in rows if not names or any(name.lower() in row.network.lower() for name in names))
