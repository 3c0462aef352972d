"""The programs that faults befall: how each is started and continued, what it has made so far, and what must be there in the end."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from modeling_lvvit.data.files.digests import DIGESTS, read_digests
from modeling_lvvit.data.files.folder_lock import UNFINISHED
from support.local_hub import LocalHub
from support.programs import TINY


NEAR = 1e-4  # of weights that other numbers of processes have computed
SHAPE = {
    "neck_channels": 16,
    "decoder_channels": 8,
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
}
SHAPE |= {"intermediate_size": 48, "stem_hidden_size": 8, "patch_size": 8}


def option_words(options: dict[str, object]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", *str(value).split("|"))]


def names_in(folder: Path) -> set[str]:
    """Of all files but locks, and checkpoints."""
    return {path.name for path in folder.iterdir() if not path.name.startswith((".lock", "checkpoint-"))}


class Subject:
    """A program with its command.

    Attributes:
        parts: That a run makes: checkpoints, shards, requests.
        pause: Seconds, of the order of the time between two parts.
    """

    name: str
    parts: int
    pause: float
    runs_anywhere = True  # by any number of processes

    def __init__(self, folder: Path):
        """`folder` has the data, and gets the undisturbed run."""
        self.data, self.reference = folder, folder / f"reference {self.name}"

    def prepare(self, output: Path) -> None:
        """What a user has before the run."""

    def words(self, output: Path, processes: int = 1) -> list[str]:
        """The command of a new run."""
        raise NotImplementedError

    def words_free(self, rng: np.random.Generator) -> list[str]:
        """Options that may be others at each start; drawn."""
        return []

    def words_again(self) -> list[str]:
        """What is added to continue it."""
        return []

    def words_anew(self) -> list[str]:
        """What is added where nothing of it can be continued, as its message says."""
        return []

    def progress(self, output: Path) -> int:
        """Parts that are there."""
        raise NotImplementedError

    def damageable(self, output: Path) -> list[Path]:
        """Files of which one is damaged: those of the newest whole part, or all."""
        raise NotImplementedError

    def check_noticed(self, path: Path, said: str) -> None:
        """Raises an `AssertionError` unless the program, which went on, named the damaged file. A list of digests that reads the same with
        another byte is no damage."""
        assert path.name in said or path.name == DIGESTS, f"a line should name {path}"

    def check_equal(self, output: Path, is_near: bool) -> None:
        """Raises an `AssertionError` unless all is as in the undisturbed run; weights may only be near to those."""
        raise NotImplementedError


class Training(Subject):
    """A run with 12 checkpoints, of which three are kept."""

    parts, pause = 12, 0.3
    steps: int
    options: dict[str, object]

    def words(self, output: Path, processes: int = 1) -> list[str]:
        options = {
            "output_dir": output, "max_steps": self.steps, "save_strategy": "steps", "save_steps": self.steps // self.parts,
            "save_total_limit": 3, "save_picture": "false", "report_to": "none", "disable_tqdm": "true", "use_cpu": "true",
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2 // processes, "batch_norm": "frozen", **self.options,
        }  # fmt: skip
        return option_words(options)

    def words_free(self, rng: np.random.Generator) -> list[str]:
        workers = int(rng.choice([0, 0, 1, 2]))
        persistent = "true" if workers and rng.random() < 0.5 else "false"
        return option_words({"dataloader_num_workers": workers, "dataloader_persistent_workers": persistent})

    def words_again(self) -> list[str]:
        return ["--resume_from_checkpoint", "last"]

    def words_anew(self) -> list[str]:
        return ["--overwrite_output_dir", "true"]

    def progress(self, output: Path) -> int:
        steps = [int(path.name.rpartition("-")[2]) for path in output.glob("checkpoint-*")]
        return max(steps, default=0) * self.parts // self.steps

    def damageable(self, output: Path) -> list[Path]:
        folders = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        while not (folders[-1] / DIGESTS).exists():
            shutil.rmtree(
                folders.pop()
            )  # a save that broke off: by chance it is whole, and the one before is not looked at
        return [path for path in folders[-1].rglob("*") if path.is_file()]

    def check_noticed(self, path: Path, said: str) -> None:
        super().check_noticed(path, said)
        assert path.name == DIGESTS or f"Passed over: {path.parent}" in said, f"{path.parent} should be passed over"

    def check_equal(self, output: Path, is_near: bool) -> None:
        last = f"checkpoint-{self.steps}"
        weights = [path.relative_to(self.reference) for path in self.reference.glob("*.safetensors")]
        weights += [path.relative_to(self.reference) for path in self.reference.glob(f"{last}/*.safetensors")]
        for name in weights:
            first, second = (folder / name for folder in (self.reference, output))
            if is_near:
                there, here = load_file(first), load_file(second)
                assert there.keys() == here.keys()
                differing = max(float(np.abs(there[key] - here[key]).max()) for key in there)
                assert differing < NEAR, f"{name} differs by {differing}"
            else:
                assert first.read_bytes() == second.read_bytes(), f"{name} differs"
        assert json.loads((output / "trainer_state.json").read_text())["global_step"] == self.steps
        for part in (".",) if is_near else (".", last):  # each process has a random state of its own
            differing = names_in(output / part) ^ names_in(self.reference / part)
            assert not differing, f"there or not there: {sorted(differing)}"
        hidden = [path for path in output.rglob(".*") if UNFINISHED.fullmatch(path.name)]
        unfinished = [*output.rglob("*.partial"), *hidden]
        assert unfinished == [], f"half written: {unfinished}"


class Classification(Training):
    """`lvvit train`."""

    name, steps = "train", 24

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.options = {
            "dataset_name": folder / "classes",
            "image_size": 32,
            "config_overrides": TINY,
            "ema_decay": 0.9,
        }


class Segmentation(Training):
    """`lvvit segment`."""

    name, steps = "segment", 12

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.options = {"dataset_name": folder / "masks", "image_size": "32|48", "config_overrides": json.dumps(SHAPE)}
        self.options |= {"learning_rate": 0.001}


class Annotation(Subject):
    """`lvvit annotate`: 22 shards."""

    name, parts, pause = "annotate", 22, 0.02

    def words(self, output: Path, processes: int = 1) -> list[str]:
        images, annotator = self.data / "images", self.data / "annotator"
        options = {"dataset_name": images, "annotator": annotator, "output_dir": output}
        return option_words({**options, "top_k": 2, "rows_per_shard": 2})

    def words_free(self, rng: np.random.Generator) -> list[str]:
        return option_words({"num_workers": rng.integers(3)})

    def progress(self, output: Path) -> int:
        return len(list(output.glob("data/*.parquet")))

    def damageable(self, output: Path) -> list[Path]:
        return [path for path in output.rglob("*") if path.is_file() and not path.name.startswith(".")]

    def check_noticed(self, path: Path, said: str) -> None:
        if path.suffix == ".parquet":  # the other files are written again in any case
            assert f"{path} is damaged" in said, f"a line should say that {path} is damaged"

    def check_equal(self, output: Path, is_near: bool) -> None:
        contents = [
            {
                str(path.relative_to(folder)): path.read_bytes()
                for path in folder.rglob("*")
                if path.is_file() and not path.name.startswith(".lock")
            }
            for folder in (self.reference, output)
        ]
        names = contents[0].keys() | contents[1].keys()
        differing = sorted(name for name in names if contents[0].get(name) != contents[1].get(name))
        assert not differing, f"differing: {differing}"


class Publishing(Subject):
    """`lvvit publish` of a trained model or of a label set, which the other programs have made."""

    name, pause = "publish", 0.02
    runs_anywhere = False

    def __init__(self, folder: Path, hub: LocalHub, kind: str):
        super().__init__(folder)
        self.hub, self.kind = hub, kind
        self.source = folder / ("reference train" if kind == "model" else "reference annotate")
        self.reference, self.begin = folder / f"reference-{kind}", 0
        self.requests = 0
        answer = hub.answer

        def counted(*arguments):
            self.requests += 1
            return answer(*arguments)

        hub.answer = counted
        self.parts = 0  # requests of an upload, set by the undisturbed one

    def prepare(self, output: Path) -> None:
        shutil.copytree(self.source, output, ignore=shutil.ignore_patterns("checkpoint-*"))
        self.begin = self.requests

    def repository(self, output: Path) -> str:
        return f"user/{output.name}"

    def words(self, output: Path, processes: int = 1) -> list[str]:
        return [str(output), self.repository(output)]

    def progress(self, output: Path) -> int:
        return self.requests - self.begin

    def damageable(self, output: Path) -> list[Path]:
        return [output / name for name in (*read_digests(output), DIGESTS)]

    def uploads(self, output: Path) -> list[dict[str, bytes]]:
        """The files of each commit, as if the repository had the name of the undisturbed one."""
        name, repository = self.repository(output), (f"{self.kind}s", self.repository(output))
        commits = self.hub.history(name, self.kind) if repository in self.hub._repositories else []
        other = self.repository(self.reference).encode()
        return [
            {path: file.content.replace(name.encode(), other) for path, file in commit.files.items()}
            for commit in commits
        ]

    def check_atomic(self, output: Path) -> bool:
        """Raises an `AssertionError` if a commit has some of the files; returns whether one has all of them."""
        whole = self.hub.files(self.repository(self.reference), self.kind)
        uploads = self.uploads(output)
        for files in uploads:
            assert not files or files == whole, f"half a commit: {sorted(files)}"
        return bool(uploads) and uploads[-1] == whole

    def check_equal(self, output: Path, is_near: bool) -> None:
        assert self.check_atomic(output), "nothing was published"
