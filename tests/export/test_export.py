"""Exported models say what the models say, for any batch and size, and run without this package."""

import copy
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    BitImageProcessorPil,
    DeiTImageProcessor,
    SegformerImageProcessor,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging

from modeling_lvvit import LVViTForImageClassification, LVViTForSemanticSegmentation, LVViTModel
from modeling_lvvit.export import export_onnx, export_program, folder
from modeling_lvvit.export.__main__ import main
from modeling_lvvit.export.folder import export_folder
from modeling_lvvit.export.torch_program import MeanPooling
from modeling_lvvit.export.verification import compare, onnx_runner, program_runner
from modeling_lvvit.variants import evaluation_image_processor
from support.models import tiny_config


onnx = pytest.importorskip("onnx")
predict = pytest.importorskip("modeling_lvvit.export.predict")
PATCH = 8
BOUND = {"rtol": 0.0, "atol": 1e-4}
GRAY_LEVEL = 1 / 255 / 0.224
SEGMENTATION = {"num_hidden_layers": 4, "neck_channels": 16, "decoder_channels": 8}


def trained(model: nn.Module) -> nn.Module:
    """Batch norms with statistics, scales and shifts of their own."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval().requires_grad_(False)


def classifier(**settings) -> LVViTForImageClassification:
    """32 x 48 pixels in patches of 8."""
    torch.manual_seed(0)
    return trained(LVViTForImageClassification(tiny_config(**settings)))


def segmenter(head: str) -> LVViTForSemanticSegmentation:
    torch.manual_seed(0)
    return trained(LVViTForSemanticSegmentation(tiny_config(segmentation_head=head, **SEGMENTATION)))


def assert_same(run, model: nn.Module, tolerance: dict[str, float] = BOUND, least: int = 1) -> None:
    """The model's size, one patch more, rectangles both ways, the smallest; one image, three, eight."""
    (rows, columns), side = model.config.grid_size, model.config.patch_size
    grids = ((rows, columns), (rows + 1, columns + 1), (2, 9), (9, 2), (least, least))
    for batch_size, grid in zip((1, 3, 8, 1, 3), grids):
        images = torch.randn(batch_size, 3, *(side * cells for cells in grid))
        expected, found = model(images, interpolate_pos_encoding=True), run(images)
        for name, values in found.items():
            assert values.dtype == torch.float32
            torch.testing.assert_close(values, expected[name], **tolerance)


def photograph(size: tuple[int, int] = (90, 60)) -> Image.Image:
    """A smooth image with a lot of colors."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def save(model: nn.Module, processor, path: Path) -> Path:
    model.save_pretrained(path)
    if processor is not None:
        processor.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _verbosity():
    """The program silences the library."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with a classifier."""
    path = tmp_path_factory.mktemp("models") / "classifier"
    return save(classifier(), evaluation_image_processor((32, 48), 0.9), path)


@pytest.fixture(scope="module")
def exported(saved) -> Path:
    """What the program makes of it."""
    output_dir = saved.parent / "exported" / "classifier"
    command = [sys.executable, "-m", "modeling_lvvit.export", "--model", saved, "--output_dir", output_dir]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("largest difference to PyTorch at 32 x 48, 40 x 56, 16 x 56 pixels: ")
    assert len(done.stdout.splitlines()) == 3
    assert "torch.onnx" not in done.stderr
    return output_dir


