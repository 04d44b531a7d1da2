"""The command line: `python cli.py COMMAND …`, or `main([COMMAND, …])` from Python."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
import traceback
from pathlib import Path

from common.errors import UserError
from common.files import at_home

TRAINER = "commands.fit"
COMMANDS = {
    "fit": (TRAINER, "train (distil) as a configuration says; --ckpt_path last resumes"),
    "validate": (TRAINER, "measure a checkpoint on the validation captions"),
    "test": (TRAINER, "measure a checkpoint on the test captions"),
    "predict": (TRAINER, "draw the pictures of the prediction captions"),
    "generate": ("commands.generate", "pictures by a student or a pipeline folder, in one step or a few"),
    "evaluate": ("commands.evaluate", "measure a model, or existing pictures, as publications do"),
    "export": ("commands.export", "write a student as a complete diffusers pipeline folder"),
    "encode-prompts": (
        "commands.encode_prompts",
        "a cache of text embeddings, for training without text encoders",
    ),
    "draw-teacher": ("commands.draw_teacher", "the teacher's own samples, as real pictures of a training"),
    "consolidate": ("commands.consolidate", "one .ckpt file from a checkpoint in shards"),
    "merge": ("commands.merge", "interpolate the weights of two students, and measure a grid of mixtures"),
    "sweep": ("commands.sweep", "a search over any config keys, resumable and parallel"),
    "compare": ("commands.compare", "runs side by side: metrics, curves, differences, sample grids"),
    "app": ("commands.app", "a local page to try a student beside its teacher"),
}
"""Module and help of each command. The module has a dataclass `Options` and `run(options)`."""
SLOW = {f"commands.{name}" for name in ("evaluate", "encode_prompts", "draw_teacher", "merge")}
"""Modules that import torch, which their help does not wait for."""
OTHER_WORDS = {
    "train": "fit", "distill": "fit", "distil": "fit", "resume": "fit", "eval": "evaluate",
    "measure": "evaluate", "sample": "generate", "infer": "generate", "inference": "generate",
    "draw": "generate", "convert": "export", "push": "export", "search": "sweep", "tune": "sweep",
    "report": "compare", "demo": "app", "serve": "app",
}  # fmt: skip
"""What others call a command."""


def usage() -> str:
    """Return the list of all commands."""
    name = Path(sys.argv[0]).name
    program = name if name == "one-step-distillation" else "python cli.py"
    return "\n".join([
        f"usage: {program} COMMAND [options]", "",
        "One-step distillation of text-to-image diffusion models.", "", "commands:",
        *(f"  {name:<15} {text}" for name, (_, text) in COMMANDS.items()), "",
        f"To begin: {program} fit --config configs/quickstart.yaml; fit --help lists all configurations.",
        f"{program} COMMAND --help lists the options of a command.",
        "--debug with any command shows the traceback of an error.",
    ])  # fmt: skip


def run_command(args: list[str]) -> None:
    """Run one command line.

    Raises:
        UserError: anything the user can mend.
        SystemExit: after `--help`, or when the run was interrupted.
    """
    args = [_readable(arg) for arg in args]
    if not args or args[0] in ("-h", "--help"):
        _tell(usage())
        raise SystemExit(0 if args else 2)
    command = args[0]
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, [*COMMANDS, *OTHER_WORDS], n=1)
        known = OTHER_WORDS.get(close[0], close[0]) if close else None
        hint = f"did you mean {known!r}?" if known else f"the commands are {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {command!r}; {hint}")
    try:
        _run(command, args)
    except (OSError, RuntimeError) as error:  # of paths: nothing but a mistake of who gave them
        if getattr(error, "errno", None) in (errno.ENAMETOOLONG, errno.ELOOP) or "Symlink loop" in str(error):
            raise UserError(f"a path can't be used: {str(error)[:200]}") from error
        raise


def _run(command: str, args: list[str]) -> None:
    path, description = COMMANDS[command]
    if {"-h", "--help"} & {*args} and (path == TRAINER or path in SLOW):
        if path == TRAINER:
            told = importlib.import_module("commands.trainer_help").text(command, description)
        else:
            told = importlib.import_module("commands.option_help").text(command, path, description)
        _tell(told)
        raise SystemExit(0)
    # here, as most commands import torch: seconds that the list of commands need not take
    module = importlib.import_module(path)
    if path == TRAINER:
        module.TrainerCLI(args)
        return
    parse = importlib.import_module("commands.options").parse
    module.run(parse(module.Options, args[1:], prog=f"cli.py {command}", description=description))


def _tell(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has enough; Python's exit would try once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _readable(arg: str) -> str:
    """A word of the command line, ~ in it as the home folder, also behind an option's `=`."""
    try:
        arg.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the command line holds bytes that are no text: {arg!r}") from error
    option, mark, value = arg.partition("=") if arg.startswith("-") else ("", "", arg)
    return option + mark + at_home(value)


def main(args: list[str] | None = None) -> None:
    """Run a command.

    Args:
        args: The command line without the program's name. None: that of the process; then a UserError is
            printed as one message and the process exits with status 2. Called with a list, errors are raised.
    """
    if args is not None:
        run_command([arg for arg in args if arg != "--debug"])
        return
    debug = "--debug" in sys.argv[1:]
    try:
        run_command([arg for arg in sys.argv[1:] if arg != "--debug"])
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
