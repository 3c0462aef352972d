"""What the training programs share: the way from a command line to a trained, evaluated, described and published model."""

import dataclasses
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from accelerate.utils import broadcast_object_list
from huggingface_hub.errors import StrictDataclassError
from transformers import set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..console import end_interrupted, quiet_libraries
from ..data.failures import FAILURES, describe_failure, ignore_ended_workers, tell_uncaught_failures
from ..data.files.folder_lock import FolderLock
from ..data.image_dataset import FEW_IMAGES, MANY_PASSES
from ..data.images import SampleError
from ..data.loaders import describe_workers
from ..finite import NotFiniteError
from ..hub.hub_trainer import push_finished_run
from ..launching import (
    end_imports,
    end_launcher_at_interrupt,
    end_together,
    end_with_launcher,
    is_main_process,
    set_up_cpu,
    start_missing_processes,
)
from ..training.base_arguments import BaseImageTrainingArguments
from ..training.base_trainer import BaseImageTrainer
from ..training.callbacks import end_after_signal
from ..training.checkpoints.output_dir import check_can_be_written, discard_overwritten_checkpoints, prepare_output_dir
from ..training.checkpoints.saving import SaveError
from ..training.checkpoints.whole import last_whole_checkpoint
from ..training.divergence import DivergenceError
from ..training.fsdp import is_fsdp_requested
from ..training.progress import PredictionFigure, describe_outputs, modification_times
from . import digit_scenes
from .model_arguments import ModelSourceArguments
from .parser import EMBEDDED_RECIPE, TrainingProgram, parse


class TrainingRun(ABC):
    """A run that is ready to start; each program fills in what it says, evaluates and writes. All processes call the methods. Without a
    `train_dataset` of the trainer the model is evaluated only."""

    trainer: BaseImageTrainer

    @abstractmethod
    def describe(self) -> str:
        """What will be trained, in a line or two."""

    def finish_model(self) -> None:  # noqa: B027  most programs have nothing to do
        """Changes the trained model before it is saved."""

    @abstractmethod
    def evaluate(self) -> None:
        """Evaluates the model and saves the metrics."""

    def draw(self, path: Path, num_images: int) -> None:  # noqa: B027  not every run has predictions to show
        """Writes a figure of the predictions for so many evaluation images, the same ones each time."""

    @abstractmethod
    def report(self) -> None:
        """Writes figure and model card, and prints the results."""


def run_program(
    program: TrainingProgram, start: list[str], prepare: Callable[..., TrainingRun], arguments: list[str]
) -> None:
    """Runs a training program from its command line to its end.

    Args:
        start: How it is started again in further processes: its path, or `--module` and its name.
        prepare: From the objects with its options to the run; whatever can go wrong before training goes wrong here.
    """
    end_imports()
    end_with_launcher()
    if start_missing_processes(start, arguments):
        return
    end_launcher_at_interrupt()
    quiet_libraries()
    tell_uncaught_failures(program.failure_message)
    try:
        _run(program, prepare, arguments)
    except KeyboardInterrupt:  # a second one in training, or one after it
        end_interrupted(f"{program.name}: interrupted")


def _run(program: TrainingProgram, prepare: Callable[..., TrainingRun], arguments: list[str]) -> None:
    with ExitStack() as held:
        try:
            model_args, data_args, training_args = parse(arguments, program)
            held.enter_context(leaving_no_empty_folder(Path(training_args.output_dir)))
            held.enter_context(held_output_dir(training_args))
            run = prepare(model_args, data_args, training_args)
        except (ValueError, OSError, StrictDataclassError) as error:
            sys.exit(program.message(error) if is_main_process() else 1)
        except KeyboardInterrupt:
            check = "`decode_data` false decodes no images before training, `check_data` false looks at no rows."
            end_interrupted(program.message(f"interrupted before training. {check}"))
        earlier = modification_times(Path(training_args.output_dir))
        if run.trainer.is_world_process_zero() and run.trainer.train_dataset is not None:
            discard_overwritten_checkpoints(training_args, model_args.overwrite_output_dir)
        run.trainer.add_callback(PredictionFigure(run.trainer, run.draw))
        _train_and_report(program, run, earlier)


def _train_and_report(program: TrainingProgram, run: TrainingRun, earlier: dict[Path, int]) -> None:
    trainer, is_main = run.trainer, run.trainer.is_world_process_zero()
    is_trained = trainer.train_dataset is not None
    description = run.describe()
    if is_main:
        workers = describe_workers(trainer.args.dataloader_num_workers, trainer.args.device.type == "cpu")
        print("\n".join([description, workers, *describe_early_stopping(trainer.args, is_trained)]), flush=True)
    try:
        if is_trained:
            train(run)
        run.evaluate()
        if is_trained:
            trainer.save_state()
        run.report()
    except DivergenceError as error:  # in all processes
        end_together()
        sys.exit(program.message(error) if is_main else 1)
    except (SampleError, NotFiniteError) as error:
        sys.exit(program.message(error))  # only the process that has the row knows of it
    except FAILURES as error:
        ignore_ended_workers()
        if describe_failure(error) is None:
            raise
        end_after_failure(program, run, error)
    if is_main:
        print(f"saved to {trainer.args.output_dir}", *describe_outputs(trainer, earlier), sep="\n  ", flush=True)
    if not is_fsdp_requested():  # else all processes take part in saving what is published
        end_together()  # the others need not wait for an upload
    if is_trained:
        push_finished_run(trainer, program.name)
    end_together()  # a process that leaves with its connections open may abort


