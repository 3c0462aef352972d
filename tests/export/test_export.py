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
    AutoConfig,
    AutoImageProcessor,
    SegformerImageProcessor,
)
from transformers.utils import logging

from modeling_lvvit import LVViTForImageClassification, LVViTForSemanticSegmentation, LVViTModel
from modeling_lvvit.backbones.image_preparation import read_preparation
from modeling_lvvit.data.files.digests import read_digests
from modeling_lvvit.export import export_onnx, export_program, folder
from modeling_lvvit.export.__main__ import main
from modeling_lvvit.export.folder import ExportSettings, export_folder
from modeling_lvvit.export.torch_program import MeanPooling
from modeling_lvvit.export.verification import compare, model_runner, onnx_runner, program_runner
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
    assert done.stdout.startswith("model.onnx: largest difference to PyTorch at 32 x 48, 49 x 48, 19 x 53 pixels ")
    assert len(done.stdout.splitlines()) == 2
    assert "torch.onnx" not in done.stderr
    return output_dir


@pytest.fixture(scope="module")
def any_size(tmp_path_factory) -> Path:
    """A file of it that takes normalized images of any size."""
    path = tmp_path_factory.mktemp("files") / "model.onnx"
    export_onnx(classifier(), path)
    return path


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
def test_onnx_file_says_what_the_model_says(any_size):
    assert_same(onnx_runner(any_size), classifier())
    axes = named_axes(any_size)
    assert axes.pop("patch_logits")[::2] == ["batch", 7]
    scores = ["batch", 7]
    assert axes == {"pixel_values": ["batch", 3, "8*rows", "8*columns"], "logits": scores, "cls_logits": scores}
    graph = onnx.load(any_size).graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    assert b".py" not in any_size.read_bytes()  # lines of source code, with paths


