"""`app`: a page on this computer to try a student beside its teacher."""

import argparse
import importlib
import os
from types import ModuleType

from commands.app_page import LAUNCH, build_page
from commands.app_pictures import SideBySide
from commands.generate import DEFAULT_MODEL
from common.errors import UserError

HOST = "127.0.0.1"  # nobody else on the network gets in


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `app`."""
    add = parser.add_argument
    add(
        "--model",
        default=DEFAULT_MODEL,
        help="the student: a .ckpt file or a Stable Diffusion folder (default: %(default)s)",
    )
    add("--teacher", help="a Stable Diffusion folder (default: the one the student was distilled from)")
    add("--port", type=int, default=7860, help="where the page is on this computer (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    """Load the models and serve the page until Ctrl+C.

    Raises:
        UserError: Gradio is not installed, a model can't be loaded, or the port is out of range or taken.
    """
    if not 1 <= options.port <= 65535:
        raise UserError(f"--port {options.port} is not a port. Give a number from 1 to 65535, such as 7860.")
    gradio = import_gradio()
    page = build_page(gradio, SideBySide(options.model, options.teacher))
    try:
        page.launch(server_name=HOST, server_port=options.port, **LAUNCH)
    except OSError as error:
        raise UserError(
            f"Port {options.port} of this computer is taken. End what uses it, or give another --port."
        ) from error
    print(f"The page is at http://{HOST}:{options.port} (this computer only); Ctrl+C ends it.", flush=True)
    page.block_thread()


def import_gradio() -> ModuleType:
    """Gradio, told not to report its use to anybody.

    Raises:
        UserError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported, and later
    try:
        return importlib.import_module("gradio")
    except ModuleNotFoundError as error:
        raise UserError('The page needs Gradio, which is not installed: pip install -e ".[app]"') from error
