"""Eight-bit copies of ONNX files run, say nearly the same, and comparisons with real images find those that do not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from modeling_lvvit import LVViTForImageClassification, LVViTForSemanticSegmentation
from modeling_lvvit.export import export_onnx
from modeling_lvvit.export.agreement import ImageAgreement, compare_on_images
from modeling_lvvit.export.quantization import quantize_onnx
from modeling_lvvit.export.real_images import RealImages, unprepared
from modeling_lvvit.export.verification import onnx_runner
from support.models import tiny_config


onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
IMAGES = np.random.default_rng(0).normal(size=(12, 1, 3, 32, 48)).astype(np.float32)


def confident(model: nn.Module) -> nn.Module:
    """Weights large enough that images differ in their best class."""
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=1.5 / weight[0].numel() ** 0.5)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A classifier of 32 x 48 pixels."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("float") / "model.onnx"
    export_onnx(confident(LVViTForImageClassification(tiny_config())), path)
    return path


@pytest.fixture(scope="module")
def quantized(source) -> Path:
    """Its copy."""
    path = source.parent / "model_quantized.onnx"
    quantize_onnx(source, path)
    return path


def write(path: Path, weights: dict[str, np.ndarray], nodes: list, shape: list) -> Path:
    """A file with `pixel_values` as its input and `logits` as its output."""
    values = [
        onnx.helper.make_tensor_value_info(name, 1, dims) for name, dims in (("pixel_values", shape), ("logits", None))
    ]
    initializers = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = onnx.helper.make_graph(nodes, "graph", values[:1], values[1:], initializers)
    opsets = [onnx.helper.make_opsetid("", 19)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def logits(path: Path) -> np.ndarray:
    run = onnx_runner(path)
    return np.concatenate([run(torch.from_numpy(image))["logits"] for image in IMAGES])


def test_matrix_products_compute_in_int8(source, tmp_path):
    report = quantize_onnx(source, tmp_path / "model_quantized.onnx")
    graph, before = (onnx.load(path).graph for path in (tmp_path / "model_quantized.onnx", source))
    kinds = [node.op_type for node in graph.node]
    # two layers of 4 products with weights and 2 of attention, two heads; four convolutions of the stem
    assert (report.products, report.float_products, kinds.count("MatMulInteger")) == (10, 4, 10)
    assert (report.convolutions, report.stored, report.float_convolutions) == (0, 4, 0)
    assert "int8: 10 x matrix product, 0 x convolution; int8 weights, computed in float32: 4 x convolution" in str(
        report
    )
    assert [value.name for value in (*graph.input, *graph.output)] == [
        value.name for value in (*before.input, *before.output)
    ]
    assert report.bytes_after == (tmp_path / "model_quantized.onnx").stat().st_size
    assert all(
        max(tensor.dims, default=0) <= 48
        for tensor in graph.initializer
        if tensor.data_type == 1 and len(tensor.dims) > 2
    )
    names = [tensor.name for tensor in graph.initializer]
    assert len(set(names)) == len(names)
    assert [path.name for path in tmp_path.iterdir()] == ["model_quantized.onnx"]
    assert str(tmp_path).encode() not in (tmp_path / "model_quantized.onnx").read_bytes()


def test_copy_says_nearly_the_same(source, quantized):
    agreement = compare_on_images(onnx_runner(quantized), onnx_runner(source), IMAGES)
    assert agreement.images == 12
    assert len(set(logits(source).argmax(axis=1))) > 2
    assert 0 < agreement.mean_change < agreement.largest_change < 0.1
    agreement.require(0.9)


def test_copies_are_equal(source, quantized, tmp_path):
    quantize_onnx(source, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == quantized.read_bytes()


def test_weights_have_seven_bits(quantized):
    """64 * 255 twice is less than 2^15: sums of two products, in which some CPUs add, do not overflow."""
    graph = onnx.load(quantized).graph
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor).astype(int) for tensor in graph.initializer}
    products = [weights[node.input[1]] for node in graph.node if node.op_type == "MatMulInteger"]
    assert max(np.abs(weight).max() for weight in products) == 64


def test_convolutions_compute_in_int8_where_they_are_calibrated(source, tmp_path):
    target = tmp_path / "model_quantized.onnx"
    report = quantize_onnx(source, target, (image for image in IMAGES[:4]))
    assert (report.products, report.convolutions, report.stored, report.float_convolutions) == (10, 4, 0, 0)
    graph = onnx.load(target).graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert all(made_by.get(name) == "DequantizeLinear" for node in convolutions for name in node.input[:2])
    compare_on_images(onnx_runner(target), onnx_runner(source), IMAGES).require(0.8)
    assert [path.name for path in tmp_path.iterdir()] == ["model_quantized.onnx"]


def test_calibration_without_images_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match="Expected images for calibration, got none"):
        quantize_onnx(source, tmp_path / "model_quantized.onnx", [])
    assert list(tmp_path.iterdir()) == []


def test_large_weights_lie_next_to_the_file(source, quantized, tmp_path):
    large = onnx.load(source)
    onnx.save_model(large, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx_data")
    target = tmp_path / "model_quantized.onnx"
    for _ in range(2):  # does not grow
        report = quantize_onnx(tmp_path / "model.onnx", target, max_file_bytes=10_000)
    sizes = [(tmp_path / name).stat().st_size for name in (target.name, f"{target.name}_data", "model.onnx_data")]
    assert sizes[1] < sizes[2] / 2
    assert report.bytes_after == sum(sizes[:2])
    assert report.bytes_before > sizes[2]
    np.testing.assert_array_equal(logits(target), logits(quantized))
    quantize_onnx(source, target)
    assert not (tmp_path / f"{target.name}_data").exists()


def test_weights_of_convolutions_have_a_scale_for_each_channel(tmp_path):
    weight = np.random.default_rng(0).normal(size=(3, 3, 2, 2)).astype(np.float32) * np.array([100, 0, 0.01]).reshape(
        -1, 1, 1, 1
    )
    nodes = [onnx.helper.make_node("Conv", ["pixel_values", "weight"], ["logits"])]
    source = write(tmp_path / "model.onnx", {"weight": weight.astype(np.float32)}, nodes, ["batch", 3, 32, 48])
    quantize_onnx(source, tmp_path / "model_quantized.onnx")
    found, expected = (logits(tmp_path / name) for name in ("model_quantized.onnx", "model.onnx"))
    for channel, largest in enumerate(np.abs(weight).max(axis=(1, 2, 3))):
        np.testing.assert_allclose(found[:, channel], expected[:, channel], atol=50 * largest / 127 / 2)  # 12 pixels
    assert np.abs(found - expected)[:, [0, 2]].max(axis=(0, 2, 3)).min() > 0


def test_files_without_float32_weights_are_refused(tmp_path):
    nodes = [onnx.helper.make_node("Relu", ["pixel_values"], ["logits"])]
    source = write(tmp_path / "model.onnx", {}, nodes, ["batch", 3, 32, 48])
    with pytest.raises(
        ValueError, match=r"model.onnx has no matrix product or convolution with constant float32 weights"
    ):
        quantize_onnx(source, tmp_path / "model_quantized.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(("head", "fuse"), [("fcn", True), ("upernet", False)])
def test_segmentation(head, fuse, tmp_path):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 4, "neck_channels": 16, "decoder_channels": 8}
    model = confident(LVViTForSemanticSegmentation(tiny_config(segmentation_head=head, **sizes)))
    export_onnx(model, tmp_path / "model.onnx", fuse=fuse)
    reference = onnx_runner(tmp_path / "model.onnx")
    for calibration in (None, IMAGES[:4]):
        report = quantize_onnx(tmp_path / "model.onnx", tmp_path / "model_quantized.onnx", calibration)
        assert (report.convolutions > 4) == (calibration is not None)
        agreement = compare_on_images(onnx_runner(tmp_path / "model_quantized.onnx"), reference, IMAGES)
        assert 0.9 <= agreement.same_class < 1
        assert agreement.largest_change < 0.5


def test_images_that_calibrate_are_not_compared_on(tmp_path):
    for number in range(8):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(tmp_path / f"{number}.png")
    calibration = RealImages(str(tmp_path), 3, unprepared, ("train",))
    others = RealImages(str(tmp_path), 8, unprepared, ("test",), other_than=calibration)
    reds = [{image[0, 0, 0, 0] for image in images} for images in (calibration, others)]
    assert len(reds[0]) == 3 and reds[1] == set(range(8)) - reds[0]
    everything = RealImages(str(tmp_path), 8, unprepared, ("train",))
    with pytest.raises(ValueError, match="All 8 images of .* are for calibration; name others"):
        RealImages(str(tmp_path), 8, unprepared, ("test",), other_than=everything)


def test_damaged_copy_is_found(source, quantized, tmp_path):
    model = onnx.load(quantized)
    kernels = [
        tensor
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2
    ]
    kernels[-1].raw_data = bytes(len(kernels[-1].raw_data))
    kernels[-2].raw_data = kernels[-2].raw_data[::-1]
    onnx.save(model, tmp_path / "damaged.onnx")
    agreement = compare_on_images(onnx_runner(tmp_path / "damaged.onnx"), onnx_runner(source), IMAGES)
    with pytest.raises(
        ValueError, match=r"Expected at least 90.00% of equal predictions. Same predictions on 12 images: \d"
    ):
        agreement.require(0.9)


def predictions(*values: list):
    """Runs that give these logits, one after the other."""
    results = iter(values)
    return lambda pixel_values: {"logits": torch.tensor([next(results)])}


def test_agreement_by_hand():
    log3 = float(np.log(3))
    found = predictions([log3, 0.0], [0.0, 0.0], [0.0, log3])  # 3/4, 1/2, 1/4
    expected = predictions([0.0, 0.0], [log3, 0.0], [log3, 0.0])  # 1/2, 3/4, 3/4
    agreement = compare_on_images(found, expected, IMAGES[:3])
    assert (agreement.images, agreement.same_class) == (3, 2 / 3)
    assert agreement.largest_change == pytest.approx(0.5)
    assert agreement.mean_change == pytest.approx((0.25 + 0.25 + 0.5) / 3)
    agreement.require(0.6)
    with pytest.raises(ValueError, match="at least 70.00% of equal predictions"):
        agreement.require(0.7)


def test_agreement_of_several_labels_counts_decisions():
    found, expected = predictions([9.0, 1.0, -1.0, -1.0]), predictions([1.0, 9.0, 1.0, -1.0])
    assert compare_on_images(found, expected, IMAGES[:1], multi_label=True).same_class == 0.75


def test_agreement_of_segmentations_counts_pixels():
    found, expected = (
        predictions([[[0.0, 1.0, 0.0]], [[1.0, 0.0, 1.0]]]),
        predictions([[[0.0, 1.0, 1.0]], [[1.0, 0.0, 0.0]]]),
    )
    assert compare_on_images(found, expected, IMAGES[:1]).same_class == pytest.approx(2 / 3)


def test_agreement_refuses_nan_and_no_images():
    agreement = compare_on_images(predictions([0.0, float("nan")]), predictions([0.0, 1.0]), IMAGES[:1])
    with pytest.raises(ValueError, match="change by up to nan"):
        agreement.require(0.0)
    with pytest.raises(ValueError, match="at least one image"):
        compare_on_images(predictions(), predictions(), iter(()))
    ImageAgreement(1, 1.0, 0.0, 0.0).require(1.0)
