"""Real clients on the hub of `local_hub`."""

import http.client
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.classifiers import transformers_model
from support.local_hub import Fault, byte_range, local_hub
from support.programs import ROOT


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
assert snapshot.name == info.sha
assert (snapshot / "README.md").read_bytes() == (folder / "numbers/README.md").read_bytes()

api.create_repo("user/net")
api.upload_folder(repo_id="user/net", folder_path=folder / "net")
api.upload_file(repo_id="user/net", path_or_fileobj=b"a" * 3_000_000, path_in_repo="weights/a b.bin")
assert json.loads(Path(hf_hub_download("user/net", "config.json")).read_text()) == {"hidden_size": 4}
assert Path(hf_hub_download("user/net", "weights/a b.bin")).stat().st_size == 3_000_000
assert not api.file_exists("user/net", "none.json") and not api.repo_exists("user/none")
api.delete_folder("weights", "user/net")
assert [sibling.rfilename for sibling in api.model_info("user/net").siblings] == ["config.json"]
"""


def run(hub, folder, client: str, *arguments: str, **variables: str) -> None:
    command, environment = [sys.executable, "-c", client, *arguments], hub.environment(folder / "home") | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stderr}\nunknown routes: {hub.unknown}"
    assert hub.unknown == []


def write(folder: Path, files: dict[str, bytes]) -> str:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return str(folder)


@pytest.mark.slow
def test_real_clients_get_back_what_they_uploaded(tmp_path):
    (tmp_path / "numbers" / "data").mkdir(parents=True)
    (tmp_path / "net").mkdir()
    (tmp_path / "numbers" / "README.md").write_text(CARD)
    (tmp_path / "net" / "config.json").write_text('{"hidden_size": 4}')
    table = pa.table({"number": range(300), "name": [f"row {number}" for number in range(300)]})
    pq.write_table(table, tmp_path / "numbers" / "data" / "train-00000.parquet", row_group_size=100)
    with local_hub() as hub:
        run(hub, tmp_path, CLIENT, str(tmp_path))
        assert set(hub.files("user/numbers", "dataset")) == {"README.md", "data/train-00000.parquet"}
        assert hub.files("user/net", "model") == {"config.json": b'{"hidden_size": 4}'}


PATCH_HEAD_CLIENT = """
import sys
import torch
from huggingface_hub import HfApi
from support.classifiers import SIZE, transformers_model
from transformers import AutoModelForImageClassification
from modeling_lvvit.token_labeling import add_patch_head
from modeling_lvvit.backbones.patch_head import load_patch_head

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
        run(
            hub,
            tmp_path,
            PATCH_HEAD_CLIENT,
            str(tmp_path / "plain"),
            PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        )
        names = hub.files("user/shards", "model")
        assert sum(name.endswith(".safetensors") for name in names) > 2


