"""Small image-text models with random weights, saved with a tokenizer of a few words (lower case) and an image processor."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    ViTImageProcessor,
)


PAD, START, END = 0, 1, 3  # an end of 2 stands for old models in transformers, which end with the highest token
WORDS = [
    "a",
    "photo",
    "of",
    "the",
    "in",
    "an",
    "part",
    "image",
    "with",
    "it",
    ".",
    "seen",
    "from",
    "nearby",
    "distance",
    "red",
    "green",
    "blue",
    "sky",
    "grass",
    "cat",
    "dog",
    "owl",
]
MAX_TOKENS = 40
WIDTH = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
SQUARE = {"height": 32, "width": 32}
CLASSES = {
    "clip": (CLIPConfig, CLIPModel),
    "siglip": (SiglipConfig, SiglipModel),
    "siglip2": (Siglip2Config, Siglip2Model),
    "clipseg": (CLIPSegConfig, CLIPSegForImageSegmentation),
}
PROCESSORS = {
    "clip": lambda: CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
    "siglip": lambda: SiglipImageProcessor(size=SQUARE),
    "siglip2": lambda: Siglip2ImageProcessor(patch_size=8, max_num_patches=16),
    "clipseg": lambda: ViTImageProcessor(
        size={"height": 48, "width": 48}
    ),  # not the 32 of the model, as the published ones
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of `WORDS`, between a start and an end."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<start>", "<unk>", "<end>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        "<start> $A <end>", None, [("<start>", START), ("<end>", END)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def letter_tokenizer() -> Siglip2Tokenizer:
    """One token for each letter, of the class that transformers loads for every SigLIP 2."""
    tokens = ["<pad>", "<start>", "<unk>", "<end>", *"abcdefghijklmnopqrstuvwxyz.,▁"]
    names = {"pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unk>"}
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return Siglip2Tokenizer(vocab=vocabulary, merges=[], padding_side="right", mask_token="<unk>", **names)


def tiny_text_model(kind: str, **vision: object) -> nn.Module:
    """3 layers of width 16, images of 32 pixels in patches of 8; weights large enough that cells differ."""
    torch.manual_seed(0)
    text = {**WIDTH, "vocab_size": 40, "max_position_embeddings": MAX_TOKENS}
    text |= {"bos_token_id": START, "eos_token_id": 99 if "siglip" in kind else END, "pad_token_id": PAD}
    shape = {"num_patches": 16} if kind == "siglip2" else {"image_size": 32}
    settings = {
        "text_config": text,
        "vision_config": {**WIDTH, "patch_size": 8, **shape, **vision},
        "projection_dim": 10,
    }
    if kind == "clipseg":
        settings |= {"extract_layers": [0, 1, 2], "reduce_dim": 8, "decoder_num_attention_heads": 2}
        settings |= {"decoder_intermediate_size": 12, "conditional_layer": 1}
    config_class, model_class = CLASSES[kind]
    if "siglip" in kind:
        settings["text_config"]["projection_size"] = WIDTH["hidden_size"]
    model = model_class(config_class(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.4)
            elif "norm" not in name and parameter.numel() > 1:
                nn.init.normal_(parameter, std=0.1)
        if "siglip" in kind:
            model.logit_scale.fill_(2.0)
            model.logit_bias.fill_(-7.0)
    return model


def save_text_model(folder: Path, kind: str, model: nn.Module | None = None) -> Path:
    """A folder as `save_pretrained` of model, tokenizer and image processor makes it."""
    (model or tiny_text_model(kind)).save_pretrained(folder)
    (letter_tokenizer if kind == "siglip2" else tiny_tokenizer)().save_pretrained(folder)
    PROCESSORS[kind]().save_pretrained(folder)
    return folder
