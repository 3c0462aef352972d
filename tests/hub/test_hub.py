"""Uploads: permission, refusals, broken connections, repetition; on the local hub."""

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from modeling_lvvit.hub.repository import HubError, HubTarget
from support.local_hub import Fault


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"weight": np.arange(50_000, dtype=np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("# Model")
    return folder


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def target(**settings) -> HubTarget:
    return HubTarget(**{"repo_id": "user/net", "token": "hf_test", **settings})


def test_what_is_uploaded_is_there(hub, folder):
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")
    address = target(private=True).open().upload(folder, "First")
    assert address.startswith(f"{hub.url}/user/net/commit/")
    expected = contents(folder)
    expected.pop("training_args.bin")
    assert hub.files("user/net") == expected
    assert hub.is_private("user/net")


def test_second_upload_sends_nothing_that_is_there(hub, folder):
    opened = target().open()
    opened.upload(folder, "First")
    sent = len(hub.received)
    (folder / "README.md").write_text("# Another card")
    opened.upload(folder, "Second")
    assert sent == 1 and len(hub.received) == sent  # the weights went once
    assert hub.files("user/net") == contents(folder)


def test_files_that_belong_together_are_replaced_together(hub, folder):
    (folder / "model-00002-of-00002.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    opened = target().open()
    opened.upload(folder, "Two shards")
    (folder / "model-00002-of-00002.safetensors").unlink()
    opened.upload(folder, "One file", ("model.safetensors", "model-*-of-*.safetensors"))
    assert set(hub.files("user/net")) == {"model.safetensors", "config.json", "README.md"}


def test_branch_is_made_and_main_left_alone(hub, folder):
    target(revision="wip/2").open().upload(folder, "Work")
    assert hub.files("user/net", revision="wip/2") == contents(folder)
    assert hub.files("user/net") == {}


def test_name_alone_is_one_of_the_user_and_organisations_can_be_written(hub, folder):
    assert target(repo_id="net").open().repo_id == "user/net"
    target(repo_id="team/net").open().upload(folder, "First")
    assert hub.files("team/net") == contents(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token": "hf_wrong"}, r"user/net cannot be opened .*does not know the token.*hf auth login.*\(status 401"),
        ({"token": False}, "does not know the token.*hf auth login"),
        ({"repo_id": "stranger/new"}, r"may not write there.*\(status 403"),
        ({"repo_id": "stranger/open"}, r"may not write there.*\(status 403"),
        ({"repo_id": "stranger/secret"}, r"may not write there|not there, or the token may not see it"),
        ({"repo_id": "a/b/c"}, "cannot be opened for an upload"),
        ({"repo_id": "user/bad name"}, "cannot be opened for an upload.*bad name"),
    ],
)
def test_refusals_come_before_any_work_and_say_what_to_do(settings, message, hub):
    hub.add("stranger/open")
    hub.add("stranger/secret", private=True)
    with pytest.raises(HubError, match=message) as caught:
        target(**settings).open()
    assert "\n" not in str(caught.value)


def test_without_any_token(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    with pytest.raises(HubError, match="hf auth login"):
        target(token=None).open()


def test_no_network_and_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="no connection, or it broke off.*Try again"):
        target().open()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(HubError, match="[Oo]ffline"):
        target().open()


FAULTS = {
    "dropped in the middle of the weights": Fault("PUT", "/lfs/.*", drop_after=70_000, times=None),
    "dropped in the commit": Fault("POST", ".*/commit/main", drop_after=20, times=None),
    "another upload at the same time": Fault("POST", ".*/commit/main", status=409, times=None),
    "not there any more": Fault("POST", ".*/commit/main", status=404, times=None),
    "changed at the same time": Fault("POST", ".*/commit/main", status=412, times=None),
    "right withdrawn": Fault("POST", ".*/commit/main", status=403, times=None),
    "token withdrawn": Fault("POST", ".*/preupload/main", status=401, times=None),
    "hub broken": Fault("POST", ".*/objects/batch", status=500, times=None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_broken_upload_loses_nothing_and_the_second_completes(name, hub, folder):
    before, opened = contents(folder), target().open()
    hub.faults.append(FAULTS[name])
    with pytest.raises(HubError) as caught:
        opened.upload(folder, "First")
    message = str(caught.value)
    assert message.startswith(f"The upload of {folder} to user/net failed: ")
    assert f"Upload it again with: lvvit publish {folder.resolve()} user/net" in message
    if FAULTS[name].drop_after is None:
        assert f"(status {FAULTS[name].status}" in message
    else:
        assert "no connection, or it broke off" in message
    assert contents(folder) == before and hub.files("user/net") == {}
    hub.faults.clear()
    arrived = len(hub.received)
    opened.upload(folder, "Second")
    assert hub.files("user/net") == before
    if "commit" in FAULTS[name].pattern:  # the weights had arrived
        assert arrived == len(hub.received) == 1


def test_a_short_failure_is_not_even_noticed(hub, folder):
    opened = target().open()
    hub.faults.append(Fault("PUT", "/lfs/.*", drop_after=70_000, times=2))
    opened.upload(folder, "First")
    assert hub.files("user/net") == contents(folder)


def test_damaged_file_stops_the_upload_before_it_starts(hub, folder):
    opened = target().open()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"model.safetensors is no whole safetensors file"):
        opened.upload(folder, "First")
    assert hub.files("user/net") == {} and not hub.received


def test_ctrl_c_is_told_like_other_failures(hub, folder, monkeypatch):
    opened = target().open()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", interrupted)
    with pytest.raises(HubError, match="failed: it was interrupted.\\n.*is complete and stays as it is"):
        opened.upload(folder, "First")


def test_token_that_is_no_token(hub):
    with pytest.raises(HubError, match="does not know the token"):
        target(token="hf_ö").open()


def test_folder_with_spaces_is_quoted_in_the_advice(hub, folder):
    spaced = folder.rename(folder.parent / "my model")
    hub.faults.append(Fault("POST", ".*/commit/main", status=409))
    with pytest.raises(HubError, match="lvvit publish '.*/my model' user/net --hub_revision"):
        target(revision="main").open().upload(spaced, "First")
