"""The command `lvvit`: all programs under one name.

lvvit                      what there is, a line and an example for each
lvvit COMMAND --help       options of one of them
lvvit completion bash      a script that completes commands and options in a shell: bash or zsh
"""

import argparse
import sys
from dataclasses import dataclass
from importlib import import_module

from .. import __version__
from ..options import OptionError, Program, with_nearest


@dataclass(frozen=True)
class Command:
    """A program of the package.

    Args:
        module: What has its `main`.
        program: Its `Program`, as `module:name`; default: `PROGRAM` of the module.
        summary: What it does, in a few words.
        example: Words after its name.
        is_launched: Whether accelerate starts it, on all accelerators of the machine.
    """

    module: str
    summary: str
    example: str
    program: str = ""
    is_launched: bool = False

    def load_program(self) -> Program:
        """Its options."""
        module, _, name = (self.program or f"{self.module}:PROGRAM").partition(":")
        return getattr(import_module(module), name)


PACKAGE = "modeling_lvvit"
COMMANDS = {
    "train": Command(
        "train_tl",
        "train a classifier, with dense labels or plain ones",
        "--dataset_name path/to/images --variant lvvit_s_224 --output_dir runs/mine",
        f"{PACKAGE}.cli.parser:TRAIN_TL",
        is_launched=True,
    ),
    "segment": Command(
        f"{PACKAGE}.segmentation.train",
        "train or evaluate a segmentation model",
        "--dataset_name path/to/data --model_name_or_path runs/mine --output_dir runs/segmenter",
        is_launched=True,
    ),
    "cache": Command(
        f"{PACKAGE}.data.reduced_copy.program",
        "write a copy of large images at a smaller size, which training reads faster",
        "path/to/images --max_side 512 --output_dir small_images",
    ),
    "annotate": Command(
        f"{PACKAGE}.cli.annotation.__main__",
        "make dense labels with any classifier",
        "path/to/images --annotator timm/dm_nfnet_f6.dm_in1k --output_dir labels",
        is_launched=True,
    ),
    "fit-annotator": Command(
        f"{PACKAGE}.annotators.fitting.program",
        "make an annotator of own classes from any pretrained network",
        "path/to/images --backbone timm/vit_small_patch14_dinov2.lvd142m --output_dir annotator",
    ),
    "check": Command(
        f"{PACKAGE}.visualization.check_labels",
        "check dense labels and draw them over their images",
        "labels path/to/images --contact_sheet labels.png",
    ),
    "evaluate": Command(
        f"{PACKAGE}.evaluate.__main__",
        "measure the accuracy of classifiers on test sets",
        "runs/mine timm/resnet50.a1_in1k --datasets path/to/images",
        is_launched=True,
    ),
    "predict": Command(
        f"{PACKAGE}.evaluate.predict",
        "write the probabilities of a folder of images to a CSV file",
        "runs/mine path/to/images",
        is_launched=True,
    ),
    "study": Command(
        f"{PACKAGE}.study.__main__",
        "compare ways of training over several seeds",
        "--quick",
    ),
    "visualize": Command(
        f"{PACKAGE}.visualization.__main__",
        "draw what classifiers look at in an image",
        "image.jpg runs/mine --output_file relevance.png",
    ),
    "demo": Command(f"{PACKAGE}.demo.__main__", "open a page to try a model on", "runs/mine"),
    "benchmark": Command(
        f"{PACKAGE}.benchmark.__main__", "measure speed and memory side by side", "inference lvvit_t_224 timm/resnet50"
    ),
    "export": Command(f"{PACKAGE}.export.__main__", "write a model as ONNX or for torch.export", "runs/mine exported"),
    "convert": Command(
        f"{PACKAGE}.original.convert",
        "convert a checkpoint of the authors' code",
        "lvvit_s-26M-224-83.3.pth.tar lvvit_s_224",
    ),
    "masks": Command(
        f"{PACKAGE}.segmentation.conversion.image_mask_folder",
        "turn folders of images and masks into segmentation data",
        "images masks --output_dir data --colors colors.json",
    ),
    "publish": Command(f"{PACKAGE}.publish", "upload a model or a label set to the Hub", "runs/mine OWNER/NAME"),
}
HIDDEN_COMMANDS = ("completion",)
SHELLS = ("bash", "zsh")
FILES = (
    "dataset_name",
    "model_name_or_path",
    "models",
    "datasets",
    "token_labels",
    "output_dir",
    "output_file",
    "image",
)


def overview() -> str:
    """A line and an example for each command."""
    width = max(map(len, COMMANDS))
    lines = [f"lvvit {__version__}: LV-ViT and token labeling", ""]
    for name, command in COMMANDS.items():
        lines += [f"  {name:{width}}  {command.summary}", f"  {'':{width}}    lvvit {name} {command.example}"]
    return "\n".join([*lines, "", "lvvit COMMAND --help lists options; lvvit train alone trains on embedded data."])


def completion(shell: str) -> str:
    """A script for a shell that completes commands and options."""
    import shtab  # for this alone

    parser = argparse.ArgumentParser(prog="lvvit")
    commands = parser.add_subparsers()
    for name, command in COMMANDS.items():
        options = command.load_program().parser(add_help=False)
        for action in options._actions:
            if action.dest in FILES:
                action.complete = shtab.FILE
        commands.add_parser(name, help=command.summary, parents=[options], formatter_class=argparse.HelpFormatter)
    return shtab.complete(parser, shell)


def run(words: list[str]) -> None:
    """Runs a command line; an `OptionError` if there is no such command."""
    name, *rest = words or ["--help"]
    if name in ("-h", "--help", "help"):
        print(overview())
    elif name == "--version":
        print(__version__)
    elif name == "completion":
        if rest not in [[shell] for shell in SHELLS]:
            raise OptionError(f"lvvit completion takes one of {', '.join(SHELLS)}.")
        print(completion(rest[0]))
    elif name not in COMMANDS:
        names = {*COMMANDS, *HIDDEN_COMMANDS}
        raise OptionError(f"there is no command {with_nearest(name, names)}. `lvvit` lists all.")
    elif COMMANDS[name].is_launched and not {"-h", "--help", "--help_all"} & set(rest):
        from .launch import launch  # not above: it takes a second

        launch(COMMANDS[name].load_program(), COMMANDS[name].module, rest)
    else:
        import_module(COMMANDS[name].module).main(rest)


def main() -> None:
    try:
        run(sys.argv[1:])
    except OptionError as error:
        sys.exit(f"lvvit: {error}")


if __name__ == "__main__":
    main()
