"""Publishes models and label sets on the Hugging Face Hub.

    lvvit publish runs/mine OWNER/NAME
    lvvit publish --variant lvvit_s_224 --checkpoint lvvit_s-26M-224-83.3.pth.tar --hub_model_id OWNER/NAME

The second converts a checkpoint of the authors' code to a complete repository: weights as safetensors, configuration, modelling code,
image processor and card. The first uploads a folder that was written here, or repeats an upload that broke off: large files that had
arrived are not sent again.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from transformers.hf_argparser import HfArg

from .console import program
from .hub.folders import publish_model_folder
from .hub.repository import HubTarget, HubTargetArguments
from .labels.publishing import check_finished, push_label_set
from .labels.writer import RECORD
from .options import Program
from .original.convert import convert_checkpoint
from .variants import SEGMENTERS, VARIANTS


RELEASED = [name for name, row in (*VARIANTS.items(), *SEGMENTERS.items()) if row.checkpoint is not None]


@dataclass
class PublishArguments(HubTargetArguments):
    """Options of the program."""

    option_groups: ClassVar[dict[str, str]] = {"folder": "what to publish", "hub_model_id": "where"}

    folder: str | None = HfArg(default=None, help="A finished model, exported model or label set.")
    variant: str | None = HfArg(default=None, help=f"Instead, the row whose weights these are: {', '.join(RELEASED)}.")
    checkpoint: str | None = HfArg(default=None, help="Authors' .pth or .pth.tar file of that row.")
    output_dir: str | None = HfArg(default=None, help="Folder to write it to; default: the name of the row.")
    ema: bool = HfArg(default=True, help="Take the averaged weights of the file where it has them, not the raw ones.")

    def __post_init__(self):
        if (self.folder is None) == (self.checkpoint is None) or (self.variant is None) != (self.checkpoint is None):
            raise ValueError("Give `variant` and `checkpoint`, or `folder`.")
        if self.variant is not None and self.variant not in RELEASED:
            raise ValueError(f"`variant` must be one of {', '.join(RELEASED)}, got {self.variant}.")
        if self.folder is not None and (self.output_dir is not None or not self.ema):
            raise ValueError("`output_dir` and `no_ema` belong to `checkpoint`.")


PROGRAM = Program(
    "lvvit publish", __doc__, (PublishArguments,), ("folder", "hub_model_id"), required=("hub_model_id",)
)


def publish_folder(folder: Path, target: HubTarget) -> str:
    """Uploads a finished model or label set, see `publish_model_folder`."""
    if target.repo_type != "dataset":
        return publish_model_folder(folder, target)
    check_finished(folder)
    return push_label_set(folder, target.open())


def publish(args: PublishArguments) -> str:
    """Does what the options say; returns the address of the commit."""
    folder = Path(args.folder or args.output_dir or args.variant).expanduser()
    repo_type = "dataset" if args.folder is not None and (folder / RECORD).is_file() else "model"
    if args.checkpoint is not None:
        difference = convert_checkpoint(Path(args.checkpoint), folder, args.ema, released_row=args.variant)
        text = f"{args.variant} -> {folder}, largest logits difference to the original tensors {difference:.2e}"
        print(text, flush=True)
    return publish_folder(folder, HubTarget(args.hub_model_id, repo_type, args.hub_private_repo, args.hub_revision))


@program(PROGRAM.name)
def main(arguments: list[str]) -> None:
    with PROGRAM.refusals():
        (args,) = PROGRAM.parse(arguments)
        try:
            print(f"published: {publish(args)}")
        except FileExistsError as error:
            raise ValueError(f"{error} Or upload what is there with `folder`.") from error


if __name__ == "__main__":
    main(sys.argv[1:])
