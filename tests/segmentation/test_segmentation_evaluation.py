"""Windows, scales and measures of segmentation."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix as independent_confusion_matrix
from torch import nn

from modeling_lvvit.segmentation import (
    SegmentationScores,
    confusion_matrix,
    multi_scale_probabilities,
    scores_of,
    sliding_window_logits,
)
from modeling_lvvit.segmentation.inference import window_starts
from support.programs import ROOT
from support.segmentation_rows import CLASSES, random_maps


def test_measures_equal_an_independent_computation():
    predictions, labels = random_maps()
    counted = labels != 255
    expected = independent_confusion_matrix(labels[counted], predictions[counted], labels=range(CLASSES))
    found = confusion_matrix(torch.from_numpy(predictions), torch.from_numpy(labels), CLASSES)
    assert np.array_equal(found.numpy(), expected)
    scores = SegmentationScores(CLASSES, keep_in_memory=True).compute(predictions=predictions, references=labels)
    hits = np.diag(expected)
    union = expected.sum(0) + expected.sum(1) - hits
    assert scores["mean_iou"] == pytest.approx((hits[:4] / union[:4]).mean(), abs=1e-9)
    assert scores["pixel_accuracy"] == pytest.approx((predictions == labels)[counted].mean(), abs=1e-9)
    assert math.isnan(scores["class_iou"][4]) and scores["class_iou"][3] == 0.0


def test_measures_by_hand():
    """2 of 3 pixels of class 0 and the one of class 1 are right."""
    scores = scores_of(np.array([[2, 1], [0, 1]]))
    assert scores["class_iou"] == pytest.approx([2 / 3, 1 / 2])
    assert scores["mean_iou"] == pytest.approx(7 / 12) and scores["pixel_accuracy"] == 0.75
    assert scores["mean_accuracy"] == pytest.approx(5 / 6)


def test_ignored_pixels_are_never_counted():
    """Whatever is predicted there."""
    predictions, labels = (torch.from_numpy(maps) for maps in random_maps())
    other = torch.where(labels == 255, 4, predictions)
    counts = [confusion_matrix(maps, labels, CLASSES) for maps in (predictions, other)]
    assert torch.equal(*counts) and counts[0].sum() == (labels != 255).sum()
    nothing = SegmentationScores(CLASSES, keep_in_memory=True)
    assert math.isnan(nothing.compute(predictions=predictions, references=torch.full_like(labels, 255))["mean_iou"])


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([0, 1], [0, 5], r"A label is 5; expected ids in \[0, 5\) or 255"),
        ([0, 1], [0, -1], "A label is -1"),
        ([0, 7], [0, 1], r"A prediction is 7; expected ids in \[0, 5\)\."),
        ([0], [0, 1], "differ in shape"),
    ],
)
def test_unknown_ids_are_refused(predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(torch.tensor(predictions), torch.tensor(labels), CLASSES)


def test_nothing_grows_with_the_number_of_images():
    """What is stored after many images is one matrix; a second evaluation begins again."""
    scores = SegmentationScores(CLASSES, keep_in_memory=True)
    predictions, labels = random_maps()
    for _ in range(50):
        for prediction, label in zip(predictions, labels):
            scores.add(prediction=prediction, reference=label)
    assert scores.writer is None and scores.counts.shape == (CLASSES, CLASSES)
    assert scores.counts.sum() == 50 * (labels != 255).sum()
    many = scores.compute()
    once = scores.compute(predictions=predictions, references=labels)
    assert many["mean_iou"] == pytest.approx(once["mean_iou"], abs=1e-12)


PROCESS = """
import json, sys
import numpy as np
from modeling_lvvit.segmentation import SegmentationScores
from support.segmentation_rows import CLASSES, random_maps

rank, folder = int(sys.argv[1]), sys.argv[2]
predictions, labels = random_maps(3)
mine = slice(rank, None, 2)  # two images in one process, one in the other
scores = SegmentationScores(CLASSES, num_process=2, process_id=rank, experiment_id="pair", cache_dir=folder)
results = []
for _ in range(5):  # one after another, without a pause
    scores.add_batch(predictions=predictions[mine], references=labels[mine])
    results.append(scores.compute())
print(json.dumps([result and result["mean_iou"] for result in results]))
"""


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    command = [sys.executable, "-c", PROCESS]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT / "tests")
        for rank in range(2)
    ]
    printed = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    predictions, labels = random_maps(3)
    whole = SegmentationScores(CLASSES, keep_in_memory=True).compute(predictions=predictions, references=labels)
    assert printed[1] == [None] * 5 and printed[0] == pytest.approx([whole["mean_iou"]] * 5, abs=1e-12)


DISTRIBUTED = """
import json, sys
from pathlib import Path
from accelerate import PartialState
from modeling_lvvit.segmentation import SegmentationScores
from support.segmentation_rows import CLASSES, random_maps

