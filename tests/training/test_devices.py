"""One run on any number of devices: the same losses, sharded weights, batch norm, compiled models."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from modeling_lvvit.training.batch_norm import FrozenBatchNorm2d, set_batch_norm
from modeling_lvvit.training.throughput import Throughput
from support.images import labelled_table
from support.programs import ROOT, TINY, options, run
from support.trainers import trainer_for


CONFIGS = ROOT / "modeling_lvvit" / "accelerate_configs"
LAUNCH = ["-m", "accelerate.commands.launch"]
# 20 steps of 32 images with every augmentation, but nothing that depends on who sits next to whom in a batch
ALIKE = ["--max_steps", "20", "--logging_steps", "1", "--mix_probability", "0", "--batch_norm", "frozen"]
ALIKE += [
    "--learning_rate",
    "1e-2",
    "--lr_scheduler_type",
    "constant",
    "--save_picture",
    "False",
    "--save_strategy",
    "no",
    "--disable_tqdm",
    "True",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Five steps of 32 images an epoch."""
    return write_data(tmp_path_factory.mktemp("data"), 160)


def write_data(folder: Path, num_rows: int) -> Path:
    parquet.write_table(labelled_table(num_rows), folder / "train.parquet")
    parquet.write_table(labelled_table(10, seed=1), folder / "test.parquet")
    return folder


def losses_of(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def train(data: Path, output: Path, launch: list[str], batch_size: int, *more: str) -> list[float]:
    command = [*launch, "train_tl.py", *options(data, output, *ALIKE, *more)]
    position = command.index("--per_device_train_batch_size") + 1
    command[position] = str(batch_size)
    result = run(command, data)
    assert result.returncode == 0, result.stderr[-3000:]
    return losses_of(output)


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory) -> tuple[list[float], Path]:
    output = tmp_path_factory.mktemp("runs") / "one"
    return train(data, output, [], 32), output


@pytest.mark.slow
def test_accumulation_has_the_loss_curve_of_the_big_batch(data, one_process, tmp_path):
    losses = train(data, tmp_path / "run", [], 8, "--gradient_accumulation_steps", "4")
    assert len(losses) == 20
    assert losses == pytest.approx(one_process[0], abs=1e-4)


@pytest.mark.slow
def test_accumulation_counts_the_images_of_a_small_last_batch(tmp_path):
    """Every fifth step has 22 images: 8, 8 and 6."""
    uneven = write_data(tmp_path, 150)
    big = train(uneven, tmp_path / "big", [], 32)
    accumulated = train(uneven, tmp_path / "accumulated", [], 8, "--gradient_accumulation_steps", "4")
    assert len(big) == 20
    assert accumulated == pytest.approx(big, abs=1e-4)


@pytest.mark.slow
def test_two_processes_have_the_loss_curve_of_one(data, one_process, tmp_path):
    losses = train(data, tmp_path / "run", [*LAUNCH, "--cpu", "--num_processes", "2"], 16)
    assert len(losses) == 20
    assert losses == pytest.approx(one_process[0], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [["--cpu"], ["--config_file", str(CONFIGS / "fsdp2.yaml"), "--mixed_precision", "no"]]
)
def test_all_processes_end_when_training_diverges(launcher, data, tmp_path):
    """Nothing is logged: it is found before a save. Earlier checkpoints stay, and are finite."""
    output = tmp_path / "run"
    more = [
        "--learning_rate",
        "1600",
        "--warmup_steps",
        "0",
        "--max_steps",
        "60",
        "--logging_steps",
        "100",
        "--ema_decay",
        "0.9",
    ]
    command = options(data, output, "--save_strategy", "steps", "--save_steps", "1", *more)
    result = run([*LAUNCH, *launcher, "--num_processes", "2", "train_tl.py", *command], data)
    assert result.returncode != 0
    assert result.stderr.count("lvvit train: Training diverged: weights are not finite at step") == 1
    assert not (output / "model.safetensors").exists() and not (output / "README.md").exists()
    for path in output.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path


