"""Fully sharded training (FSDP2): what accelerate leaves to its users."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, broadcast
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from .base_arguments import BaseImageTrainingArguments


logger = logging.get_logger(__name__)


def is_fsdp_requested() -> bool:
    """Whether FSDP was chosen, in the configuration of accelerate or with `--fsdp`."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def configure_fsdp2(accelerator: Accelerator, args: BaseImageTrainingArguments, model: nn.Module) -> bool:
    """Prepares accelerate for FSDP2 if that was asked for, and says whether weights will be sharded.

    On CPU processes accelerate would train with whole copies without a word: it knows FSDP for accelerators only. Transformer
    layers are the units by default. Mixed precision is autocast, as without FSDP: accelerate's policy would cast batch norm to
    bfloat16, but not its statistics.

    Raises:
        ValueError: If FSDP1 is asked for.
    """
    state = accelerator.state
    if is_fsdp_requested() and state.distributed_type is DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    if state.distributed_type is not DistributedType.FSDP:
        return False
    plugin = state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(f"Only FSDP2 is supported: set fsdp_version to 2, not to {plugin.fsdp_version}.")
    plugin.mixed_precision_policy = None
    if not plugin.transformer_cls_names_to_wrap:
        plugin.transformer_cls_names_to_wrap = sorted(layer_class_names(model))
    return True


def layer_class_names(model: nn.Module) -> set[str]:
    """Names of the classes of which a network is made up: transformer layers; in networks without such, those of which a module has
    several, the outermost ones."""
    layers = {type(part).__name__ for part in model.modules() if isinstance(part, GradientCheckpointingLayer)}
    if layers:
        return layers
    siblings = Counter(
        (id(parent), type(part)) for parent in model.modules() for part in parent.children() if any(part.children())
    )
    repeated = {
        part for (_, part), count in siblings.items() if count > 1 and not part.__module__.startswith("torch.")
    }
    outermost = {type(part) for part in _outermost(model, tuple(repeated))}
    if not outermost:
        logger.warning("%s has no repeated layers to shard one by one: it is one unit.", type(model).__name__)
    return {part.__name__ for part in outermost}


def _outermost(module: nn.Module, classes: tuple[type, ...]) -> Iterator[nn.Module]:
    """Modules of some classes that do not lie within others of them."""
    for part in module.children():
        if isinstance(part, classes):
            yield part
        else:
            yield from _outermost(part, classes)


def broadcast_buffers(accelerator: Accelerator, model: nn.Module) -> None:
    """Gives all processes the batch-norm statistics of the main one, which are those that are saved."""
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            broadcast(buffer)


@contextmanager
def own_class(model: nn.Module) -> Iterator[None]:
    """Gives a sharded model its own class back within a `with` block: FSDP2 puts another in its place, whose code would be saved
    next to the weights."""
    sharded_class = type(model)
    if isinstance(model, FSDPModule):
        model.__class__ = sharded_class.__bases__[1]
    try:
        yield
    finally:
        model.__class__ = sharded_class
