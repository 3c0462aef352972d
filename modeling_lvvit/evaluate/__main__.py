"""Evaluates image classifiers, ours and any of transformers or timm, each with its own preprocessing.

    lvvit evaluate outputs/digit_scenes --datasets DATA
    lvvit evaluate runs/lvvit_s_224 timm/deit_small_patch16_224.fb_in1k --datasets imagenet imagenet-v2 imagenet-a \\
        --real_labels imagenet --corruptions ImageNet-C --output_file results.json
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from transformers.hf_argparser import HfArg

from ..console import ignore_interrupts, program, progress_bar
from ..data.images import MAX_PIXELS_HELP, PixelLimit, SampleError, parse_image_size
from ..data.multi_label.columns import COLUMNS_HELP, SEPARATOR_HELP, check_label_options, describe_labels
from ..data.sampling import ShardedEvalSampler
from ..deployment import prepare_for_cpu
from ..finite import NotFiniteError, check_scores
from ..launching import (
    end_together,
    end_with_launcher,
    name_options,
    set_up_cpu,
    start_missing_processes,
)
from ..options import Program
from ..per_class.scores import ConfusionMatrix
from ..token_labeling.dataset import TokenLabelDataset
from .classifier import Classifier, InputOptions, load_classifier
from .per_class import PerClassReports
from .prediction_table import find_positive
from .probabilities import CollectedProbabilities, ProbabilityReports, check_problem_types
from .report import markdown_table, notes_on, notes_on_corruptions, save_results
from .scores import ClassificationScores, find_real_labels, mean_corruption_error
from .test_sets import TestSet, corruption_folders, model_class_map, open_test_set, reassessed_labels
from .two_classes import Wish


MODULE = "modeling_lvvit.evaluate"
FOLDER_COLUMNS = ("image", "label")  # of image folders
RANKS = 5


@dataclass
class EvaluationArguments:
    """Options of the program."""

    option_groups: ClassVar[dict[str, str]] = {
        "models": "models",
        "datasets": "test sets",
        "image_size": "models",
        "batch_size": "computation",
    }

    models: list[str] | None = HfArg(
        default=None,
        help="Classifiers: Hub names or folders of transformers, timm/NAME, folders that timm saved.",
        aliases=["--model", "--model_name_or_path"],
    )
    model_revision: str | None = HfArg(default=None, help="Revision of the models on the Hub.")
    trust_remote_code: bool = HfArg(default=False, help="Allow code of a Hub repository to run.")
    random_weights: bool = HfArg(default=False, help="Build architectures without weights, to try things out.")
    datasets: list[str] | None = HfArg(
        default=None,
        help="Test sets: Hub names, image folders, folders of Parquet files, or such files.",
        aliases=["--dataset", "--dataset_name"],
    )
    eval_split: str | None = HfArg(
        default=None, help="Split of all of them; default: found by name.", aliases=["--split"]
    )
    dataset_config_name: str | None = HfArg(default=None, help="Configuration on the Hub.")
    dataset_revision: str | None = HfArg(default=None, help="Revision on the Hub.")
    image_column_name: str = HfArg(default="image", help="Column of images.", aliases=["--image_column"])
    label_column_name: str = HfArg(
        default="label", help="Column of class ids or names, or of lists of them.", aliases=["--label_column"]
    )
    label_separator: str | None = HfArg(default=None, help=SEPARATOR_HELP)
    label_column_names: list[str] | None = HfArg(default=None, help=COLUMNS_HELP)
    class_map: str | None = HfArg(
        default=None,
        help="Which class of a model is which of the data: identity, or a file; default: by name, synonym or WordNet id.",
    )
    real_labels: str | None = HfArg(
        default=None,
        help="Re-assessed labels of the first test set: imagenet, those of its validation set, or a JSON file or its URL.",
    )
    corruptions: str | None = HfArg(default=None, help="Folder of ImageNet-C.")
    positive_class: str | None = HfArg(
        default=None, help="Name of the positive one of two classes; default: the second."
    )
    min_recall: float | None = HfArg(
        default=None,
        help="Of two classes: choose the highest threshold with at least this recall of the positive one; default: Youden's J.",
    )
    min_precision: float | None = HfArg(
        default=None,
        help="Of two classes: choose the lowest threshold with at least this precision of the positive one.",
    )
    max_eval_samples: int | None = HfArg(
        default=None, help="Images of a subset of each test set, drawn over all classes.", aliases=["--max_samples"]
    )
    max_image_pixels: int | None = HfArg(default=None, help=MAX_PIXELS_HELP)
    image_size: list[int] | None = HfArg(
        default=None, help="Side of the input in pixels, or height and width; default: that of each model."
    )
    crop_pct: float | None = HfArg(
        default=None,
        help="Share of the resized image that the center crop keeps; default: that of each model.",
        aliases=["--crop_fraction"],
    )
    batch_size: int = HfArg(default=32, help="Images that a device takes at a time.")
    dataloader_num_workers: int = HfArg(default=0, help="Processes that load images.", aliases=["--num_workers"])
    bf16: bool = HfArg(default=False, help="Compute in bfloat16.")
    output_file: str | None = HfArg(
        default=None,
        help="JSON file for all results and settings; the table is always printed.",
        aliases=["--output"],
    )

    def __post_init__(self):
        self.datasets = self.datasets or []
        if not self.datasets and self.corruptions is None:
            raise ValueError("Give test sets (`datasets`) or a folder of corruptions (`corruptions`).")
        if self.real_labels is not None and not self.datasets:
            raise ValueError("`real_labels` belong to a test set: give `datasets`.")
        parse_image_size(self.image_size, "`image_size`")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"`crop_pct` must lie in (0, 1], got {self.crop_pct}.")
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}.")
        if self.output_file is not None and Path(self.output_file).is_dir():
            raise ValueError(f"`output_file` {self.output_file} is a folder; give the name of a JSON file.")

        check_label_options(self.label_column_name, self.label_separator, self.label_column_names)
        Wish(self.min_recall, self.min_precision)

    @property
    def wishes_two_classes(self) -> bool:
        """Whether an option is for two classes alone."""
        return any(value is not None for value in (self.positive_class, self.min_recall, self.min_precision))

    def input_options(self) -> InputOptions:
        """Changes of the models' preprocessing."""
        return InputOptions(parse_image_size(self.image_size, "`image_size`"), self.crop_pct)


