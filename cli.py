"""The command line: `python cli.py COMMAND …`, or `main([COMMAND, …])` from Python."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
import traceback

from common.errors import UserError

TRAINER_COMMANDS = {
    "fit": "train (distil) as a configuration says; --ckpt_path last resumes",
    "validate": "measure a checkpoint on the validation captions",
    "test": "measure a checkpoint on the test captions",
    "predict": "draw the pictures of the prediction captions",
}
# A tool command is a module with add_arguments(parser) and run(namespace), and one line here. Those that
# measure or draw reports live in callbacks/commands, the others in lightning_modules/commands. A command with
# configuration files has parse(args, prog=, description=) in place of add_arguments.
TOOL_COMMANDS = {
    "generate": "one-step images from a checkpoint or a pipeline folder",
    "evaluate": "measure a model, or existing pictures, as publications do",
    "export": "write a student as a complete diffusers pipeline folder",
    "encode-prompts": "a cache of text embeddings, for training without text encoders",
    "consolidate": "one .ckpt file from a checkpoint in shards",
    "merge": "interpolate the weights of two students, and measure a grid of mixtures",
    "sweep": "a search over any config keys, resumable and parallel",
    "compare": "runs side by side: metrics, curves, differences, sample grids",
    "app": "a local page to try a student beside its teacher",
}
TOOL_MODULES = {
    "generate": "commands.generate",
    "evaluate": "commands.evaluate",
    "export": "commands.export",
    "encode-prompts": "commands.encode_prompts",
    "consolidate": "commands.consolidate",
    "merge": "commands.merge",
    "sweep": "commands.sweep",
    "compare": "commands.compare",
    "app": "commands.app",
}


def usage() -> str:
    """Return the list of all commands."""
    helps = {**TRAINER_COMMANDS, **TOOL_COMMANDS}
    lines = [f"  {name:<15} {text}" for name, text in helps.items()]
    return "\n".join([
        "usage: python cli.py COMMAND [options]", "",
        "One-step distillation of text-to-image diffusion models.", "", "commands:", *lines, "",
        "python cli.py COMMAND --help lists the options of a command.",
        "--debug with any command shows the traceback of an error.",
    ])  # fmt: skip


def run_command(args: list[str]) -> None:
    """Run one command line.

    Raises:
        UserError: anything the user can mend.
        SystemExit: after `--help`, or when the run was interrupted.
    """
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        raise SystemExit(0 if args else 2)
    command = args[0]
    if command in TOOL_COMMANDS:
        module = importlib.import_module(TOOL_MODULES[command])
        program, description = f"cli.py {command}", TOOL_COMMANDS[command]
        if hasattr(module, "parse"):
            module.run(module.parse(args[1:], prog=program, description=description))
        else:
            parser = argparse.ArgumentParser(prog=program, description=description)
            module.add_arguments(parser)
            module.run(parser.parse_args(args[1:]))
    elif command in TRAINER_COMMANDS:
        # here, because it imports torch and Lightning: seconds that --help need not take
        from commands.fit import TrainerCLI

        TrainerCLI(args)
    else:
        names = [*TRAINER_COMMANDS, *TOOL_COMMANDS]
        close = difflib.get_close_matches(command, names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the commands are {', '.join(names)}"
        raise UserError(f"unknown command {command!r}; {hint}")


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
