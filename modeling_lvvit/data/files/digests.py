"""Digests of the files of a folder, by which damage is found: a list in the form that `sha256sum --check` reads too, which begins with a
comment for that program, the number of its lines: a list that was cut off behind one of them is known by it."""

import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .atomic_files import write_text


DIGESTS = "SHA256SUMS"
CHUNK = 2**22  # bytes


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def file_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Digests of several files by their path in the folder; several are computed at a time."""
    names = sorted(names)
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to others
        return dict(zip(names, pool.map(lambda name: file_digest(folder / name), names)))


def write_digests(folder: Path, digests: dict[str, str]) -> None:
    """Writes the list of a folder. To be called when all its files are written."""
    write_text(folder / DIGESTS, _head(digests) + _lines(dict(sorted(digests.items()))))


def _head(digests: dict[str, str]) -> str:
    return f"# SHA-256 of {len(digests)} file{'s' * (len(digests) != 1)}\n"


def _lines(digests: dict[str, str]) -> str:
    return "".join(digest_line(name, digest) for name, digest in digests.items())


def digest_line(name: str, digest: str) -> str:
    """A line of the list."""
    return f"{digest}  {name}\n"


def parse_digests(text: str) -> dict[str, str]:
    """Digests by path, of whole lines; a last line that was not written to its end, and others that are none, are passed over."""
    found = re.findall(r"^([0-9a-f]{64})  (.+)\n", text, flags=re.MULTILINE)
    return {name: digest for digest, name in found}


def read_digests(folder: Path) -> dict[str, str] | None:
    """The list of a folder; `None` where there is none. A `ValueError` if it is damaged. Older lists do not begin with their number."""
    path = folder / DIGESTS
    if not path.is_file():
        return None
    text = path.read_bytes().decode(errors="replace")
    digests = parse_digests(text)
    if not digests or text.removeprefix(_head(digests)) != _lines(digests):
        raise ValueError(f"{path} is damaged: it is no whole list of digests.")
    return digests


def damaged_files(folder: Path) -> list[str]:
    """What is wrong with a folder by its list, a few words for each file: missing ones and those with another content. Empty where all is
    well, and where there is no list."""
    try:
        digests = read_digests(folder)
    except ValueError as error:
        return [str(error).rstrip(".")]
    names = digests or {}
    missing = [name for name in names if not (folder / name).is_file()]
    found = file_digests(folder, names.keys() - set(missing))
    changed = [name for name, digest in found.items() if digest != names[name]]
    return [f"{name} is missing" for name in missing] + [f"{name} is damaged" for name in changed]
