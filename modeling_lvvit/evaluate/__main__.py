"""Evaluates image classifiers, ours and any of transformers or timm, each with its own preprocessing.

    lvvit evaluate outputs/digit_scenes --datasets DATA
    lvvit evaluate runs/lvvit_s_224 timm/deit_small_patch16_224.fb_in1k --datasets imagenet imagenet-v2 imagenet-a \\
        --real_labels imagenet --corruptions ImageNet-C --output_file results.json
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..console import program, progress_bar
from ..data.classes.multi_label import describe_labels
from ..data.images import PixelLimit, SampleError
from ..data.loaders import sharded_loader
from ..deployment import prepare_for_cpu
from ..finite import NotFiniteError, check_scores
from ..launching import end_together, join_processes, name_options
from ..options import Program
from ..per_class.scores import ConfusionMatrix
from ..token_labeling.dataset import TokenLabelDataset
from .arguments import EvaluationArguments
from .class_reports import CollectedProbabilities, PerClassReports, ProbabilityReports, check_problem_types
from .classifier import Classifier, load_classifier
from .prediction_table import find_positive
from .report import markdown_table, note_on_training, notes_on, notes_on_corruptions, save_results
from .scores import ClassificationScores, find_real_labels, mean_corruption_error
from .test_sets import TestSet, corruption_folders, model_class_map, open_test_set, reassessed_labels
from .two_classes import Wish


MODULE = "modeling_lvvit.evaluate"
FOLDER_COLUMNS = ("image", "label")  # of image folders
RANKS = 5


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
    loader = sharded_loader(_Numbered(samples), args.batch_size, args.dataloader_num_workers, state)
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
    state = join_processes(MODULE, arguments)
    if state is None:
        return
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
            notes += filter(None, [note_on_training(classifier.name, test_set)])
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
