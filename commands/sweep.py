"""`sweep`: a search over any config keys, resumable and parallel."""

import argparse
from pathlib import Path

from common.errors import UserError

_EPILOG = """\
A sweep's YAML names base (a config of fit, or several), space (config keys with grid, choices, range,
log_range, int_range or int_log_range), metric, direction and trials; optional are overrides, pruning,
sampler, seed, name, root, storage and launcher. docs/sweeps.md describes them all.

Every trial is an ordinary fit that leaves a run folder under runs/<name>/. Ctrl-C (or a crash) loses nothing:
the same command goes on. The same command on other machines that see the same storage shares the work.
Exit status: 0 if all trials came to an end, 1 if some failed, 2 for a mistake in the settings.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sweep`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("--config", required=True, type=Path, help="the sweep's YAML, see configs/sweep/")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="trials at once on this machine; they share its cores and GPUs (default: 1)",
    )


def run(options: argparse.Namespace) -> None:
    """Run or continue a sweep, then print the ranked table and where the results lie.

    Raises:
        UserError: a mistake in the settings, found before the first trial; Optuna is not installed; no trial
            has the metric.
        SystemExit: with status 1 if a trial failed.
    """
    from commands.sweeping.settings import read_settings
    from commands.sweeping.study import TrialBook, import_optuna

    if options.workers < 1:
        raise UserError(f"--workers is {options.workers}; it must be at least 1")
    import_optuna()
    settings = read_settings(options.config)
    # here, because they import torch and Lightning: seconds that a mistake in the YAML need not take
    from commands.sweeping.check import check_keys
    from commands.sweeping.driver import Driver
    from commands.sweeping.results import text_table, write_results
    from commands.sweeping.trial_process import threads_per_worker, visible_gpus

    print(f"Trying the {len(settings.space.dimensions)} search keys on the parser of fit …", flush=True)
    check_keys(settings)
    book = TrialBook.open(settings)
    before = sum(trial.state.is_finished() for trial in book.live().values())
    print(
        f"Sweep {settings.name}: {settings.trials} trials, {before} of them done; "
        f"{options.workers} at once with {threads_per_worker(options.workers)} threads each",
        flush=True,
    )
    driver = Driver(
        settings, book, options.workers, on_change=lambda: write_results(book), gpus=visible_gpus()
    )
    try:
        driver.run()
    finally:
        content = write_results(book)
    print(f"\n{text_table(content)}\n\nSweep: {settings.folder / 'sweep.html'}")
    if content["best_config"]:
        print(f"Best configuration: {content['best_config']}")
    if failed := content["counts"]["failed"]:
        print(f"{failed} trials failed; their errors are in {settings.folder / 'sweep.html'}", flush=True)
        raise SystemExit(1)
