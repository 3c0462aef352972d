"""The first nodes of exported files do what image processors do; maps of segmentation models cover the image."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    BitImageProcessor,
    BitImageProcessorPil,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    SegformerImageProcessor,
    TimmWrapperImageProcessor,
)

from modeling_lvvit.backbones.image_preparation import read_preparation
from modeling_lvvit.export.verification import preparation_runner
from modeling_lvvit.variants import evaluation_image_processor


pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")
SIZES = ((90, 60), (61, 97), (30, 30), (400, 31), (640, 480))  # width, height
TIMM = {
    "input_size": [3, 33, 33],
    "crop_pct": 0.9,
    "crop_mode": "center",
    "interpolation": "bicubic",
    "mean": [0.5] * 3,
    "std": [0.25] * 3,
}


def photograph(size: tuple[int, int]) -> Image.Image:
    """Noise over a smooth image."""
    random = np.random.default_rng(0)
    smooth = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = random.integers(-30, 30, (size[1], size[0], 3))
    return Image.fromarray(np.uint8((np.asarray(smooth, dtype=int) + noise).clip(0, 255)))


def as_input(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32).transpose(2, 0, 1)[None].copy())


@pytest.mark.parametrize(
    ("processor", "levels"),
    [
        (BitImageProcessorPil(size={"shortest_edge": 35}, crop_size={"height": 32, "width": 24}), 1),
        (evaluation_image_processor((32, 48), 0.9), 2),
        (evaluation_image_processor((33, 33), 0.9), 2),
        (BitImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 20, "width": 33}, resample=2), 2),
        (DeiTImageProcessor(size={"height": 40, "width": 50}, crop_size={"height": 32, "width": 32}), 2),
        (ConvNextImageProcessor(size={"shortest_edge": 32}), 2),
        (TimmWrapperImageProcessor(pretrained_cfg=TIMM), 1),
        (SegformerImageProcessor(size={"shortest_edge": 40, "longest_edge": 50}), 2),
        (SegformerImageProcessor(do_resize=False), 0),
        (BitImageProcessor(do_resize=False, do_center_crop=False, do_normalize=False), 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_files_prepare_images_as_processors_do(processor, levels):
    """To the last bits but for the filters of libraries, which round in ways of their own."""
    preparation = read_preparation(processor)
    run = preparation_runner(preparation)
    level = 1 / 255 / min(preparation.image_std)
    for size in SIZES:
        image = photograph(size)
        expected = torch.as_tensor(np.asarray(processor(image, return_tensors="pt")["pixel_values"]))
        torch.testing.assert_close(run(as_input(image)), expected, rtol=0, atol=levels * level + 1e-5)


def test_batches_are_prepared_as_single_images():
    run = preparation_runner(read_preparation(evaluation_image_processor((32, 48), 0.9)))
    images = torch.cat([as_input(photograph((90, 60))), as_input(photograph((90, 60)).rotate(180))])
    assert torch.equal(run(images), torch.cat([run(images[:1]), run(images[1:])]))


def test_sides_are_filled_up_to_whole_patches():
    run = preparation_runner(read_preparation(SegformerImageProcessor(do_resize=False)), patch_size=16)
    prepared = run(as_input(photograph((33, 32))))
    assert prepared.shape == (1, 3, 32, 48)
    assert not prepared[..., 33:].any()
    assert prepared[..., 32].any()


def test_filters_that_files_lack_are_refused():
    from modeling_lvvit.export.preparation import check_preparation

    preparation = read_preparation(
        BitImageProcessorPil(size={"shortest_edge": 35}, crop_size=32, resample=Image.Resampling.LANCZOS)
    )
    with pytest.raises(ValueError, match="resizes with the filter lanczos; graphs have bilinear and bicubic"):
        check_preparation(preparation)


class Cells(nn.Module):
    """Means of 4 x 4 pixels: a segmentation model of patches of 16 pixels."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(pixel_values, 4)


def segmenting_file(preparation):
    import onnxruntime

    from modeling_lvvit.export.preparation import prepend_preparation

    image = ir.Value(name="pixel_values", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", 3, "h", "w"]))
    pooled = ir.node("AveragePool", [image], {"kernel_shape": [4, 4], "strides": [4, 4]})
    pooled.outputs[0].name, pooled.outputs[0].type = "logits", image.type
    pooled.outputs[0].shape = ir.Shape(["b", 3, "r", "c"])
    graph = ir.Graph([image], pooled.outputs, nodes=[pooled], opset_imports={"": 18}, name="cells")
    prepend_preparation(graph, preparation, 16)
    return onnxruntime.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())


def test_maps_cover_the_image_and_not_what_it_was_filled_up_with():
    session = segmenting_file(read_preparation(SegformerImageProcessor(do_resize=False)))

    def run(image: Image.Image) -> np.ndarray:
        return session.run(["logits"], {"pixel_values": as_input(image).numpy()})[0]

    whole = photograph((64, 48))
    prepared = preparation_runner(read_preparation(SegformerImageProcessor(do_resize=False)))(as_input(whole))
    np.testing.assert_allclose(
        run(whole), Cells()(prepared).numpy(), rtol=0, atol=1e-5
    )  # nothing to fill up, nothing changes
    ramp = Image.fromarray(np.repeat(np.arange(0, 250, 5, dtype=np.uint8)[None, :, None], 40, 0).repeat(3, 2))
    map_of_ramp = run(ramp)
    assert map_of_ramp.shape == (1, 3, 10, 13)  # of 50 pixels, filled up to 64: 12.5 cells
    steps = np.diff(map_of_ramp[0, 0, 0])
    assert steps[1:-1] == pytest.approx(np.full(10, steps[1]), rel=1e-3)  # evenly, as the ramp
