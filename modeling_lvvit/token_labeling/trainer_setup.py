"""Whether arguments, model and data fit each other, before training."""

from typing import Any

import timm
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..annotators.online import OnlineAnnotator
from ..backbones.patch_head import add_patch_head, has_patch_head
from ..backbones.resize import native_image_size
from ..data.classes.multi_label import MULTI_LABEL, is_multi_label
from ..data.sampling import BALANCED
from ..labels.crops import check_drawn
from .arguments import TokenLabelTrainingArguments
from .dataset import TokenLabelDataset
from .stream import TokenLabelStream


logger = logging.get_logger(__name__)


def with_patch_head(model: nn.Module, train_dataset: Any | None) -> nn.Module:
    """A model that takes `mix_mask` and has patch logits: itself, or any other classifier with a patch head added.

    The transform of the training samples tells the size of the images; without it the configuration does.

    Raises:
        ValueError: If the size is unknown, or the model has no spatial features.
    """
    if has_patch_head(model):
        return model
    size = getattr(getattr(train_dataset, "transform", None), "image_size", None) or native_image_size(model)
    if size is None:
        raise ValueError(
            f"{type(model).__name__} does not say what images it takes. Add the patch head before: "
            "add_patch_head(model, (height, width))."
        )
    return add_patch_head(model, size)


def token_grid_size(model: nn.Module) -> tuple[int, int]:
    """Rows and columns of the patch logits of a model."""
    if hasattr(model, "patch_grid_size"):
        return model.patch_grid_size
    config = model.config
    if hasattr(config, "grid_size"):
        return tuple(config.grid_size)
    size = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size,) * 2
    return size[0] // config.patch_size, size[1] // config.patch_size


def check_fit(
    args: TokenLabelTrainingArguments,
    train_dataset: Any,
    num_classes: int,
    grid_size: tuple[int, int],
    annotator: OnlineAnnotator | None,
) -> None:
    """Checks what would otherwise go wrong in training, or silently.

    Raises:
        ValueError: If several GPUs would share one process, dense columns would be dropped, the data or the annotator has other
            classes, there are both stored labels and an annotator, or the model has fewer than 2 x 2 tokens to label.
    """
    if annotator is not None:
        if getattr(train_dataset, "has_label_maps", False):
            raise ValueError("The training data has label maps; train with them or with an annotator, not with both.")
        annotator.check_num_classes(num_classes)
        if args.patch_target == "image":
            text = "Patch tokens learn from an annotator or the image label (`patch_target` 'image'), not from both."
            raise ValueError(text)
    if trains_patches(args, train_dataset, annotator) and min(grid_size) < 2:
        raise ValueError(
            f"The model has {grid_size[0]} x {grid_size[1]} tokens; token labels need at least 2 x 2. Give it larger images or "
            "smaller patches, or train with plain labels (dense_weight 0)."
        )
    if args.n_gpu > 1:
        raise ValueError(
            "DataParallel would tear apart the images that are mixed with each other. Start one process per GPU: "
            f"accelerate launch --num_processes {args.n_gpu} ..., or set CUDA_VISIBLE_DEVICES."
        )
    if args.remove_unused_columns:
        raise ValueError(
            "remove_unused_columns=True would drop the dense labels and crop boxes before they reach the loss; "
            "leave it at False."
        )
    if args.train_sampling_strategy == BALANCED and not isinstance(train_dataset, TokenLabelDataset | None):
        raise ValueError(
            "`train_sampling_strategy` balanced needs to know the class of every image before training, which a stream does not: use "
            "`class_weights` with a file or numbers, or data that is no stream (a TokenLabelDataset)."
        )
    if getattr(train_dataset, "has_crop_maps", False):
        check_crop_options(args, train_dataset)
    if isinstance(train_dataset, (TokenLabelDataset, TokenLabelStream)):
        train_dataset.check_num_classes(num_classes)
    if isinstance(train_dataset, TokenLabelDataset) and (count := train_dataset.num_unlabeled):
        _check_unlabeled(args, count, len(train_dataset), trains_patches(args, train_dataset, annotator))
    if args.cell_target != "map" and annotator is not None and set(args.mix_methods) - {"token"}:
        raise ValueError(
            f"`cell_target` {args.cell_target!r} compares the annotator's classes of an image with its human label, and `mix_methods` cutmix and "
            "mixup show it two images at once. Mix by token."
        )


