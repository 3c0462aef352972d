"""The Trainer: what is trained, how it is weighted, accumulated, averaged and resumed."""

import copy
import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from modeling_lvvit.labels.label_crops import CropGeometry, pool_label_maps
from modeling_lvvit.labels.label_maps import decode
from modeling_lvvit.token_labeling import (
    ImageProcessorTransform,
    TokenLabelCollator,
    TokenLabelDataset,
    TokenLabelTrainer,
    TokenLabelTrainingArguments,
)
from modeling_lvvit.training.divergence import DivergenceError
from support.models import NUM_CLASSES
from support.samples import samples_of
from support.trainers import StopAfter, arguments, image_processor, trainer_for


def freeze_batch_norm(model) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train(False)
            module.train = lambda mode=True: None


def test_one_step_changes_every_parameter(tiny_model, labelled_rows, tmp_path):
    before = copy.deepcopy(tiny_model.state_dict())
    trainer_for(tiny_model, labelled_rows, tmp_path).train()
    same = [name for name, value in tiny_model.named_parameters() if torch.equal(value, before[name])]
    assert same == []


def test_plain_labels_leave_the_patch_head_and_switch_it_off(tiny_model, labelled_rows, tmp_path):
    before = tiny_model.patch_classifier.weight.clone()
    trainer_for(tiny_model, labelled_rows, tmp_path, with_maps=False, weight_decay=0.0).train()
    assert torch.equal(tiny_model.patch_classifier.weight, before)
    assert tiny_model.config.patch_logits_weight == 0.0


def test_zero_dense_weight_trains_like_plain_labels(tiny_model, labelled_rows, tmp_path):
    models = [tiny_model, copy.deepcopy(tiny_model)]
    trainer_for(models[0], labelled_rows, tmp_path, dense_weight=0.0, cls_target="label").train()
    trainer_for(models[1], labelled_rows, tmp_path, with_maps=False).train()
    for ours, reference in zip(models[0].state_dict().values(), models[1].state_dict().values()):
        assert torch.equal(ours, reference)


def test_dense_training_switches_the_patch_head_on_again(tiny_model, labelled_rows, tmp_path):
    tiny_model.config.patch_logits_weight = 0.0
    trainer_for(tiny_model, labelled_rows, tmp_path)
    assert tiny_model.config.patch_logits_weight == 0.5


@pytest.mark.parametrize("with_maps", [True, False])
def test_accumulation_gives_the_gradient_of_the_big_batch(with_maps, tiny_model, labelled_rows, tmp_path):
    """Batch 12 against 4 x 3: one step of plain gradient descent, batch norm frozen, mixing off."""
    steps = []
    for batch_size, accumulation in ((12, 1), (3, 4)):
        model = copy.deepcopy(tiny_model)
        freeze_batch_norm(model)
        trainer = trainer_for(
            model,
            labelled_rows,
            tmp_path,
            with_maps,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            mix_probability=0.0,
            optim="sgd",
            learning_rate=1.0,
            weight_decay=0.0,
        )
        trainer.train()
        steps.append([new - old for new, old in zip(model.parameters(), tiny_model.parameters())])
    scale = max(step.abs().max() for step in steps[0])
    assert scale > 1e-3
    for big, accumulated in zip(*steps):
        torch.testing.assert_close(accumulated, big, rtol=1e-4, atol=1e-6 * scale.item())


def dense_reference(trainer, batch, output) -> tuple[torch.Tensor, torch.Tensor]:
    """Class-token and patch-token losses from targets over all classes, by their definitions."""
    args, smoothing = trainer.args, trainer.args.label_smoothing_factor
    ids = batch["token_label_palette"].gather(1, batch["token_label_index"].long().flatten(1))
    dense = decode(ids.view(batch["token_label_index"].shape), batch["token_label_scores"], NUM_CLASSES)
    cls, tokens = (
        pool_label_maps(dense, CropGeometry(batch["crop_box"]), grid, args.label_crop)
        .flatten(2)
        .mT.div(args.label_temperature)
        .softmax(-1)
        for grid in ((1, 1), (4, 6))
    )
    human = torch.nn.functional.one_hot(batch["labels"], NUM_CLASSES).float()
    agree = (cls[:, 0].argmax(-1) == batch["labels"]).float().unsqueeze(1)
    share = {"dense": 1.0, "label": 0.0, "blend": 0.9 - 0.4 * agree}[args.cls_target]
    target = share * cls[:, 0] + (1 - share) * human
    kept = 1 - batch["mix_mask"].float().mean(dim=(1, 2)).unsqueeze(1)
    target, tokens = (smoothing / NUM_CLASSES + (1 - smoothing) * value for value in (target, tokens))
    mixed = kept * target + (1 - kept) * target.flip(0)
    return tuple(
        -(value * logits.log_softmax(-1)).sum(-1).mean()
        for value, logits in ((mixed, output["cls_logits"]), (tokens, output["patch_logits"]))
    )


