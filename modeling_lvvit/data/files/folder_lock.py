"""One run at a time writes to a folder."""

import json
import os
import platform
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout


LOCK = ".lock"  # what hubs, datasets and checks of folders pass over: names that begin with it
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # of Linux, the same in all containers of a machine
# names of files that are being written next to their place: by `atomic_files`, and by safetensors (the Rust crate `tempfile`)
UNFINISHED = re.compile(r"\..+\.[a-z0-9_]{8}\.partial|\.tmp[A-Za-z0-9]{6}")
SECONDS_FOR_WORKERS = 10  # to end after the process that has held the lock


class FolderLock:
    """Who writes to a folder; also for a `with` block.

    The kernel holds the lock, and lets it go when the process ends, however that ends. Network file systems may know nothing of locks, or
    nothing of those of other machines, so that a file next to it says who has it: a process of this machine that is gone has it no more. Of
    one of another machine nothing can be known.

    Args:
        folder: Is made where it is missing.
        path: Of the lock; `path` with `.json` behind it says who has it. Default: `.lock` in the folder.
        parts: Patterns of the folders in it that runs write to as well.
    """

    def __init__(self, folder: Path, path: Path | None = None, parts: tuple[str, ...] = ()):
        self.folder, self.path, self.parts = folder, path or folder / LOCK, parts
        self.owner_path = self.path.with_name(f"{self.path.name}.json")
        self._lock = FileLock(self.path)
        self._is_held = False

    def acquire(self) -> None:
        """Takes the lock at once, and removes what a run that was killed left half written.

        Raises:
            ValueError: If another run has it.
            OSError: If nothing can be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        owner, has_kernel_lock = self._read_owner(), True
        try:
            self._lock.acquire(timeout=SECONDS_FOR_WORKERS if owner and _is_gone(owner, False) else 0)
        except NotImplementedError:  # of a file system without locks
            has_kernel_lock = False
        except Timeout as error:
            raise ValueError(self._refusal(owner)) from error
        try:
            owner = self._read_owner()
            if owner is not None and not _is_gone(owner, has_kernel_lock):
                raise ValueError(self._refusal(owner))
            self.owner_path.unlink(missing_ok=True)
            with self.owner_path.open("x", encoding="utf-8") as file:
                json.dump(_this_process(), file)
            self._remove_unfinished()
        except FileExistsError as error:  # of another machine, at the same moment
            self._lock.release()
            raise ValueError(self._refusal(self._read_owner())) from error
        except BaseException:
            self._lock.release()
            raise
        self._is_held = True

    def release(self) -> None:
        """Lets other runs write to the folder; does nothing where it is not held."""
        if self._is_held:
            self._is_held = False
            self.owner_path.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _remove_unfinished(self) -> None:
        for folder in [self.folder, *(part for pattern in self.parts for part in self.folder.glob(pattern))]:
            for path in folder.glob(".*"):
                if UNFINISHED.fullmatch(path.name) and path.is_file():
                    path.unlink(missing_ok=True)

    def _read_owner(self) -> dict[str, Any] | None:
        """Who has it or had it; `None` where nothing says so, or not all of it was written."""
        with suppress(OSError, ValueError):
            owner = json.loads(self.owner_path.read_text(encoding="utf-8"))
            if isinstance(owner, dict) and owner.keys() == _this_process().keys():
                return owner
        return None

    def _refusal(self, owner: dict[str, Any] | None) -> str:
        who = "" if owner is None else f": process {owner['pid']} on {owner['host']}, since {owner['since']}"
        return (
            f"Another run is writing to {self.folder}{who}. Wait for its end, or stop it. If it is gone, remove {self.path} and "
            f"{self.owner_path.name} there."
        )


def is_lock(path: Path) -> bool:
    """Whether a file in a folder only tells who writes to it."""
    return path.name in (LOCK, f"{LOCK}.json")


def _is_gone(owner: dict[str, Any], has_kernel_lock: bool) -> bool:
    """Whether it is sure that the process which had a lock has ended; `has_kernel_lock`: whether this one could take it from the kernel."""
    now = _this_process()
    is_same_boot = owner["boot"] == now["boot"]
    if owner["host"] != now["host"]:
        return is_same_boot and has_kernel_lock  # a container that was on this machine
    if not is_same_boot:  # the machine was started again
        return True
    if owner["pid"] == now["pid"] and owner["started"] == now["started"]:
        return has_kernel_lock  # of an object that was forgotten
    try:
        is_zombie = psutil.Process(owner["pid"]).status() == psutil.STATUS_ZOMBIE
        return is_zombie or _start(owner["pid"]) != owner["started"]
    except psutil.Error:
        return True


def _this_process() -> dict[str, Any]:
    boot = BOOT_ID.read_text(encoding="ascii").strip() if BOOT_ID.is_file() else platform.node()
    return {
        "host": platform.node(),
        "boot": boot,
        "pid": os.getpid(),
        "started": _start(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _start(pid: int) -> float:
    """When a process began: on Linux in ticks after the machine, which stay the same when the clock is set."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.is_file():
        return float(stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19])
    return psutil.Process(pid).create_time()
