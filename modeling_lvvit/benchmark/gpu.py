"""Speed on a GPU in one run within a time budget, the most important figures first.

Models of a group share a process and are taken in turn. What fails, or does not fit into the time that is left, is named and left out;
every figure is written to the file as soon as there is one.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat

import datasets
import torch

from .comparison import COLUMNS, SYNTHETIC_IMAGES, TRAINING_FLOPS, count_size, image_rows, relative_speed, table
from .data_loading import token_label_loader
from .image_supply import COPY, LOADER, device_batch, image_supplies
from .interleaved_timing import Times
from .measure import matmul_ceiling, memory_now, peak_memory, time_call
from .models import BenchmarkModel, Setting, inference_call, training_call
from .record import Record


FAMILY = ("lvvit_s_224", "lvvit_t_224", "lvvit_m_224", "lvvit_l_288")
COMPETITOR = "timm/deit_small_patch16_224"
COMPETITOR_SIDE = 224
PRECISION = "bfloat16"
BATCH_SIZES = (512, 256)  # inference, training
COMPILING = {"compiled", "deployed"}
# seconds until a model has made its first calls, until one like it was measured
FIRST_ESTIMATES = {"inference": 40.0, "training": 80.0}
EAGER_ESTIMATE = 5.0
MARGIN = 1.5  # the next model may have more layers than the dearest one so far
SECONDS_OF_A_TURN = 0.1
SUPPLY_SHARE = 1 / 80  # of the whole time for each loader and decoder: 6 s of eight minutes
SUPPLIES = 8  # at most so many loaders and decoders; their time is kept free until they are measured
DEVICE_STEP = "device step"
SPEED_COLUMNS = {
    "model": "{}",
    "batch_size": "{}",
    "first_call_seconds": "{:.1f}",
    **{name: text for name, text in COLUMNS.items() if name not in ("model", "ratio_per_flop")},
}
UTILIZATION_COLUMNS = {
    name: SPEED_COLUMNS[name] for name in ("model", "batch_size", "gflops", "images_per_second", "ceiling_share")
}
SUPPLY_COLUMNS = {"model": "{}", "images_per_second": "{:,.0f}"}


@dataclass
class GPUBenchmark:
    """The measurements, in the order of their importance.

    Args:
        record: Where figures go.
        device: What is measured; a CPU to try the program.
        family: Our models; the first is compared with others.
        batch_sizes: Images at a time in inference and in training; halved where memory does not suffice.
        rounds: Times that each model of a group is taken.
        images: Source of images; default: synthetic photographs.
        num_classes: Outputs of all models; default: their own.
    """

    record: Record
    device: torch.device
    family: tuple[str, ...] = FAMILY
    batch_sizes: tuple[int, int] = BATCH_SIZES
    rounds: int = 7
    images: str | None = None
    num_classes: int | None = None

    def __post_init__(self):
        self.ceiling = None  # FLOP/s
        self.supply_seconds = 60 * self.record.minutes * SUPPLY_SHARE  # of each
        self.reserved_seconds = SUPPLIES * self.supply_seconds
        self._longest: dict[tuple[str, bool], float] = {}  # first call of a mode, with or without compilation
        self._batches: dict[tuple, dict[str, torch.Tensor]] = {}
        self._rows: dict[int, datasets.Dataset] = {}  # by number of classes

    def run(self) -> None:
        """Measures everything that fits into the time."""
        first, *others = self.family
        with self.record.attempt("fastest matrix product"):
            self.ceiling = matmul_ceiling(self.device, getattr(torch, PRECISION))
            self.record.environment["matmul_flops_per_second"] = self.ceiling
            self.record.say(f"fastest matrix product in {PRECISION}: {self.ceiling / 1e12:.2f} TFLOP/s")
        with torch._dynamo.config.patch(automatic_dynamic_shapes=False):  # another batch size gets a static graph too
            for mode in ("inference", "training"):
                self.compare(mode, contestants(mode, first))
            self.first_limit()
            for name in others:
                for mode in ("inference", "training"):
                    self.compare(mode, own_contestants(name))
        self.print_utilization()
        left_out = "".join(f"\n  {text}" for text in self.record.left_out) or " nothing"
        print(f"\nleft out:{left_out}", flush=True)

    def compare(self, mode: str, specifications: list[str]) -> None:
        """Times models in turn; once memory did not suffice for one, those after it begin with its batch size."""
        batch_size, calls, rows = self.batch_sizes[mode == "training"], {}, {}
        for text in specifications:
            what = f"{mode} {text}"
            if self.record.has_time(what, self._estimate(mode, text), self.reserved_seconds):
                with self.record.attempt(what):
                    calls[text], rows[text] = self._prepared(mode, text, batch_size)
                    batch_size = rows[text]["batch_size"]
        seconds = self._take_turns(mode, calls)
        calls.clear()
        torch._dynamo.reset()  # graphs of the same code are limited in number
        self._free_memory()
        if not seconds:
            return
        reference = next(iter(seconds))
        measured = [
            self._with_speed(rows[text], seconds[text], rows[reference], seconds[reference]) for text in seconds
        ]
        for row in measured:
            self.record.add(row)
        print(f"\n{mode}, {self.device}\n{table(measured, SPEED_COLUMNS)}\n", flush=True)

    def first_limit(self) -> None:
        """Measures how fast images come, and says what limits a training run."""
        record, rates, self.reserved_seconds = self.record, {}, 0.0
        best = [row for row in record.rows if row["mode"] == "training" and row["model"].startswith(self.family[0])]
        if best:
            rates[DEVICE_STEP] = max(row["images_per_second"] for row in best)
        with record.attempt("loaders and decoders"):
            loader = self._loader(self.family[0], self.batch_sizes[1])
            for name, measure in image_supplies(loader, self.device, self.supply_seconds):
                if record.has_time(name, self.supply_seconds):
                    with record.attempt(name):
                        rates[name] = measure()
                        record.add({"mode": "supply", "model": name, "images_per_second": rates[name]})
                        record.say(f"{name}: {rates[name]:,.0f} images a second")
        if rates:
            rows = [{"model": name, "images_per_second": rate} for name, rate in rates.items()]
            print(
                f"\nthe whole step, {self.device}\n{table(rows, SUPPLY_COLUMNS)}\n{limit_sentence(rates)}\n",
                flush=True,
            )

    def print_utilization(self) -> None:
        """The faster of eager and compiled for each of our models, with its share of the fastest matrix product."""
        for mode in ("inference", "training"):
            rows = []
            for name in self.family:
                found = [
                    row for row in self.record.rows if row["mode"] == mode and row["model"] in own_contestants(name)
                ]
                if found and self.ceiling:
                    rows.append(max(found, key=lambda row: row["images_per_second"]))
            if rows:
                print(f"\nshare of the fastest matrix product, {mode}\n{table(rows, UTILIZATION_COLUMNS)}", flush=True)

    def _estimate(self, mode: str, text: str) -> float:
        """Seconds until a model is measured, from what those like it took."""
        compiles = bool(BenchmarkModel.parse(text).options & COMPILING)
        if (mode, compiles) in self._longest:
            return MARGIN * self._longest[mode, compiles]
        return FIRST_ESTIMATES[mode] if compiles else EAGER_ESTIMATE

    def _prepared(self, mode: str, text: str, batch_size: int) -> tuple[Callable[[], object], dict[str, object]]:
        """The call that is timed, and what is known of it; with half the images where memory does not suffice."""
        while True:
            try:
                return self._first_calls(mode, text, batch_size)
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise
            self._free_memory()  # here, where the error no longer holds what was allocated
            self.record.say(f"{mode} {text}: no memory for {batch_size} images at a time, trying {batch_size // 2}")
            batch_size //= 2

    def _first_calls(self, mode: str, text: str, batch_size: int) -> tuple[Callable[[], object], dict[str, object]]:
        model, setting = BenchmarkModel.parse(text), Setting(self.device, batch_size, self.num_classes)
        compiles = bool(model.options & COMPILING)
        parameters, flops = count_size(model, self.num_classes)
        batch = self._batch(text, batch_size) if mode == "training" else None
        before = memory_now(self.device)
        call = inference_call(model, setting) if batch is None else training_call(model, setting, repeat(batch))
        first = time_call(call, self.device)
        self._longest[mode, compiles] = max(first, self._longest.get((mode, compiles), 0.0))
        time_call(call, self.device, 2)
        row = {"mode": mode, "model": text, "batch_size": batch_size, "parameters": parameters, "gflops": flops / 1e9}
        row |= {"first_call_seconds": first, "compiles": compiles, "peak_bytes": peak_memory(self.device, before)}
        self.record.say(f"{mode} {text}: first call{', with compilation,' if compiles else ''} in {first:.1f} s")
        return call, row

    def _take_turns(self, mode: str, calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of each call, by model; without those that failed."""
        seconds, repeats = {text: [] for text in calls}, {}
        for _ in range(self.rounds):
            for text in list(seconds):
                with self.record.attempt(f"{mode} {text}"):
                    if text not in repeats:
                        repeats[text] = max(1, round(SECONDS_OF_A_TURN / time_call(calls[text], self.device)))
                    seconds[text].append(time_call(calls[text], self.device, repeats[text]))
                    continue
                del seconds[text]
        return seconds

    def _with_speed(
        self, row: dict, seconds: list[float], reference: dict, reference_seconds: list[float]
    ) -> dict[str, object]:
        """A row with its figures; the ratio is that of images a second, also where batch sizes differ."""
        images = row["batch_size"]
        scaled = [images / reference["batch_size"] * value for value in reference_seconds]
        peak = row.pop("peak_bytes")
        row = row | relative_speed(Times(seconds, peak), Times(scaled), images)
        if self.device.type == "cpu":  # the peak of the process, which all models share
            del row["peak_megabytes"]
        if self.ceiling:
            flops = 1e9 * row["gflops"] * (1 if row["mode"] == "inference" else TRAINING_FLOPS)
            row["ceiling_share"] = flops * row["images_per_second"] / self.ceiling
        return row

    def _loader(self, text: str, batch_size: int):
        """Our loader for the images of a model."""
        model = BenchmarkModel.parse(text)
        num_classes = model.num_classes(self.num_classes)
        if num_classes not in self._rows:
            self._rows[num_classes] = image_rows(self.images, num_classes, max(SYNTHETIC_IMAGES, *self.batch_sizes))
        rows = self._rows[num_classes]
        if len(rows) < batch_size:
            raise ValueError(
                f"{self.images} has {len(rows)} images, fewer than a batch of {batch_size} (--batch_sizes)"
            )
        torch.manual_seed(0)
        return token_label_loader(rows, batch_size, model.image_size(), model.grid_size(), has_maps=True)

    def _batch(self, text: str, batch_size: int) -> dict[str, torch.Tensor]:
        """A batch on the device, kept for models with the same images."""
        model = BenchmarkModel.parse(text)
        key = (batch_size, model.image_size(), model.grid_size(), model.num_classes(self.num_classes))
        if key not in self._batches:
            self._batches[key] = device_batch(self._loader(text, batch_size), self.device)
        return self._batches[key]

    def _free_memory(self) -> None:
        gc.collect()
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()