@pytest.mark.parametrize("label_crop", ["correct", "authors"])
@pytest.mark.parametrize("cls_target", ["dense", "label", "blend"])
def test_losses_follow_their_definitions(cls_target, label_crop, tiny_model, labelled_rows, tmp_path):
    """Every option away from its default, a mask of unequal parts, and a batch that has both kinds of blend."""
    options = {"label_smoothing_factor": 0.2, "label_temperature": 0.5, "cls_weight": 2.0, "dense_weight": 0.5}
    trainer = trainer_for(tiny_model, labelled_rows, tmp_path, cls_target=cls_target, label_crop=label_crop, **options)
    torch.manual_seed(0)
    batch = TokenLabelCollator((4, 6), mix_probability=0.0)(trainer.train_dataset.__getitems__(list(range(12))))
    batch["mix_mask"] = torch.zeros(12, 4, 6, dtype=torch.bool)
    batch["mix_mask"][:, 1:3, 2:5] = True
    output = {"cls_logits": torch.randn(12, NUM_CLASSES), "patch_logits": torch.randn(12, 24, NUM_CLASSES)}
    losses = trainer.objective(output, {**batch}, batch["mix_mask"])
    cls_loss, token_loss = dense_reference(trainer, batch, output)
    torch.testing.assert_close(losses["cls_loss"], cls_loss)
    torch.testing.assert_close(losses["token_loss"], token_loss)
    torch.testing.assert_close(losses["loss"], 2.0 * cls_loss + 0.5 * token_loss)


def test_weight_decay_spares_vectors_class_token_and_positions(tiny_model, labelled_rows, tmp_path):
    decayed = trainer_for(tiny_model, labelled_rows, tmp_path).get_decay_parameter_names(tiny_model)
    parameters = dict(tiny_model.named_parameters())
    assert all(parameters[name].ndim >= 2 for name in decayed)
    spared = {name.rpartition(".")[2] for name in parameters if name not in decayed and parameters[name].ndim > 1}
    assert spared == {"cls_token", "position_embeddings"}
    assert "lvvit.embeddings.patch_embeddings.conv1.weight" in decayed


