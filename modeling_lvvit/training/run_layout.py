"""What a run keeps on other numbers of processes: images of a step, the order of a stream, and what each micro-batch draws."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from ..data.steps import StreamOrder
from ..hub.hub_trainer import ARGUMENTS
from .checkpoints.record import read_json


class RunLayout(TrainerCallback, ExportableState):
    """What the processes that began a run have fixed for all that continue it, kept in `trainer_state.json` of its checkpoints.

    Args:
        images_per_step: Images of an optimizer step, over all processes.
        stream_order: Fields of the `StreamOrder`; `None` for stored data.
        seeds_steps: Whether random draws of the model start anew in each micro-batch, from seed, step and number of the micro-batch. Runs
            of before there was this record go on with the generators of their processes.
    """

    def __init__(self, images_per_step: int, stream_order: dict[str, int] | None = None, seeds_steps: bool = True):
        self.images_per_step, self.stream_order, self.seeds_steps = images_per_step, stream_order, seeds_steps

    def state(self) -> dict[str, Any]:
        """For `trainer_state.json`."""
        fields = {name: getattr(self, name) for name in ("images_per_step", "stream_order", "seeds_steps")}
        return {"args": fields, "attributes": {}}

    def take(self, other: "RunLayout") -> None:
        """Goes on with that of another run."""
        self.__dict__.update(other.__dict__)

    def on_train_begin(self, args, state, control, **kwargs):
        state.stateful_callbacks[type(self).__name__] = self.state()  # which a state of before lacks


def read_layout(checkpoint: Path) -> RunLayout | None:
    """That of a checkpoint; of one that has none what its arguments and the number of its random states say, `None` if they say nothing."""
    stored = read_json(checkpoint / TRAINER_STATE_NAME).get("stateful_callbacks", {}).get(RunLayout.__name__)
    if stored is not None:
        return RunLayout(**stored["args"])
    args = read_json(checkpoint / ARGUMENTS)
    batch_size, accumulation = (
        args.get(name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    if batch_size is None or accumulation is None:
        return None
    processes = max(1, len(list(checkpoint.glob("rng_state_*.pth"))))
    order = StreamOrder(processes, args.get("dataloader_num_workers") or 0, batch_size)
    return RunLayout(batch_size * accumulation * processes, order.to_dict(), seeds_steps=False)
