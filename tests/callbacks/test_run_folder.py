"""Finding, numbering and removing run folders, and reading checkpoints safely."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from callbacks.run_folder import (
    RunFolder,
    find_checkpoint,
    new_version,
    newest_checkpoint,
    read_checkpoint,
    run_dir,
    versions,
)
from common.errors import UserError


def make(folder: Path, *names: str) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    for name in names:
        (folder / "checkpoints" / name).touch()
    return folder


def test_versions_are_ordered_by_number_not_by_name(tmp_path: Path) -> None:
    for number in (10, 2, 0):
        (tmp_path / f"version_{number}").mkdir()
    (tmp_path / "version_11").touch()
    (tmp_path / "version_x").mkdir()
    assert [path.name for path in versions(tmp_path)] == ["version_0", "version_2", "version_10"]


def test_new_version_takes_the_next_free_number(tmp_path: Path) -> None:
    assert new_version(tmp_path, "a").name == "version_0"
    (tmp_path / "a" / "version_7").mkdir()
    (tmp_path / "a" / "version_8").touch()  # something else in the way
    assert new_version(tmp_path, "a").name == "version_9"
    assert new_version(tmp_path, "b").name == "version_0"


def test_last_is_the_newest_version_with_a_checkpoint(tmp_path: Path) -> None:
    make(tmp_path / "a" / "version_0", "last.ckpt")
    expected = make(tmp_path / "a" / "version_1", "last.ckpt", "step_900.ckpt")
    make(tmp_path / "a" / "version_2", "saving.tmp")
    assert find_checkpoint("last", tmp_path, "a") == expected / "checkpoints" / "last.ckpt"
    assert find_checkpoint("last", tmp_path, "b") is None


def test_without_last_the_largest_step_counts(tmp_path: Path) -> None:
    run = make(tmp_path, "step_900.ckpt", "step_1000.ckpt", "best.ckpt")
    assert newest_checkpoint(run) == run / "checkpoints" / "step_1000.ckpt"


def test_a_folder_of_shards_is_found_while_it_is_being_replaced(tmp_path: Path) -> None:
    """Killed between the two renames: the run must not start afresh."""
    run = make(tmp_path, "last.old.tmp", "saving.tmp", "step_900.ckpt")
    assert newest_checkpoint(run) == run / "checkpoints" / "last.old.tmp"


def test_best_is_the_newest_best(tmp_path: Path) -> None:
    expected = make(tmp_path / "a" / "version_0", "last.ckpt", "best.ckpt")
    make(tmp_path / "a" / "version_1", "last.ckpt")
    assert find_checkpoint("best", tmp_path, "a") == expected / "checkpoints" / "best.ckpt"
    with pytest.raises(UserError, match="no best.ckpt"):
        find_checkpoint("best", tmp_path, "b")


def test_checkpoints_do_not_run_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "sprung",)  # type: ignore[return-value]

    path = tmp_path / "trap.ckpt"
    torch.save({"global_step": 1, "state_dict": {}, "trap": Trap()}, path)
    with pytest.raises(UserError, match=r"trap\.ckpt"):
        read_checkpoint(path)
    assert not (tmp_path / "sprung").exists()


def test_a_folder_is_removed_only_by_the_one_who_made_it(tmp_path: Path) -> None:
    theirs = make(tmp_path / "runs" / "a" / "version_0", "last.ckpt")
    RunFolder(theirs).discard()
    assert theirs.is_dir()
    made = new_version(tmp_path / "runs", "b")
    RunFolder(made, is_new=True).discard()
    assert not made.parent.exists()
    assert theirs.is_dir()


def test_an_empty_experiment_and_root_go_with_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "given").mkdir()
    RunFolder(new_version(tmp_path / "given" / "root", "a"), is_new=True).discard()
    assert [path.name for path in tmp_path.rglob("*")] == ["given"]
    monkeypatch.chdir(tmp_path / "given")
    RunFolder(new_version(Path("."), "a"), is_new=True).discard()
    assert [path.name for path in tmp_path.rglob("*")] == ["given"]


def test_a_folder_another_run_has_begun_to_use_stays(tmp_path: Path) -> None:
    mine, theirs = new_version(tmp_path / "runs", "a"), new_version(tmp_path / "runs", "a")
    RunFolder(mine, is_new=True).discard()
    assert theirs.is_dir() and not mine.exists()


@pytest.mark.parametrize("name", ["is_dir", "exists"])
def test_places_that_may_not_be_looked_into(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    make(tmp_path / "a" / "version_0", "last.ckpt", "best.ckpt")
    monkeypatch.setattr(Path, name, refuse)
    for which in ("last", "best"):
        with pytest.raises(UserError, match="Permission denied"):
            find_checkpoint(which, tmp_path, "a")
    if name == "is_dir":
        with pytest.raises(UserError, match="Permission denied"):
            new_version(tmp_path, "a")
        with pytest.raises(UserError, match="Permission denied"):
            read_checkpoint(tmp_path / "x.ckpt")
    else:
        with pytest.raises(UserError, match="Permission denied"):
            find_checkpoint(str(tmp_path / "x.ckpt"), tmp_path, "a")


def test_an_error_without_words_names_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise EOFError

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(UserError, match="can't be read as a checkpoint: EOFError;"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_run_dir_of_a_trainer_from_python(tmp_path: Path) -> None:
    bare = SimpleNamespace(callbacks=[], log_dir=None, default_root_dir=str(tmp_path))
    assert run_dir(bare) == tmp_path  # type: ignore[arg-type]
    folder = RunFolder(tmp_path / "runs" / "a" / "version_3")
    known = SimpleNamespace(callbacks=[folder], log_dir="elsewhere", default_root_dir=str(tmp_path))
    assert run_dir(known) == folder.path  # type: ignore[arg-type]


def test_a_session_that_trains_nothing_takes_its_event_files_along(tmp_path: Path) -> None:
    """TensorBoard opens its file before the checkpoint is read; one that is refused leaves none behind."""
    names = ("events.out.tfevents.1", "events.out.tfevents.2", "metrics.csv")
    (tmp_path / names[0]).touch()
    folder = RunFolder(tmp_path)
    for name in names[1:]:
        (tmp_path / name).touch()
    folder.discard()
    assert sorted(path.name for path in tmp_path.iterdir()) == [names[0], names[2]]
