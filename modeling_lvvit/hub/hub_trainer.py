"""What a run publishes: weights as they are evaluated, code, image processor and card; nothing that is a pickle."""

import json
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..data.files.atomic_files import write_text
from .file_checks import CARD, REPLACED
from .repository import HubError, HubTarget


logger = logging.get_logger(__name__)
GENERATED = "generated_from_trainer"  # tag of the library's drafts
STAGE = "_published"  # folder in `output_dir` whose content a push in the background uploads
# not training_...: `datasets` would take that for data of a split, were the folder one of data
ARGUMENTS = "arguments.json"
TRAINING_DATA = "training_data"  # in it: which images
DRAFT = """# {name}

Training in progress: step {step:,} of {steps:,}. These are the weights {kind}; a card with results replaces this page in the end.
"""


class HubTrainer(Trainer):
    """A `Trainer` whose uploads anybody can load and trust. Training arguments are saved as JSON, not as a pickle; tokens are left out.

    `hub_strategy="end"` publishes when the run is over, `"every_save"` also at each checkpoint, in the background, without the
    state of the optimizer, unless the one before is still on its way (`hub_always_push` waits for it). The repository is opened, and
    writing to it asked for, when the Trainer is made, which all processes must do together. `push_to_hub` in a
    program comes after evaluation and card.
    """

    push_in_progress: Future | None = None
    published_kind = "of training"  # in words
    training_data: dict[str, str] | None = None  # for `arguments.json`

    @contextmanager
    def published_weights(self) -> Iterator[None]:
        """Puts the weights that are published in training into the model; these are those of training itself."""
        yield

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in `Trainer`, with the branch `hub_revision`; a `HubError` in all processes if it cannot be written."""
        answer: list[Any] = [None, None]  # full name, or what is wrong
        if self.is_world_process_zero():
            try:
                answer[0] = self._target(token, private).open().repo_id
            except HubError as error:
                answer[1] = str(error)
        self.hub_model_id, problem = broadcast_object_list(answer)
        if problem is not None:
            raise HubError(problem)

    def _target(self, token: str | None = None, private: bool | None = None, revision: str | None = None) -> HubTarget:
        args = self.args
        return HubTarget(
            self.hub_model_id or args.hub_model_id or Path(args.output_dir).resolve().name,
            private=args.hub_private_repo if private is None else private,
            revision=revision or args.hub_revision,
            token=token or args.hub_token,
        )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> str | Future | None:
        """Saves the model and publishes the output folder without its checkpoints; arguments are as in `Trainer`.

        Returns:
            Address of the commit, or with `blocking=False` a `Future` with it; `None` in other processes than the first.

        Raises:
            HubError: If the Hub cannot be reached or refuses. The output folder is complete.
            ValueError: If a file in it is damaged.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        target = self._target(token, private, revision)
        if self.hub_model_id is None or revision is not None:
            target = target.open()
            self.hub_model_id = target.repo_id
        self.create_model_card(model_name=kwargs.pop("model_name", target.repo_id.rpartition("/")[2]), **kwargs)
        self._finish_current_push()
        shutil.rmtree(Path(self.args.output_dir) / STAGE, ignore_errors=True)
        upload = (Path(self.args.output_dir), commit_message or "End of training", REPLACED)
        return target.upload(*upload) if blocking else HfApi().run_as_future(target.upload, *upload)

    def publish_in_background(self) -> None:
        """Publishes the weights of this step, unless the last ones are still on their way (`hub_always_push`: after waiting for them).

        A failure of the upload is a warning: training goes on, and the push at the end sends everything. All processes must call it.
        """
        args = self.args
        if not args.push_to_hub or args.hub_strategy == HubStrategy.END:
            return
        is_busy = self.push_in_progress is not None and not self.push_in_progress.done()
        if broadcast_object_list([is_busy and not args.hub_always_push])[0]:
            return
        self._finish_current_push()
        stage = Path(args.output_dir) / STAGE
        with self.published_weights():
            self.save_model(str(stage), _internal_call=True)
        if not self.is_world_process_zero():
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        target, step = self._target(), self.state.global_step
        name = target.repo_id.rpartition("/")[2]
        text = DRAFT.format(name=name, step=step, steps=self.state.max_steps, kind=self.published_kind)
        data = ModelCardData(library_name="transformers", tags=["token-labeling", "vision"])
        write_text(stage / CARD, str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")))
        message = f"Training in progress, step {step}"
        self.push_in_progress = HfApi().run_as_future(target.upload, stage, message, REPLACED)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: the Trainer would upload the weights of the checkpoint and its pickles. See `publish_in_background`."""

    def _finish_current_push(self) -> None:
        """Waits for the push in the background, and warns if it failed."""
        push, self.push_in_progress = self.push_in_progress, None
        if push is None:
            return
        if not push.done():
            logger.warning("Waiting for the upload of an earlier step.")
        if (error := push.exception()) is not None:
            logger.warning("An upload in training failed. %s", str(error).partition("\n")[0])

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            self.save_arguments(folder)

    def save_arguments(self, folder: Path) -> None:
        """Writes the arguments of the run and which data it is about."""
        content = json.loads(self.args.to_json_string())
        if self.training_data is not None:
            content[TRAINING_DATA] = self.training_data
        write_text(folder / ARGUMENTS, json.dumps(content, indent=2) + "\n")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`, but a card that somebody wrote stays: a push would otherwise replace it by the library's draft."""
        card = Path(self.args.output_dir) / CARD
        is_written = card.exists() and GENERATED not in (ModelCard.load(card).data.tags or ())
        if self.is_world_process_zero() and not is_written:
            card.unlink(missing_ok=True)
            super().create_model_card(*args, **kwargs)


def push_finished_run(trainer: HubTrainer, program: str) -> None:
    """Publishes a finished run, with its card, if that was asked for; ends the program with a message if it fails."""
    if not trainer.args.push_to_hub:
        return
    try:
        address = trainer.push_to_hub()
    except (HubError, ValueError) as error:
        sys.exit(f"{program}: {error}")
    if trainer.is_world_process_zero():
        print(f"published: {address}", flush=True)