LARGE_FILES_CLIENT = """
import json, sys
from pathlib import Path
from datasets import Dataset, load_dataset
from huggingface_hub import HfApi, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

def status(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except HfHubHTTPError as error:
        return type(error), error.response.status_code

def contents(path):
    return {file.relative_to(path): file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}

folder, api = Path(sys.argv[1]), HfApi()
api.create_repo("user/net", private=True)
first = api.upload_folder(repo_id="user/net", folder_path=folder)
assert api.upload_folder(repo_id="user/net", folder_path=folder).oid == first.oid  # nothing new: no commit
(file,) = api.get_paths_info("user/net", "parts.safetensors")
metadata = api.get_hf_file_metadata(url=hf_hub_url("user/net", file.path))
assert (file.lfs.size, file.lfs.sha256) == (250_000, metadata.etag)
snapshot = Path(snapshot_download("user/net"))
assert contents(snapshot) == contents(folder) and api.model_info("user/net").private

(folder / "config.json").write_text('{"hidden_size": 8}')
assert status(api.upload_folder, repo_id="user/net", folder_path=folder, revision="v2") == (RevisionNotFoundError, 404)
assert status(api.create_branch, "user/net", branch="v2", revision="none") == (RevisionNotFoundError, 404)
api.create_branch("user/net", branch="v2")
assert status(api.create_branch, "user/net", branch="v2") == (HfHubHTTPError, 409)
api.create_branch("user/net", branch="v2", exist_ok=True)
second = api.upload_folder(repo_id="user/net", folder_path=folder, revision="v2")
heads = {branch.name: branch.target_commit for branch in api.list_repo_refs("user/net").branches}
assert heads == {"main": first.oid, "v2": second.oid}
for revision, size in ((None, 4), ("v2", 8), (first.oid, 4), (second.oid, 8)):
    config = hf_hub_download("user/net", "config.json", revision=revision)
    assert json.loads(Path(config).read_text()) == {"hidden_size": size}
late = dict(path_or_fileobj=b"", path_in_repo="late", repo_id="user/net")
assert status(api.upload_file, **late, revision="v2", parent_commit=first.oid) == (HfHubHTTPError, 412)

rows = Dataset.from_dict({"number": range(300)})
rows.push_to_hub("team/rows", num_shards=2, revision="v2")
stream = load_dataset("team/rows", split="train", revision="v2", streaming=True)
assert list(stream) == list(rows)
stream.push_to_hub("team/rows")
assert list(load_dataset("team/rows", split="train")) == list(rows)

api.create_repo("user/page", repo_type="space", space_sdk="static")
api.upload_folder(repo_id="user/page", repo_type="space", folder_path=folder)
assert api.space_info("user/page").sdk == "static"
assert contents(snapshot_download("user/page", repo_type="space")) == contents(folder)
"""


@pytest.mark.slow
def test_large_files_branches_and_spaces(tmp_path):
    files = {
        "one.bin": b"1" * 90_000,
        "parts.safetensors": bytes(range(250)) * 1000,
        "config.json": b'{"hidden_size": 4}',
    }
    with local_hub() as hub:
        hub.part_size = 100_000
        run(hub, tmp_path, LARGE_FILES_CLIENT, write(tmp_path / "net", files))
        sizes = [received.size for received in hub.received if received.repo_id == "user/net"]
        assert sorted(sizes) == [50_000, 90_000, 100_000, 100_000]  # once, for all uploads
        assert hub.files("user/net") == files
        assert hub.files("user/net", revision="v2") == {**files, "config.json": b'{"hidden_size": 8}'}
        assert len(hub.history("user/net")) == 2 and len(hub.history("user/net", branch="v2")) == 3
        assert hub.is_private("user/net") and not hub.is_private("team/rows", "dataset")