PROGRAM = Program("lvvit evaluate", __doc__, (EvaluationArguments,), ("models*",), required=("models",))


@torch.inference_mode()
def evaluate(
    classifier: Classifier,
    test_set: TestSet,
    args: EvaluationArguments,
    state: PartialState,
    columns: tuple[str, str],
    real: Sequence[frozenset[int] | None] | None = None,
    confusion: ConfusionMatrix | None = None,
    collected: CollectedProbabilities | None = None,
) -> dict[str, float]:
    """Scores of a classifier on a test set; every process takes its share of the rows and gets the scores of all.

    Args:
        classifier: On the device of the process.
        test_set: Rows.
        args: Batch size, precision, class map.
        state: Which process this is.
        columns: Names of the columns of images and labels.
        real: Re-assessed labels of the rows.
        confusion: Is filled with the images of this process.
        collected: Gets the probabilities of the images of this process. Images with several classes have no other scores.

    Raises:
        NotFiniteError: If scores of an image are NaN or infinite.
    """
    class_map = model_class_map(classifier.class_names, test_set, args.class_map)
    samples = TokenLabelDataset(
        test_set.rows,
        partial(_as_sample, classifier.transform),
        *columns,
        name=test_set.name,
    )
    sampler = ShardedEvalSampler(len(samples), state.process_index, state.num_processes)
    loader = DataLoader(
        _Numbered(samples),
        args.batch_size,
        sampler=sampler,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=ignore_interrupts,
        pin_memory=state.device.type == "cuda",
    )
    scores = ClassificationScores(len(test_set.class_names))
    autocast = torch.autocast(state.device.type, torch.bfloat16) if args.bf16 else nullcontext()
    title = f"{classifier.name} on {test_set.name}"
    for batch in progress_bar(loader, desc=title, unit="batch", disable=not state.is_main_process):
        with autocast:
            logits = classifier.logits(batch["pixel_values"].to(state.device, non_blocking=True))
        check_scores(logits, [f"row {index}" for index in batch["index"].tolist()], title)
        if class_map is not None:
            logits = class_map.apply(logits[..., None, None])[..., 0, 0]  # (B, classes of the data)
        if collected is not None:
            collected.add(batch["index"], classifier.probabilities(logits), batch["labels"])
        if test_set.is_multi_label:
            continue
        ranked = logits.topk(min(RANKS, logits.shape[-1]), dim=-1).indices
        seen = None if real is None else [real[index] for index in batch["index"].tolist()]
        scores.add_batch(predictions=ranked, references=batch["labels"], real=seen)
        if confusion is not None:
            confusion.add_batch(predictions=ranked[:, 0], references=batch["labels"])
    return {} if test_set.is_multi_label else scores.compute()