def named_axes(path: Path) -> dict[str, list[int | str]]:
    """Names or sizes of the axes of inputs and outputs."""
    graph = onnx.load(path).graph
    return {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


@pytest.mark.slow
def test_folder_has_the_layout_of_transformers_js(exported):
    files = sorted(path.relative_to(exported).as_posix() for path in exported.rglob("*.*"))
    assert files == ["config.json", "onnx/model.onnx", "predict.py", "preprocessor_config.json"]
    assert [path.name for path in exported.parent.iterdir()] == ["classifier"]  # nothing half made
    assert list(read_digests(exported)) == ["onnx/model.onnx"]
    scores = ["batch", 7]
    assert named_axes(exported / "onnx" / "model.onnx") == {
        "pixel_values": ["batch", 3, "height", "width"],
        "logits": scores,
        "cls_logits": scores,
        "patch_logits": ["batch", 24, 7],
        "crop_box": [4],
    }
    config = AutoConfig.from_pretrained(exported)
    assert config.model_type == "vit"
    assert config.id2label == classifier().config.id2label
    settings = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    assert settings["transformers.js_config"] == {"dtype": "fp32"}
    processor = AutoImageProcessor.from_pretrained(exported)
    image = photograph()
    (pixel_values,) = processor(image, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(pixel_values.transpose(1, 2, 0), np.asarray(image))  # all is left to the file


@pytest.mark.slow
@pytest.mark.parametrize("size", [(61, 64), (64, 61), (4, 8)])
def test_onnx_file_refuses_other_sizes(size, any_size):
    """Not the answer for the 56 x 64 pixels above the rest."""
    with pytest.raises(Exception, match="multiple of block_size"):
        onnx_runner(any_size)(torch.zeros(1, 3, *size))


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
    (file,) = export_folder(str(saved), tmp_path / "half", ExportSettings(dtypes=["float16"], prepare=False))
    assert file.path.name == "model_fp16.onnx"
    assert 1e-6 < file.agreement.difference < file.agreement.bound
    path = tmp_path / "half" / "onnx" / "model_fp16.onnx"
    graph = onnx.load(path).graph
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    # all but the position table, which is resized in float32
    weights = [weight for weight in graph.initializer if len(weight.dims) > 1 and weight.dims[-2:] != [4, 6]]
    assert {weight.data_type for weight in weights} == {onnx.TensorProto.FLOAT16}
    assert_same(onnx_runner(path), classifier(), {"rtol": 0.0, "atol": file.agreement.bound})
    assert "predict.py" not in {
        path.name for path in (tmp_path / "half").iterdir()
    }  # which leaves preparation to the file
    processor = AutoImageProcessor.from_pretrained(tmp_path / "half")
    assert processor.to_dict() == AutoImageProcessor.from_pretrained(saved).to_dict()


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
    (file,) = export_folder(str(save(model, processor, tmp_path / "model")), tmp_path / "out")
    assert file.agreement.is_near

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


def test_differences_are_found(saved):
    """A batch of three that gets the result of its first image, a small error, and a NaN."""
    model = classifier()

    def run_with(change):
        reference = model_runner(model, None)
        return lambda images: {name: change(values) for name, values in reference(images).items()}

    assert compare(run_with(lambda logits: logits), model, torch.float32).is_near
    for change in (
        lambda logits: logits[:1].expand_as(logits),
        lambda logits: logits + 2e-4,
        lambda logits: logits * float("nan"),
    ):
        assert not compare(run_with(change), model, torch.float32).is_near


def test_file_that_differs_is_not_kept(saved, tmp_path, monkeypatch):
    model = classifier()
    monkeypatch.setattr(folder, "export_onnx", lambda model, path, *options: path.write_bytes(b""))
    preparation = read_preparation(AutoImageProcessor.from_pretrained(saved))
    run = model_runner(model, (32, 48), preparation)
    monkeypatch.setattr(folder, "onnx_runner", lambda path: lambda images: {
        name: values + 0.01 for name, values in run(images).items()
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


def test_exported_folders_are_not_exported_again(exported, tmp_path, capsys):
    message = refused(capsys, exported, tmp_path / "out")
    assert message.endswith("is an exported folder; give the model that it was made of.")


def test_models_that_cannot_be_exported(saved, tmp_path, capsys):
    out, processor = tmp_path / "out", evaluation_image_processor((32, 48), 0.9)
    (tmp_path / "empty").mkdir()
    one_row = classifier(patch_size=16, image_size=(16, 32))
    for model, options, message in (
        (tmp_path / "nowhere", [], "There is no model folder"),
        (tmp_path / "empty", [], "empty is no model"),
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


def test_processor_that_a_file_does_not_follow_is_refused(tmp_path, capsys):
    processor = evaluation_image_processor((32, 48), 0.9)
    save(classifier(), processor, tmp_path / "model")
    path = tmp_path / "model" / "preprocessor_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | {"do_pad": True, "pad_size": {"height": 64, "width": 64}}), encoding="utf-8")
    assert "cannot be exported: BitImageProcessor" in refused(capsys, tmp_path / "model", tmp_path / "out")


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


def test_settings_are_checked():
    for settings, message in (
        ({"dtypes": ["int8"]}, "name images on which it is compared, `check_images`"),
        ({"dtypes": ["int4"]}, "must be of float32, float16, int8; got int4"),
        ({"dtypes": ["float32", "float32"]}, "names each type once"),
        ({"file_format": "torch", "dtypes": ["float32", "float16"]}, "one `dtype`, float32 or float16"),
        ({"calibration": "images"}, "is for `dtype` int8"),
        ({"min_agreement": 1.1}, r"must lie in \[0, 1\], got 1.1"),
        ({"max_check_images": 0}, "at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ExportSettings(**settings)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder of images of several sizes."""
    path = tmp_path_factory.mktemp("images")
    for number, size in enumerate(((90, 60), (48, 32), (40, 100))):
        photograph(size).save(path / f"{number}.png")
    return path


@pytest.mark.slow
def test_all_types_are_compared_on_real_images(saved, images, tmp_path, capsys):
    out = tmp_path / "out"
    types = ["--dtype", "int8", "float16", "float32", "--check_images", str(images), "--min_agreement", "0"]
    main(["--model", str(saved), "--output_dir", str(out), *types])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == ["model.onnx"] * 2 + ["model_fp16.onnx"] * 2 + [
        "model_quantized.onnx"
    ] * 2
    assert all("on 3 images" in line for line in lines[1:-1:2])
    assert sorted(path.name for path in (out / "onnx").iterdir()) == [
        "model.onnx",
        "model_fp16.onnx",
        "model_quantized.onnx",
    ]
    assert "fp32" in (out / "config.json").read_text(encoding="utf-8")
    image = images / "0.png"
    full, small = (
        run_script(out, image, "--file", name, "--top", "7") for name in ("model.onnx", "model_quantized.onnx")
    )
    assert full != small
    assert sorted(line.split()[1] for line in full.splitlines()) == sorted(
        line.split()[1] for line in small.splitlines()
    )


@pytest.mark.slow
def test_types_that_change_predictions_are_not_kept(saved, images, tmp_path, capsys, monkeypatch):
    """Of the three files only int8 is bad, and a file that int8 is made of does not stay."""
    runner = folder.onnx_runner

    def damaged(path: Path):
        run = runner(path)
        return lambda pixels: {
            name: -values if "quantized" in path.name else values for name, values in run(pixels).items()
        }

    monkeypatch.setattr(folder, "onnx_runner", damaged)
    options = ["--dtype", "int8", "--check_images", str(images)]
    message = refused(capsys, saved, tmp_path / "out", *options)
    assert message.startswith(
        "lvvit export: model_quantized.onnx is not saved. Expected at least 99.00% of equal predictions."
    )
    assert "--min_agreement says what is enough, 0 takes it as it is" in message
    assert not (tmp_path / "out").exists()
    main(["--model", str(saved), "--output_dir", str(tmp_path / "out"), *options, "--min_agreement", "0"])
    assert [path.name for path in (tmp_path / "out" / "onnx").iterdir()] == ["model_quantized.onnx"]
    assert '"dtype": "q8"' in (tmp_path / "out" / "config.json").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["onnx", "torch"])
def test_segmentation_files_that_prepare_nothing_are_compared_on_images_of_any_size(file_format, images, tmp_path):
    processor = SegformerImageProcessor(size={"shortest_edge": 36, "longest_edge": 90})
    path = save(segmenter("fcn"), processor, tmp_path / "model")
    settings = ExportSettings(file_format, prepare=False, check_images=str(images))
    (file,) = export_folder(str(path), tmp_path / "out", settings)
    assert file.on_images.images == 3
    assert file.on_images.same_class > 0.999


def test_images_that_cannot_be_used_are_named(saved, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    photograph().save(tmp_path / "images" / "good.png")
    (tmp_path / "images" / "bad.png").write_bytes((tmp_path / "images" / "good.png").read_bytes()[:300])
    options = ["--format", "torch", "--check_images"]
    assert "bad.png cannot be read as an image" in refused(
        capsys, saved, tmp_path / "out", *options, str(tmp_path / "images")
    )
    assert "There is nothing at" in refused(capsys, saved, tmp_path / "out", *options, str(tmp_path / "gone"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_large_weights_lie_next_to_the_file(tmp_path, monkeypatch):
    model, processor = classifier(), evaluation_image_processor((32, 48), 0.9)
    monkeypatch.setattr(folder, "MAX_INLINE_BYTES", 1000)
    export_folder(
        str(save(model, processor, tmp_path / "model")),
        tmp_path / "out",
        ExportSettings(dtypes=["float32", "float16"]),
    )
    names = ["model.onnx", "model.onnx_data", "model_fp16.onnx", "model_fp16.onnx_data"]
    assert sorted(path.name for path in (tmp_path / "out" / "onnx").iterdir()) == names
    settings = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["transformers.js_config"]
    assert settings["use_external_data_format"] == {"model.onnx": 1, "model_fp16.onnx": 1}
    assert len(read_digests(tmp_path / "out")) == 4
    photograph().save(tmp_path / "image.png")
    assert run_script(tmp_path / "out", tmp_path / "image.png")