@pytest.mark.slow
def test_two_processes_continue_within_an_epoch_as_if_never_stopped(data, tmp_path):
    """Everything random is on; step 7 is the second of the second epoch."""
    launch = [*LAUNCH, "--cpu", "--num_processes", "2"]
    drop_path = TINY.replace("}", ", drop_path_rate: 0.2}")
    more = ["--mix_probability", "1", "--config_overrides", drop_path, "--batch_norm", "local", "--max_steps", "11"]
    more += ["--ema_decay", "0.5", "--save_strategy", "steps", "--save_steps", "7"]
    train(data, tmp_path / "whole", launch, 16, *more)
    resume = ["--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-7")]
    train(data, tmp_path / "resumed", launch, 16, *more, *resume)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


@pytest.mark.slow
def test_sharded_processes_have_the_loss_curve_of_one_and_save_whole_weights(data, one_process, tmp_path):
    output = tmp_path / "run"
    launch = [*LAUNCH, "--config_file", str(CONFIGS / "fsdp2.yaml"), "--num_processes", "2", "--mixed_precision", "no"]
    losses = train(data, output, launch, 16, "--ema_decay", "0.5", "--save_strategy", "steps", "--save_steps", "10")
    assert losses == pytest.approx(one_process[0], abs=1e-4)
    assert (output / "checkpoint-10" / "model.safetensors").is_file()
    model, loading = AutoModelForImageClassification.from_pretrained(output, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert all(torch.isfinite(weight).all() for weight in model.state_dict().values())
    assert model.num_parameters() == AutoModelForImageClassification.from_pretrained(one_process[1]).num_parameters()
    assert json.loads((output / "config.json").read_text())["architectures"] == ["LVViTForImageClassification"]
    assert (output / "modeling_lvvit.py").is_file()
    average = load_file(output / "checkpoint-20" / "ema.safetensors")
    for name, weight in model.state_dict().items():  # the average is what remains
        torch.testing.assert_close(weight, average[name])
    resume = ["--resume_from_checkpoint", str(output / "checkpoint-10"), "--overwrite_output_dir"]
    train(data, tmp_path / "resumed", launch, 16, "--ema_decay", "0.5", *resume)
    resumed = load_file(tmp_path / "resumed" / "model.safetensors")
    assert [name for name, weight in model.state_dict().items() if not torch.equal(weight, resumed[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "timm/test_vit"])
def test_models_with_an_added_patch_head_are_sharded_too(name, data, tmp_path):
    """Their class is extended by the patch head and by FSDP; what is saved is the plain one, and a resumed run (of one of
    them) ends alike."""
    size = "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64, patch_size: 8}"
    model = ["--architecture", name, "--config_overrides", size if name == "vit" else "{}", "--max_steps", "5"]
    launch = [*LAUNCH, "--config_file", str(CONFIGS / "fsdp2.yaml"), "--num_processes", "2", "--mixed_precision", "no"]
    expected = train(data, tmp_path / "one", [], 32, *model)
    output = tmp_path / "run"
    losses = train(data, output, launch, 16, *model, "--save_strategy", "steps", "--save_steps", "3")
    assert losses == pytest.approx(expected, abs=1e-4)
    plain, loading = AutoModelForImageClassification.from_pretrained(output, output_loading_info=True)
    assert type(plain).__module__.startswith("transformers.") and not loading["missing_keys"]
    weights, one = (load_file(tmp_path / folder / "model.safetensors") for folder in ("run", "one"))
    assert weights.keys() == one.keys() and any("patch_head." in key for key in weights)
    if name != "vit":
        return
    resume = ["--resume_from_checkpoint", str(output / "checkpoint-3"), "--overwrite_output_dir"]
    train(data, tmp_path / "resumed", launch, 16, *model, *resume)
    resumed = load_file(tmp_path / "resumed" / "model.safetensors")
    assert [key for key, value in weights.items() if not torch.equal(value, resumed[key])] == []


@pytest.mark.slow
def test_compiled_model_trains_and_saves_clean_names(data, one_process, tmp_path):
    losses = train(data, tmp_path / "run", [], 32, "--torch_compile", "--max_steps", "3", "--ema_decay", "0.5")
    assert losses == pytest.approx(one_process[0][:3], abs=1e-4)
    assert (
        load_file(tmp_path / "run" / "model.safetensors").keys()
        == load_file(one_process[1] / "model.safetensors").keys()
    )


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_accelerate_configuration_is_understood(path):
    """The launcher reads it and fills the rest; only a configuration for CPU could be started here."""
    code = (
        "import sys; from accelerate.commands.config.config_args import load_config_from_file as load;"
        "config = load(sys.argv[1]); print(config.distributed_type.value, config.num_processes, config.mixed_precision)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    kind, processes, precision = result.stdout.split()
    expected = {"one_gpu_bf16": ("NO", "1"), "one_gpu_fp16": ("NO", "1"), "eight_gpus": ("MULTI_GPU", "8")}
    expected |= {"multi_node": ("MULTI_GPU", "16"), "fsdp2": ("FSDP", "8")}
    assert (kind, processes) == expected[path.stem]
    assert precision == ("fp16" if path.stem.endswith("fp16") else "bf16")


def test_frozen_batch_norm_keeps_its_statistics_but_learns(tiny_model, labelled_rows, tmp_path):
    before = copy.deepcopy(tiny_model.state_dict())
    trainer_for(tiny_model, labelled_rows, tmp_path, batch_norm="frozen").train()
    norm = tiny_model.lvvit.embeddings.patch_embeddings.norm1
    assert isinstance(norm, FrozenBatchNorm2d)
    name = "lvvit.embeddings.patch_embeddings.norm1"
    assert torch.equal(norm.running_mean, before[f"{name}.running_mean"])
    assert norm.num_batches_tracked == 0
    assert not torch.equal(norm.weight, before[f"{name}.weight"])
    assert tiny_model.state_dict().keys() == before.keys()


def test_synchronized_batch_norm_is_refused_where_it_cannot_be_done(tiny_model):
    with pytest.raises(ValueError, match="local or frozen"):
        set_batch_norm(tiny_model, "synchronized", torch.device("cpu"), num_processes=2)
    set_batch_norm(tiny_model, "synchronized", torch.device("cuda"), num_processes=2)
    norm = tiny_model.lvvit.embeddings.patch_embeddings.norm1
    assert isinstance(norm, torch.nn.SyncBatchNorm)


def test_one_process_needs_no_synchronization(tiny_model):
    set_batch_norm(tiny_model, "synchronized", torch.device("cpu"), num_processes=1)
    assert type(tiny_model.lvvit.embeddings.patch_embeddings.norm1) is torch.nn.BatchNorm2d


def test_order_of_rows_depends_on_seed_and_epoch(tiny_model, tmp_path):
    rows, orders = datasets.Dataset(labelled_table(50)), []
    for seed, epoch in ((0, 0), (0, 0), (0, 1), (7, 0)):
        trainer = trainer_for(tiny_model, rows, tmp_path, data_seed=seed)
        loader = trainer.get_train_dataloader()
        trainer.state.epoch = float(epoch)
        orders.append([row for batch in loader.batch_sampler for row in batch])
        assert sorted(orders[-1]) == list(range(50))
        generator = torch.Generator().manual_seed(seed + epoch)  # as in checkpoints of earlier versions
        assert orders[-1] == torch.randperm(50, generator=generator).tolist()
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] and orders[0] != orders[3] and orders[2] != orders[3]


def test_throughput_by_hand(monkeypatch):
    """10 s, of which 2 s evaluation and 4 s waiting: 24 images in 8 s, half of them waiting."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = Throughput()
    clock.count(24)
    for context, seconds in ((clock.paused(), 2), (clock.waiting(), 4)):
        with context:
            now[0] += seconds
    now[0] += 4
    assert clock.report() == {"images_per_second": 3.0, "data_wait": 0.5}
    now[0] += 1
    assert clock.report() == {"images_per_second": 0.0, "data_wait": 0.0}
