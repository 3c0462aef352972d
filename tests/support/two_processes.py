"""Run by torchrun in test_program: trains two epochs and writes what this process saw and ended with."""

import json
import sys
from pathlib import Path

import datasets
import torch

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.launching import end_together
from modeling_lvvit.token_labeling import TokenLabelDataset, TokenLabelTrainer
from support.images import labelled_table
from support.models import tiny_config
from support.samples import plain_transform
from support.trainers import arguments


class RecordingDataset(TokenLabelDataset):
    """Remembers which rows were read, and the first crop."""

    def __getitems__(self, indices):
        samples = super().__getitems__(indices)
        seen.extend(indices)
        crops.append(samples[0]["crop_box"].tolist())
        return samples


seen, crops = [], []
torch.manual_seed(0)
model = LVViTForImageClassification(tiny_config(drop_path_rate=0.2))
columns = {"ids_column": "token_label_ids", "scores_column": "token_label_scores"}
samples = RecordingDataset(datasets.Dataset(labelled_table(16)), plain_transform(crop_scale=(0.2, 0.9)), **columns)
folder = Path(sys.argv[1])
options = {"per_device_train_batch_size": 4, "max_steps": 4, "ema_decay": 0.5}
trainer = TokenLabelTrainer(model, arguments(folder / "run", **options), train_dataset=samples)
trainer.train()
weights = {name: value.sum().item() for name, value in model.named_parameters()}
record = {"seen": seen, "crops": crops, "weights": weights}
(folder / f"{trainer.args.process_index}.json").write_text(json.dumps(record))
end_together()  # as programs do: a process that leaves with its connections open may abort
