"""What programs share: the start of their processes, their share of the machine, and the words of their messages."""

import atexit
import ctypes
import dataclasses
import gc
import logging
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil
import torch
from accelerate import PartialState
from accelerate.commands.launch import launch_command_parser
from torch import distributed
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from . import _end_start, _first_parent


LAUNCHER_VARIABLE = "MODELING_LVVIT_LAUNCHER"  # holds the number of the process that a started one ends with
SECONDS_BETWEEN_LOOKS = 0.5  # at whether that is still there
# for a checkpoint when it is gone: short, as processes may wait for one that went with it
SECONDS_TO_END = 4.0
# Threads of gloo still drop the tensors of the last collective, for which they need the interpreter's lock. One that waits for it while the
# interpreter ends aborts the process, so they get the lock for longer than they need it.
SECONDS_OF_GLOO = 0.1
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # <malloc.h>
_interrupted = threading.Event()  # by Ctrl-C, which has ended the launcher


def end_imports() -> None:
    """In a program whose `main` begins, makes Ctrl-C a `KeyboardInterrupt` again, which ended the program until then (see `_end_start`), and
    collects garbage from now on, but does not look for it among what was imported."""
    if signal.getsignal(signal.SIGINT) is _end_start:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def missing_cpu_processes() -> int:
    """How many processes `accelerate launch --cpu --num_processes N` was asked for but did not start; 0 if all is well.

    For CPU training accelerate starts a single process, whatever N is (its issue 2741); it leaves the number only in its
    own command line.
    """
    is_lone_cpu_process = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "WORLD_SIZE" not in os.environ
    if not is_lone_cpu_process or "MASTER_ADDR" not in os.environ:
        return 0
    parent = psutil.Process(os.getppid()).cmdline()
    # started as `accelerate launch`, `accelerate-launch` or `python -m accelerate.commands.launch`
    start = next((index for index, word in enumerate(parent) if word.endswith("launch")), None)
    if start is None:
        return 0
    options, _ = launch_command_parser().parse_known_args(parent[start + 1 :])
    return options.num_processes if (options.num_processes or 0) > 1 and (options.num_machines or 1) == 1 else 0


def start_missing_processes(program: list[str], arguments: list[str]) -> bool:
    """Starts the processes that accelerate left out, waits for them, and says whether there were any. `program` is the path of the
    one that was started, or `--module` and its name."""
    processes = missing_cpu_processes()
    if not processes:
        return False
    end_launcher_at_interrupt()
    with quiet_launch():
        run_processes(processes, program, arguments)
    return True


def join_processes(module: str, arguments: list[str]) -> PartialState | None:
    """The place of this process among those of a program that computes without training, its share of the cores taken; `None` if it only
    started the others, see `start_missing_processes`."""
    if start_missing_processes(["--module", module], arguments):
        return None
    # without the word, accelerate takes several processes on CPUs for single ones
    state = PartialState(cpu=not torch.accelerator.is_available())
    set_up_cpu(state.device)
    return state


def run_processes(number: int, program: list[str], arguments: list[str]) -> None:
    """Runs a program in several processes of this machine; a `ChildFailedError` if one of them fails."""
    os.environ.pop("MASTER_PORT", None)
    torchrun(["--standalone", f"--nproc_per_node={number}", *program, *arguments])


@contextmanager
def quiet_launch() -> Iterator[None]:
    """Around a launcher that runs in this process (torchrun, accelerate): when its processes fail or are interrupted, this one ends
    with their status. They have said why; the launcher's traceback and its notes of what it sends to whom say nothing more."""
    end_imports()
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    for name in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        yield
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode
        if status < 0:  # it could not say why
            name = signal.Signals(-status).name
            reason = ", perhaps for want of memory" if name == "SIGKILL" else ""
            print(f"process {rank} was ended by {name}{reason}", file=sys.stderr, flush=True)
    except subprocess.CalledProcessError as error:
        status = error.returncode
    except SignalException as error:
        status = 128 + error.sigval
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    else:
        return
    status = 128 - status if status < 0 else status
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        stop_launcher()
    sys.exit(status)


def waiting_launcher() -> psutil.Process | None:
    """The `accelerate launch` that has started this process alone and does nothing but wait for it; `None` if there is none."""
    try:
        parent = psutil.Process(os.getppid())
        python, *words = parent.cmdline()
    except (psutil.Error, ValueError):  # it is gone
        return None
    start = [os.path.basename(word) for word in words if word not in ("-u", "-m")][:2]
    is_launcher = start == ["accelerate", "launch"] or start[:1] in (
        ["accelerate-launch"],
        ["accelerate.commands.launch"],
    )
    return parent if is_launcher and "python" in python and "WORLD_SIZE" not in os.environ else None


def end_with_launcher() -> None:
    """Has this program end like after SIGTERM when a process that waits for it is gone, however that ended (SIGKILL, too little memory):

    - `accelerate launch`, which passes no signal on to the only process that it starts
    - the elastic agent (`torchrun`), without which its processes would wait for each other
    - the one that is named in `LAUNCHER_VARIABLE`: another program of this package

    After the first it has all the time that it needs, as it may have been SIGTERM; after the others `SECONDS_TO_END`.
    """
    if (launcher := waiting_launcher()) is not None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _end_like_launcher)
        _when_gone(launcher.pid, _end_unless_interrupted)
    starters = {int(os.environ.get(LAUNCHER_VARIABLE, os.getpid()))}
    if "TORCHELASTIC_RUN_ID" in os.environ:
        starters.add(_first_parent)
    for pid in starters - {os.getpid()}:
        _when_gone(pid, _end_in_time)


