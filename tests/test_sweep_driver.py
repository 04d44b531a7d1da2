"""The driver of a sweep: killed, shared, pruned, with failing trials. Trials are stand-ins for `fit`."""

import os
import signal
from pathlib import Path
from typing import Any

import optuna
import pytest

from commands.sweeping import study as study_module
from commands.sweeping.results import collect
from commands.sweeping.study import same
from commands.sweeping.trial_process import environment, read_values, threads_per_worker
from common.errors import UserError
from tests.sweep_stand_in import (
    choice,
    driver,
    in_background,
    noted,
    number,
    states,
    study,
    wait_for,
    whole,
    write_script,
    write_sweep,
)


def all_distinct(path: Path) -> bool:
    points = [trial.params for trial in study(path).live()]
    return not any(same(a, b) for i, a in enumerate(points) for b in points[:i])


def drawn(path: Path, count: int) -> list[Any]:
    """The values of x of so many trials that were handed out and not run."""
    one = study(path)
    return [trial.params["x"] for _ in range(count) if (trial := one.claim())]


def test_driver_and_trial_are_killed_after_three_trials(tmp_path: Path) -> None:
    """Eight distinct trials in the end; those that had ended are not run again, the lost one is."""
    path = write_sweep(tmp_path, overrides={"delay": 0.2})
    first = in_background(lambda: driver(path).run())
    wait_for(lambda: len(noted(path, "started")) == 4)
    os.kill(first.pid, signal.SIGKILL)
    os.kill(int(noted(path, "started")[3][2]), signal.SIGKILL)
    first.join()
    ended_before = noted(path, "ended")
    assert len(ended_before) == 3
    running = [trial for trial in study(path).live() if trial.state.name == "RUNNING"]
    assert len(running) == 1
    driver(path, workers=2).run()
    assert states(path) == ["COMPLETE"] * 8
    assert all_distinct(path)
    ended = noted(path, "ended")
    assert ended[:3] == ended_before
    assert len({x for _, x, _ in ended}) == len(ended) == 8
    [again] = [trial for trial in study(path).live() if "again" in trial.user_attrs]
    assert again.params == running[0].params
    assert again.user_attrs["folder"].endswith("trial_003_again_1/version_0")
    assert 3 in [row["trial"] for row in collect(study(path))["trials"]]


def test_a_finished_sweep_runs_nothing_and_a_larger_number_continues_it(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, trials=2)
    driver(path).run()
    driver(path, workers=2).run()
    assert len(noted(path, "started")) == 2
    path = write_sweep(tmp_path, trials=3)
    driver(path).run()
    assert len(noted(path, "started")) == 3 and all_distinct(path)


def test_a_file_has_one_driver(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, trials=1)
    with study(path).joined(), pytest.raises(UserError, match="another process works .*--workers.*--storage"):
        driver(path).run()
    driver(path).run()
    assert states(path) == ["COMPLETE"]


def test_two_drivers_of_a_database_share_the_trials(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, storage=f"sqlite:///{tmp_path}/study.db", trials=4, overrides={"delay": 0.1})
    study(path)  # makes its tables
    write_script(tmp_path)
    both = [in_background(lambda: driver(path).run()) for _ in range(2)]
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert states(path) == ["COMPLETE"] * 4
    assert all_distinct(path)
    started = noted(path, "started")
    assert len({x for _, x, _ in started}) == len(started) == 4


def test_an_entry_too_many_is_void(tmp_path: Path) -> None:
    """Two drivers that ask at the same moment: neither the same point nor one trial more is run."""
    path = write_sweep(tmp_path, trials=2, space={"x": choice(1, 2)})
    one, other = study(path), study(path)
    first = other.study.ask(other.settings.space)
    second = one.claim()  # its sampler has the same seed
    assert second is not None and second.params != first.params
    third = other.study.ask(other.settings.space)
    assert one.claim() is None
    assert [trial.number for trial in one.live()][:2] == [first.number, second.number]
    assert third.number == max(trial.number for trial in one.live())


def test_nothing_is_handed_out_while_another_driver_draws(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, trials=2)
    one, other = study(path), study(path)
    trial = other.study.ask()  # it has no values yet
    assert one.claim() is None
    trial.suggest_float("x", 0, 10)
    assert one.claim() is not None


def test_a_small_space_is_tried_completely(tmp_path: Path) -> None:
    """Each of the six points once, though the sampler repeats itself."""
    space = {"x": choice(1, 2, 3), "y": choice("a", "b")}
    path = write_sweep(tmp_path, space=space, trials=6)
    driver(path, workers=2).run()
    points = sorted((t.params["x"], t.params["y"]) for t in study(path).live())
    assert points == [(x, y) for x in (1, 2, 3) for y in ("a", "b")]


