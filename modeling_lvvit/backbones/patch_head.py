"""Gives any image classifier of transformers or timm a patch head, so that it can learn from dense labels.

The features are those that `DenseClassifier` finds: the last layer output with a spatial layout from which the classifier reads. A
linear layer on each of their cells gives `patch_logits`; the classifier itself stays as it is and gives `cls_logits`. Nothing is
wrapped: the model keeps its weights' names, is saved by its own `save_pretrained`, and is loaded by `AutoModelForImageClassification`
as the plain model that it was, with the patch head as weights that this leaves out.
"""

import functools
import inspect
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, TimmWrapperConfig, TimmWrapperForImageClassification
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, ModelOutput, cached_file, logging

from ..data.classes.multi_label import is_multi_label
from ..finite import check_weights
from .class_rows import ClassRows
from .feature_hook import FeatureHook, find_features, unused_parameters
from .feature_search import probe_images
from .resize import forward_options


logger = logging.get_logger(__name__)
PATCH_HEAD = "patch_head."  # in the names of its weights
INITIALIZER_RANGE = 0.02  # of linear layers in LV-ViT and ViT


@dataclass
class PatchHeadOutput(ModelOutput):
    """
    Output of a classifier with a patch head.

    Args:
        loss (`torch.FloatTensor`, *optional*): Cross-entropy of `logits`; given when `labels` are.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`): Prediction of the classifier.
        cls_logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`): The same.
        patch_logits (`torch.FloatTensor` of shape `(batch_size, rows * columns, num_labels)`):
            Scores of each cell, row-major, in the image that the cell belongs to.
        hidden_states, attentions: Those of the classifier, if it was asked for them.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    cls_logits: torch.FloatTensor | None = None
    patch_logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class PatchHeadMixin:
    """What `add_patch_head` puts in front of a classifier's class."""

    feature_hook: FeatureHook
    saves_patch_head = True
    # by the names that the modules have now, not those of older versions, which only `from_pretrained` can read
    saves_own_names = False

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        mix_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> PatchHeadOutput:
        """
        Args:
            pixel_values: Normalized images, `(batch_size, num_channels, height, width)`.
            labels: Class ids `(batch_size,)`; when given, `loss` is the cross-entropy of `logits`. With the `problem_type`
                multi_label_classification 0 and 1 `(batch_size, num_labels)`, and the binary cross-entropy of each class.
            mix_mask: Boolean `(batch_size, rows, columns)`, equal for both partners of a pair. The pixels of masked cells are
                exchanged between sample b and sample B-1-b, and `patch_logits` put back. For a patch embedding without overlap
                this is MixToken exactly: what is exchanged before it and after it are the same patches.
        """
        hook = self.feature_hook
        if mix_mask is not None:
            pixel_values = exchange_pixels(pixel_values, mix_mask)
        kwargs.pop("return_dict", None)
        hook.open()
        try:
            outputs = super().forward(pixel_values=pixel_values, **{**hook.forward_options, **kwargs})
            features = hook.take()
        finally:
            hook.close()
        if mix_mask is not None:
            features = torch.where(mix_mask.flatten(1).unsqueeze(-1), features.flip(0), features)
        loss = None
        if labels is not None and is_multi_label(self.config):
            loss = nn.functional.binary_cross_entropy_with_logits(outputs.logits, labels.to(outputs.logits))
        elif labels is not None:
            loss = nn.functional.cross_entropy(outputs.logits, labels)
        others = (getattr(outputs, name, None) for name in ("hidden_states", "attentions"))
        return PatchHeadOutput(loss, outputs.logits, outputs.logits, get_patch_head(self)(features), *others)

    @property
    def patch_grid_size(self) -> tuple[int, int]:
        """Rows and columns of `patch_logits`."""
        return self.feature_hook.feature_map.grid_size

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in `PreTrainedModel`; without the patch head if `saves_patch_head` was set to `False`."""
        if not self.saves_patch_head:
            weights = self.state_dict() if state_dict is None else state_dict
            state_dict = {name: value for name, value in weights.items() if PATCH_HEAD not in name}
        if self.saves_own_names:
            kwargs["save_original_format"] = False
        return super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)

    def __reduce_ex__(self, protocol: int) -> Any:
        if type(self).__bases__[0] is not PatchHeadMixin:  # a class that a library has put in front of ours
            return super().__reduce_ex__(protocol)
        return _blank, (type(self).__bases__[1],), self.__dict__


@contextmanager
def weights_by_own_names(model: nn.Module) -> Iterator[None]:
    """Lets a model with an added patch head save its weights so that `load_state_dict` can read them, as the Trainer does."""
    if not isinstance(model, PatchHeadMixin):
        yield
        return
    model.saves_own_names = True
    try:
        yield
    finally:
        model.saves_own_names = False


def exchange_pixels(pixel_values: torch.Tensor, mix_mask: torch.Tensor) -> torch.Tensor:
    """Exchanges the pixels of masked cells of sample b with those of sample B-1-b.

    Args:
        pixel_values: `(batch_size, channels, height, width)`.
        mix_mask: Boolean `(batch_size, rows, columns)`; where the image cannot be divided evenly, pixels follow the nearest cell.
    """
    mask = nn.functional.interpolate(mix_mask.unsqueeze(1).float(), size=pixel_values.shape[-2:], mode="nearest-exact")
    return torch.where(mask.bool(), pixel_values.flip(0), pixel_values)


def has_patch_head(model: nn.Module) -> bool:
    """Whether a model takes `mix_mask`, as LV-ViT and models with an added patch head do."""
    return "mix_mask" in inspect.signature(model.forward).parameters


def get_patch_head(model: nn.Module) -> nn.Module:
    """The added patch head."""
    return _owner(model).patch_head


def add_patch_head(model: nn.Module, image_size: tuple[int, int]) -> PreTrainedModel:
    """Gives a classifier a patch head with random weights.

    The features are found by running a copy of the model on two images. Parameters that take no part in the logits (mask tokens,
    auxiliary heads) are frozen, so that distributed training does not wait for their gradients.

    Args:
        model: Image classifier of transformers, which is changed and returned; or of timm, which is returned within a
            `TimmWrapperForImageClassification`.
        image_size: Height and width of the images in pixels.

    Raises:
        ValueError: If the model has a patch head already, no spatial features from which its head reads, takes no images of this size, or has fewer than
            2 x 2 cells on them.
    """
    if has_patch_head(model):
        raise ValueError(f"{type(model).__name__} has a patch head already.")
    if not isinstance(model, PreTrainedModel):
        model = _in_transformers(model, tuple(image_size))
    options = forward_options(model, image_size)
    if options:
        logger.warning(
            "%s was made for other images than %d x %d: its position table is resized in every forward pass, and later users of "
            "the trained model must ask for this (interpolate_pos_encoding=True), unless `resize_classifier` makes it fit.",
            type(model).__name__,
            *image_size,
        )
    hook, width, is_normed = find_features(model, tuple(image_size), options)
    for name in unused_parameters(model, hook):
        model.get_parameter(name).requires_grad_(False)
    head = nn.Linear(width, model.config.num_labels)
    nn.init.trunc_normal_(head.weight, std=INITIALIZER_RANGE)
    nn.init.zeros_(head.bias)
    # features that the classifier itself normalizes only after pooling are normalized for the patch head too
    parameter = next(model.parameters())
    head = nn.Sequential(nn.Identity() if is_normed else nn.LayerNorm(width), head).to(parameter)
    _owner(model).patch_head = head
    model.feature_hook = hook
    model.get_submodule(hook.feature_map.module_name).register_forward_hook(hook.store)
    model.__class__ = _class_with_patch_head(type(model))
    return model


def load_patch_head(
    model: PreTrainedModel, path: str, revision: str | None = None, rows: ClassRows | None = None
) -> bool:
    """Takes the weights of the patch head over from a saved model that had one of the same shape.

    Args:
        model: With a patch head.
        path: Folder or Hub name of the saved model.
        revision: On the Hub.
        rows: Which of its classes become those of the model; default: it has the same ones.

    Returns:
        Whether there were any for one of the classes.

    Raises:
        ValueError: If they are NaN or infinite.
    """
    head = get_patch_head(model)
    expected, weights = head.state_dict(), {}
    for file in _weight_files(path, revision):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  the file is no mapping
                _, is_head, name = key.rpartition(PATCH_HEAD)
                if is_head and name in expected:
                    weights[name] = tensors.get_tensor(key)
    if rows is not None and not rows.is_identity:
        if rows.are_new:
            return False
        for name in {"1.weight", "1.bias"} & weights.keys():
            if len(weights[name]) == len(rows.old_names) and weights[name].shape[1:] == expected[name].shape[1:]:
                weights[name] = rows.merged(weights[name], expected[name])
    if weights.keys() != expected.keys() or any(weights[name].shape != expected[name].shape for name in expected):
        return False
    check_weights({PATCH_HEAD + name: tensor for name, tensor in weights.items()}, path)
    head.load_state_dict(weights)
    return True


def restore_patch_head(
    model: PreTrainedModel, image_size: tuple[int, int], path: str, revision: str | None, unexpected: Iterable[str]
) -> PreTrainedModel:
    """A loaded classifier with the patch head that it was saved with, if it was.

    Args:
        model: Classifier, which is changed.
        image_size: Height and width of the images in pixels.
        path, revision: Where it was loaded from.
        unexpected: Names of weights that were saved with it and that it does not have.

    Raises:
        ValueError: If the patch head cannot be given to it.
    """
    if not any(PATCH_HEAD in key for key in unexpected):
        return model
    model = add_patch_head(model, image_size)
    if not load_patch_head(model, path, revision):
        raise ValueError("its patch head has another shape than its features need, or is not stored as safetensors.")
    return model


def _weight_files(path: str, revision: str | None) -> list[str | Path]:
    """Weight files that may hold a patch head: all of a folder; on the Hub the one file, or the shards that the index names."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return sorted(folder.glob("*.safetensors"))
    find = functools.partial(cached_file, path, revision=revision, _raise_exceptions_for_missing_entries=False)
    index = find(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        file = find(SAFE_WEIGHTS_NAME)
        return [file] if file else []
    shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    return [find(shard) for shard in sorted({shards[key] for key in shards if PATCH_HEAD in key})]


def _owner(model: nn.Module) -> nn.Module:
    """The module that holds the patch head. The wrapper of timm models takes every weight for one of timm's when it loads."""
    return model.timm_model if isinstance(model, TimmWrapperForImageClassification) else model


def _blank(base: type) -> PreTrainedModel:
    """An empty model of a class with a patch head, for copies."""
    extended = _class_with_patch_head(base)
    return extended.__new__(extended)


@functools.cache
def _class_with_patch_head(base: type) -> type:
    # the name stays, so that a saved configuration names the plain class
    return type(base.__name__, (PatchHeadMixin, base), {"__module__": base.__module__, "__doc__": base.__doc__})


def _in_transformers(model: nn.Module, image_size: tuple[int, int]) -> PreTrainedModel:
    """A model of timm as one of transformers, with its weights.

    Raises:
        ValueError: If it is none, or could not be built again from its name: then it could be saved, but not loaded.
    """
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if name is None:
        raise ValueError(f"{type(model).__name__} is neither a model of transformers nor one of timm.")
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    for model_args in (None, {"img_size": list(image_size)}):
        config = TimmWrapperConfig(architecture=name, num_labels=model.num_classes, model_args=model_args)
        with suppress(TypeError), torch.random.fork_rng(devices=[]):  # a network without a fixed input size
            copied = TimmWrapperForImageClassification(config)
            if {key: value.shape for key, value in copied.timm_model.state_dict().items()} == shapes:
                copied.timm_model.load_state_dict(model.state_dict())
                if _agree(copied.timm_model.to(next(model.parameters())), model, image_size):
                    copied.timm_model = model
                    return copied
    raise ValueError(
        f"{name} was made with other arguments than its own, with which it could not be loaded again. Make it with "
        "TimmWrapperForImageClassification(TimmWrapperConfig(architecture, model_args={...}, num_labels=...))."
    )


@torch.no_grad()
def _agree(one: nn.Module, other: nn.Module, image_size: tuple[int, int]) -> bool:
    """Whether two models give the same logits; pooling, for example, has no weights that would tell."""
    images = probe_images(image_size).to(next(one.parameters()))
    logits = []
    for model in (one, other):
        was_training = model.training
        logits.append(model.eval()(images))
        model.train(was_training)
    return torch.allclose(*logits, atol=1e-5, rtol=1e-3)