class _Numbered(torch.utils.data.Dataset):
    """Samples that know their row."""

    def __init__(self, samples: TokenLabelDataset):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [{**sample, "index": index} for sample, index in zip(self.samples.__getitems__(indices), indices)]


def _as_sample(transform: Any, image: Any) -> dict[str, torch.Tensor]:
    return {"pixel_values": transform(image)}


def evaluate_corruptions(
    classifier: Classifier, folders: dict[str, dict[str, Path]], args: EvaluationArguments, state: PartialState
) -> dict[str, Any]:
    """Error rates of a classifier on every corruption and severity, and what follows from them."""
    errors: dict[str, list[float]] = {}
    images: dict[str, int] = {}
    for corruption, severities in folders.items():
        for severity, folder in severities.items():
            test_set = open_test_set(str(folder), max_samples=args.max_eval_samples)
            test_set.name = f"{corruption}/{severity}"
            scores = evaluate(classifier, test_set, args, state, FOLDER_COLUMNS)
            errors.setdefault(corruption, []).append(1 - scores["accuracy"])
            images[test_set.name] = scores["images"]
    notes = notes_on_corruptions(errors, images)
    if args.max_eval_samples is not None:
        notes.append(f"at most {args.max_eval_samples:,} images of each set")
    return {**mean_corruption_error(errors), "errors": errors, "notes": notes}


def prepare(args: EvaluationArguments) -> tuple[list[Classifier], list[TestSet], Any, dict[str, dict[str, Path]]]:
    """Loads everything and pairs the classes, so that what does not fit is found before any work."""
    PixelLimit(args.max_image_pixels)
    classifiers = [
        load_classifier(name, args.input_options(), args.model_revision, args.trust_remote_code, args.random_weights)
        for name in args.models
    ]
    columns = (args.image_column_name, args.label_column_name)
    source = (args.eval_split, args.dataset_config_name, args.dataset_revision, *columns, args.max_eval_samples)
    test_sets = [open_test_set(name, *source, args.label_separator, args.label_column_names) for name in args.datasets]
    if args.wishes_two_classes:
        for test_set in test_sets:
            find_positive(test_set.class_names, args.positive_class)
    folders = corruption_folders(Path(args.corruptions).expanduser()) if args.corruptions is not None else {}
    corrupted = [open_test_set(str(severities["1"])) for severities in list(folders.values())[:1]]
    for classifier in classifiers:
        for test_set in [*test_sets, *corrupted]:
            check_problem_types(classifier.is_multi_label, classifier.name, test_set)
            try:
                model_class_map(classifier.class_names, test_set, args.class_map)
            except ValueError as error:
                reason = str(error).replace("annotator", "model")  # for which classes are paired elsewhere
                raise ValueError(f"{classifier.name} on {test_set.name}: {reason}") from error
    real = None
    if args.real_labels is not None and test_sets[0].is_multi_label:
        raise ValueError(
            f"`real_labels` are for images with one class each, those of {test_sets[0].name} have several."
        )
    if args.real_labels is not None:
        real = reassessed_labels(test_sets[0], *columns, find_real_labels(args.real_labels))
    return classifiers, test_sets, real, folders


