"""Run by torchrun in test_evaluation: evaluates sets of several sizes, and writes what the first process found."""

import json
import sys
from pathlib import Path

import datasets
import torch

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.data.classes.multi_label import MULTI_LABEL
from modeling_lvvit.launching import end_together
from modeling_lvvit.token_labeling import ImageProcessorTransform, TokenLabelDataset, TokenLabelTrainer
from support.images import labelled_table
from support.models import NUM_CLASSES, tiny_config
from support.samples import samples_of
from support.trainers import arguments, image_processor


SETS = [(37, 8), (5, 3), (1, 4)]  # images, images of a batch
rows = datasets.Dataset(labelled_table(44))
lists = [[row % NUM_CLASSES, NUM_CLASSES - 1][: 1 + row % 2] for row in range(len(rows))]
several = rows.select_columns("image").add_column(
    "label",
    [sorted(set(ids)) for ids in lists],
    feature=datasets.List(datasets.ClassLabel(names=rows.features["label"].names)),
)


def measure(rows: datasets.Dataset, batch_size: int, **config) -> dict[str, float]:
    """Metrics of an evaluation, of a prediction and of an evaluation with a weight average."""
    torch.manual_seed(0)
    model = LVViTForImageClassification(tiny_config(**config))
    samples = TokenLabelDataset(rows, ImageProcessorTransform(image_processor()), name="evaluation")
    options = {"per_device_eval_batch_size": batch_size, "per_device_train_batch_size": 12 // num_processes}
    options |= {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"ema_decay": 0.5, "learning_rate": 0.0, "batch_norm": "frozen"}
    train = None if config else samples_of(datasets.Dataset(labelled_table(12)))
    trainer = TokenLabelTrainer(model, arguments(folder, **options), train_dataset=train, eval_dataset=samples)
    predicted = trainer.predict(samples)
    figures = predicted.metrics | {"predictions": len(predicted.predictions), "labels": len(predicted.label_ids)}
    if train is None:
        figures |= trainer.evaluate()
    else:  # nothing is learned, but there are an average and raw weights
        trainer.train()
        for entry in trainer.state.log_history:
            figures |= {name: value for name, value in entry.items() if name.startswith("eval_")}
    return {name: value for name, value in figures.items() if not name.endswith(("_second", "_runtime", "_time"))}


folder, num_processes = Path(sys.argv[1]), int(sys.argv[2])
record = {}
for images, batch_size in SETS:
    record[f"{images} by {batch_size}"] = measure(rows.select(range(images)), batch_size)
    record[f"{images} by {batch_size}, multi-label"] = measure(
        several.select(range(images)), batch_size, problem_type=MULTI_LABEL
    )
if int(torch.distributed.get_rank()) == 0:
    (folder / f"{num_processes}.json").write_text(json.dumps(record))
end_together()
