"""`compare`: several runs side by side, as one page."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError


@dataclass(frozen=True)
class Options:
    """The options of `compare`.

    Args:
        runs: run folders, folders of an experiment or a sweep (all of its runs), or patterns in quotes
        output: the HTML page to write, e.g. report.html
    """

    runs: list[str]
    output: Path = field(kw_only=True)


def run(options: Options) -> None:
    """Write the page; runs that have not ended are shown with what there is.

    Raises:
        UserError: a RUN names no run, or the output cannot be written.
        SystemExit: with status 1 if a file of a run was damaged; the page is written without it.
    """
    from common.files import write_text_atomically
    from reports.comparison import find_runs, load_runs
    from reports.comparison_page import render_comparison

    if options.output.is_dir():
        raise UserError(
            f"--output {options.output} is a folder; name a file, e.g. {options.output}/report.html"
        )
    folders = find_runs(options.runs)
    runs = load_runs(folders)
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(options.output, render_comparison(runs))
    except OSError as error:
        raise UserError(
            f"cannot write {options.output}: {error.strerror or error}; give another --output"
        ) from error
    print(f"{len(runs)} runs compared: {options.output}")
    problems = [problem for one in runs for problem in one.problems]
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    if problems:
        raise SystemExit(1)