state = PartialState(cpu=True)
predictions, labels = random_maps(3)
mine = slice(state.process_index, None, 2)
result = SegmentationScores(CLASSES).compute(predictions=predictions[mine], references=labels[mine])
Path(__file__).with_name(f"{state.process_index}.json").write_text(json.dumps(result["mean_iou"]))
state.wait_for_everyone()
state.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_of_torch_all_get_the_result(tmp_path):
    (tmp_path / "program.py").write_text(DISTRIBUTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(tmp_path / "program.py")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    subprocess.run(command, capture_output=True, env=variables, check=True)
    predictions, labels = random_maps(3)
    whole = SegmentationScores(CLASSES).compute(predictions=predictions, references=labels)["mean_iou"]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found == pytest.approx([whole] * 2, abs=1e-12)


def test_lists_of_maps_of_several_sizes():
    """As the image processors of the library give them."""
    scores = SegmentationScores(CLASSES)
    maps = [torch.zeros(2, 3, dtype=torch.uint8), torch.ones(4, 5, dtype=torch.uint8)]
    assert scores.compute(predictions=maps, references=maps)["pixel_accuracy"] == 1.0
    with pytest.raises(ValueError, match="Give predictions and references"):
        scores.compute(references=maps)


def test_ignore_indices_that_do_not_fit_the_type_of_the_labels():
    maps = torch.full((2, 2), 156, dtype=torch.uint8)
    assert confusion_matrix(maps, maps, 200, ignore_index=-100).sum() == 4
    with pytest.raises(ValueError, match="is the id of one of the 300 classes"):
        SegmentationScores(300)


@pytest.mark.parametrize(
    ("length", "starts"), [(9, [0, 3, 5]), (10, [0, 3, 6]), (4, [0]), (3, [0]), (5, [0, 1]), (7, [0, 3])]
)
def test_windows_cover_an_axis_once_at_its_end(length, starts):
    assert window_starts(length, 4, 3) == starts


def convolution(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Conv2d(3, CLASSES, 3, padding=1).eval()


@torch.no_grad()
def test_one_window_is_the_whole_image():
    """Also where the image is smaller than the window; logits of a quarter of the resolution are enlarged."""
    model, pixel_values = convolution(), torch.randn(2, 3, 24, 36)
    for window in ((24, 36), (512, 512)):
        assert torch.equal(sliding_window_logits(model, pixel_values, window, window), model(pixel_values))

    def coarse(images):
        return model(images)[..., ::4, ::4]

    expected = nn.functional.interpolate(coarse(pixel_values), (24, 36), mode="bilinear")
    assert torch.equal(sliding_window_logits(coarse, pixel_values, (24, 36), (24, 36)), expected)


@torch.no_grad()
def test_overlapping_windows_are_averaged():
    """Each window says its number: where the second begins, both count."""
    numbers = iter(range(10))

    def numbered(images):
        return torch.full((1, 1, *images.shape[-2:]), float(next(numbers)))

    logits = sliding_window_logits(numbered, torch.zeros(1, 3, 4, 9), (4, 4), (4, 3))
    assert logits[0, 0, 2].tolist() == [0.0, 0.0, 0.0, 0.5, 1.0, 1.5, 1.5, 2.0, 2.0]


@torch.no_grad()
def test_windows_of_a_local_model_change_its_borders_only():
    model, pixel_values = convolution(), torch.randn(1, 3, 20, 20)
    logits = sliding_window_logits(model, pixel_values, (12, 12), (8, 8))
    torch.testing.assert_close(logits[..., :7, :7], model(pixel_values)[..., :7, :7])


def test_windows_that_leave_gaps_are_refused():
    with pytest.raises(ValueError, match="stride must lie between 1 and the side of the window"):
        sliding_window_logits(convolution(), torch.zeros(1, 3, 8, 8), (4, 4), (5, 4))


@torch.no_grad()
def test_several_scales_and_mirror_images():
    """One scale without a mirror image is the plain prediction; a symmetric model of a symmetric image gives a symmetric map."""
    model, pixel_values = convolution(), torch.randn(1, 3, 16, 24)
    single = multi_scale_probabilities(model, pixel_values, (1.0,), flip=False)
    torch.testing.assert_close(single, model(pixel_values).softmax(1))
    mirrored = torch.cat([pixel_values, pixel_values.flip(-1)], dim=-1)
    several = multi_scale_probabilities(model, mirrored, (0.5, 1.0, 1.75))
    torch.testing.assert_close(several.sum(1), torch.ones_like(several[:, 0]))
    torch.testing.assert_close(several, several.flip(-1))