def own_contestants(name: str) -> list[str]:
    """One of our models, eager and compiled."""
    return [f"{name}+{PRECISION}", f"{name}+{PRECISION}+compiled"]


def contestants(mode: str, name: str) -> list[str]:
    """The authors' rendering of a model first, with which the others are compared; ours; and one of timm with the same images."""
    height, width = BenchmarkModel.parse(name).image_size()
    others = [f"original/{name}+{PRECISION}", *own_contestants(name)]
    others += [f"{name}+{PRECISION}+deployed"] if mode == "inference" else []
    if height == width:
        competitor = COMPETITOR if height == COMPETITOR_SIDE else f"{COMPETITOR}@{height}"
        others += own_contestants(competitor)
    return others


def limit_sentence(rates: dict[str, float]) -> str:
    """What limits a training run, from images a second of the device's step and of what supplies it, by name."""
    chain = {name: rate for name, rate in rates.items() if name in (DEVICE_STEP, COPY) or name.startswith(LOADER)}
    if DEVICE_STEP not in chain or len(chain) < 2:
        return "The first limit is unknown: the device's step or what supplies it was not measured."
    best_loader = max((name for name in chain if name.startswith(LOADER)), key=chain.get, default=None)
    chain = {name: rate for name, rate in chain.items() if name in (DEVICE_STEP, COPY, best_loader)}
    first = min(chain, key=chain.get)
    sentence = (
        f"The first limit is the {first}: {chain[first]:,.0f} images a second; "
        f"with it the device would be busy {min(1.0, chain[first] / chain[DEVICE_STEP]):.0%} of the time."
    )
    decoders = [name for name in rates if name not in (DEVICE_STEP, COPY) and not name.startswith(LOADER)]
    if decoders and best_loader:
        fastest = max(decoders, key=rates.get)
        sentence += (
            f" The fastest decoder is {fastest}: {rates[fastest]:,.0f} images a second, "
            f"{rates[fastest] / rates[best_loader]:.1f} times the {best_loader}."
        )
    return sentence
