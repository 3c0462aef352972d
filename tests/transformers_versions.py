"""Loads saved models with several versions of transformers, each with the oldest torch that it allows, and prints by how
much their outputs differ from those of this package.

python tests/transformers_versions.py                    the versions of `VERSIONS`
python tests/transformers_versions.py 4.57.1 5.0.0       these versions
python tests/transformers_versions.py --folder ENVS      with environments in ENVS

Every version gets a virtual environment of its own, made once and kept in the user's cache (several GB each, from PyPI).
This package is not importable there. Each environment loads a classifier and a segmenter by all Auto classes and pipelines,
from a folder and by name from a local stand-in for the Hub, fine-tunes both with a plain Trainer, saves them and loads them
again (`transformers_client.py`). What it saved is then loaded by this package with the transformers of this environment.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch
import transformers
from huggingface_hub import HfApi, constants
from PIL import Image
from transformers import SegformerImageProcessor

from modeling_lvvit import LVViTConfig, LVViTForImageClassification, LVViTForSemanticSegmentation
from modeling_lvvit.variants import evaluation_image_processor
from support.local_hub import TOKEN, LocalHub, local_hub


VERSIONS = ("4.57.1", "5.0.0", "5.5.0", "5.10.4", "5.24.0")
TORCH = {"5.10.4": "2.7"}  # cannot be imported with torch 2.4, which its metadata allows
CLIENT = Path(__file__).parent / "transformers_client.py"
HEIGHT, WIDTH, PATCH_SIZE = 32, 48, 8
NAMES = {"classifier": "user/classifier", "segmenter": "user/segmenter"}
OLDEST_TORCH = """
import importlib.metadata, re
requirements = [each for each in importlib.metadata.requires("transformers") if 'extra == "torch"' in each]
print(next(match[1] for match in (re.match(r"torch>=([0-9.]+)", each) for each in requirements) if match))
"""


def save_models(folder: Path) -> dict[str, torch.Tensor]:
    """Saves a classifier, a segmenter and their inputs.

    Args:
        folder: Receives the folders of `NAMES`, `pixels.pt` and `image.png`.

    Returns:
        The outputs of this package, under the names of `transformers_client.py`.
    """
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 48}
    settings |= {"stem_hidden_size": 8, "image_size": [HEIGHT, WIDTH], "patch_size": PATCH_SIZE, "num_labels": 7}
    settings["initializer_range"] = 0.2  # logits of about 1
    config = LVViTConfig(**settings, neck_channels=16, decoder_channels=8, out_features=["stage1", "stage4"])
    classifier, segmenter = LVViTForImageClassification(config), LVViTForSemanticSegmentation(config)
    pixels = torch.randn(2, 3, HEIGHT, WIDTH)
    for model in (classifier, segmenter):
        model.train()(pixels)  # statistics of the batch norms
        model.eval()
    torch.save(pixels, folder / "pixels.pt")
    image = (torch.rand(HEIGHT + 9, WIDTH + 15, 3) * 255).byte()
    Image.fromarray(image.numpy()).save(folder / "image.png")
    classifier.save_pretrained(folder / "classifier")
    processor = evaluation_image_processor((HEIGHT, WIDTH), 0.9)
    processor.save_pretrained(folder / "classifier")
    segmenter.save_pretrained(folder / "segmenter")
    SegformerImageProcessor(do_resize=False).save_pretrained(folder / "segmenter")
    return expected_outputs(classifier, segmenter, pixels) | {
        "processor_pixels": processor(Image.fromarray(image.numpy()), return_tensors="pt")["pixel_values"]
    }


@torch.no_grad()
def expected_outputs(
    classifier: LVViTForImageClassification, segmenter: LVViTForSemanticSegmentation, pixels: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The outputs of this package, under the names of `transformers_client.py`."""
    output = classifier(pixels)
    mix_mask = torch.zeros(len(pixels), *classifier.config.grid_size, dtype=torch.bool)
    mix_mask[:, : mix_mask.shape[1] // 2] = True
    mixed = classifier(pixels, mix_mask=mix_mask).logits
    classifier.set_attn_implementation("eager")
    features = classifier.lvvit(pixels, output_hidden_states=True, output_attentions=True)
    maps = [
        classifier.lvvit.layernorm(features.hidden_states[stage])[:, 1:].mT.unflatten(2, classifier.config.grid_size)
        for stage in (1, 4)
    ]
    return {
        "logits": output.logits,
        "patch_logits": output.patch_logits,
        "mixed_logits": mixed,
        "fused_logits": output.logits,
        "hidden_states": torch.stack(features.hidden_states),
        "attentions": torch.stack(features.attentions),
        "feature_maps": torch.stack(maps),
        "map_logits": segmenter(pixels).logits,
    }


@torch.no_grad()
def reloaded_outputs(folder: Path, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits of the models that a client has saved, loaded by this package."""
    return {
        "tuned_logits": LVViTForImageClassification.from_pretrained(folder / "classifier").eval()(pixels).logits,
        "tuned_map_logits": LVViTForSemanticSegmentation.from_pretrained(folder / "segmenter").eval()(pixels).logits,
    }


def largest_differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest absolute difference of each output."""
    return {name: (found[name] - value).abs().max().item() for name, value in expected.items()}


def run_client(
    python: Path | str, inputs: Path, output: Path, names: list[str], environment: dict[str, str]
) -> tuple[list[str], dict[str, float]]:
    """Runs `transformers_client.py` and loads what it saved.

    Args:
        python: Interpreter.
        inputs: Folder that `save_models` filled.
        output: Folder for the results.
        names: Classifier and segmenter, as folders or names on the Hub.
        environment: Variables of the process.

    Returns:
        Its versions of transformers and torch, and the largest differences from `expected.pt` in `inputs`.
    """
    output.mkdir(parents=True)
    done = subprocess.run(
        [str(python), "-P", str(CLIENT), str(inputs), str(output), *names],
        cwd=output,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{python} failed:\n{done.stderr[-4000:]}")
    found = torch.load(output / "outputs.pt", weights_only=True)
    expected = torch.load(inputs / "expected.pt", weights_only=True)
    expected |= reloaded_outputs(output, torch.load(inputs / "pixels.pt", weights_only=True))
    return json.loads(done.stdout.strip().rpartition("\n")[2]), largest_differences(found, expected)


def python_with(version: str, folder: Path) -> Path:
    """Interpreter of an environment with a version of transformers and the oldest torch that it allows, made if missing."""
    environment = folder / f"transformers-{version}"
    python = environment / "bin" / "python"
    if (environment / "done").is_file():
        return python
    print(f"installing transformers {version} into {environment}", flush=True)
    venv.create(environment, with_pip=True, clear=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"transformers=={version}"]
    subprocess.run(pip, check=True)
    oldest = subprocess.run([python, "-c", OLDEST_TORCH], check=True, capture_output=True, text=True).stdout.strip()
    major, minor = map(int, TORCH.get(version, oldest).split(".")[:2])
    # the minor version of torchvision is 15 ahead; torch 2.2 and earlier were built for numpy 1
    vision = [f"torch=={major}.{minor}.0", f"torchvision==0.{minor + 15}.0", "numpy<2" if minor < 3 else "numpy"]
    subprocess.run([*pip, *vision, "accelerate", "pillow"], check=True)
    (environment / "done").touch()
    return python


def upload(folder: Path, hub: LocalHub) -> None:
    """Puts the models on the stand-in for the Hub."""
    constants.HF_HUB_DISABLE_XET = True  # the stand-in has no such storage
    api = HfApi(endpoint=hub.url, token=TOKEN)
    for part, name in NAMES.items():
        api.create_repo(name)
        api.upload_folder(repo_id=name, folder_path=folder / part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lvvit-tests" / "environments"
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--folder", type=Path, default=cache, help="where the environments are")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    failed = False
    with tempfile.TemporaryDirectory() as temporary, local_hub() as hub:
        inputs = Path(temporary)
        torch.save(save_models(inputs), inputs / "expected.pt")
        upload(inputs, hub)
        for version in args.versions:
            python = python_with(version, args.folder)
            for source, names in (
                ("folder", [str(inputs / part) for part in NAMES]),
                ("Hub name", list(NAMES.values())),
            ):
                output = inputs / f"{version} {source}"
                environment = {
                    name: value for name, value in hub.environment(output / "hf").items() if name != "PYTHONPATH"
                }
                try:
                    versions, differences = run_client(python, inputs, output, names, environment)
                except RuntimeError as error:
                    failed = True
                    print(f"transformers {version}, {source}: {error}\nunknown routes: {hub.unknown}", flush=True)
                    continue
                logits = max(value for name, value in differences.items() if re.search(r"logits$", name))
                print(
                    f"transformers {versions[0]}, torch {versions[1]}, {source}: largest difference of logits {logits:.1e}; "
                    + ", ".join(f"{name} {value:.1e}" for name, value in differences.items()),
                    flush=True,
                )
    sys.exit(failed)


if __name__ == "__main__":
    main()
