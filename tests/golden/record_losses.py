"""Records the losses of `test_golden_losses.py`: `PYTHONPATH=.:tests python tests/golden/record_losses.py`, about half a minute.

To be run again only where a change is meant to move the losses; the commit says which one, and why.
"""

import json
import tempfile
from pathlib import Path

from support.recorded_runs import GOLDEN, RUNS, run_folder, versions


def main() -> None:
    """Writes `losses.json`."""
    losses = {}
    for name, run in RUNS.items():
        with tempfile.TemporaryDirectory() as folder, run_folder(Path(folder)):
            losses[name] = run.losses()
    text = json.dumps({"losses": losses, "versions": versions()}, indent=1)
    (GOLDEN / "losses.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
