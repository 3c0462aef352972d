"""What a benchmark with a time budget has measured so far, and what it has left out."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..data.files.atomic_files import write_json


@dataclass
class Record:
    """What was measured and what was left out, printed and written to a file as it comes.

    Args:
        minutes: The time budget.
        environment: Hardware and versions, for the file.
        file: JSON file; `None` for none.
    """

    minutes: float
    environment: dict[str, object] = field(default_factory=dict)
    file: Path | None = None
    rows: list[dict[str, object]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds_left(self) -> float:
        """Of the budget."""
        return 60 * self.minutes - (time.perf_counter() - self.started)

    def say(self, text: str) -> None:
        """Prints a line with the time since the start."""
        print(f"{time.perf_counter() - self.started:4.0f} s  {text}", flush=True)

    def add(self, row: dict[str, object]) -> None:
        """Keeps a row of figures."""
        self.rows.append(row)
        self._write()

    def leave_out(self, what: str, reason: str) -> None:
        """Says that and why there are no figures of something."""
        self.left_out.append(f"{what}: {reason}")
        self.say(f"left out: {self.left_out[-1]}")
        self._write()

    def has_time(self, what: str, seconds: float, reserved: float = 0.0) -> bool:
        """Whether so much time is left besides what is reserved for others; else `what` is left out."""
        left = max(self.seconds_left - reserved, 0.0)
        if seconds > left:
            self.leave_out(what, f"may take {seconds:.1f} s, {left:.1f} s are left (--minutes)")
        return seconds <= left

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Goes on after whatever goes wrong in a `with` block, which is left out then."""
        try:
            yield
        except Exception as error:  # compilers, drivers and decoders have errors of their own; the other figures count
            self.leave_out(what, f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}")

    def _write(self) -> None:
        if self.file is not None:
            write_json(self.file, {"environment": self.environment, "rows": self.rows, "left_out": self.left_out})
