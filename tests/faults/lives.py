"""Programs in processes that start in a moment: forked from one that has imported everything, and stopped or killed like any other."""

import contextlib
import ctypes
import faulthandler
import importlib
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import psutil


CONTEXT = multiprocessing.get_context("forkserver")
PROGRAMS = {
    "train": "train_tl",
    "segment": "modeling_lvvit.segmentation.train",
    "annotate": "modeling_lvvit.cli.annotation.__main__",
    "publish": "modeling_lvvit.publish",
}
LAUNCHER = "modeling_lvvit.cli.command"
# what programs import when they first need it
LATE = ["lives", "modeling_lvvit.cli.launch", "sklearn.metrics", "rich.progress"]
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
LIMIT = 120  # seconds of a life, on a busy machine too
ORPHANS_END = 12  # seconds: workers of loaders look for their parent every five


def live(module: str, function: str, words: list[str], log: str | None, environment: dict[str, str]) -> None:
    """In the new process: runs a program, with a session of its own, as the shell of a user gives it a group of its own."""
    os.setsid()
    os.environ.update(environment)
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # the default again
    sys.argv = [module]
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for descriptor in (1, 2):
            os.dup2(file, descriptor)
        sys.stdout.reconfigure(line_buffering=True)
        faulthandler.register(signal.SIGUSR1)
    getattr(importlib.import_module(module), function)(words)


class Life:
    """A running process of a program. What it prints goes to `log`."""

    def __init__(self, module: str, words: list[str], log: Path | None = None, function: str = "main", **environment):
        self.log, log_name = log, None if log is None else str(log)
        self.process = CONTEXT.Process(target=live, args=(module, function, words, log_name, environment))
        self.process.start()
        while log is not None and not log.exists() and not self.is_over:
            time.sleep(0.002)

    @property
    def is_over(self) -> bool:
        return self.process.exitcode is not None

    def children(self) -> list[psutil.Process]:
        """Processes that it has started."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def send(self, number: int, to_group: bool = False) -> None:
        """A signal to the process, or to all of its group, as a terminal does."""
        with contextlib.suppress(ProcessLookupError):  # it has ended
            (os.killpg if to_group else os.kill)(self.process.pid, number)

    def limit_files(self, size: int) -> None:
        """From now on no file can grow beyond so many bytes."""
        if not self.is_over:
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (size, size))

    def wait(self) -> int:
        """Its status, negative where a signal ended it; an `AssertionError` if it does not end."""
        self.process.join(LIMIT)
        if not self.is_over:
            self.send(signal.SIGUSR1)  # says where it is
            time.sleep(1)
            self.send(signal.SIGKILL, to_group=True)
            self.process.join()
            raise AssertionError(f"it did not end within {LIMIT} seconds, see {self.log}")
        return self.process.exitcode

    @property
    def said(self) -> str:
        """What it printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")


class Machine:
    """The server from which lives are forked, and all that comes of them: orphans become children of this process.

    Args:
        environment: Of all lives.
    """

    def __init__(self, environment: dict[str, str]):
        os.environ.clear()
        os.environ.update(environment)
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        CONTEXT.set_forkserver_preload([*PROGRAMS.values(), LAUNCHER, *LATE])
        Life("builtins", [], function="len").wait()  # starts it
        self.servers = psutil.Process().children()

    def left_over(self) -> list[psutil.Process]:
        """Processes that live on after those that started them; zombies are buried."""
        others = [part for part in psutil.Process().children(recursive=True) if part not in self.servers]
        for part in others:
            with contextlib.suppress(ChildProcessError):  # its parent is another process
                os.waitpid(part.pid, os.WNOHANG)
        return [part for part in others if part.is_running() and part.status() != psutil.STATUS_ZOMBIE]

    def check_no_orphans(self) -> None:
        """Raises an `AssertionError` if processes do not end when those that started them are gone."""
        end = time.monotonic() + ORPHANS_END
        while (others := self.left_over()) and time.monotonic() < end:
            time.sleep(0.05)
        if others:
            names = [f"{part.pid} {' '.join(part.cmdline())[:100]}" for part in others]
            self.end()
            raise AssertionError(f"processes live on: {names}")

    def end(self) -> None:
        """Kills what is left over."""
        for part in self.left_over():
            part.kill()
        self.left_over()

    def cpu_seconds(self) -> float:
        """That lives have taken so far, and those that they started."""
        parts = [part.cpu_times() for part in [*self.servers, psutil.Process()] if part.is_running()]
        return sum(part.user + part.system + part.children_user + part.children_system for part in parts)


def rank_variables(rank: int, number: int, port: int) -> dict[str, str]:
    """What launchers tell one of several processes."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
