"""Writes the probabilities of all images of a folder to a CSV file, by any classifier with its own preprocessing.

    lvvit predict runs/mine path/to/images                                    predictions.csv: path, class, a column for each class
    lvvit predict timm/resnet50.a1_in1k image.jpg --top_k 5
    lvvit predict runs/defects path/to/images --threshold results_defects_test_roc.json

Labels are not needed, and folders may be nested in any way. Images with several classes (multi-label) have those with a probability of
at least --threshold.
"""

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers.hf_argparser import HfArg

from ..console import program, progress_bar
from ..data.classes.unlabeled import UnlabeledImages, open_images
from ..data.images import MAX_PIXELS_HELP, PixelLimit, SampleError, parse_image_size
from ..data.loaders import NUM_WORKERS_HELP, sharded_loader
from ..deployment import prepare_for_cpu
from ..finite import NotFiniteError, check_scores
from ..launching import end_together, join_processes
from ..options import Program
from ..token_labeling.multi_label import THRESHOLD
from .classifier import Classifier, InputOptions, load_classifier
from .predicted_images import Inputs, PredictionDataset
from .prediction_table import Decision, Prediction, describe_predictions, find_positive, read_threshold, write_table


MODULE = "modeling_lvvit.evaluate.predict"


@dataclass
class PredictArguments:
    """Options of the program."""

    option_groups: ClassVar[dict[str, str]] = {
        "model_name_or_path": "model",
        "dataset_name": "images",
        "threshold": "predictions",
        "batch_size": "speed",
    }

    model_name_or_path: str | None = HfArg(
        default=None, help="Classifier: Hub name or folder of transformers, timm/NAME, or a folder that timm saved."
    )
    model_revision: str | None = HfArg(default=None, help="Revision on the Hub.")
    trust_remote_code: bool = HfArg(default=False, help="Allow code of a Hub repository to run.")
    image_size: list[int] | None = HfArg(
        default=None, help="Side of the input in pixels, or height and width; default: that of the model."
    )
    crop_pct: float | None = HfArg(
        default=None,
        help="Share of the resized image that the center crop keeps; default: that of the model.",
        aliases=["--crop_fraction"],
    )
    dataset_name: str | None = HfArg(
        default=None, help="Images: a folder (nested in any way), one image, Hub name, Parquet file or folder of them."
    )
    dataset_config_name: str | None = HfArg(default=None, help="Configuration on the Hub.")
    dataset_revision: str | None = HfArg(default=None, help="Revision on the Hub.")
    eval_split: str | None = HfArg(default=None, help="Split of a dataset; default: found by name.")
    image_column_name: str = HfArg(default="image", help="Column of images.", aliases=["--image_column"])
    on_error: Literal["stop", "empty"] = HfArg(
        default="stop", help="Damaged image: stop before the work, or a row without a class that says why."
    )
    max_image_pixels: int | None = HfArg(default=None, help=MAX_PIXELS_HELP)
    threshold: str | None = HfArg(
        default=None,
        help="Probability from which on the positive one of two classes is predicted, or the JSON file of an evaluation that has it; of more "
        f"classes the one below which none is predicted; of images with several classes that of each ({THRESHOLD}); default: the best class.",
    )
    positive_class: str | None = HfArg(
        default=None, help="Name of the positive one of two classes; default: the second."
    )
    top_k: int | None = HfArg(default=None, help="Write the best classes alone, for models of many; default: all.")
    output_file: str | None = HfArg(default=None, help="CSV file; default: predictions.csv.")
    batch_size: int = HfArg(default=32, help="Images that a device takes at a time.")
    dataloader_num_workers: int | None = HfArg(default=None, help=NUM_WORKERS_HELP)
    bf16: bool = HfArg(default=False, help="Compute in bfloat16.")

    def __post_init__(self):
        self.input_options()  # raises on bad sizes
        for name in ("batch_size", "top_k"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        read_threshold(self.threshold)
        self.output_file = self.output_file or "predictions.csv"
        if Path(self.output_file).expanduser().is_dir():
            raise ValueError(f"`output_file` {self.output_file} is a folder; give the name of a CSV file.")

    def input_options(self) -> InputOptions:
        """Changes of the model's preprocessing."""
        return InputOptions(parse_image_size(self.image_size, "`image_size`"), self.crop_pct)


PROGRAM = Program(
    "lvvit predict",
    __doc__,
    (PredictArguments,),
    ("model_name_or_path", "dataset_name"),
    required=("model_name_or_path", "dataset_name"),
)


def decide(args: PredictArguments, classifier: Classifier) -> Decision:
    """How probabilities of a classifier become classes; a `ValueError` if the options do not fit its classes."""
    names = classifier.class_names
    threshold, positive = read_threshold(args.threshold)
    if args.positive_class is not None:
        positive = args.positive_class
    if classifier.is_multi_label:
        if positive is not None:
            raise ValueError(
                f"{classifier.name} gives images several classes, none of which is positive: leave out `positive_class`."
            )
        return Decision(names, True, THRESHOLD if threshold is None else threshold)
    if positive is not None and threshold is None:
        raise ValueError("`positive_class` says what `threshold` is about: give both.")
    if threshold is None or (positive is None and len(names) != 2):
        return Decision(names, False, threshold)
    return Decision(names, False, threshold, find_positive(names, positive))


def prepare(args: PredictArguments, is_main_process: bool) -> tuple[Classifier, Decision, UnlabeledImages]:
    """Everything that can go wrong before the work."""
    PixelLimit(args.max_image_pixels)
    images = open_images(
        args.dataset_name, args.eval_split, args.dataset_config_name, args.dataset_revision, args.image_column_name
    )
    source = (args.model_revision, args.trust_remote_code)
    classifier = load_classifier(args.model_name_or_path, args.input_options(), *source)
    decision = decide(args, classifier)
    if args.top_k is not None and args.top_k > len(classifier.class_names):
        raise ValueError(
            f"`top_k` {args.top_k} is more than the {len(classifier.class_names)} classes of {classifier.name}."
        )
    if args.on_error == "stop" and is_main_process:
        try:
            PredictionDataset(images, classifier.transform).check_images()
        except ValueError as error:
            raise ValueError(f"{error}\n`on_error` empty gives such images a row without a class.") from error
    return classifier, decision, images


@torch.inference_mode()
def predict(
    classifier: Classifier, decision: Decision, images: UnlabeledImages, args: PredictArguments, state: PartialState
) -> list[Prediction]:
    """Predictions of all images, in their order; every process takes its share, and gets those of all.

    Raises:
        NotFiniteError: If probabilities are NaN.
        SampleError: If an image cannot be read, and `args.on_error` is stop.
    """
    samples = PredictionDataset(images, classifier.transform)
    loader = sharded_loader(samples, args.batch_size, args.dataloader_num_workers, state, Inputs.collate)
    autocast = torch.autocast(state.device.type, torch.bfloat16) if args.bf16 else nullcontext()
    predictions: list[Prediction] = []
    progress = progress_bar(
        total=len(loader.sampler), desc="Predicting", unit="image", disable=not state.is_main_process
    )
    for inputs in loader:
        if inputs.errors and args.on_error == "stop":
            row, text = next(iter(inputs.errors.items()))
            raise SampleError(
                f"{images.paths[row]}: {text}. `on_error` empty gives such images a row without a class."
            )
        predictions += [Prediction(row, error=text) for row, text in inputs.errors.items()]
        progress.update(len(inputs.errors) + len(inputs.indices))
        if not inputs.indices:
            continue
        with autocast:
            logits = classifier.logits(inputs.pixel_values.to(state.device, non_blocking=True))
        check_scores(logits, [images.paths[index] for index in inputs.indices], classifier.name)
        probabilities = classifier.probabilities(logits).cpu()
        for row, one, classes in zip(inputs.indices, probabilities, decision.classes(probabilities)):
            listed = one.tolist()
            if args.top_k is not None:
                best = one.topk(args.top_k)
                listed = list(zip(best.indices.tolist(), best.values.tolist()))
            predictions.append(Prediction(row, classes, one[classes].tolist(), listed))
    progress.close()
    return sorted(gather_object(predictions), key=lambda prediction: prediction.row)


@program(PROGRAM.name)
def main(arguments: list[str]) -> None:
    state = join_processes(MODULE, arguments)
    if state is None:
        return
    with PROGRAM.refusals():
        (args,) = PROGRAM.parse(arguments)
        with state.main_process_first():
            classifier, decision, images = prepare(args, state.is_main_process)
    prepare_for_cpu(classifier.model.to(state.device))
    if state.is_main_process:
        print(f"{len(images.rows):,} images of {images.name}, {len(decision.class_names):,} classes", flush=True)
        if decision.positive is not None:
            print(
                f"{decision.class_names[decision.positive]} from a probability of {decision.threshold:g} on",
                flush=True,
            )
    with PROGRAM.refusals(NotFiniteError, of_all_processes=False):
        predictions = predict(classifier, decision, images, args, state)
        if state.is_main_process:
            path = Path(args.output_file).expanduser()
            write_table(path, images.paths, predictions, decision, args.top_k, args.on_error == "empty")
            print("\n".join([*describe_predictions(predictions, decision), f"saved {path}"]))
    end_together()


if __name__ == "__main__":
    main(sys.argv[1:])
