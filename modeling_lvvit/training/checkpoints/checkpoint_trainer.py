"""A `Trainer` whose checkpoints are whole, or known not to be."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ...backbones.patch_head import PATCH_HEAD, weights_by_own_names
from ...data.files.atomic_files import write_json
from ...data.files.digests import DIGESTS
from ...hub.file_checks import write_weight_digests
from ...hub.hub_trainer import HubTrainer
from ..base_arguments import BaseImageTrainingArguments
from ..divergence import DivergenceCheck
from ..fsdp import broadcast_buffers, own_class
from ..throughput import Throughput
from .record import read_json
from .saving import Saving, age_checkpoints
from .whole import seal_checkpoint


ALL_RESULTS = "all_results.json"


class CheckpointTrainer(HubTrainer):
    """A `Trainer` that writes no weights which are NaN or infinite, seals checkpoints with digests before it deletes older ones, and ends in
    all processes with one message where one cannot write.

    Attributes:
        throughput: Which does not count the time of saving.
        divergence: What looks at weights.
        saving: What remembers failures until all processes know of them.
    """

    def __init__(self, model: nn.Module, args: BaseImageTrainingArguments, *positional: Any, **kwargs: Any):
        super().__init__(model, args, *positional, **kwargs)
        self.throughput = Throughput()
        self.saving = Saving()
        self.divergence = DivergenceCheck(self.accelerator, args)
        self.add_callback(self.divergence)

    def tensors_to_save(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights and statistics of the model by name, sharded where they are."""
        yield from self.accelerator.unwrap_model(self.model, keep_torch_compile=False).state_dict().items()

    def check_weights(self) -> None:
        """Raises a `DivergenceError` in all processes if something that would be saved is NaN or infinite."""
        self.divergence.check_weights(self.tensors_to_save(), self.state)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`, with whole weights where they are sharded; a `DivergenceError` in place of weights that are not finite."""
        # whole weights are the same in all processes, of which one may save alone
        self.divergence.check_weights(self.tensors_to_save(), self.state, of_all_processes=self.is_fsdp_enabled)
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            if _internal_call:  # by all processes
                self.saving.agree()
            return
        broadcast_buffers(self.accelerator, self.model)  # a sharded checkpoint takes them from any process
        self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        if _internal_call:
            self.saving.agree()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        with (
            self.saving.noting(folder),
            own_class(self.accelerator.unwrap_model(self.model, keep_torch_compile=False)),
        ):
            super()._save(output_dir, state_dict)
            # a checkpoint is sealed when it is whole
            if self.args.should_save and not folder.name.startswith(PREFIX_CHECKPOINT_DIR):
                write_weight_digests(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self.saving.noting(output_dir):
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_scaler(self, output_dir: str) -> None:
        with self.saving.noting(output_dir):
            super()._save_scaler(output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in `Trainer`. A checkpoint is whole once it has its list of digests: that is written last, before older ones are deleted."""
        self.check_weights()
        run = Path(self._get_output_dir(trial))
        folder, limit = run / f"checkpoint-{self.state.global_step}", self.args.save_total_limit
        if self.args.should_save:
            for name in (DIGESTS, TRAINER_STATE_NAME):
                (folder / name).unlink(missing_ok=True)  # of an earlier run that is written over
            age_checkpoints(run, folder.name)
        unwrapped = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        with self.throughput.paused():
            self.args.save_total_limit = None  # older ones are deleted once this one is whole
            try:
                with weights_by_own_names(unwrapped), self.saving.noting(folder):
                    super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            if self.args.should_save:
                with self.saving.noting(folder):
                    self.save_arguments(folder)
                    seal_checkpoint(folder)
            self.saving.agree()
            if self.args.should_save:
                rotate_checkpoints(run, limit, self.state.best_model_checkpoint, use_mtime=True)
            self.publish_in_background()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As in `Trainer`; a patch head that nothing trains is not saved, and so not missed."""
        if not getattr(self.model, "saves_patch_head", True):
            load_result.missing_keys[:] = [name for name in load_result.missing_keys if PATCH_HEAD not in name]
        super()._issue_warnings_after_load(load_result)

    def _save_rng_state(self, output_dir: str) -> None:
        with self.saving.noting(output_dir):
            super()._save_rng_state(output_dir)
        self.saving.agree()  # before the main process writes the state that makes the checkpoint whole

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """As in `Trainer`, in files that are whole or not there."""
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        try:
            earlier = read_json(folder / ALL_RESULTS)
        except ValueError:  # half written, by the library
            earlier = {}
        write_json(folder / f"{split}_results.json", metrics)
        if combined:
            write_json(folder / ALL_RESULTS, earlier | metrics)
