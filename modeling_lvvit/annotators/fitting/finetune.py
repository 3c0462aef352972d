"""Trains the last stage of a backbone with its head, from the head that was fitted on the frozen backbone."""

import copy
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms import v2
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from ...backbones.feature_search import output_logits, probe_images
from ...backbones.preprocessing import Preprocessing
from ...backbones.resize import forward_options
from ...console import progress_bar
from ...data.images import decode_image
from ...data.loaders import PREFETCH_FACTOR, default_num_workers
from ...finite import check_weights
from ..image_batches import ImageBatches
from ..prefetch import prepared_ahead
from .arguments import FitAnnotatorArguments
from .backbone import Backbone, set_head
from .head import FittedHead, Regression, draw_folds, fit_temperature, log_loss
from .images import LabeledImages


LEARNING_RATE, WEIGHT_DECAY, WARMUP = 1e-4, 0.05, 0.05
CROP_SCALE = (0.4, 1.0)  # share of the image that a crop shows
HELD_OUT_PARTS = 10  # one of them judges
MANY_BLOCKS = 5  # of more, the last quarter is trained; else the last one


@dataclass(frozen=True)
class Finetuned:
    """What finetuning gave.

    Args:
        model: The finetuned classifier, its logits divided by the temperature.
        figures: For the record.
        is_better: Whether it tells more of the held-out images than the frozen backbone with a head fitted on the same images.
    """

    model: nn.Module
    figures: dict[str, Any]
    is_better: bool


class LossModule(nn.Module):
    """A classifier that gives its loss, as the Trainer wants it. Norms keep their statistics and nothing is dropped: what is frozen must
    stay as it was."""

    def __init__(self, model: nn.Module, options: dict[str, Any], class_weights: torch.Tensor | None):
        super().__init__()
        self.model, self.options = model, options
        self.register_buffer("class_weights", class_weights, persistent=False)

    def train(self, mode: bool = True) -> "LossModule":
        """The classifier stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Normalized images `(B, 3, height, width)` and class ids `(B,)` to `loss` and `logits`."""
        logits = output_logits(self.model(pixel_values, **self.options)).float()
        return {"loss": nn.functional.cross_entropy(logits, labels, self.class_weights), "logits": logits}


class StepBar(TrainerCallback):
    """Progress by steps, as other programs of the package show it."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Begins the bar."""
        self.bar = progress_bar(total=state.max_steps, desc="Finetuning", unit="step")

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Moves it on."""
        self.bar.update()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Ends it."""
        self.bar.close()


class Crops(Dataset):
    """Random crops of images, mirrored half of the time."""

    def __init__(self, images: LabeledImages, column: str, rows: np.ndarray, preprocessing: Preprocessing):
        self.images, self.column, self.rows, self.preprocessing = images, column, rows, preprocessing
        self.values = images.rows.select_columns(column).with_format("arrow")
        size, resample = list(preprocessing.image_size), v2.InterpolationMode.BICUBIC
        self.crop = v2.Compose(
            [v2.RandomResizedCrop(size, CROP_SCALE, interpolation=resample, antialias=True), v2.RandomHorizontalFlip()]
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = int(self.rows[index])
        value = self.values[row : row + 1][self.column][0].as_py()
        image = decode_image({"bytes": None, "path": value} if isinstance(value, str) else value)
        pixels = v2.functional.pil_to_tensor(self.crop(image))
        return {
            "pixel_values": self.preprocessing.normalize(pixels),
            "labels": torch.tensor(int(self.images.classes[row])),
        }


def _lists(module: nn.Module) -> Iterator[list[nn.Module]]:
    """The outermost lists of blocks or stages below a module; `layer1`, `layer2`, ... are the stages of one list."""
    groups: dict[str, list[nn.Module]] = {}
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) > 1:
            groups.setdefault(name.rstrip("0123456789"), []).append(child)
        else:
            yield from _lists(child)
    for group in groups.values():
        yield group if len(group) > 1 else list(group[0])


@torch.no_grad()
def last_stage(model: nn.Module, image_size: tuple[int, int]) -> list[str]:
    """Names of the parameters of the last stage and of all that runs behind it: of the list of blocks or stages with the most parameters the
    last one, or of more than `MANY_BLOCKS` the last quarter.

    Raises:
        ValueError: If the network has no such list.
    """
    lists = list(_lists(model))
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no list of stages or blocks, of which the last could be finetuned."
        )
    blocks = max(lists, key=lambda parts: sum(p.numel() for part in parts for p in part.parameters()))
    stage = blocks[-math.ceil(len(blocks) / 4) :] if len(blocks) > MANY_BLOCKS else blocks[-1:]
    names = {module: name for name, module in model.named_modules()}
    order: dict[nn.Module, None] = {}  # modules by their first call
    handles = [module.register_forward_pre_hook(lambda module, _: order.setdefault(module)) for module in names]
    try:
        model(probe_images(image_size).to(next(model.parameters()).device), **forward_options(model, image_size))
    finally:
        for handle in handles:
            handle.remove()
    called = list(order)
    inside = {part for block in stage for part in block.modules()}
    first = next((place for place, module in enumerate(called) if module in inside), len(called))
    trained = inside | set(called[first:])
    return [
        ".".join(filter(None, [names[module], name]))
        for module in names
        if module in trained
        for name, _ in module.named_parameters(recurse=False)
    ]