def end_with_parent() -> None:
    """Has a worker process end at once when the one that started it is gone, however that ended."""
    _when_gone(multiprocessing.parent_process().pid, os._exit, 1)


def start_worker(*_: object) -> None:
    """For the start of worker processes: Ctrl-C goes to all, and the main one ends the others; they end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _when_gone(pid: int, then: Callable, *arguments: object) -> None:
    """Calls a function, in a thread, once a process is gone. It is looked for again and again: Linux could send a signal, but when the
    thread is gone that started this process, and other systems could not."""
    process = None
    with suppress(psutil.Error):
        process = psutil.Process(pid)

    def watch() -> None:
        while process is not None and _is_alive(process):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        then(*arguments)

    threading.Thread(target=watch, daemon=True).start()


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _end_unless_interrupted() -> None:
    """After the end of a launcher, unless this process has ended it."""
    if not _interrupted.is_set():
        _send_sigterm()


def _end_in_time() -> None:
    _send_sigterm()
    time.sleep(SECONDS_TO_END)
    os._exit(128 + signal.SIGTERM)


def _send_sigterm() -> None:
    """To the main thread, which may wait for something and must wake up."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
    else:
        signal.raise_signal(signal.SIGTERM)


def _end_like_launcher(number: int, frame: object) -> None:
    """Handles SIGTERM as if there were no handler, but with a launcher that says nothing about it."""
    stop_launcher()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def end_launcher_at_interrupt() -> None:
    """On Ctrl-C, ends an `accelerate launch` that waits for this process: it gets the signal too, and would print a traceback.

    It prints it a quarter of a second later (`subprocess.Popen.wait`), so that a thread has to act, whatever the main one computes. Where
    no terminal has sent the signal, only this process may have it: then the launcher waits for the end, see `stop_launcher`.
    """
    launcher = waiting_launcher()
    if launcher is None or threading.current_thread() is not threading.main_thread() or not _is_in_foreground():
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while os.read(reader, 1) != bytes([signal.SIGINT]):
            pass
        _interrupted.set()
        stop_launcher()

    threading.Thread(target=watch, daemon=True).start()


def stop_launcher() -> None:
    """Ends an `accelerate launch` that waits for this process, which would answer a status other than 0 with a traceback."""
    launcher = waiting_launcher()
    if launcher is not None:
        _interrupted.set()  # its end is no reason to end this process
        launcher.terminate()


def _is_in_foreground() -> bool:
    """Whether Ctrl-C of the terminal reaches this process."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    finally:
        os.close(terminal)


def end_together() -> None:
    """Has the processes of a program end at the same time: one that goes first can take down others that still use their connection."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
        time.sleep(SECONDS_OF_GLOO)


@atexit.register
def _outlast_gloo() -> None:
    """Where connections are open at the end of a program, as after a refusal."""
    if distributed.is_available() and distributed.is_initialized():
        time.sleep(SECONDS_OF_GLOO)


def is_main_process() -> bool:
    """Whether this process is the one of its machine that speaks to the user."""
    return int(os.environ.get("LOCAL_RANK", "0")) <= 0


def name_options(message: object, *arguments: type | str) -> str:
    """A message of the library in the words of a program: parameters that it names in backticks become options.

    Args:
        message: An error or a text, for example "Name it with `image_column`."
        arguments: Dataclasses of the program's options, or names of options. A parameter without an option of its name becomes the
            one with `_name` behind it, else the only option that ends in it: `class_map` becomes `--annotator_class_map`.
    """
    names = {part for part in arguments if isinstance(part, str)}
    names |= {entry.name for part in arguments if part not in names for entry in dataclasses.fields(part)}

    def option(match: re.Match) -> str:
        options = [name for name in (match[1], f"{match[1]}_name") if name in names]
        options = options or [name for name in names if name.endswith(f"_{match[1]}")]
        return f"--{options[0]}" if len(options) == 1 else match[0]

    return re.sub(r"`(\w+)`", option, str(message))


def set_up_cpu(device: torch.device) -> None:
    """What a process that computes on the CPU needs: freed memory is kept, and the cores are shared between the processes of
    this machine (`accelerate launch` gives each a single thread unless `--num_cpu_threads_per_process` says otherwise). A number of
    threads in `OMP_NUM_THREADS` holds, but for the 1 that launchers put there where nobody chose one."""
    if device.type != "cpu":
        return
    keep_freed_memory()
    # of several processes, and of one by `accelerate launch`; other variables of accelerate come from its objects too
    is_launched = "LOCAL_WORLD_SIZE" in os.environ or "ACCELERATE_USE_CPU" in os.environ
    if is_launched and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, num_cpu_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next step, instead of giving it back and having Linux clear and map it again: on two
    cores of an AMD EPYC a training step of LV-ViT-T with 16 images takes 0.75 of the time.

    For the whole process, whose memory then stays at its peak (1.05 to 1.15 of what it would be); without effect under other
    allocators.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def num_cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