@pytest.mark.parametrize("sampler", ["BruteForceSampler", "RandomSampler", "GridSampler"])
def test_samplers_of_grids(tmp_path: Path, sampler: str) -> None:
    arguments = {"search_space": {"x": [1, 2, 3, 4]}} if sampler == "GridSampler" else {"seed": 0}
    path = write_sweep(
        tmp_path, space={"x": choice(1, 2, 3, 4)}, trials=4,
        sampler={"class_path": sampler, "init_args": arguments},
    )  # fmt: skip
    driver(path).run()
    assert states(path) == ["COMPLETE"] * 4
    assert sorted(trial.params["x"] for trial in study(path).live()) == [1, 2, 3, 4]


def test_steps_of_a_range_are_tried_once_each(tmp_path: Path) -> None:
    """0.1 + 6 * 0.1 is above 0.7, and 0.1 + 2 * 0.1 above 0.3."""
    path = write_sweep(tmp_path, space={"x": number(0.1, 0.7, step=0.1)}, trials=7)
    values = sorted(drawn(path, 7))
    assert values == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], rel=1e-12)


def test_a_large_space_is_never_listed(tmp_path: Path) -> None:
    """A sampler that repeats itself gets help from chance; the points of the space would fill the memory."""
    path = write_sweep(tmp_path, space={"x": whole(0, 10**12)}, trials=3)
    one = study(path)
    one.sampler = optuna.samplers.PartialFixedSampler({"x": 5}, optuna.samplers.RandomSampler(seed=0))
    points = [trial.params["x"] for _ in range(3) if (trial := one.claim())]
    assert points[0] == 5 and len(set(points)) == 3


def test_the_search_is_a_function_of_its_seed(tmp_path: Path) -> None:
    points = []
    for folder, seed in [("a", 0), ("b", 0), ("c", 1)]:
        (tmp_path / folder).mkdir()
        sampler = {"class_path": "TPESampler", "init_args": {"seed": seed}}
        points.append(drawn(write_sweep(tmp_path / folder, sampler=sampler, trials=3), 3))
    assert points[0] == points[1] != points[2]


def test_a_sampler_that_does_not_suit_the_space(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, sampler={"class_path": "BruteForceSampler"})
    with pytest.raises(UserError, match="the sampler cannot draw from this space: .*step must be given"):
        driver(path).run()
    assert noted(path, "started") == []


def test_a_failing_trial_is_recorded_and_the_sweep_goes_on(tmp_path: Path) -> None:
    path = write_sweep(
        tmp_path, space={"x": choice(1, 9, 2)}, trials=3, overrides={"delay": 0, "fail_above": 5}
    )
    driver(path).run()
    assert sorted(states(path)) == ["COMPLETE", "COMPLETE", "FAIL"]
    [failed] = [trial for trial in study(path).live() if trial.state.name == "FAIL"]
    error = failed.user_attrs["error"]
    assert failed.params == {"x": 9} and error.startswith("exit status 1\neverything is fine")
    assert error.endswith("RuntimeError: x is far too large")
    ranked = collect(study(path))["trials"]
    assert [(t["params"]["x"], t["rank"], t["value"]) for t in ranked] == [
        (2, 1, 1.5),
        (1, 2, 4.5),
        (9, None, None),
    ]


def test_a_metric_that_never_appears_ends_the_sweep(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, overrides={"delay": 0, "metric": "val/scores"})
    with pytest.raises(UserError, match="'val/score' never appeared.*did you mean 'val/scores'.*train/loss"):
        driver(path).run()
    assert len(noted(path, "started")) == 1


def test_a_metric_that_is_not_finite_is_a_failure(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, trials=1)
    script = write_script(tmp_path)
    script.write_text(script.read_text().replace("{(x - 3) ** 2 + step / 100!r}", "nan"))
    driver(path).run()
    assert study(path).live()[0].user_attrs["error"] == "val/score is nan at step 50"


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_pruning_stops_trials_worse_than_the_median(tmp_path: Path, direction: str) -> None:
    """x = 9 is the worst of a minimization and the best of a maximization; the warm-up is kept."""
    path = write_sweep(
        tmp_path, space={"x": number(0, 10)}, trials=4, direction=direction, overrides={"delay": 0.1},
        pruner={"class_path": "MedianPruner", "init_args": {"n_warmup_steps": 20, "n_startup_trials": 2}},
    )  # fmt: skip
    one = driver(path)
    for x in (2, 4, 9, 3):
        one.study.study.enqueue_trial({"x": x})
    one.run()
    pruned = {"minimize": 2, "maximize": 3}[direction]
    assert states(path) == ["PRUNED" if i == pruned else "COMPLETE" for i in range(4)]
    trial = study(path).live()[pruned]
    assert max(trial.intermediate_values) in (20, 30, 40)
    assert [name for name, *_ in noted(path, "stopped")] == [f"trial_{pruned:03d}"]
    ranked = collect(study(path))["trials"]
    assert ranked[-1]["trial"] == pruned and ranked[-1]["rank"] is None


