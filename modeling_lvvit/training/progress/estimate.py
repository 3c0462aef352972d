"""How long a run will take, and how much memory it needs."""

import math
import platform
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta

import psutil
import torch
from transformers import TrainerState, TrainingArguments

from ...data.decoding import jpeg_regions
from ...data.loaders import cores_of_process, lacks_shared_memory, processes_of_machine
from ..throughput import Throughput


WARMUP_STEPS = 5  # compilation, first reading of files, growing memory
MEASURED_STEPS = 10
FEW_STEPS, LONG = 3, 60.0  # so many are enough where they take so many seconds
MUCH_WAITING = 0.1  # share of the time
DECODER = "nvidia-nvimgcodec-cu13"
DECODER_SYSTEMS = {("Linux", "x86_64"), ("Linux", "aarch64"), ("Windows", "AMD64")}  # for which it is published
LONG_RUN, SHORT_RUN = 1200.0, 600.0  # seconds: from where on a shorter run is proposed, and how long that takes
PATIENCE = 5
GIB = 2**30


@dataclass
class RunClock:
    """Durations of the steps, evaluations and checkpoints of a run, from when it starts or goes on; in seconds.

    Args:
        throughput: Clock of the Trainer, which knows what is no training.
        steps_per_epoch: `None` if that is not known.
    """

    throughput: Throughput
    steps_per_epoch: float | None = None
    evaluations: list[float] = field(default_factory=list)
    saves: list[float] = field(default_factory=list)
    is_evaluated: bool = False  # since the last step
    interval: tuple[int, float, float, float] | None = None  # where that of `waited_share` began

    def start(self, state: TrainerState, steps_per_epoch: float | None) -> None:
        """Begins to measure."""
        self.evaluations, self.saves, self.is_evaluated, self.interval = [], [], False, None
        self.steps_per_epoch, self.first_step = steps_per_epoch, state.global_step
        self.began = time.perf_counter()
        self._mark(state)

    def _mark(self, state: TrainerState) -> None:
        clock = self.throughput
        self._paused = clock.paused_seconds
        self._marked = (state.global_step, time.perf_counter(), clock.paused_seconds, clock.waited_seconds)

    def _since(self, mark: tuple[int, float, float, float], state: TrainerState) -> tuple[int, float, float]:
        """Steps, seconds of training and seconds of waiting since then."""
        step, began, paused, waited = mark
        seconds = time.perf_counter() - began - (self.throughput.paused_seconds - paused)
        return state.global_step - step, seconds, self.throughput.waited_seconds - waited

    def step(self, state: TrainerState) -> None:
        """Notes the end of a step."""
        pause, self._paused = self.throughput.paused_seconds - self._paused, self.throughput.paused_seconds
        if pause > 0:
            (self.evaluations if self.is_evaluated else self.saves).append(pause)
            self.is_evaluated = False
        if state.global_step - self.first_step == WARMUP_STEPS:
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()  # the processor works ahead of the device
            self._mark(state)

    def measured(self, state: TrainerState) -> tuple[int, float, float]:
        """Steps after the warm-up, the seconds that they took, and how many of them they waited for data."""
        if state.global_step - self.first_step <= WARMUP_STEPS:
            return 0, 0.0, 0.0
        return self._since(self._marked, state)

    def waited_share(self, state: TrainerState) -> float | None:
        """Share of the time that training has waited for data since the last call, to be called at each log. The warm-up, in which
        workers start and load their first batches, does not count; `None` while an interval has too few steps, it goes on then."""
        if state.global_step - self.first_step <= WARMUP_STEPS:
            return None
        steps, seconds, waited = self._since(self.interval or self._marked, state)
        if steps < MEASURED_STEPS:
            return None
        clock = self.throughput
        self.interval = (state.global_step, time.perf_counter(), clock.paused_seconds, clock.waited_seconds)
        return waited / seconds

    def is_measured(self, state: TrainerState) -> bool:
        """Whether there is enough to estimate with."""
        steps, seconds, _ = self.measured(state)
        return steps >= MEASURED_STEPS or (steps >= FEW_STEPS and seconds >= LONG)

    def evaluations_left(self, args: TrainingArguments, state: TrainerState) -> int:
        """How many evaluations come, with the last one, after training."""
        left = self._occasions(args.eval_strategy, state.eval_steps, state)
        return left + 1 if args.eval_strategy != "no" else 0

    def _occasions(self, strategy: str, every: float, state: TrainerState) -> int:
        every = {"steps": every, "epoch": self.steps_per_epoch}.get(strategy)
        return (
            math.ceil(state.max_steps / every) - int(state.global_step // every) if every else 0
        )  # the end is one too

    def seconds_left(self, args: TrainingArguments, state: TrainerState) -> float | None:
        """Until the end of the run; `None` while too little is known. Evaluations and checkpoints count once one was timed."""
        steps, seconds, _ = self.measured(state)
        if not steps:
            return None
        left = (state.max_steps - state.global_step) * seconds / steps
        if self.evaluations:
            left += self.evaluations_left(args, state) * sum(self.evaluations) / len(self.evaluations)
        if self.saves:
            left += self._occasions(args.save_strategy, state.save_steps, state) * sum(self.saves) / len(self.saves)
        return left


def describe_estimate(clock: RunClock, args: TrainingArguments, state: TrainerState) -> str:
    """A line about duration and memory."""
    steps, seconds, _ = clock.measured(state)
    left = clock.seconds_left(args, state)
    rest = f"{state.max_steps - state.global_step:,} steps of {seconds / steps:.3g} s"
    if evaluations := clock.evaluations_left(args, state):
        rest += f" and {evaluations:,} evaluations"
        rest += (
            f" of {sum(clock.evaluations) / len(clock.evaluations):.3g} s" if clock.evaluations else ", not timed yet"
        )
    whole = f"{duration(time.perf_counter() - clock.began + left)} in all, " if clock.first_step == 0 else ""
    text = f"estimate: {whole}{duration(left)} left ({rest})"
    return "; ".join(filter(None, [text, describe_memory(args.device)]))


def describe_shorter_run(clock: RunClock, args: TrainingArguments, state: TrainerState) -> str | None:
    """A line that says how to make a run shorter that takes more than 20 minutes; `None` for others, and for one that goes on."""
    if clock.first_step or not clock.measured(state)[0] or clock.seconds_left(args, state) < LONG_RUN:
        return None
    whole = time.perf_counter() - clock.began + clock.seconds_left(args, state)
    step = whole / state.max_steps  # with its share of evaluations and checkpoints
    number, ways = max(1, int(SHORT_RUN / step)), []
    if clock.steps_per_epoch is not None and args.max_steps <= 0:
        epochs = max(1, int(number / clock.steps_per_epoch))
        if epochs < args.num_train_epochs:
            ways.append(f"--num_train_epochs {epochs} takes about {_minutes(epochs * clock.steps_per_epoch * step)}")
    ways.append(f"--max_steps {number} {'' if ways else 'takes '}about {_minutes(number * step)}")
    if getattr(args, "early_stopping_patience", None) is None:
        ways.append(f"--early_stopping_patience {PATIENCE} ends training when it gets no better")
    return f"shorter: {', '.join(ways)}"


def _minutes(seconds: float) -> str:
    """Whole minutes in words."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes:,} minute{'s' if minutes > 1 else ''}"


def describe_memory(device: torch.device) -> str | None:
    """Peak memory of the device; on a CPU that of this process and its loader workers. `None` where that cannot be asked."""
    if device.type == "cpu":
        used, total = process_memory(), psutil.virtual_memory().total
        processes = processes_of_machine()
        each = f" in each of {processes} processes" if processes > 1 else ""
        return f"memory {used / GIB:.1f} GiB{each} of {total / GIB:.1f}"
    try:
        used, (_, total) = torch.accelerator.max_memory_reserved(device), torch.accelerator.get_memory_info(device)
    except (RuntimeError, NotImplementedError):
        return None
    return f"memory of the device {used / GIB:.1f} of {total / GIB:.1f} GiB"


def process_memory() -> int:
    """Bytes of this process in memory, and of its children what they do not share with it."""
    process = psutil.Process()
    used = process.memory_info().rss
    for child in process.children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            used += child.memory_full_info().uss
    return used


def describe_waiting(args: TrainingArguments, share: float) -> str | None:
    """A line that says what to try if training waits for data for too large a share of the time; `None` if it does not."""
    if share <= MUCH_WAITING:
        return None
    workers, cores = args.dataloader_num_workers, cores_of_process()
    text = f"{share:.0%} of the time waits for images"
    on_cpu = args.device.type == "cpu"  # where the cores compute
    if workers < cores and not on_cpu and not lacks_shared_memory():
        return f"{text}: try more --dataloader_num_workers (now {workers}, {cores} cores)"
    ways = ["smaller files (lvvit cache)"]
    if (platform.system(), platform.machine()) in DECODER_SYSTEMS and not jpeg_regions.is_used():
        ways.append(f"a faster decoder (pip install {DECODER})")
    though = (
        "" if on_cpu or not workers else f", although {workers} --dataloader_num_workers load them on {cores} cores"
    )
    return f"{text}{though}: try {', '.join(ways)}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, for example 1:02:03."""
    return str(timedelta(seconds=round(seconds)))
