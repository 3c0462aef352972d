"""Who takes part in a benchmark: a model with its options, and what it does in a step."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate.utils import send_to_device
from torch import nn

from ..deployment import prepare_for_inference
from ..export.verification import exported_runner
from ..modeling_lvvit import LVViTForImageClassification
from ..original.model import OriginalLVViT, original_loss
from ..token_labeling import TokenLabelTrainingArguments, finish_images
from ..token_labeling.losses import LABEL_FIELDS, TokenLabelingLoss
from ..variants import VARIANTS, variant_config


PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
TRAINING, INFERENCE = {"training", "run"}, {"inference"}
EVERYONE, OURS = {"ours", "timm", "original"}, {"ours"}
BOTH = TRAINING | INFERENCE
PRECISION = "weights in inference, autocast in training (and where the model is original/)"
# option -> whose it is, in which modes, and what it does
OPTIONS = {
    **dict.fromkeys(PRECISIONS, (EVERYONE, BOTH, PRECISION)),
    **dict.fromkeys(ATTENTIONS, (OURS, BOTH, "attention implementation")),
    "compiled": (EVERYONE, BOTH, "torch.compile"),
    "kept_memory": (EVERYONE, BOTH, "freed memory stays in the process, as with train_tl.py; on a CPU"),
    "channels_last": (EVERYONE, BOTH, "weights and images in channels-last layout"),
    "fused": (OURS, INFERENCE, "batch norms and residual divisor folded in"),
    "deployed": (OURS, INFERENCE, "prepare_for_inference: fused, compiled, packed"),
    "int8": (OURS, INFERENCE, "deployed, with 8-bit weights; on a CPU"),
    "onnx": (OURS, INFERENCE, "exported, fused, run by ONNX Runtime; on a CPU"),
    "plain": (OURS, TRAINING, "trained with plain labels"),
    "checkpointing": (OURS, TRAINING, "activation checkpointing"),
}


@dataclass(frozen=True)
class Setting:
    """What all models of a comparison share; with `num_classes` of `None` each has its own number (1000, or that of a folder)."""

    device: torch.device
    batch_size: int
    num_classes: int | None = None


@dataclass(frozen=True)
class BenchmarkModel:
    """A model and how it runs, written `NAME@SIZE+option+option`.

    Args:
        source: `"ours"`, `"timm"` or `"original"` (the authors' model and step, rendered plainly).
        name: A published size, a folder with a saved model of ours, or a model of timm.
        options: Of `OPTIONS`.
        square_size: Height and width of its images in pixels; default: its own size.
        arguments: Further ones for the constructor of timm, as pairs.
    """

    source: str
    name: str
    options: frozenset[str] = frozenset()
    square_size: int | None = None
    arguments: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> "BenchmarkModel":
        """Reads `lvvit_s_224+fused+bfloat16`, `timm/cait_m36_384@448`, `original/lvvit_s_224`, `path/to/folder`.

        Raises:
            ValueError: If the model or an option is unknown, or they do not fit.
        """
        name, *options = text.split("+")
        name, has_side, side = name.partition("@")
        if has_side and not (side.isdecimal() and int(side)):
            raise ValueError(f"{text!r}: expected the side of its images in pixels behind the @, got {side!r}.")
        source, _, rest = name.partition("/")
        if source in ("timm", "original"):
            name = rest
        else:
            source = "ours"
        is_ours = name in VARIANTS or (Path(name) / "config.json").is_file()
        if not (timm.is_model(name) if source == "timm" else is_ours):
            raise ValueError(
                f"{text!r} names no model: expected one of {', '.join(VARIANTS)} or a folder with a saved model, "
                "original/ and one of these, or timm/ and a model of timm."
            )
        for option in options:
            sources, _, _ = OPTIONS.get(option, (EVERYONE, None, None))
            if option not in OPTIONS or source not in sources:
                reason = "is for our models only" if option in OPTIONS else "is unknown"
                raise ValueError(f"{text!r}: option {option} {reason}; options are {', '.join(OPTIONS)}.")
        for choice, names in (("precision", PRECISIONS), ("attention", ATTENTIONS)):
            if len(set(names) & set(options)) > 1:
                raise ValueError(f"{text!r} has more than one {choice}.")
        return cls(source, name, frozenset(options), int(side) if has_side else None)

    def check_mode(self, mode: str) -> None:
        """Raises a `ValueError` if an option does nothing in a mode."""
        unused = sorted(option for option in self.options if mode not in OPTIONS[option][1])
        if unused:
            raise ValueError(f"{self.source} {self.name}: option {unused[0]} does nothing in mode {mode}.")

    @property
    def dtype(self) -> torch.dtype:
        """Precision; float32 where none is named."""
        return next((PRECISIONS[option] for option in self.options if option in PRECISIONS), torch.float32)

    def image_size(self) -> tuple[int, int]:
        """Height and width of its images."""
        if self.square_size is not None:
            return self.square_size, self.square_size
        if self.source == "timm":
            return timm.get_pretrained_cfg(self.name).input_size[1:]
        return self._config(None).image_height_width

    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of its patch tokens; for models of timm those of patches of 16 pixels."""
        if self.source == "timm":
            height, width = self.image_size()
            return height // 16, width // 16
        return self._config(None).grid_size

    def num_classes(self, asked: int | None) -> int:
        """Outputs of its model."""
        return asked or (1000 if self.source == "timm" else self._config(None).num_labels)

    def build(self, num_classes: int | None = None) -> nn.Module:
        """The model with random weights in float32."""
        if self.source == "timm":
            create = {"num_classes": num_classes or 1000, **dict(self.arguments)}
            if self.square_size is not None and timm.get_pretrained_cfg(self.name).fixed_input_size:
                create["img_size"] = self.square_size
            return timm.create_model(self.name, **create)
        model_class = OriginalLVViT if self.source == "original" else LVViTForImageClassification
        return model_class(self._config(num_classes))

    def _config(self, num_classes: int | None):
        overrides = {} if num_classes is None else {"num_labels": num_classes}
        if self.square_size is not None:
            overrides["image_size"] = self.square_size
        if self.name in VARIANTS:
            config = variant_config(self.name, **overrides)
        else:
            config = LVViTForImageClassification.config_class.from_pretrained(self.name, **overrides)
        config._attn_implementation = next((option for option in self.options if option in ATTENTIONS), "sdpa")
        return config

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """Mixed precision, where asked for."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(device.type, self.dtype)


def inference_call(benchmark_model: BenchmarkModel, setting: Setting) -> Callable[[], torch.Tensor]:
    """Logits of a fixed batch, without gradients."""
    torch.manual_seed(0)
    model = benchmark_model.build(setting.num_classes).eval().to(setting.device)
    options, context = benchmark_model.options, nullcontext
    pixels = torch.randn(setting.batch_size, 3, *benchmark_model.image_size(), device=setting.device)
    if "onnx" in options:
        run = exported_runner(model, benchmark_model.dtype)
        return lambda: run(pixels)["logits"]
    if benchmark_model.source == "original":
        context = lambda: benchmark_model.autocast(setting.device)  # noqa: E731  their evaluation runs under AMP
    elif options & {"deployed", "int8"}:
        model = prepare_for_inference(model, benchmark_model.dtype, int8_weights="int8" in options)
        print(f"{benchmark_model.name}: {model.preparation}", flush=True)
    else:
        model = (model.fuse() if "fused" in options else model).to(benchmark_model.dtype)
    if benchmark_model.source != "original":
        pixels = pixels.to(benchmark_model.dtype)
    if "channels_last" in options:
        model, pixels = (part.to(memory_format=torch.channels_last) for part in (model, pixels))
    if "compiled" in options:
        model = torch.compile(model)

    @torch.no_grad()
    def call() -> torch.Tensor:
        with context():
            output = model(pixels)
        return output if isinstance(output, torch.Tensor) else output.logits

    return call


def training_call(
    benchmark_model: BenchmarkModel, setting: Setting, batches: Iterator[dict[str, torch.Tensor]]
) -> Callable[[], None]:
    """A training step: forward, loss, backward, AdamW.

    Ours takes the loss of `TokenLabelTrainer` and the fused optimizer that is its default. The original one gets its dense
    targets ready made (its loader makes them) and the optimizer of its time. Models of timm learn plain labels. One of the batches
    (of `TokenLabelCollator`) is taken for each step.
    """
    torch.manual_seed(0)
    options, is_original = benchmark_model.options, benchmark_model.source == "original"
    model = benchmark_model.build(setting.num_classes).train().to(setting.device)
    if "channels_last" in options:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=None if is_original else True)
    if "checkpointing" in options:
        model.gradient_checkpointing_enable()
    compute_loss = _loss_function(model, benchmark_model)
    forward = torch.compile(model) if "compiled" in options else model

    def call() -> None:
        batch = finish_images(send_to_device(next(batches), setting.device, non_blocking=True))
        optimizer.zero_grad()
        compute_loss(forward, batch).backward()
        optimizer.step()

    return call


LossFunction = Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]


def _token_labeling_loss(grid_size: tuple[int, int], num_classes: int) -> TokenLabelingLoss:
    """The losses of `TokenLabelTrainer` with its defaults."""
    return TokenLabelingLoss(TokenLabelTrainingArguments("unused", report_to="none"), grid_size, num_classes)


def _loss_function(model: nn.Module, benchmark_model: BenchmarkModel) -> LossFunction:
    """What computes the loss of a batch of `TokenLabelCollator` from the forward of a model."""
    targets = None  # of the original

    def our_loss(forward: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mix_mask = batch.get("mix_mask")
        with benchmark_model.autocast(batch["pixel_values"].device):
            outputs = forward(pixel_values=batch["pixel_values"], mix_mask=mix_mask)
        return token_labeling_loss(outputs, {name: batch[name] for name in fields if name in batch}, mix_mask)["loss"]

    def plain_loss(forward: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with benchmark_model.autocast(batch["labels"].device):
            return nn.functional.cross_entropy(forward(batch["pixel_values"]), batch["labels"], label_smoothing=0.1)

    def original_model_loss(forward: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        nonlocal targets
        targets = dense_targets(batch, model.grid_size, model.head.out_features) if targets is None else targets
        with benchmark_model.autocast(targets.device):
            return original_loss(forward(batch["pixel_values"]), targets, model.grid_size)

    if benchmark_model.source == "ours":
        token_labeling_loss = _token_labeling_loss(model.config.grid_size, model.config.num_labels)
        fields = ("labels",) if "plain" in benchmark_model.options else LABEL_FIELDS
        return our_loss
    return plain_loss if benchmark_model.source == "timm" else original_model_loss


def dense_targets(batch: dict[str, torch.Tensor], grid_size: tuple[int, int], num_classes: int) -> torch.Tensor:
    """Smoothed probabilities of every class for human label, crop and every patch token, `(B, C, 2 + N)` float32."""
    _, cls_target, token_targets = _token_labeling_loss(grid_size, num_classes).crop_targets(batch)
    human = nn.functional.one_hot(batch["labels"], num_classes).float()
    columns = [human.unsqueeze(1), cls_target.to_dense().unsqueeze(1), token_targets.to_dense()]
    return torch.cat(columns, dim=1).mul_(0.9).add_(0.1 / num_classes).transpose(1, 2).contiguous()