def test_without_pruning_every_trial_runs_to_its_end(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, space={"x": choice(2, 3, 4, 4.5, 5, 9)}, trials=6)
    driver(path, workers=3).run()
    assert states(path) == ["COMPLETE"] * 6


def test_an_interrupted_sweep_stops_its_trials_and_goes_on(tmp_path: Path) -> None:
    """What comes up in the driver, here after the first trial, leaves no process behind."""
    path = write_sweep(tmp_path, trials=3, overrides={"delay": 0.02})

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        driver(path, workers=2, on_change=interrupt).run()
    assert len(noted(path, "started")) == len(noted(path, "ended")) + len(noted(path, "stopped"))
    driver(path).run()
    assert states(path) == ["COMPLETE"] * 3 and all_distinct(path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_driver_in_order(tmp_path: Path, number: signal.Signals) -> None:
    path = write_sweep(tmp_path, trials=3, overrides={"delay": 0.5})
    process = in_background(lambda: driver(path).run())
    wait_for(lambda: len(noted(path, "started")) == 1)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == (143 if number == signal.SIGTERM else 1)
    assert noted(path, "stopped") == noted(path, "started")
    assert states(path) == ["WAITING"]  # to be run again, by any driver


def test_a_trial_of_a_silent_machine_is_lost_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_sweep(tmp_path, trials=1, storage=f"sqlite:///{tmp_path}/study.db")
    elsewhere, here = study(path), study(path)
    trial = elsewhere.claim()
    assert trial is not None
    now = [0.0]
    monkeypatch.setattr(study_module.time, "monotonic", lambda: now[0])
    assert here.recover() == []
    now[0] = 100.0
    trial.set_user_attr("beat", 1)
    assert here.recover() == []
    now[0] = 270.0  # 170 s after the last sign of life was seen
    assert here.recover() == []
    now[0] = 290.0
    assert here.recover() == [0]
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        elsewhere.tell(trial, "COMPLETE", 1.0, seconds=1.0)
    again = here.claim()
    assert again is not None and again.params == trial.params


def test_a_study_of_other_settings_is_refused(tmp_path: Path) -> None:
    study(write_sweep(tmp_path))
    with pytest.raises(UserError, match="begun with another space"):
        study(write_sweep(tmp_path, space={"x": number(0, 9)}))
    path = write_sweep(tmp_path)
    (tmp_path / "base.yaml").write_text("trainer: {max_steps: 51}\n")
    with pytest.raises(UserError, match="another base"):
        study(path)


def test_a_storage_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot open the storage sqlite:////none/study.db"):
        study(write_sweep(tmp_path, storage="sqlite:////none/study.db"))


def test_a_launcher_that_does_not_exist(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, launcher=["no-such-launcher"])
    with pytest.raises(UserError, match="cannot start a trial by 'no-such-launcher'"):
        driver(path).run()
    assert states(path) == ["WAITING"]


def test_workers_share_cores_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [threads_per_worker(n) for n in (1, 2, 3, 9)] == [8, 4, 2, 1]
    assert environment(2, 1)["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [threads_per_worker(n) for n in (1, 4)] == [3, 2]
    shares = [environment(2, i, ["0", "1", "2"])["CUDA_VISIBLE_DEVICES"] for i in (0, 1)]
    assert shares == ["0,2", "1"]
    assert environment(3, 2, ["0", "1"])["CUDA_VISIBLE_DEVICES"] == "0"


def test_a_line_in_the_making_is_left_for_later(tmp_path: Path) -> None:
    """0.12 of 0.125 would be a wrong value."""
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss,val/score\n5,1.0,\n10,,0.5\n20,,0.12")
    assert read_values(path, "val/score") == {10: 0.5}
    path.write_text("step,train/loss,val/score\n5,1.0,\n10,,0.5\n20,,0.125\n")
    assert read_values(path, "val/score") == {10: 0.5, 20: 0.125}
    assert read_values(tmp_path / "none.csv", "val/score") == {}