def run_script(folder: Path, *arguments) -> str:
    """Output of `predict.py` where the large libraries cannot be imported."""
    program = (
        "import runpy, sys\n"
        "sys.modules |= dict.fromkeys(['torch', 'torchvision', 'transformers', 'modeling_lvvit', 'onnx'])\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-I", "-c", program, folder / "predict.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_onnx_file_says_what_the_model_says(exported):
    assert sorted(path.name for path in exported.iterdir()) == [
        "SHA256SUMS", "config.json", "model.onnx", "predict.py", "preprocessor_config.json"
    ]  # fmt: skip
    assert_same(onnx_runner(exported / "model.onnx"), classifier())
    assert [path.name for path in exported.parent.iterdir()] == ["classifier"]  # nothing half made
    graph = onnx.load(exported / "model.onnx").graph
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert axes.pop("patch_logits")[::2] == ["batch", 7]
    scores = ["batch", 7]
    assert axes == {"pixel_values": ["batch", 3, "8*rows", "8*columns"], "logits": scores, "cls_logits": scores}
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    assert b".py" not in (exported / "model.onnx").read_bytes()  # lines of source code, with paths


@pytest.mark.slow
@pytest.mark.parametrize("size", [(61, 64), (64, 61), (4, 8)])
def test_onnx_file_refuses_other_sizes(size, exported):
    """Not the answer for the 56 x 64 pixels above the rest."""
    with pytest.raises(Exception, match="multiple of block_size"):
        onnx_runner(exported / "model.onnx")(torch.zeros(1, 3, *size))


@pytest.mark.slow
def test_script_predicts_what_processor_and_model_predict(exported, saved, tmp_path):
    model, image = classifier(), photograph()
    image.save(tmp_path / "image.png")
    lines = run_script(exported, tmp_path / "image.png", "--top", "3").splitlines()
    pixel_values = AutoImageProcessor.from_pretrained(saved)(image, return_tensors="pt")["pixel_values"]
    shares, ids = model(torch.as_tensor(pixel_values)).logits.softmax(dim=1)[0].topk(3)
    assert [line.split()[1] for line in lines] == [model.config.id2label[index] for index in ids.tolist()]
    assert [float(line.split("%")[0]) for line in lines] == pytest.approx((100 * shares).tolist(), abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"patch_size": 16, "image_size": 48, "conv_stem": False, "qkv_bias": True, "patch_logits_weight": 0.0},
        {"image_size": (24, 32), "residual_divisor": 3.0},  # the grid of the example that is traced
    ],
)
def test_other_architectures(settings, tmp_path):
    model = classifier(**settings)
    before = copy.deepcopy(model.state_dict())
    export_onnx(model, tmp_path / "model.onnx")
    assert_same(onnx_runner(tmp_path / "model.onnx"), model)
    assert model.lvvit.embeddings.grid_size == model.config.grid_size  # left as it was
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_float16(saved, tmp_path):
    agreement = export_folder(str(saved), tmp_path / "half", dtype="float16")
    assert 1e-6 < agreement.difference < agreement.bound
    graph = onnx.load(tmp_path / "half" / "model.onnx").graph
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    # all but the position table, which is resized in float32
    weights = [weight for weight in graph.initializer if len(weight.dims) > 1 and weight.dims[-2:] != [4, 6]]
    assert {weight.data_type for weight in weights} == {onnx.TensorProto.FLOAT16}
    assert_same(onnx_runner(tmp_path / "half" / "model.onnx"), classifier(), {"rtol": 0.0, "atol": agreement.bound})


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [True, False])
def test_program(fuse, saved, tmp_path):
    options = [] if fuse else ["--no_fuse"]
    main(["--model", str(saved), "--output_dir", str(tmp_path / "out"), "--format", "torch", *options])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "SHA256SUMS", "config.json", "model.pt2", "preprocessor_config.json"
    ]  # fmt: skip
    path = tmp_path / "out" / "model.pt2"
    assert_same(program_runner(path), classifier(), least=2)
    operations = {str(node.target) for node in torch.export.load(path).graph.nodes}
    assert any("batch_norm" in name for name in operations) is not fuse
    with zipfile.ZipFile(path) as archive:
        (graph,) = (archive.read(name) for name in archive.namelist() if name.endswith("models/model.json"))
    assert b".py" not in graph


@pytest.mark.slow
def test_program_refuses_other_sizes():
    run = export_program(classifier()).module()
    with pytest.raises((AssertionError, RuntimeError)):
        run(torch.zeros(1, 3, 30, 48))


