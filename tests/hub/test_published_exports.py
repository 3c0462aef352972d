"""Exported models on the Hub: their files, their card, and what they may not replace."""

import json

import pytest
from huggingface_hub import HfApi, ModelCard

from modeling_lvvit import publish
from modeling_lvvit.data.files.digests import file_digests, write_digests


CONFIG = {
    "model_type": "vit",
    "id2label": {"0": "cat", "1": "dog", "2": "owl"},
    "transformers.js_config": {"dtype": "fp32", "use_external_data_format": {"model.onnx": 1}},
}
WEIGHTS = {"model.onnx": 10, "model.onnx_data": 1_200_000, "model_fp16.onnx": 700_000, "model_quantized.onnx": 400_000}


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")


@pytest.fixture
def exported(tmp_path):
    """Writes a folder as `lvvit export` does."""

    def write(*names: str, **config):
        folder = tmp_path / "pets"
        (folder / "onnx").mkdir(parents=True, exist_ok=True)
        for name in names or WEIGHTS:
            (folder / "onnx" / name).write_bytes(b"x" * WEIGHTS[name])
        (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
        (folder / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
        (folder / "predict.py").write_text("print(1)\n")
        write_digests(folder, file_digests(folder, [f"onnx/{name}" for name in names or WEIGHTS]))
        return folder

    return write


def test_exported_folder_is_a_repository_of_transformers_js(hub, exported):
    folder = exported()
    publish.main([str(folder), "user/pets"])
    files = hub.files("user/pets")
    assert set(files) == {
        "README.md", "SHA256SUMS", "config.json", "preprocessor_config.json", "predict.py", *(f"onnx/{name}" for name in WEIGHTS)
    }  # fmt: skip
    card = ModelCard(files["README.md"].decode())
    about = card.data.to_dict()
    assert (about["library_name"], about["pipeline_tag"]) == ("transformers.js", "image-classification")
    assert "onnx" in about["tags"]
    assert 'await pipeline("image-classification", "user/pets");' in card.text
    for row in (
        "| `onnx/model.onnx` | `fp32`, the default | 1.2 |",
        "| `onnx/model_fp16.onnx` | `fp16` | 0.7 |",
        "| `onnx/model_quantized.onnx` | `q8` | 0.4 |",
    ):
        assert row in card.text


def test_card_of_several_classes_an_image_takes_sigmoids_and_names_the_branch(hub, exported):
    folder = exported("model_quantized.onnx", problem_type="multi_label_classification")
    publish.main([str(folder), "user/pets", "--hub_revision", "wip"])
    card = hub.files("user/pets", revision="wip")["README.md"].decode()
    assert 'await AutoModel.from_pretrained("user/pets", { revision: "wip" });' in card
    assert "logits.sigmoid()" in card and "await pipeline(" not in card


def test_card_of_a_segmentation_model(hub, exported):
    publish.main([str(exported("model.onnx", "model.onnx_data", model_type="segformer")), "user/scenes"])
    card = hub.files("user/scenes")["README.md"].decode()
    assert (
        'await pipeline("image-segmentation", "user/scenes");' in card
        and "Semantic segmentation with 3 classes" in card
    )


def test_own_card_is_kept_and_files_of_former_exports_go(hub, exported):
    folder = exported()
    (folder / "README.md").write_text("# My own words\n")
    publish.main([str(folder), "user/pets"])
    for name in ("model.onnx", "model.onnx_data", "model_fp16.onnx"):
        (folder / "onnx" / name).unlink()
    exported("model_quantized.onnx")
    publish.main([str(folder), "user/pets"])
    files = hub.files("user/pets")
    assert files["README.md"] == b"# My own words\n"
    assert [name for name in files if name.startswith("onnx/")] == ["onnx/model_quantized.onnx"]


@pytest.mark.parametrize(
    ("there", "found"), [("model.safetensors", "a model of PyTorch"), ("onnx/model.onnx", "an exported model")]
)
def test_one_kind_of_model_does_not_replace_the_other(there, found, hub, exported, tiny_model, tmp_path):
    folder = exported()
    if found == "an exported model":
        folder = tmp_path / "trained"
        tiny_model.save_pretrained(folder)
        (folder / "README.md").write_text("# Model")
    api = HfApi(token="hf_test")
    api.create_repo("user/net")
    api.upload_file(repo_id="user/net", path_or_fileobj=b"x" * 10, path_in_repo=there)
    with pytest.raises(SystemExit, match=f"user/net holds {found}, and .* Publish it under another name"):
        publish.main([str(folder), "user/net"])
    assert list(hub.files("user/net")) == [there]


def test_file_that_the_digests_name_must_be_there(hub, exported):
    folder = exported()
    (folder / "onnx" / "model.onnx_data").unlink()
    with pytest.raises(SystemExit, match="onnx/model.onnx_data is missing"):
        publish.main([str(folder), "user/pets"])
