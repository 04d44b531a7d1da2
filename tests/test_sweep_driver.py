"""The driver of a sweep: killed, shared, pruned, with failing trials. Trials are stand-ins for `fit`."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from commands.sweeping import study
from commands.sweeping.results import collect
from commands.sweeping.settings import read_settings
from commands.sweeping.space import same
from commands.sweeping.storage import is_alive, this_process
from commands.sweeping.study import TrialBook, point_of
from commands.sweeping.trial_process import environment, read_values, threads_per_worker
from common.errors import UserError
from tests.sweep_stand_in import book, driver, in_background, noted, states, write_script, write_sweep


def all_distinct(path: Path) -> bool:
    points = [point_of(trial) for trial in book(path).live().values()]
    return not any(same(a, b) for i, a in enumerate(points) for b in points[:i])


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_killed_after_three_trials_it_goes_on_with_two_workers(tmp_path: Path) -> None:
    """Eight distinct trials in the end; those that had ended are not run again, the lost one is."""
    path = write_sweep(tmp_path, overrides={"delay": 0.05})
    settings = read_settings(path)
    first = in_background(lambda: driver(path).run())
    wait_for(lambda: len(noted(settings, "started")) == 4)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    ended_before = noted(settings, "ended")
    running = [t for t in book(path).live().values() if t.state.name == "RUNNING"]
    assert len(running) == 1
    driver(path, workers=2).run()
    assert states(path) == ["COMPLETE"] * 8
    assert all_distinct(path)
    ended = noted(settings, "ended")
    assert ended[: len(ended_before)] == ended_before
    assert len({x for _, x, _ in ended}) == len(ended) == 8
    again = [t for t in book(path).trials() if t.user_attrs.get("slot") == running[0].user_attrs["slot"]]
    assert [point_of(t) for t in again] == [running[0].params] * 2
    assert again[1].user_attrs["folder"].endswith("trial_003_again_1/version_0")
    assert noted(settings, "stopped")[0][0] == "trial_003"  # the orphan ended with its driver


def test_a_finished_sweep_runs_nothing(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, trials=2)
    driver(path).run()
    driver(path, workers=2).run()
    assert len(noted(read_settings(path), "started")) == 2


def test_more_trials_continue_a_finished_sweep(tmp_path: Path) -> None:
    driver(write_sweep(tmp_path, trials=2)).run()
    path = write_sweep(tmp_path, trials=3)
    driver(path).run()
    assert len(noted(read_settings(path), "started")) == 3 and all_distinct(path)


@pytest.mark.parametrize("database", [False, True])
def test_two_drivers_that_start_at_once_share_the_trials(tmp_path: Path, database: bool) -> None:
    changes: dict[str, Any] = {"storage": f"sqlite:///{tmp_path}/study.db"} if database else {}
    changes["trials"] = 3 if database else 6  # SQLite takes its time
    path = write_sweep(tmp_path, overrides={"delay": 0.05}, **changes)
    start = tmp_path / "start"

    def work() -> None:
        wait_for(start.exists)
        driver(path).run()

    both = [in_background(work), in_background(work)]
    write_script(tmp_path)
    start.touch()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert states(path) == ["COMPLETE"] * changes["trials"]
    assert all_distinct(path)
    started = noted(read_settings(path), "started")
    assert len({x for _, x, _ in started}) == len(started) == changes["trials"]
    owners = {trial.user_attrs["owner"] for trial in book(path).live().values()}
    assert len(owners) == 2


def test_two_drivers_that_plan_the_same_slot(tmp_path: Path) -> None:
    """The later entry is void, and nobody runs it."""
    path = write_sweep(tmp_path, trials=2)
    one, other = book(path), book(path)
    one._plan(0, {})
    other._plan(0, {})  # has not seen the entry of the first
    trials = [one.claim(), other.claim()]
    assert [t.user_attrs["slot"] for t in trials if t] == [0, 1]
    assert one.claim() is None
    assert sorted(one.live()) == [0, 1]
    assert sum(bool(t.user_attrs.get("void")) for t in one.trials()) == 1


def test_a_small_space_is_tried_completely(tmp_path: Path) -> None:
    """Grid times choices: each of the six points once, though the sampler repeats itself."""
    space = {"x": [1, 2, 3], "y": {"choices": ["a", "b"]}}
    path = write_sweep(tmp_path, space=space, trials=6)
    driver(path, workers=2).run()
    points = sorted((t.params["x"], t.params["y"]) for t in book(path).live().values())
    assert points == [(x, y) for x in (1, 2, 3) for y in ("a", "b")]
    firsts = [book(path).live()[slot].params["x"] for slot in range(3)]
    assert firsts == [1, 2, 3]  # the grid is gone through in order


def claimed(path: Path, count: int) -> list[dict[str, Any]]:
    one = book(path)
    return [trial.params for _ in range(count) if (trial := one.claim())]


def test_steps_of_a_range_are_tried_once_each(tmp_path: Path) -> None:
    """0.1 + 6 * 0.1 is above 0.7, and 0.1 + 2 * 0.1 above 0.3."""
    path = write_sweep(tmp_path, space={"x": {"range": [0.1, 0.7], "step": 0.1}}, trials=7)
    values = sorted(point["x"] for point in claimed(path, 7))
    assert values == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], rel=1e-12) and values[-1] == 0.7


def test_a_large_space_is_never_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler that repeats itself gets help from chance; the points of the space would fill the memory."""
    path = write_sweep(tmp_path, space={"x": {"int_range": [0, 10**12]}}, trials=3)
    monkeypatch.setattr(study, "_MOST_DRAWS", 2)
    monkeypatch.setattr(TrialBook, "_draft", stubborn)
    points = [point["x"] for point in claimed(path, 3)]
    assert points[0] == 5 and len(set(points)) == 3