def end_after_failure(program: TrainingProgram, run: TrainingRun, error: Exception) -> NoReturn:
    """Ends the program after a failure (`failures.describe_failure`): what happened, what is kept, and how to go on."""
    if isinstance(error, SaveError):  # in all processes
        end_together()
        if not is_main_process():
            sys.exit(1)
    folder = Path(run.trainer.args.output_dir)
    checkpoint = last_whole_checkpoint(folder)
    advice = "Start the same command again"
    if checkpoint is not None:
        advice = f"{checkpoint} is whole: the same command with --resume_from_checkpoint last goes on from there"
    elif run.trainer.train_dataset is not None:
        advice = f"{folder} has no whole checkpoint yet: start the same command again with --overwrite_output_dir true"
    sys.exit(program.message(f"{describe_failure(error)}. {advice}."))


@contextmanager
def held_output_dir(training_args: BaseImageTrainingArguments) -> Iterator[None]:
    """Keeps other runs out of `output_dir`, which the main process holds for all; a `ValueError` in all if another run writes to it."""
    folder, problem = Path(training_args.output_dir), [None]
    check_can_be_written(folder)
    lock = FolderLock(folder, parts=(f"{PREFIX_CHECKPOINT_DIR}-*",))
    if training_args.should_save:
        try:
            lock.acquire()
        except (ValueError, OSError) as error:
            problem = [str(error)]
    if broadcast_object_list(problem)[0] is not None:
        raise ValueError(problem[0])
    try:
        yield
    finally:
        lock.release()


@contextmanager
def leaving_no_empty_folder(folder: Path) -> Iterator[None]:
    """Removes a folder that was made in the block if an error ends that before anything was written."""
    was_there = folder.exists()
    try:
        yield
    except BaseException:
        if not was_there and is_main_process():
            with suppress(OSError):  # it holds something, or was not made
                folder.rmdir()
        raise


def describe_early_stopping(args: BaseImageTrainingArguments, is_trained: bool = True) -> list[str]:
    """What early stopping goes by, and which options were set for it; no line without it."""
    patience = args.early_stopping_patience
    if patience is None or not is_trained:
        return []
    choices = args.early_stopping_choices.items()
    chosen = ", ".join(
        f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}" for name, value in choices
    )
    metric = args.metric_for_best_model.removeprefix("eval_")
    evaluations = "one evaluation" if patience == 1 else f"{patience} evaluations in a row"
    text = f"early stopping: after {evaluations} without a better {metric} (--metric_for_best_model)"
    return [f"{text}; set for it: {chosen}" if chosen else text]


def train(run: TrainingRun) -> None:
    """Trains and saves the model; ends the program if a signal stops it."""
    trainer = run.trainer
    result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    if trainer.stop_on_signal.received:
        end_after_signal(trainer)
    if trainer.is_world_process_zero() and (best := trainer.describe_best()) is not None:
        print(best, flush=True)
    run.finish_model()
    trainer.save_model(_internal_call=True)  # it is published at the end, with evaluation and card
    trainer.save_metrics("train", result.metrics)


def set_up(model_args: ModelSourceArguments, training_args: BaseImageTrainingArguments) -> None:
    """Output folder, CPU and seed of a run, before anything is opened.

    Raises:
        ValueError: See `prepare_output_dir`; or if something to log to is unknown or not installed.
    """
    training_args.check_reporting()
    prepare_output_dir(training_args, model_args.model_name_or_path, model_args.overwrite_output_dir)
    set_up_cpu(training_args.device)
    set_seed(training_args.seed)


def decodes_all(asked: bool | None, training_args: BaseImageTrainingArguments, num_images: int) -> bool:
    """Whether the look at so many images before training decodes all of them, see `DECODE_HELP`."""
    if asked is not None:
        return asked
    passes = training_args.num_train_epochs
    if training_args.max_steps > 0:
        passes = training_args.max_steps * training_args.images_per_step / num_images
    return num_images <= FEW_IMAGES or passes >= MANY_PASSES


def with_embedded_data(data_args: Any) -> Any:
    """Options of the data; where they name none, those of the embedded dataset, which is built on first use."""
    if data_args.dataset_name not in (None, EMBEDDED_RECIPE):
        return data_args
    return dataclasses.replace(data_args, dataset_name=str(digit_scenes.build_or_reuse()))
