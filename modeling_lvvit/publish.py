"""Publishes models and label sets on the Hugging Face Hub.

    python -m modeling_lvvit.publish --variant lvvit_s_224 --checkpoint lvvit_s-26M-224-83.3.pth.tar --repo_id OWNER/NAME
    python -m modeling_lvvit.publish --folder runs/mine --repo_id OWNER/NAME

The first converts a checkpoint of the authors' code to a complete repository: weights as safetensors, configuration, modelling code,
image processor and card. The second uploads a folder that was written here, or repeats an upload that broke off: large files that had
arrived are not sent again.
"""

import argparse
from pathlib import Path

from .console import program
from .hub.folders import add_target_options, publish_model_folder
from .hub.repository import HubTarget
from .labels.publishing import check_finished, push_label_set
from .labels.writer import RECORD
from .original.convert import convert_checkpoint
from .variants import SEGMENTERS, VARIANTS


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options of the program; ends it if they do not fit each other."""
    parser = argparse.ArgumentParser(
        prog="modeling_lvvit.publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    released = [name for name, row in (*VARIANTS.items(), *SEGMENTERS.items()) if row.checkpoint is not None]
    rows = f"whose weights these are: {', '.join(released)}"
    parser.add_argument("--variant", choices=released, metavar="ROW", help=rows)
    parser.add_argument("--checkpoint", type=Path, help="authors' .pth or .pth.tar file")
    parser.add_argument("--output_dir", type=Path, help="folder to write; default: the name of the row")
    raw = "take the raw weights where the file also has averaged ones"
    parser.add_argument("--no_ema", action="store_true", help=raw)
    parser.add_argument("--folder", type=Path, help="instead, a finished model, exported model or label set")
    parser.add_argument("--repo_id", required=True, metavar="OWNER/NAME", help="repository; made if there is none")
    add_target_options(parser)
    args = parser.parse_args(arguments)
    if (args.folder is None) == (args.checkpoint is None) or (args.variant is None) != (args.checkpoint is None):
        parser.error("give --variant and --checkpoint, or --folder")
    if args.folder is not None and (args.output_dir is not None or args.no_ema):
        parser.error("--output_dir and --no_ema belong to --checkpoint")
    return args


def publish_folder(folder: Path, target: HubTarget) -> str:
    """Uploads a finished model or label set, see `publish_model_folder`."""
    if target.repo_type != "dataset":
        return publish_model_folder(folder, target)
    check_finished(folder)
    return push_label_set(folder, target.open())


def publish(args: argparse.Namespace) -> str:
    """Does what the options say; returns the address of the commit."""
    folder = (args.folder or args.output_dir or Path(args.variant)).expanduser()
    repo_type = "dataset" if args.folder is not None and (folder / RECORD).is_file() else "model"
    if args.checkpoint is not None:
        difference = convert_checkpoint(args.checkpoint, folder, not args.no_ema, released_row=args.variant)
        text = f"{args.variant} -> {folder}, largest logits difference to the original tensors {difference:.2e}"
        print(text, flush=True)
    return publish_folder(folder, HubTarget(args.repo_id, repo_type, args.private, args.revision))


@program("modeling_lvvit.publish")
def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    try:
        print(f"published: {publish(args)}")
    except FileExistsError as error:
        raise SystemExit(f"modeling_lvvit.publish: {error} Or upload what is there with --folder.") from error
    except (ValueError, OSError) as error:
        raise SystemExit(f"modeling_lvvit.publish: {error}") from error


if __name__ == "__main__":
    main()