@pytest.mark.slow
def test_fcn_segmentation(tmp_path):
    model = segmenter("fcn")
    export_onnx(model, tmp_path / "model.onnx")
    assert_same(onnx_runner(tmp_path / "model.onnx"), model)


@pytest.mark.slow
def test_upernet_segmentation_and_its_script(tmp_path):
    model, image = segmenter("upernet"), photograph((70, 50))
    processor = SegformerImageProcessor(size={"shortest_edge": 40, "longest_edge": 50})
    agreement = export_folder(str(save(model, processor, tmp_path / "model")), tmp_path / "out")
    assert agreement.is_near
    assert_same(onnx_runner(tmp_path / "out" / "model.onnx"), model)

    image.save(tmp_path / "image.png")
    lines = run_script(tmp_path / "out", tmp_path / "image.png", "--output", tmp_path / "classes.png").splitlines()
    pixel_values = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"])
    assert pixel_values.shape[2:] == (36, 50)  # no multiples of the patch size
    logits = nn.functional.interpolate(model(pixel_values).logits, (50, 70), mode="bilinear", align_corners=False)
    expected = logits[0].argmax(dim=0).numpy()
    painted = Image.open(tmp_path / "classes.png")
    assert painted.mode == "P"
    assert len({tuple(painted.getpalette()[index : index + 3]) for index in range(0, 21, 3)}) == 7
    assert (np.asarray(painted) == expected).mean() > 0.99
    ids, counts = np.unique(np.asarray(painted), return_counts=True)
    assert lines[1].split() == [f"{counts.max() / counts.sum():.2%}", model.config.id2label[int(ids[counts.argmax()])]]


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(7, 4), (6, 12), (1, 5)])
def test_mean_pooling(bins, size):
    maps = torch.randn(2, 3, *size)
    torch.testing.assert_close(MeanPooling(bins)(maps), nn.functional.adaptive_avg_pool2d(maps, bins))


@pytest.mark.parametrize("size", [(90, 60), (61, 97), (30, 30)])
@pytest.mark.parametrize(
    ("processor", "levels"),
    [
        (BitImageProcessorPil(size={"shortest_edge": 35}, crop_size={"height": 32, "width": 24}), 0),
        (evaluation_image_processor((32, 48), 0.9), 2),
        (BitImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 20, "width": 33}, resample=2), 2),
        (DeiTImageProcessor(size={"height": 40, "width": 50}, crop_size={"height": 32, "width": 32}), 2),
        (SegformerImageProcessor(size={"shortest_edge": 40, "longest_edge": 50}), 2),
        (SegformerImageProcessor(do_resize=False), 0),
        (BitImageProcessor(do_resize=False, do_center_crop=False, do_normalize=False), 0),
    ],
)
def test_script_prepares_images_as_processors_do(processor, levels, size):
    """To the last bits but for the filters of torchvision, which differ from Pillow's by up to two gray levels."""
    image = photograph(size)
    expected = np.asarray(processor(image, return_tensors="pt")["pixel_values"])
    found = predict.prepare(image, json.loads(processor.to_json_string()))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=levels * GRAY_LEVEL + 1e-6)


def test_script_takes_images_of_any_mode():
    settings = json.loads(evaluation_image_processor((32, 48), 0.9).to_json_string())
    for mode in ("L", "RGBA", "P", "CMYK"):
        assert predict.prepare(photograph().convert(mode), settings).shape == (1, 3, 32, 48)


def test_differences_are_found(saved):
    """A batch of three that gets the result of its first image, a small error, and a NaN."""
    model = classifier()

    def run_with(change):
        return lambda images: {"logits": change(model(images, interpolate_pos_encoding=True).logits)}

    assert compare(run_with(lambda logits: logits), model, torch.float32).is_near
    for change in (
        lambda logits: logits[:1].expand(len(logits), -1),
        lambda logits: logits + 2e-4,
        lambda logits: logits * float("nan"),
    ):
        assert not compare(run_with(change), model, torch.float32).is_near