def test_loss_components_are_logged(tiny_model, labelled_rows, tmp_path):
    trainer = trainer_for(tiny_model, labelled_rows, tmp_path, max_steps=4, logging_steps=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "cls_loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["cls_loss"] + entry["token_loss"], rel=1e-4)


def test_learning_rate_follows_the_images_per_step(tmp_path):
    options = {"learning_rate": None, "per_device_train_batch_size": 64, "gradient_accumulation_steps": 4}
    assert arguments(tmp_path, **options).learning_rate == pytest.approx(1.6e-3 / 4)
    assert arguments(tmp_path, **{**options, "learning_rate": 0.5}).learning_rate == 0.5


BAD_ARGUMENTS = {
    "dense_weight": -1,
    "label_temperature": 0,
    "cls_target": "both",
    "label_crop": "wrong",
    "mix_probability": 1.5,
    "ema_decay": 1.0,
    "base_ema_decay": 0.0,
    "mix_methods": ["cutout"],
    "mixup_alpha": 0,
    "lr_schedule": "other",
    "batch_norm": "global",
    "label_smoothing_factor": 2.0,
    "per_device_train_batch_size": 0,
    "gradient_accumulation_steps": 0,
    "learning_rate": float("nan"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_impossible_arguments_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}`"):
        arguments(tmp_path, **{name: BAD_ARGUMENTS[name]})


def test_removing_unused_columns_is_refused(tiny_model, labelled_rows, tmp_path):
    with pytest.raises(ValueError, match="remove_unused_columns"):
        trainer_for(tiny_model, labelled_rows, tmp_path, remove_unused_columns=True)


def test_class_count_of_the_data_must_fit(tiny_model, labelled_rows, tmp_path):
    tiny_model.config.num_labels = 3
    with pytest.raises(ValueError, match="7 classes in column 'label', the model has 3"):
        trainer_for(tiny_model, labelled_rows, tmp_path)


def test_evaluation_counts_every_image_once(tiny_model, labelled_rows, tmp_path):
    samples = TokenLabelDataset(labelled_rows, ImageProcessorTransform(image_processor()), name="evaluation")
    trainer = TokenLabelTrainer(tiny_model, arguments(tmp_path, per_device_eval_batch_size=5), eval_dataset=samples)
    metrics = trainer.evaluate()
    pixel_values = torch.stack([samples[index]["pixel_values"] for index in range(12)])
    with torch.no_grad():
        logits = tiny_model.eval()(pixel_values).logits
    labels = torch.tensor(samples.labels(12))
    assert metrics["eval_accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    in_top5 = (logits.topk(5).indices == labels.unsqueeze(1)).any(1).float().mean().item()
    assert metrics["eval_top5_accuracy"] == pytest.approx(in_top5)


def test_average_follows_its_formula(tiny_model, labelled_rows, tmp_path):
    """After two steps: the weights of step 1, then 0.75 of them and 0.25 of step 2 (the first update copies)."""
    weights = []
    trainer = trainer_for(tiny_model, labelled_rows, tmp_path, max_steps=2, ema_decay=0.75)
    update = trainer.ema.on_step_end

    def record(args, state, control, model=None, **kwargs):
        weights.append(model.classifier.weight.detach().clone())
        return update(args, state, control, model=model, **kwargs)

    trainer.ema.on_step_end = record
    trainer.train()
    torch.testing.assert_close(tiny_model.classifier.weight, 0.75 * weights[0] + 0.25 * weights[1])


def test_evaluation_of_other_data_is_of_that_data(tiny_model, labelled_rows, tmp_path):
    """With workers that outlive an epoch the library keeps a loader, whatever data is asked for."""
    few, many = (
        TokenLabelDataset(labelled_rows.select(range(count)), ImageProcessorTransform(image_processor()))
        for count in (3, 12)
    )
    settings = arguments(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True)
    trainer = TokenLabelTrainer(tiny_model, settings, eval_dataset=few)
    assert len(trainer.get_eval_dataloader().dataset) == 3
    assert len(trainer.get_eval_dataloader(many).dataset) == 12
    assert settings.dataloader_persistent_workers


def test_loading_by_one_process_for_all_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dispatch_batches"):
        arguments(tmp_path, accelerator_config={"dispatch_batches": True})


def test_evaluation_during_training_uses_the_average(tiny_model, labelled_rows, tmp_path):
    """With a decay near 1 the average stays at the weights after the first step, whatever follows."""
    evaluation = TokenLabelDataset(labelled_rows, ImageProcessorTransform(image_processor()), name="evaluation")
    options = {"max_steps": 3, "ema_decay": 1 - 1e-9, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.1}
    arguments_ = arguments(tmp_path, lr_scheduler_type="constant", **options)
    trainer = TokenLabelTrainer(
        tiny_model, arguments_, train_dataset=samples_of(labelled_rows), eval_dataset=evaluation
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_best_average_is_what_remains(tiny_model, labelled_rows, tmp_path):
    evaluation = TokenLabelDataset(labelled_rows, ImageProcessorTransform(image_processor()), name="evaluation")
    options = {"max_steps": 4, "ema_decay": 0.5, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.3}
    options |= {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    trainer = TokenLabelTrainer(
        tiny_model, arguments(tmp_path, **options), train_dataset=samples_of(labelled_rows), eval_dataset=evaluation
    )
    trainer.train()
    best = load_file(Path(trainer.state.best_model_checkpoint) / "ema.safetensors")
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(value, best[name]), name


def test_resumed_run_ends_like_an_uninterrupted_one(tiny_model, labelled_rows, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "ema_decay": 0.9}
    whole, first, second = (copy.deepcopy(tiny_model) for _ in range(3))
    trainer_for(whole, labelled_rows, tmp_path / "whole", **options).train()
    interrupted = trainer_for(first, labelled_rows, tmp_path / "parts", **options)
    interrupted.add_callback(StopAfter(2))
    interrupted.train()
    assert load_file(tmp_path / "parts" / "checkpoint-2" / "ema.safetensors")["n_averaged"] == 2
    resumed = trainer_for(second, labelled_rows, tmp_path / "parts", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    for ours, reference in zip(second.state_dict().values(), whole.state_dict().values()):
        assert torch.equal(ours, reference)


def test_plain_training_says_that_the_patch_head_is_left_out(tiny_model, labelled_rows, tmp_path, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    package_logger = logging.getLogger("modeling_lvvit.token_labeling.trainer_setup")
    package_logger.setLevel(logging.INFO)
    package_logger.addHandler(caplog.handler)
    trainer_for(tiny_model, labelled_rows, tmp_path, with_maps=False)
    assert "left out of `logits`" in caplog.text


def test_a_finished_card_is_not_replaced_by_a_draft(tiny_model, labelled_rows, tmp_path):
    trainer = trainer_for(tiny_model, labelled_rows, tmp_path / "run")
    card = tmp_path / "run" / "README.md"
    card.parent.mkdir(exist_ok=True)
    card.write_text("the real card")
    trainer.create_model_card()
    assert card.read_text() == "the real card"
    card.unlink()
    trainer.create_model_card()
    assert card.is_file()


def test_raw_and_averaged_accuracy_are_both_reported(tiny_model, labelled_rows, tmp_path):
    """The average stays near the first step, the weights run away: other accuracies, and each is of its weights."""
    evaluation = TokenLabelDataset(labelled_rows, ImageProcessorTransform(image_processor()), name="evaluation")
    options = {"max_steps": 3, "ema_decay": 1 - 1e-9, "eval_strategy": "steps", "eval_steps": 3, "learning_rate": 0.5}
    settings = arguments(tmp_path, **options, lr_scheduler_type="constant")
    trainer = TokenLabelTrainer(tiny_model, settings, train_dataset=samples_of(labelled_rows), eval_dataset=evaluation)
    seen = {}
    trainer.add_callback(Keep(seen))
    trainer.train()
    raw, average = copy.deepcopy(tiny_model), tiny_model  # the average is what training leaves
    raw.load_state_dict(seen["weights"])
    logged = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    for name, model in (("eval_raw_accuracy", raw), ("eval_accuracy", average)):
        metrics = TokenLabelTrainer(model, arguments(tmp_path), eval_dataset=evaluation).evaluate()
        assert logged[name] == metrics["eval_accuracy"], name
    assert "eval_raw_top5_accuracy" in logged


class Keep(TrainerCallback):
    """Keeps the weights of the last step."""

    def __init__(self, seen: dict):
        self.seen = seen

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen["weights"] = copy.deepcopy(model.state_dict())


def test_logs_tell_speed_and_go_to_tensorboard(tiny_model, labelled_rows, tmp_path):
    trainer = trainer_for(tiny_model, labelled_rows, tmp_path, max_steps=4, logging_steps=2, report_to="tensorboard")
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "cls_loss" in entry]
    assert all(entry["images_per_second"] > 0 and 0 <= entry["data_wait"] <= 1 for entry in entries)
    assert all("learning_rate" in entry for entry in entries)
    assert TokenLabelTrainingArguments(str(tmp_path)).report_to == ["tensorboard"]
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_averages_of_the_wrong_model_are_refused(tiny_model, labelled_rows, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "ema_decay": 0.9}
    trainer_for(copy.deepcopy(tiny_model), labelled_rows, tmp_path, **options).train()
    save_file({"n_averaged": torch.tensor(1), "other": torch.zeros(1)}, tmp_path / "checkpoint-1" / "ema.safetensors")
    (tmp_path / "checkpoint-1" / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=r"ema.safetensors holds other weights"):
        trainer_for(tiny_model, labelled_rows, tmp_path, **options).train(str(tmp_path / "checkpoint-1"))


def test_published_schedule_goes_through_a_shortened_run(tiny_model, labelled_rows, tmp_path):
    """Ten epochs stretched over 20 steps: 2 of warm-up, 6 of cosine, 2 at the minimum; two steps each."""
    options = {"lr_schedule": "published", "num_train_epochs": 10, "warmup_epochs": 2, "cooldown_epochs": 2}
    options |= {"learning_rate": 1.0, "base_learning_rate": 1.0, "base_warmup_learning_rate": 0.2}
    options |= {"base_min_learning_rate": 0.1, "max_steps": 20, "logging_steps": 1, "optim": "sgd"}
    trainer = trainer_for(tiny_model, labelled_rows, tmp_path, **options)
    scheduler = trainer.create_scheduler(20, torch.optim.SGD(tiny_model.parameters(), lr=1.0))
    rates = []
    for _ in range(20):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * epoch / 8)) for epoch in range(2, 8)]
    assert rates[::2] == pytest.approx([0.2, 0.6, *cosine, 0.1, 0.1])
    assert rates[1::2] == rates[::2]
    with pytest.raises(ValueError, match="shorten these"):
        arguments(tmp_path, lr_schedule="published", num_train_epochs=15)


def test_patch_logits_stay_in_half_precision(tiny_model, labelled_rows, tmp_path):
    seen = []
    trainer = trainer_for(tiny_model, labelled_rows, tmp_path, bf16=True, eval_strategy="no")
    objective = trainer.objective
    trainer.objective = lambda outputs, *rest: seen.append(outputs["patch_logits"].dtype) or objective(outputs, *rest)
    trainer.train()
    assert seen == [torch.bfloat16]
    assert type(tiny_model).forward.__get__(tiny_model) == tiny_model.forward  # no wrapper is left
    projected = []
    tiny_model.lvvit.layers[0].attention.qkv.register_forward_hook(lambda *call: projected.append(call[-1].dtype))
    samples = [samples_of(labelled_rows)[index] for index in range(2)]
    for names in (
        ("pixel_values", "normalization", "labels"),
        ("pixel_values", "normalization"),
    ):  # evaluation, prediction
        trainer.predict([{name: sample[name] for name in names} for sample in samples])
    assert projected == [torch.bfloat16] * 2


def test_infinite_losses_end_training(tiny_model, labelled_rows, tmp_path):
    """They are not replaced by the mean of earlier ones."""
    trainer = trainer_for(tiny_model, labelled_rows, tmp_path, learning_rate=1e30, max_steps=4, logging_steps=1)
    with pytest.raises(DivergenceError, match="the loss is nan at step 2"):
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 1 and math.isfinite(losses[0])


def test_the_compiled_model_has_no_graph_breaks(tiny_model, labelled_rows, tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"torch_compile": True, "torch_compile_backend": "eager", "bf16": True, "mix_probability": 0.5}
    trainer_for(tiny_model, labelled_rows, tmp_path, max_steps=6, per_device_train_batch_size=2, **options).train()
    counters = torch._dynamo.utils.counters
    assert sum(counters["graph_break"].values()) == 0, counters["graph_break"]
    assert 1 <= counters["stats"]["unique_graphs"] <= 2  # with and without mixed tokens


def test_compiled_training_has_one_shape_and_evaluates_all_images(tiny_model, labelled_rows, tmp_path):
    """12 images in batches of 5: two an epoch; and in batches of 8 in the evaluation, which is not compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"torch_compile": True, "torch_compile_backend": "eager", "dataloader_drop_last": True, "ema_decay": 0.9}
    options |= {"per_device_train_batch_size": 5, "per_device_eval_batch_size": 8, "eval_strategy": "epoch"}
    settings = arguments(tmp_path, max_steps=-1, num_train_epochs=2, **options)
    evaluated = TokenLabelDataset(labelled_rows, ImageProcessorTransform(image_processor()))
    trainer = TokenLabelTrainer(tiny_model, settings, train_dataset=samples_of(labelled_rows), eval_dataset=evaluated)
    trainer.train()
    assert trainer.state.global_step == settings.optimizer_steps(12) == 4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert len(trainer.predict(evaluated).predictions) == 12 and settings.dataloader_drop_last
    with pytest.raises(ValueError, match=r"12 training images, fewer than a step takes \(13\)"):
        trainer_for(tiny_model, labelled_rows, tmp_path, dataloader_drop_last=True, per_device_train_batch_size=13)
