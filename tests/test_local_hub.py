"""Real clients on the hub of `local_hub`."""

import http.client
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from local_hub import byte_range, local_hub
from test_patch_head import transformers_model


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
---
# Numbers
"""
CLIENT = """
import json, sys
from pathlib import Path
from datasets import load_dataset
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

folder, api = Path(sys.argv[1]), HfApi()
for _ in range(2):  # the second time nothing is new
    api.create_repo("user/numbers", repo_type="dataset", exist_ok=True)
    api.upload_folder(repo_id="user/numbers", repo_type="dataset", folder_path=folder / "numbers")
expected = [{"number": number, "name": f"row {number}"} for number in range(300)]
assert list(load_dataset("user/numbers", split="train")) == expected
assert list(load_dataset("user/numbers", split="train", streaming=True)) == expected
info = api.dataset_info("user/numbers")
assert sorted(api.list_repo_files("user/numbers", repo_type="dataset")) == ["README.md", "data/train-00000.parquet"]
(file,) = api.get_paths_info("user/numbers", ["data/train-00000.parquet", "none"], repo_type="dataset")
assert file.size == (folder / "numbers" / file.path).stat().st_size
snapshot = Path(snapshot_download("user/numbers", repo_type="dataset"))
assert (snapshot.name, (snapshot / "README.md").read_bytes()) == (info.sha, (folder / "numbers/README.md").read_bytes())

api.create_repo("user/net")
api.upload_folder(repo_id="user/net", folder_path=folder / "net")
api.upload_file(repo_id="user/net", path_or_fileobj=b"a" * 3_000_000, path_in_repo="weights/a b.bin")
assert json.loads(Path(hf_hub_download("user/net", "config.json")).read_text()) == {"hidden_size": 4}
assert Path(hf_hub_download("user/net", "weights/a b.bin")).stat().st_size == 3_000_000
assert not api.file_exists("user/net", "none.json") and not api.repo_exists("user/none")
api.delete_folder("weights", "user/net")
assert [sibling.rfilename for sibling in api.model_info("user/net").siblings] == ["config.json"]
"""


@pytest.mark.slow
def test_real_clients_get_back_what_they_uploaded(tmp_path):
    (tmp_path / "numbers" / "data").mkdir(parents=True)
    (tmp_path / "net").mkdir()
    (tmp_path / "numbers" / "README.md").write_text(CARD)
    (tmp_path / "net" / "config.json").write_text('{"hidden_size": 4}')
    table = pa.table({"number": range(300), "name": [f"row {number}" for number in range(300)]})
    pq.write_table(table, tmp_path / "numbers" / "data" / "train-00000.parquet", row_group_size=100)
    with local_hub() as hub:
        command, variables = [sys.executable, "-c", CLIENT, str(tmp_path)], hub.environment(tmp_path / "home")
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stderr}\nunknown routes: {hub.unknown}"
        assert hub.unknown == []
        assert set(hub.files("user/numbers", "dataset")) == {"README.md", "data/train-00000.parquet"}
        assert hub.files("user/net", "model") == {"config.json": b'{"hidden_size": 4}'}


PATCH_HEAD_CLIENT = """
import sys
import torch
from huggingface_hub import HfApi
from test_patch_head import SIZE, transformers_model
from transformers import AutoModelForImageClassification
from modeling_lvvit.token_labeling import add_patch_head
from modeling_lvvit.token_labeling.patch_head import load_patch_head

model, api = add_patch_head(transformers_model("vit"), SIZE), HfApi()
other = AutoModelForImageClassification.from_pretrained(sys.argv[1])  # without a patch head
for name, shard_size in (("user/whole", "1GB"), ("user/shards", "20KB")):
    folder = f"{sys.argv[1]} {shard_size}"
    model.save_pretrained(folder, max_shard_size=shard_size)
    api.create_repo(name)
    api.upload_folder(repo_id=name, folder_path=folder)
    again = add_patch_head(AutoModelForImageClassification.from_pretrained(name), SIZE)
    assert load_patch_head(again, name)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
api.create_repo("user/plain")
api.upload_folder(repo_id="user/plain", folder_path=sys.argv[1])
assert not load_patch_head(add_patch_head(other, SIZE), "user/plain")
"""


@pytest.mark.slow
def test_patch_heads_come_from_the_hub(tmp_path):
    """From one file of weights or from the shard that has it."""
    transformers_model("vit").save_pretrained(tmp_path / "plain")
    with local_hub() as hub:
        command = [sys.executable, "-c", PATCH_HEAD_CLIENT, str(tmp_path / "plain")]
        variables = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(Path(__file__).parent)}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stderr}\nunknown routes: {hub.unknown}"
        names = hub.files("user/shards", "model")
        assert sum(name.endswith(".safetensors") for name in names) > 2


def test_unknown_routes_are_refused_and_remembered():
    with local_hub() as hub:
        connection = http.client.HTTPConnection(hub.url.removeprefix("http://"))
        connection.request("GET", "/api/spaces/a/b?full=1")
        response = connection.getresponse()
        assert (response.status, json.load(response)) == (404, {"error": "no route for GET /api/spaces/a/b?full=1"})
        connection.close()
        assert hub.unknown == ["GET /api/spaces/a/b?full=1"]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("bytes=2-5", (2, 6)),
        ("bytes=2-50", (2, 10)),
        ("bytes=7-", (7, 10)),
        ("bytes=10-", (10, 10)),
    ],
)
def test_byte_ranges(header, expected):
    assert byte_range(header, 10) == expected
