"""One run at a time writes to a folder; a run that was killed keeps nobody out."""

import json
import os
import signal
import subprocess
import sys

import pytest

from modeling_lvvit.data.files import folder_lock
from modeling_lvvit.data.files.atomic_files import atomic_directory
from modeling_lvvit.data.files.folder_lock import FolderLock
from support.programs import ROOT, TINY


def hidden(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_second_is_refused_and_told_who_writes(tmp_path):
    with FolderLock(tmp_path / "run"):
        owner = json.loads((tmp_path / "run" / ".lock.json").read_text())
        with pytest.raises(
            ValueError, match=rf"process {os.getpid()} on {owner['host']}, since {owner['since']}.*remove"
        ):
            FolderLock(tmp_path / "run").acquire()
        FolderLock(tmp_path / "other").acquire()
    assert hidden(tmp_path / "run") == []
    FolderLock(tmp_path / "run").acquire()


def test_it_is_released_after_an_error(tmp_path):
    with pytest.raises(KeyError), FolderLock(tmp_path):
        raise KeyError
    assert hidden(tmp_path) == []


def test_the_lock_of_a_killed_process_refuses_nobody(tmp_path):
    code = "import os, sys; from pathlib import Path; from modeling_lvvit.data.files.folder_lock import FolderLock\n"
    code += "FolderLock(Path(sys.argv[1])).acquire(); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL and hidden(tmp_path) == [".lock", ".lock.json"]
    with FolderLock(tmp_path):
        assert json.loads((tmp_path / ".lock.json").read_text())["pid"] == os.getpid()


def test_what_a_killed_run_had_half_written_is_removed(tmp_path):
    code = "import os, sys; from pathlib import Path; from modeling_lvvit.data.files.atomic_files import write_atomically\n"
    code += "write_atomically(Path(sys.argv[1]), lambda file: os.kill(os.getpid(), 9))"
    inner, other = tmp_path / "checkpoint-3", tmp_path / "other"
    for folder in (tmp_path, inner, other):
        folder.mkdir(exist_ok=True)
        subprocess.run([sys.executable, "-c", code, str(folder / "a.json")], cwd=ROOT, check=False)
        (folder / ".tmpAb12Cd").write_bytes(b"half")  # by safetensors
        assert len(hidden(folder)) == 2
        for name in (".env", ".notes.partial", ".tmp", ".tmpnotes", "a.partial"):  # of the user
            (folder / name).touch()
    (tmp_path / ".tmpfolder").mkdir()
    kept = {".env", ".notes.partial", ".tmp", ".tmpnotes", "a.partial"}
    with FolderLock(tmp_path, parts=("checkpoint-*",)):
        assert {path.name for path in inner.iterdir()} == kept
        assert len(hidden(other)) == 7
    assert {path.name for path in tmp_path.iterdir()} == kept | {".tmpfolder", "checkpoint-3", "other"}


def test_a_folder_that_a_killed_process_was_filling_is_removed(tmp_path):
    code = "import os, sys; from pathlib import Path; from modeling_lvvit.data.files.atomic_files import atomic_directory\n"
    code += "with atomic_directory(Path(sys.argv[1])) as folder: (folder / 'a').touch(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], cwd=ROOT, check=False)
    (tmp_path / ".model.original.of.mine").mkdir()
    assert len(hidden(tmp_path)) == 4  # with the lock
    with atomic_directory(tmp_path / "model") as folder:
        (folder / "b").touch()
    assert hidden(tmp_path) == [".model.original.of.mine", "model"]
    assert hidden(tmp_path / "model") == ["b"]


def leave_lock(folder, **changes) -> None:
    """That of the process which has started this one, in which it differs."""
    facts = {"pid": os.getppid(), "started": folder_lock._start(os.getppid()), "since": "2026-01-02 03:04:05"}
    (folder / ".lock").touch()
    (folder / ".lock.json").write_text(json.dumps({**folder_lock._this_process(), **facts, **changes}))


def without_kernel_locks(monkeypatch) -> None:
    def refuse(self, *arguments, **options):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(folder_lock.FileLock, "acquire", refuse)


@pytest.mark.parametrize("has_kernel_locks", [True, False])
def test_of_another_machine_the_message_says_what_to_remove(has_kernel_locks, tmp_path, monkeypatch):
    leave_lock(tmp_path, host="node7", boot="another")
    if not has_kernel_locks:
        without_kernel_locks(monkeypatch)
    message = r"process \d+ on node7, since 2026-01-02 03:04:05\. .* remove .*/\.lock and \.lock\.json there"
    with pytest.raises(ValueError, match=message):
        FolderLock(tmp_path).acquire()
    for name in (".lock", ".lock.json"):
        (tmp_path / name).unlink()
    FolderLock(tmp_path).acquire()


@pytest.mark.parametrize(
    ("changes", "is_refused"),
    [
        ({}, True),  # it lives
        ({"started": -100.0}, False),  # another process has its number now
        ({"boot": "before the restart"}, False),
        ({"host": "container-5"}, True),  # its processes cannot be seen
    ],
    ids=str,
)
def test_without_locks_of_the_kernel_the_owner_counts(changes, is_refused, tmp_path, monkeypatch):
    leave_lock(tmp_path, **changes)
    without_kernel_locks(monkeypatch)
    if is_refused:
        with pytest.raises(ValueError, match="Another run is writing"):
            FolderLock(tmp_path).acquire()
    else:
        FolderLock(tmp_path).acquire()


def test_a_container_of_this_machine_that_is_gone_refuses_nobody(tmp_path):
    leave_lock(tmp_path, host="container-5")
    FolderLock(tmp_path).acquire()


def test_a_process_that_was_killed_and_not_waited_for_refuses_nobody(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"], stdout=-1
    ) as zombie:
        zombie.stdout.readline()
        leave_lock(tmp_path, pid=zombie.pid, started=folder_lock._start(zombie.pid))
        with pytest.raises(ValueError, match=f"process {zombie.pid}"):
            FolderLock(tmp_path).acquire()
        zombie.kill()
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        FolderLock(tmp_path).acquire()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}'])
def test_half_a_record_refuses_nobody(content, tmp_path):
    (tmp_path / ".lock.json").write_text(content)
    FolderLock(tmp_path).acquire()


def test_a_folder_that_is_being_made_is_not_made_twice(tmp_path):
    with atomic_directory(tmp_path / "export") as partial:
        (partial / "file").touch()
        with pytest.raises(ValueError, match="Another run is writing to .*export: process"):
            atomic_directory(tmp_path / "export").__enter__()
        with atomic_directory(tmp_path / "export", is_shared=True):
            pass
    assert hidden(tmp_path) == ["export"]


@pytest.mark.parametrize("more", [[], ["--overwrite_output_dir", "true"], ["--resume_from_checkpoint", "last"]])
def test_training_in_the_folder_of_another_run_is_refused_at_once(more, tmp_path):
    import train_tl

    arguments = ["--dataset_name", "no/such", "--output_dir", str(tmp_path), "--config_overrides", TINY, *more]
    with (
        FolderLock(tmp_path),
        pytest.raises(SystemExit, match=rf"^lvvit train: Another run .* process {os.getpid()} on"),
    ):
        train_tl.main([*arguments, "--report_to", "none"])
    with pytest.raises(SystemExit, match=r"no whole checkpoint|no/such"):
        train_tl.main([*arguments, "--report_to", "none"])
    assert not tmp_path.exists() or hidden(tmp_path) == []