def finetune(
    args: FitAnnotatorArguments,
    backbone: Backbone,
    images: LabeledImages,
    features: dict[str, np.ndarray],
    fitted: dict[str, FittedHead],
    weights: np.ndarray | None,
    preprocessing: Preprocessing,
    device: torch.device,
) -> Finetuned:
    """Trains the last stage on nine tenths of the images and compares on the other tenth; says which is better.

    Args:
        backbone: Classifier, which is not changed.
        images: With their content hashes.
        features, fitted: By head, of the frozen backbone.
        weights: Of the classes in the loss, `(C,)`, or `None`.
        preprocessing: Of held-out images.
        device: Where to train.
    """
    hashes = np.asarray(images.hashes, dtype=np.int64)
    parts = min(HELD_OUT_PARTS, len(np.unique(hashes)))
    held_out = draw_folds(hashes, images.classes, parts, args.seed) == 0
    sample_weights = np.ones(len(hashes)) if weights is None else weights[images.classes]
    model = copy.deepcopy(backbone.model)
    for name, values in features.items():
        regression = Regression(
            values[~held_out], images.classes[~held_out], sample_weights[~held_out], len(images.class_names)
        )
        head = regression.fit(fitted[name].regularization)
        set_head(model, name, *(torch.from_numpy(part).float() for part in (head.weight, head.bias)))
    model = model.to(device)
    rows = np.flatnonzero(held_out)
    before = predict(model, args, images, rows, preprocessing, device)
    train(model, args, images, np.flatnonzero(~held_out), preprocessing, weights)
    after = predict(model, args, images, rows, preprocessing, device)
    temperature = fit_temperature(after, images.classes[rows], sample_weights[rows])
    for name in features:
        layer = model.get_submodule(name)
        set_head(model, name, layer.weight / temperature, layer.bias / temperature)
    accuracies = [float((logits.argmax(axis=1) == images.classes[rows]).mean()) for logits in (before, after)]
    is_better = accuracies[1] > accuracies[0]
    choice = "the finetuned backbone is kept" if is_better else "the frozen backbone is kept"
    loss = log_loss(after / temperature, images.classes[rows], sample_weights[rows])
    print(
        f"finetuning, {len(rows):,} held-out images: accuracy {100 * accuracies[0]:.1f} % frozen, {100 * accuracies[1]:.1f} % finetuned "
        f"(log-loss {loss:.4f} with temperature {temperature:.3f}): {choice}",
        flush=True,
    )
    figures = {"epochs": args.finetune_epochs, "held_out_images": len(rows), "accuracy_frozen": accuracies[0]}
    figures |= {"accuracy_finetuned": accuracies[1], "log_loss_finetuned": loss, "temperature_finetuned": temperature}
    return Finetuned(
        model.cpu().requires_grad_(True), figures | {"chosen": "finetuned" if is_better else "frozen"}, is_better
    )


@torch.inference_mode()
def predict(
    model: nn.Module,
    args: FitAnnotatorArguments,
    images: LabeledImages,
    rows: np.ndarray,
    preprocessing: Preprocessing,
    device: torch.device,
) -> np.ndarray:
    """Logits of images `(n, C)`, float32."""
    batches = ImageBatches(
        images.rows.select(rows), args.image_column_name, images.keys.take(rows), len(rows), args.batch_size
    )
    options, logits = forward_options(model, preprocessing.image_size), []
    model.eval()
    for _, prepared in prepared_ahead(batches.batches([0]), preprocessing, args.num_workers or 0):
        pixels = torch.stack([image.pixels for image in prepared]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            logits.append(output_logits(model(preprocessing.normalize(pixels), **options)).float().cpu().numpy())
    return np.concatenate(logits)


def train(
    model: nn.Module,
    args: FitAnnotatorArguments,
    images: LabeledImages,
    rows: np.ndarray,
    preprocessing: Preprocessing,
    weights: np.ndarray | None,
) -> None:
    """Trains the last stage of a model and what is behind it, in place.

    Raises:
        ValueError: If it has no stages, or the training diverged.
    """
    names = set(last_stage(model, preprocessing.image_size))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    number = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    is_cpu = next(model.parameters()).device.type == "cpu"
    slow = "; this is slow on a CPU" if is_cpu else ""
    print(f"finetuning {number:,} parameters of the last stage for {args.finetune_epochs:g} epochs{slow}", flush=True)
    class_weights = None if weights is None else torch.from_numpy(weights).float()
    module = LossModule(model, forward_options(model, preprocessing.image_size), class_weights)
    workers = 0 if is_cpu else args.num_workers or default_num_workers(is_cpu)
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            folder,
            num_train_epochs=args.finetune_epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            warmup_steps=WARMUP,
            lr_scheduler_type="cosine",
            bf16=args.bf16,
            seed=args.seed,
            use_cpu=is_cpu,
            dataloader_num_workers=workers,
            dataloader_persistent_workers=workers > 0,
            dataloader_prefetch_factor=PREFETCH_FACTOR if workers else None,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        training._n_gpu = min(
            training.n_gpu, 1
        )  # of several GPUs one: a last stage is not worth what `DataParallel` costs
        crops = Crops(images, args.image_column_name, rows, preprocessing)
        trainer = Trainer(module, training, train_dataset=crops, callbacks=[StepBar()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    check_weights(model, "the finetuned backbone")
