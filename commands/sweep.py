"""`sweep`: a search over any config keys, resumable and parallel."""

import argparse
from pathlib import Path

from common.errors import UserError

_EPILOG = """\
A sweep's YAML names base (a config of fit, or several), space (config keys with Optuna's distributions),
metric, direction and trials; optional are overrides, sampler and pruner (classes of Optuna), name, root,
storage and launcher. docs/sweeps.md describes them all.

Every trial is an ordinary fit that leaves a run folder under runs/<name>/. Ctrl-C (or a crash) loses nothing:
the same command goes on. Several machines share the work if each runs it with a database as storage.
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
    parser.add_argument(
        "--storage",
        help="a database for several machines, such as postgresql://user@host/sweeps (default: the YAML's, "
        "or a file beside the runs)",
    )


def run(options: argparse.Namespace) -> None:
    """Run or continue a sweep, then print the ranked table and where the results lie.

    Raises:
        UserError: a mistake in the settings, found before the first trial; Optuna is not installed; no trial
            has the metric.
        SystemExit: with status 1 if a trial failed.
    """
    if options.workers < 1:
        raise UserError(f"--workers is {options.workers}; it must be at least 1")
    try:
        from commands.sweeping.settings import read_settings
    except ImportError as error:
        raise UserError('sweep needs Optuna, which is not installed: pip install -e ".[sweep]"') from error
    settings = read_settings(options.config, options.storage)
    # here, because they import torch and Lightning: seconds that a mistake in the YAML need not take
    from commands.sweeping.check import check_keys
    from commands.sweeping.driver import Driver
    from commands.sweeping.results import ranked_table, write_results
    from commands.sweeping.study import SweepStudy
    from commands.sweeping.trial_process import threads_per_worker, visible_gpus

    print(f"Trying the {len(settings.space)} search keys on the parser of fit …", flush=True)
    check_keys(settings)
    study = SweepStudy(settings)
    before = sum(trial.state.is_finished() for trial in study.live())
    print(
        f"Sweep {settings.name}: {settings.trials} trials, {before} of them done; "
        f"{options.workers} at once with {threads_per_worker(options.workers)} threads each",
        flush=True,
    )
    driver = Driver(study, options.workers, on_change=lambda: write_results(study), gpus=visible_gpus())
    try:
        driver.run()
    finally:
        content = write_results(study)
    print(f"\n{ranked_table(content)}\n\nSweep: {settings.folder / 'sweep.html'}")
    if content["best_config"]:
        print(f"Best configuration: {content['best_config']}")
    if failed := content["counts"]["failed"]:
        print(f"{failed} trials failed; their errors are in {settings.folder / 'sweep.html'}", flush=True)
        raise SystemExit(1)
