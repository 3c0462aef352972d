"""Image-text models of transformers, loaded and given the texts of classes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ...backbones.image_processors import checked_settings, choose_image_size, read_settings
from ...backbones.loading import FORWARD_ERRORS, LOADING_ERRORS, library_errors, load_image_processor
from ...backbones.preprocessing import Preprocessing
from ...backbones.resize import native_image_size
from ...console import progress_bar
from ...data.sampling import temporary_seed
from ...finite import check_weights
from .cells import CLIPCells, CLIPSegScores, EmbeddingScores, Siglip2Cells, SiglipCells, TextScores


logger = logging.get_logger(__name__)
# model type -> its class; AutoModel would give CLIPSeg without its decoder
MODELS = {
    "clip": "CLIPModel",
    "siglip": "SiglipModel",
    "siglip2": "Siglip2Model",
    "clipseg": "CLIPSegForImageSegmentation",
}
CELLS = {"clip": CLIPCells, "siglip": SiglipCells, "siglip2": Siglip2Cells}
PADDED = (
    "siglip",
    "siglip2",
)  # read the last of a fixed number of tokens, of lower-case texts, without attention mask
READ = {False: ("input_ids", "attention_mask"), True: ("input_ids",)}  # of what a tokenizer gives
TEXTS_PER_BATCH = 64
MANY_TEXTS = 1000  # from here on a bar shows that something goes on


def load_text_model(
    name: str, image_size: tuple[int, int] | None, source: dict[str, Any], random_weights: bool
) -> tuple[PreTrainedModel, Preprocessing]:
    """An image-text model and what it does to images.

    Args:
        name: Hub name or folder.
        image_size: Height and width in pixels, multiples of its patches; default: its own, in whole patches.
        source: `revision` and `trust_remote_code`.
        random_weights: Whether to build the architecture only, with weights of seed 0.

    Raises:
        ValueError: If it cannot be loaded, is of another type, or does not take images of this size.
    """
    with library_errors(LOADING_ERRORS):
        config = AutoConfig.from_pretrained(name, **source)
    if config.model_type not in MODELS:
        raise ValueError(
            f"its model type is {config.model_type!r}. Image-text models of these types score cells: {', '.join(MODELS)}. "
            "A classifier is given without `text:`."
        )
    model_class = getattr(transformers, MODELS[config.model_type])
    with library_errors(LOADING_ERRORS), temporary_seed(0 if random_weights else None):
        if random_weights:
            model, missing = model_class._from_config(config, dtype=torch.float32), ()
        else:
            options = {"dtype": torch.float32, "output_loading_info": True, "revision": source["revision"]}
            model, info = model_class.from_pretrained(name, **options)
            missing = info["missing_keys"]
    if missing:
        raise ValueError(f"it is no trained {MODELS[config.model_type]}, its weights lack {sorted(missing)[:10]}.")
    check_weights(model)
    return model, _preprocessing(model, name, image_size, source)


def is_text_model(name: str, source: dict[str, Any]) -> bool:
    """Whether a name or folder is that of an image-text model, as far as can be told."""
    try:
        return AutoConfig.from_pretrained(name, **source).model_type in MODELS
    except LOADING_ERRORS:
        return False


def _preprocessing(
    model: PreTrainedModel, name: str, image_size: tuple[int, int] | None, source: dict[str, Any]
) -> Preprocessing:
    """Normalization and filter of its image processor, for images in whole patches.

    Raises:
        ValueError: If `image_size` is no multiple of the patches.
    """
    processor, vision = load_image_processor(name, source), model.config.vision_config
    if (
        model.config.model_type == "siglip2"
    ):  # its processor makes patches of an image; as many of them as it has positions
        settings, native = read_settings(processor), (math.isqrt(vision.num_patches) * vision.patch_size,) * 2
    else:
        settings, native = checked_settings(processor), native_image_size(model)
    size = choose_image_size(processor, image_size, settings.image_size, native)
    whole = tuple(side // vision.patch_size * vision.patch_size for side in size)
    if image_size is not None and (whole != tuple(size) or 0 in whole):
        raise ValueError(
            f"`annotator_image_size` must be multiples of its patches of {vision.patch_size} pixels, so that cells cover the image; "
            f"got {size[0]} x {size[1]}."
        )
    if whole != tuple(size):
        logger.warning(
            "%s: images become %d x %d pixels, not %d x %d, so that patches of %d pixels cover all of them.",
            name, *whole, *size, vision.patch_size,
        )  # fmt: skip
    return Preprocessing.with_statistics(whole, settings.image_mean, settings.image_std, settings.resample)


def score_texts(
    model: PreTrainedModel,
    name: str,
    source: dict[str, Any],
    image_size: tuple[int, int],
    classes: Sequence[Sequence[str]],
    background: Sequence[str],
) -> TextScores:
    """The network that scores classes at each cell. It takes the image tower out of the model, whose text tower is used here once.

    Args:
        model: From `load_text_model`, in evaluation mode.
        name, source: Where its tokenizer is.
        image_size: Height and width in pixels.
        classes: Texts of each class.
        background: Texts of what is no class.

    Raises:
        ValueError: If there is no tokenizer, or a text is too long.
    """
    groups = [*classes, *([text] for text in background)]
    features = embed_texts(model, name, source, list(dict.fromkeys(text for group in groups for text in group)))
    config = model.config
    grid_size = tuple(side // config.vision_config.patch_size for side in image_size)
    if config.model_type == "clipseg":
        means = [torch.stack([features[text] for text in group]).mean(dim=0) for group in groups]
        return TextScores(CLIPSegScores(model, torch.stack(means), grid_size), len(classes))
    directions = {text: nn.functional.normalize(feature, dim=0) for text, feature in features.items()}
    means = [torch.stack([directions[text] for text in group]).mean(dim=0) for group in groups]
    text_embeds = nn.functional.normalize(torch.stack(means), dim=1)  # (classes + background, D)
    cells = CELLS[config.model_type](model)
    return TextScores(EmbeddingScores(cells, text_embeds, model.logit_scale.exp().item(), grid_size), len(classes))


@torch.no_grad()
def embed_texts(
    model: PreTrainedModel, name: str, source: dict[str, Any], texts: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Text -> its embedding `(D,)`, float32, as the text tower projects it.

    Raises:
        ValueError: If the tokenizer cannot be loaded, or a text has more tokens than the model takes.
    """
    try:
        with library_errors((*LOADING_ERRORS, TypeError)):
            tokenizer = AutoTokenizer.from_pretrained(name, **source)
    except ImportError as error:  # SigLIP
        raise ValueError(f"its tokenizer needs more packages: pip install sentencepiece protobuf. {error}") from error
    padded, limit = model.config.model_type in PADDED, model.config.text_config.max_position_embeddings
    words = [text.lower() for text in texts] if padded else list(texts)
    for text, ids in zip(texts, tokenizer(words)["input_ids"]):
        if len(ids) > limit:
            raise ValueError(f"the text {text!r} has {len(ids)} tokens, the model takes {limit}. Shorten it.")
    tower = model.clip if model.config.model_type == "clipseg" else model
    padding = {"padding": "max_length", "max_length": limit} if padded else {"padding": True}
    features = []
    progress = progress_bar(total=len(texts), desc="Reading prompts", unit="text", disable=len(texts) < MANY_TEXTS)
    with progress:
        for start in range(0, len(words), TEXTS_PER_BATCH):
            inputs = tokenizer(words[start : start + TEXTS_PER_BATCH], return_tensors="pt", **padding)
            inputs = {key: inputs[key].to(model.device) for key in inputs if key in READ[padded]}
            with library_errors(FORWARD_ERRORS):
                pooled = tower.text_model(**inputs).pooler_output  # (texts, D)
            features.append(pooled if padded else tower.text_projection(pooled))
            progress.update(len(pooled))
    return dict(zip(texts, torch.cat(features).float()))
