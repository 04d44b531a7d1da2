"""`app`: a page on this computer to try a student beside its teacher."""

import importlib
import os
from dataclasses import dataclass
from types import ModuleType

from commands.generate import DEFAULT_MODEL
from commands.options import Port
from common.errors import UserError

HOST = "127.0.0.1"  # nobody else on the network gets in


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `app`.

    Args:
        model: the student: a run folder, best, last, a .ckpt file or a model's folder
        teacher: a model's folder (the one the student was distilled from if left out)
        port: where the page is on this computer
    """

    model: str = DEFAULT_MODEL
    teacher: str | None = None
    port: Port = 7860


def run(options: Options) -> None:
    """Load the models and serve the page until Ctrl+C.

    Raises:
        UserError: Gradio is not installed, a model can't be loaded, or the port is taken.
    """
    gradio = import_gradio()
    # here, because they import torch: seconds that --help need not take
    from commands.app_page import LAUNCH, build_page
    from commands.app_pictures import SideBySide, local_students

    models = SideBySide(options.model, options.teacher)
    choices = dict.fromkeys([options.model, DEFAULT_MODEL, *local_students()])
    page = build_page(gradio, models, list(choices))
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