REFUSALS_CLIENT = """
import sys, time
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

time.sleep = lambda seconds: None  # clients wait before they try again

def status(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except HfHubHTTPError as error:
        return type(error), error.response.status_code

folder, api, anonymous, wrong = sys.argv[1], HfApi(), HfApi(token=False), HfApi(token="hf_wrong")
file = dict(path_or_fileobj=b"text", path_in_repo="a.txt")
assert (api.whoami()["name"], [team["name"] for team in api.whoami()["orgs"]]) == ("user", ["team"])
assert status(wrong.whoami) == (HfHubHTTPError, 401)
for name in ("user/secret", "user/open", "team/secret"):
    api.create_repo(name, private=name.endswith("secret"))
    api.upload_file(repo_id=name, **file)
assert Path(hf_hub_download("team/secret", "a.txt")).read_text() == "text"
missing, refused, forbidden = (RepositoryNotFoundError, 401), (HfHubHTTPError, 401), (HfHubHTTPError, 403)
assert status(anonymous.create_repo, "user/new") == status(wrong.create_repo, "user/new") == refused
assert status(api.create_repo, "stranger/new") == forbidden
assert status(api.create_repo, "user/open") == (HfHubHTTPError, 409)
assert status(anonymous.model_info, "team/secret") == status(anonymous.model_info, "user/none") == missing
assert status(anonymous.hf_hub_download, "user/secret", "a.txt") == missing
assert anonymous.model_info("user/open").private is False and status(wrong.model_info, "user/open") == refused
assert status(anonymous.upload_file, repo_id="user/open", **file) == missing
assert status(wrong.upload_file, repo_id="user/open", **file) == refused
assert status(anonymous.create_branch, "user/open", branch="v2") == missing
assert status(api.upload_file, repo_id="stranger/open", **file) == forbidden
assert status(api.create_branch, "stranger/open", branch="v2") == forbidden
api.auth_check("team/secret", write=True), anonymous.auth_check("user/open"), api.auth_check("stranger/open")
assert status(anonymous.auth_check, "user/open", write=True) == status(anonymous.auth_check, "user/secret") == missing
assert status(api.auth_check, "stranger/open", write=True) == forbidden
assert status(api.upload_file, repo_id="stranger/secret", **file) == (RepositoryNotFoundError, 404)
assert status(api.upload_file, repo_id="user/none", **file) == (RepositoryNotFoundError, 404)

api.create_repo("user/busy")
assert status(api.upload_folder, repo_id="user/busy", folder_path=folder) == (HfHubHTTPError, 409)
api.create_repo("user/weak")
try:
    api.upload_folder(repo_id="user/weak", folder_path=folder)
except RuntimeError as error:
    assert "parts.safetensors" in str(error) and not isinstance(error.__cause__, HfHubHTTPError)  # no answer
else:
    raise AssertionError("an upload whose connections broke went well")
assert api.list_repo_files("user/weak") == []
for name in ("user/busy", "user/weak"):
    api.upload_folder(repo_id=name, folder_path=folder)
"""


@pytest.mark.slow
def test_refusals_and_faults(tmp_path):
    files = {"one.bin": b"1" * 90_000, "parts.safetensors": bytes(range(250)) * 1000}
    with local_hub() as hub:
        hub.part_size = 100_000
        hub.add("stranger/open")
        hub.add("stranger/secret", private=True)
        hub.faults += [
            Fault("POST", ".*/user/busy/preupload/main", status=503),  # clients try again
            Fault("POST", ".*/user/busy/commit/main", status=409),
            Fault("PUT", "/lfs/models/user/weak/.*/2", drop_after=1000, times=6),
        ]
        run(hub, tmp_path, REFUSALS_CLIENT, write(tmp_path / "net", files))
        assert [fault.times for fault in hub.faults] == [0, 0, 0]
        sizes = {
            name: [one.size for one in hub.received if one.repo_id == name] for name in ("user/busy", "user/weak")
        }
        assert sorted(sizes["user/busy"]) == [50_000, 90_000, 100_000, 100_000]  # once, for two pushes
        assert sorted(sizes["user/weak"]) == [50_000, 90_000, 100_000, 100_000, 100_000]  # the first part again
        assert hub.files("user/busy") == hub.files("user/weak") == files
        assert hub.files("stranger/open") == {} and hub.is_private("team/secret")


def test_a_request_that_arrives_in_part_changes_nothing():
    with local_hub() as hub:
        hub.add("user/net")
        host, port = hub.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                f"PUT /lfs/models/user/net/{'0' * 64}/1 HTTP/1.1\r\nContent-Length: 10\r\n\r\nhalf".encode()
            )
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(100) == b""
        assert hub.received == []


def test_unknown_routes_are_refused_and_remembered():
    with local_hub() as hub:
        connection = http.client.HTTPConnection(hub.url.removeprefix("http://"))
        connection.request("GET", "/api/papers/a/b?full=1")
        response = connection.getresponse()
        assert (response.status, json.load(response)) == (404, {"error": "no route for GET /api/papers/a/b?full=1"})
        connection.close()
        assert hub.unknown == ["GET /api/papers/a/b?full=1"]


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