@program(PROGRAM.name)
def main(arguments: list[str]) -> None:
    if start_missing_processes(["--module", MODULE], arguments):
        return
    end_with_launcher()
    # without the word, accelerate takes several processes on CPUs for single ones
    state = PartialState(cpu=not torch.accelerator.is_available())
    set_up_cpu(state.device)
    with PROGRAM.refusals():
        (args,) = PROGRAM.parse(arguments)
        with state.main_process_first():
            classifiers, test_sets, real, folders = prepare(args)
    if state.is_main_process:
        for part in test_sets:
            print(describe_labels(part.rows, f"{part.name} ({part.split})", args.label_column_name))
        for note in notes_on_corruptions(folders, {}) if folders else ():
            print(f"{PROGRAM.name}: {args.corruptions}: {note}", file=sys.stderr)
    # only the process that has a row knows of an error in it
    with PROGRAM.refusals(SampleError, NotFiniteError, of_all_processes=False):
        reports = PerClassReports(args.output_file)
        wish = Wish(args.min_recall, args.min_precision)
        probability_reports = ProbabilityReports(args.output_file, args.positive_class, wish)
        results = evaluate_all(args, state, classifiers, test_sets, real, folders, reports, probability_reports)
    if state.is_main_process:
        texts = [name_options(text, EvaluationArguments) for text in probability_reports.texts]
        print("\n\n".join([markdown_table(results), *reports.texts, *texts]))
    end_together()


def evaluate_all(
    args: EvaluationArguments,
    state: PartialState,
    classifiers: list[Classifier],
    test_sets: list[TestSet],
    real: Sequence[frozenset[int] | None] | None,
    folders: dict[str, dict[str, Path]],
    reports: PerClassReports,
    probability_reports: ProbabilityReports,
) -> list[dict[str, Any]]:
    """Every classifier on every test set; what is there is saved after each of them, and what the terminal says of classes added to
    `reports` and `probability_reports`."""
    results: list[dict[str, Any]] = []

    def save() -> None:
        if state.is_main_process and args.output_file is not None:
            save_results(Path(args.output_file), results, args)

    columns = (args.image_column_name, args.label_column_name)
    for classifier in classifiers:
        prepare_for_cpu(classifier.model.to(state.device))
        record = {"model": classifier.name, **classifier.facts, "results": {}}
        results.append(record)
        for test_set in test_sets:
            seen = real if test_set is test_sets[0] else None
            confusion = None if test_set.is_multi_label else reports.matrix_for(test_set.class_names)
            collected = CollectedProbabilities.of(test_set)
            scores = evaluate(classifier, test_set, args, state, columns, seen, confusion, collected)
            if confusion is not None:
                scores |= reports.add(confusion, classifier.name, test_set, state.is_main_process)
            if collected is not None:
                scores |= probability_reports.add(collected, classifier.name, test_set, state.is_main_process)
            notes = notes_on(scores, test_set, args.label_column_name, len(classifier.class_names), seen is not None)
            facts = {"split": test_set.split, "classes": len(test_set.class_names), "notes": notes}
            record["results"][test_set.name] = {**facts, **scores}
            save()
        if folders:
            record["corruptions"] = evaluate_corruptions(classifier, folders, args, state)
            save()
        classifier.model.to("cpu")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
