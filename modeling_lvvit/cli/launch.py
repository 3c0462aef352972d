"""Starts programs through accelerate: in this process where one is enough, else in as many as its options ask for."""

import os
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import torch
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from ..launching import quiet_launch, run_processes
from ..options import OptionError, Program


ACCELERATE_CONFIGS = Path(__file__).parents[1] / "accelerate_configs"


def split_options(words: list[str], program: Program) -> tuple[list[str], list[str]]:
    """The options of `accelerate launch` in a command line, and the words that are left for the program, whose options come first where both
    have one of a name."""
    launcher, names = (parser._option_string_actions for parser in (launch_command_parser(), program.parser()))
    options, left, takes_value = [], [], False
    for word in words:
        name, has_value, _ = word.partition("=")
        if takes_value or (name in launcher and name not in names):
            options.append(word)
            takes_value = not (takes_value or has_value or launcher[name].nargs == 0)
        else:
            left.append(word)
    return options, left


def launcher_arguments(options: list[str], module: str, words: list[str]) -> Namespace:
    """What `accelerate launch` makes of its options. Where neither they nor a configuration file say so: all accelerators of this machine, in
    full precision.

    Raises:
        OptionError: If it does not take an option or its value.
    """
    parser = launch_command_parser()

    def refuse(message: str) -> None:
        raise OptionError(f"accelerate launch: {message}")

    parser.error = refuse
    args = parser.parse_args([*options, "--module", module, *words])
    if args.config_file is not None and not Path(args.config_file).expanduser().is_file():
        shipped = ACCELERATE_CONFIGS / Path(args.config_file).with_suffix(".yaml").name
        if not shipped.is_file():
            names = ", ".join(sorted(path.stem for path in ACCELERATE_CONFIGS.glob("*.yaml")))
            raise OptionError(f"There is no `config_file` {args.config_file}; the package has {names}.")
        args.config_file = str(shipped)
    if args.config_file is None and (args.cpu or not Path(default_config_file).is_file()):
        accelerators = 0 if args.cpu or not torch.accelerator.is_available() else torch.accelerator.device_count()
        args.num_processes = max(1, accelerators) if args.num_processes is None else args.num_processes
        is_plain = not (args.tpu or args.use_deepspeed or args.use_fsdp or args.use_megatron_lm)
        args.multi_gpu = args.multi_gpu or (is_plain and accelerators > 1 and args.num_processes > 1)
        args.num_machines = args.num_machines or 1
        args.mixed_precision = args.mixed_precision or "no"
        args.dynamo_backend = args.dynamo_backend or "no"
    try:
        return _validate_launch_command(args)[0]
    except ValueError as error:
        raise OptionError(f"accelerate launch: {error}") from error


def launch(program: Program, module: str, words: list[str]) -> None:
    """Runs `main` of a module with the words that are its own, as `accelerate launch -m MODULE` does, without tracebacks of the launcher.

    Args:
        words: Command line, options of `accelerate launch` among them.
    """
    with program.refusals():
        options, left = split_options(words, program)
        args = launcher_arguments(options, module, left)
    is_simple = not (args.multi_gpu or args.tpu or args.use_deepspeed or args.use_fsdp or args.use_megatron_lm)
    if not args.cpu and (not is_simple or args.num_machines > 1):
        with quiet_launch():
            launch_command(args)
        return
    _, environment = prepare_simple_launcher_cmd_env(args)
    if environment["ACCELERATE_USE_CPU"] == "False" and args.num_processes == 1:
        # by this variable `set_up_cpu` knows launchers, whose 1 thread it overrides; a 1 that the user chose holds
        del environment["ACCELERATE_USE_CPU"]
        if any(word.replace("-", "_").startswith("__num_cpu_threads_per_process") for word in options):
            torch.set_num_threads(args.num_cpu_threads_per_process)  # it has read the variable already
        elif "OMP_NUM_THREADS" not in os.environ:
            del environment["OMP_NUM_THREADS"]
    os.environ.update(environment)
    if args.num_machines == 1 and args.num_processes > 1:
        with quiet_launch():
            run_processes(args.num_processes, ["--module", module], left)
    else:
        import_module(module).main(left)