def stubborn(self: TrialBook, slot: int, live: Any) -> Any:
    """A study whose sampler always gives 5."""
    import optuna

    draft = optuna.create_study()
    draft.sampler = optuna.samplers.PartialFixedSampler({"x": 5}, optuna.samplers.RandomSampler(seed=0))
    return draft


def test_the_search_is_a_function_of_its_seed(tmp_path: Path) -> None:
    points = []
    for folder, seed in [("a", 0), ("b", 0), ("c", 1)]:
        (tmp_path / folder).mkdir()
        one = book(write_sweep(tmp_path / folder, seed=seed, trials=3))
        points.append([trial.params for _ in range(3) if (trial := one.claim())])
    assert points[0] == points[1] != points[2]


def test_a_failing_trial_is_recorded_and_the_sweep_goes_on(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, space={"x": [1, 9, 2]}, trials=3, overrides={"delay": 0, "fail_above": 5})
    driver(path).run()
    assert states(path) == ["COMPLETE", "FAIL", "COMPLETE"]
    error = book(path).live()[1].user_attrs["error"]
    assert error.startswith("exit status 1\neverything is fine")
    assert error.endswith("RuntimeError: x is far too large")
    ranked = collect(book(path))["trials"]
    assert [(t["trial"], t["rank"], t["value"]) for t in ranked] == [
        (2, 1, 1.5),
        (0, 2, 4.5),
        (1, None, None),
    ]


def test_a_metric_that_never_appears_ends_the_sweep(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, overrides={"delay": 0, "metric": "val/scores"})
    with pytest.raises(UserError, match="'val/score' never appeared.*did you mean 'val/scores'.*train/loss"):
        driver(path).run()
    assert len(noted(read_settings(path), "started")) == 1