def test_file_that_differs_is_not_kept(saved, tmp_path, monkeypatch):
    model = classifier()
    monkeypatch.setattr(folder, "export_onnx", lambda model, path, dtype, fuse: path.write_bytes(b""))
    monkeypatch.setattr(folder, "onnx_runner", lambda path: lambda images: {
        "logits": model(images, interpolate_pos_encoding=True).logits + 0.01
    })  # fmt: skip
    with pytest.raises(ValueError, match="differ from the model's by up to 1.0e-02, more than 1.0e-04; not saved"):
        export_folder(str(saved), tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []


def refused(capsys, model: Path, output_dir: Path, *options: str) -> str:
    """What the program says before it ends with 1."""
    with pytest.raises(SystemExit) as ended:
        main(["--model", str(model), "--output_dir", str(output_dir), *options])
    assert "usage" not in capsys.readouterr().err
    return ended.value.code


def test_models_that_cannot_be_exported(saved, tmp_path, capsys):
    vit = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32)
    out, processor = tmp_path / "out", evaluation_image_processor((32, 48), 0.9)
    (tmp_path / "empty").mkdir()
    one_row = classifier(patch_size=16, image_size=(16, 32))
    for model, options, message in (
        (tmp_path / "nowhere", [], "There is no model folder"),
        (tmp_path / "empty", [], "empty is no model"),
        (save(ViTForImageClassification(vit), processor, tmp_path / "vit"), [], "vit is ViTForImageClassification"),
        (save(LVViTModel(tiny_config()), processor, tmp_path / "backbone"), [], "backbone is LVViTModel; LVViTFor"),
        (save(classifier(), None, tmp_path / "bare"), [], "bare has no preprocessor_config.json"),
        (save(one_row, processor, tmp_path / "row"), ["--format", "torch"], "has (1, 2) patches; programs need 2"),
    ):  # fmt: skip
        assert message in refused(capsys, model, out, *options)
        assert not out.exists()


def test_missing_weights_are_refused(tmp_path, capsys):
    model = classifier()
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("patch_classifier")}
    model.save_pretrained(tmp_path / "model", state_dict=weights)
    evaluation_image_processor((32, 48), 0.9).save_pretrained(tmp_path / "model")
    assert "lacks weights: patch_classifier.bias" in refused(capsys, tmp_path / "model", tmp_path / "out")


def test_processor_that_the_script_does_not_follow_is_refused(tmp_path, capsys):
    processor = evaluation_image_processor((32, 48), 0.9)
    save(classifier(), processor, tmp_path / "model")
    path = tmp_path / "model" / "preprocessor_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | {"do_pad": True, "pad_size": {"height": 64, "width": 64}}), encoding="utf-8")
    assert "would prepare images in another way" in refused(capsys, tmp_path / "model", tmp_path / "out")


def test_folders_that_hold_something_are_left_alone(saved, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine", encoding="utf-8")
    assert "exists and is not empty" in refused(capsys, saved, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert "exists and is not empty" in refused(capsys, saved, tmp_path / "out" / "mine.txt")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_are_named(package, saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = refused(capsys, saved, tmp_path / "out")
    assert package in message
    assert 'pip install "modeling-lvvit[export]"' in message


@pytest.mark.slow
def test_package_is_imported_without_them():
    program = (
        "import sys; sys.modules |= dict.fromkeys(['onnx', 'onnxruntime', 'onnxscript'])\n"
        "import modeling_lvvit.export, modeling_lvvit.export.__main__"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_arguments_are_checked(tmp_path):
    model = classifier()
    with pytest.raises(ValueError, match="Expected one of float32, float16, got torch.bfloat16"):
        export_program(model, torch.bfloat16)
    with pytest.raises(ValueError, match="can be exported, got LVViTModel"):
        export_onnx(model.lvvit, tmp_path / "model.onnx")
