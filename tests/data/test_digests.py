"""Lists of digests, and the damage that they find."""

import shutil
import subprocess

import pytest

from modeling_lvvit.data.files.digests import DIGESTS, damaged_files, file_digests, write_digests


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "part").mkdir()
    for name, content in (("weights", b"\x00" * 5000), ("part/state", b"abc")):
        (tmp_path / name).write_bytes(content)
    write_digests(tmp_path, file_digests(tmp_path, ["weights", "part/state"]))
    return tmp_path


def test_a_whole_folder_has_no_damage_and_the_usual_program_agrees(folder):
    assert damaged_files(folder) == []
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", DIGESTS], cwd=folder, check=True, capture_output=True)
    text = (folder / DIGESTS).read_text()
    (folder / DIGESTS).write_text(text.partition("\n")[2])  # as before lists began with their number
    assert text.startswith("# SHA-256 of 2 files\n") and damaged_files(folder) == []


def test_damage_is_named(folder):
    content = bytearray((folder / "weights").read_bytes())
    content[4321] ^= 1 << 5  # one bit
    (folder / "weights").write_bytes(content)
    (folder / "part" / "state").unlink()
    assert damaged_files(folder) == ["part/state is missing", "weights is damaged"]
    (folder / "weights").write_bytes(bytes(4999))
    assert "weights is damaged" in damaged_files(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-1],
        lambda text: "",
        lambda text: "".join(text.splitlines(keepends=True)[:-1]),
        lambda text: text.splitlines(keepends=True)[0],
        lambda text: text.replace("2 files", "3 files"),
        lambda text: text.replace("weights", "weigh\xff\nts"),
    ],
)
def test_a_damaged_list_is_named(change, folder):
    (folder / DIGESTS).write_bytes(change((folder / DIGESTS).read_text()).encode("latin-1"))
    assert damaged_files(folder) == [f"{folder / DIGESTS} is damaged: it is no whole list of digests"]


def test_folders_without_a_list_are_taken(folder):
    (folder / DIGESTS).unlink()
    (folder / "weights").write_bytes(b"")
    assert damaged_files(folder) == []
