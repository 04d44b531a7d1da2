"""`sweep`: a search over any config keys, resumable and parallel.

Every trial is an ordinary fit that leaves a run folder under runs/<name>/. Ctrl-C (or a crash) loses nothing:
the same command goes on. Exit status: 0 if all trials came to an end, 1 if some failed, 2 for a mistake.
"""

from dataclasses import dataclass
from pathlib import Path

from jsonargparse.typing import PositiveInt

from common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `sweep`.

    Args:
        config: the sweep's YAML: base, space, metric, direction and trials, and more (docs/sweeps.md);
            examples are in configs/sweep/
        workers: trials at once on this machine; they share its cores and GPUs
        storage: a database for several machines, such as postgresql://user@host/sweeps (the YAML's, or a file
            beside the runs, if left out)
    """

    config: Path
    workers: PositiveInt = 1
    storage: str | None = None


def run(options: Options) -> None:
    """Run or continue a sweep, then print the ranked table and where the results lie.

    Raises:
        UserError: a mistake in the settings, found before the first trial; Optuna is not installed; no trial
            has the metric.
        SystemExit: with status 1 if a trial failed.
    """
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