def test_a_metric_that_is_not_finite_is_a_failure(tmp_path: Path) -> None:
    one = driver(write_sweep(tmp_path, trials=1))
    script = tmp_path / "trial.py"
    script.write_text(script.read_text().replace("{(x - 3) ** 2 + step / 100!r}", "nan"))
    one.run()
    assert book(tmp_path / "sweep.yaml").live()[0].user_attrs["error"] == "val/score is nan at step 50"


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_pruning_stops_trials_worse_than_the_median(tmp_path: Path, direction: str) -> None:
    """x = 9 is the worst of a minimization and the best of a maximization; the warm-up is kept."""
    path = write_sweep(
        tmp_path, space={"x": [2, 4, 9, 3]}, trials=4, direction=direction,
        overrides={"delay": 0.1}, pruning={"warmup_steps": 20, "finished_trials": 2},
    )  # fmt: skip
    driver(path).run()
    pruned = {"minimize": 2, "maximize": 3}[direction]
    assert states(path) == ["PRUNED" if slot == pruned else "COMPLETE" for slot in range(4)]
    trial = book(path).live()[pruned]
    assert max(trial.intermediate_values) in (20, 30, 40)
    assert [name for name, *_ in noted(read_settings(path), "stopped")] == [f"trial_{pruned:03d}"]
    ranked = collect(book(path))["trials"]
    assert ranked[-1]["trial"] == pruned and ranked[-1]["rank"] is None


def test_without_pruning_every_trial_runs_to_its_end(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, space={"x": [2, 3, 4, 4.5, 5, 9]}, trials=6, pruning=False)
    driver(path, workers=3).run()
    assert states(path) == ["COMPLETE"] * 6


def test_an_interrupted_sweep_stops_its_trials_and_goes_on(tmp_path: Path) -> None:
    """Ctrl-C, here after the first trial, leaves no process behind and nothing half-done."""
    path = write_sweep(tmp_path, trials=3, overrides={"delay": 0.02})

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        driver(path, workers=2, on_change=interrupt).run()
    settings = read_settings(path)
    assert len(noted(settings, "started")) == len(noted(settings, "ended")) + len(noted(settings, "stopped"))
    driver(path).run()
    assert states(path) == ["COMPLETE"] * 3 and all_distinct(path)


def test_sigterm_ends_a_driver_like_ctrl_c(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, trials=3, overrides={"delay": 0.5})
    settings = read_settings(path)
    process = in_background(lambda: driver(path).run())
    wait_for(lambda: len(noted(settings, "started")) == 1)
    process.terminate()
    process.join()
    assert process.exitcode == 143
    assert noted(settings, "stopped") == noted(settings, "started")
    assert book(path).live() == {}  # its slot is free again, at once and for every machine


def test_a_trial_of_a_silent_machine_is_lost_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_sweep(tmp_path, trials=1)
    elsewhere = TrialBook(read_settings(path), book(path).study, me="elsewhere|1|2")
    trial = elsewhere.claim()
    assert trial is not None
    here = book(path)
    now = [0.0]
    monkeypatch.setattr(study.time, "monotonic", lambda: now[0])
    assert here.recover() == []
    now[0] = 100.0
    elsewhere.beat(trial)
    assert here.recover() == []
    now[0] = 270.0  # 170 s after the last sign of life was seen
    assert here.recover() == []
    now[0] = 290.0
    assert here.recover() == [0]
    assert not elsewhere.beat(trial) and not elsewhere.tell(trial, "COMPLETE", 1.0)
    again = here.claim()
    assert again is not None and again.params == trial.params


def test_a_machine_of_the_same_name_is_another_one() -> None:
    """Its process ids say nothing here: a copied machine must not lose its trials at once."""
    me = this_process()
    assert is_alive(me)
    name, rest = me.split("|", 1)
    assert is_alive(f"{name.split()[0]} another-boot|{rest}") is None
    assert is_alive(f"{name}|{os.getpid()}|1") is False


def test_a_study_of_other_settings_is_refused(tmp_path: Path) -> None:
    book(write_sweep(tmp_path))
    with pytest.raises(UserError, match="begun with another space"):
        book(write_sweep(tmp_path, space={"x": {"range": [0, 9]}}))
    path = write_sweep(tmp_path)
    (tmp_path / "base.yaml").write_text("trainer: {max_steps: 51}\n")
    with pytest.raises(UserError, match="another base"):
        book(path)


def test_a_launcher_that_does_not_exist(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, launcher=["no-such-launcher"])
    with pytest.raises(UserError, match="cannot start a trial by 'no-such-launcher'"):
        driver(path).run()
    assert book(path).live() == {}


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