def _check_unlabeled(args: TokenLabelTrainingArguments, count: int, total: int, has_dense: bool) -> None:
    """Raises a `ValueError` if images without a human label would have nothing to learn from, or something needs that label."""
    reasons = {
        "`patch_target` image learns the human label": args.patch_target == "image",
        "`train_sampling_strategy` balanced draws by it": args.train_sampling_strategy == BALANCED,
        "there are no dense labels to learn from instead (`token_labels` or `annotator`, and `dense_weight` above 0)": not has_dense,
    }
    if given := [reason for reason, holds in reasons.items() if holds]:
        raise ValueError(
            f"{count:,} of {total:,} training images have no human label, and {' and '.join(given)}. Leave these images out, or label them."
        )


def check_crop_options(args: TokenLabelTrainingArguments, train_dataset: TokenLabelDataset) -> None:
    """Raises a `ValueError` if a run with labels of crops would draw others than those, or rows more than once in an epoch."""
    options = {"data_seed": args.data_seed, **train_dataset.transform.draw_options()}
    record = train_dataset.label_maps.record
    check_drawn(record, options)
    if record.timm != timm.__version__ and train_dataset.transform.rand_augment is not None:
        logger.warning(
            "The crops were labelled with timm %s, here is %s: if its RandAugment differs, labels lie beside their crops.",
            record.timm, timm.__version__,
        )  # fmt: skip
    if args.train_sampling_strategy == BALANCED:
        raise ValueError(
            "`train_sampling_strategy` balanced draws rows several times in an epoch, with other crops each time, and the label set has labels of "
            "one crop of each row. Weigh the classes (`class_weights`), or label crops in training (`annotator`)."
        )
    if args.label_crop == "authors":
        raise ValueError(
            "`label_crop` authors cuts maps of whole images, and the label set has maps of crops: leave it out."
        )


def check_problem_type(args: TokenLabelTrainingArguments, config: PreTrainedConfig, *samples: Any) -> None:
    """Checks that model and data agree on whether an image may have several classes, and that nothing else is asked for than plain
    labels of such images.

    Raises:
        ValueError: If they do not, or there is.
    """
    for part in samples:
        has_several = getattr(part, "is_multi_label", False)
        if isinstance(part, (TokenLabelDataset, TokenLabelStream)) and has_several != is_multi_label(config):
            raise ValueError(
                f"The data has {'several classes' if has_several else 'one class'} of each image, the model has the `problem_type` "
                f"{config.problem_type}. Set `model.config.problem_type` to {MULTI_LABEL if has_several else 'single_label_classification'}."
            )
    if not is_multi_label(config):
        return
    options = {
        "patch_target": args.patch_target == "image",
        "class_weights": args.class_weights is not None,
        "train_sampling_strategy": args.train_sampling_strategy == BALANCED,
    }
    if given := [f"`{name}`" for name, is_given in options.items() if is_given]:
        raise ValueError(
            f"Images have several classes, and {' and '.join(given)} {'is' if len(given) == 1 else 'are'} for images with one class each: leave "
            f"{'it' if len(given) == 1 else 'them'} out."
        )


def trains_patches(args: TokenLabelTrainingArguments, train_dataset: Any, annotator: OnlineAnnotator | None) -> bool:
    """Whether patch tokens learn anything: from label maps, an annotator, or the image label."""
    has_labels = getattr(train_dataset, "has_label_maps", False) or annotator is not None
    return bool(has_labels or args.patch_target == "image") and args.dense_weight > 0


def use_patch_head(model: nn.Module, is_trained: bool) -> None:
    """Lets the patch head enter the prediction of LV-ViT, or the saved weights of another model, exactly when it is trained."""
    config = model.config
    if hasattr(model, "saves_patch_head"):
        model.saves_patch_head = is_trained
    if not hasattr(config, "patch_logits_weight"):
        return
    if not is_trained and config.patch_logits_weight:
        logger.info("No dense labels: the patch head is not trained and left out of `logits`.")
        config.patch_logits_weight = 0.0
    elif is_trained and not config.patch_logits_weight:
        config.patch_logits_weight = type(config)().patch_logits_weight
