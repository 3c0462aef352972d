"""Loads and fine-tunes saved LV-ViT models with the installed transformers, without this package.

python -P transformers_client.py INPUTS OUTPUT CLASSIFIER SEGMENTER

INPUTS is a folder with `pixels.pt`, images `(batch_size, 3, height, width)`, and `image.png`. CLASSIFIER and SEGMENTER are
folders or names on the Hub. OUTPUT receives `outputs.pt` and the fine-tuned models `classifier` and `segmenter`. The last
line of the output is a JSON list: the versions of transformers and torch. See `transformers_versions.py`.
"""

# ruff: noqa: E402 (imports after the lines that hide packages)

import json
import sys
from pathlib import Path


sys.modules["modeling_lvvit"] = None  # the installed package must not help
sys.modules["datasets"] = None  # not needed; the installed one may be too new for this version of transformers

import torch
import transformers
from PIL import Image
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module


STEPS = 2
TRUSTED = {"trust_remote_code": True}


def classifier_outputs(name: str, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the classifier, its backbone and its feature maps give."""
    classifier = AutoModelForImageClassification.from_pretrained(name, **TRUSTED).eval()
    model = AutoModel.from_pretrained(name, attn_implementation="eager", **TRUSTED).eval()
    backbone_class = AutoBackbone
    if Path(name).is_dir():  # which AutoBackbone of transformers 5 takes for a name on the Hub
        backbone_class = get_class_from_dynamic_module("modeling_lvvit.LVViTBackbone", name)
    backbone = backbone_class.from_pretrained(name, out_features=["stage1", "stage4"], **TRUSTED).eval()
    assert type(classifier).__module__.startswith("transformers_modules.")
    rows, columns = model.config.grid_size
    mix_mask = torch.zeros(len(pixels), rows, columns, dtype=torch.bool)
    mix_mask[:, : rows // 2] = True
    with torch.no_grad():
        output = classifier(pixels)
        features = model(pixels, output_hidden_states=True, output_attentions=True)
        return {
            "logits": output.logits,
            "patch_logits": output.patch_logits,
            "mixed_logits": classifier(pixels, mix_mask=mix_mask).logits,
            "fused_logits": classifier.fuse()(pixels).logits,
            "hidden_states": torch.stack(features.hidden_states),
            "attentions": torch.stack(features.attentions),
            "feature_maps": torch.stack(backbone(pixels).feature_maps),
        }


def segmenter_outputs(name: str, classifier_name: str, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the segmenter gives; a classifier is loaded as segmenter too."""
    segmenter = AutoModelForSemanticSegmentation.from_pretrained(name, **TRUSTED).eval()
    settings = {"neck_channels": 16, "decoder_channels": 8, "num_labels": 3}
    fresh = AutoModelForSemanticSegmentation.from_pretrained(classifier_name, **settings, **TRUSTED).eval()
    with torch.no_grad():
        assert fresh(pixels).logits.shape[1] == 3
        return {"map_logits": segmenter(pixels).logits}


def pipeline_outputs(name: str, segmenter_name: str, image: Image.Image) -> dict[str, torch.Tensor]:
    """Pixels of the image processor, which the pipelines must use too."""
    config = AutoConfig.from_pretrained(name, **TRUSTED)
    pixels = AutoImageProcessor.from_pretrained(name, **TRUSTED)(image, return_tensors="pt")["pixel_values"]
    classify = pipeline("image-classification", model=name, top_k=config.num_labels, **TRUSTED)
    scores = {answer["label"]: answer["score"] for answer in classify(image)}
    segments = pipeline("image-segmentation", model=segmenter_name, **TRUSTED)(image)
    assert segments and segments[0]["mask"].size == image.size
    scores = torch.tensor([scores[config.id2label[index]] for index in range(config.num_labels)])
    with torch.no_grad():
        torch.testing.assert_close(scores, classify.model(pixels).logits.softmax(-1)[0])
    return {"processor_pixels": pixels}


def fine_tune(auto_class: type, name: str, pixels: torch.Tensor, labels: torch.Tensor, folder: Path) -> torch.Tensor:
    """Trains with a plain Trainer, saves, loads again; returns the logits."""
    torch.manual_seed(0)
    model = auto_class.from_pretrained(name, **TRUSTED)
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=len(pixels),
        learning_rate=1e-3,
        gradient_checkpointing=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    samples = [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels)]
    trainer = Trainer(model, arguments, train_dataset=samples, eval_dataset=samples)
    trainer.train()
    predictions = trainer.predict(samples).predictions
    assert predictions.shape[:2] == (len(pixels), model.config.num_labels)  # no patch logits, no hidden states
    trainer.save_model(str(folder))
    code = {path.name for path in folder.glob("*.py")}
    assert code == {"configuration_lvvit.py", "modeling_lvvit.py"}, code
    loaded = auto_class.from_pretrained(str(folder), **TRUSTED).eval()
    with torch.no_grad():
        logits = loaded(pixels).logits
        assert torch.equal(logits, model.eval()(pixels).logits)
    return logits


def main(inputs: str, output: str, classifier: str, segmenter: str) -> None:
    torch.set_num_threads(1)
    pixels = torch.load(Path(inputs) / "pixels.pt", weights_only=True)
    outputs = classifier_outputs(classifier, pixels)
    outputs |= segmenter_outputs(segmenter, classifier, pixels)
    outputs |= pipeline_outputs(classifier, segmenter, Image.open(Path(inputs) / "image.png"))
    labels = torch.arange(len(pixels))
    maps = (pixels[:, 0] > 0).long()
    outputs["tuned_logits"] = fine_tune(
        AutoModelForImageClassification, classifier, pixels, labels, Path(output) / "classifier"
    )
    outputs["tuned_map_logits"] = fine_tune(
        AutoModelForSemanticSegmentation, segmenter, pixels, maps, Path(output) / "segmenter"
    )
    torch.save(outputs, Path(output) / "outputs.pt")
    print(json.dumps([transformers.__version__, torch.__version__]))


if __name__ == "__main__":
    main(*sys.argv[1:])
