"""Result folders appear whole or not at all."""

import os
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.files import (
    check_output_folder,
    check_writable_folder,
    claimed,
    filled_at_once,
    unfinished,
    write_text_atomically,
    written_at_once,
    written_whole,
)


def nothing(folder: Path) -> set[str]:
    return set()


def test_new_empty_and_own_folders_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "own").mkdir()
    (tmp_path / "own/result").touch()
    for name in ("new/deep", "empty"):
        assert check_output_folder(tmp_path / name, nothing) == tmp_path / name
    assert check_output_folder(tmp_path / "own", lambda folder: {"result", "other"}) == tmp_path / "own"
    assert not (tmp_path / "new").exists()  # checking leaves nothing behind


def test_files_and_foreign_content_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file is a file\. Give a folder"):
        check_output_folder(tmp_path / "file", nothing)
    with pytest.raises(UserError, match="can't be made: .*file is a file"):
        check_output_folder(tmp_path / "file/inside", nothing)
    with pytest.raises(UserError, match=r"holds other files \(file\)"):
        check_output_folder(tmp_path, nothing)


def test_missing_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the superuser may write anywhere
    with pytest.raises(UserError, match="no permission in"):
        check_output_folder(tmp_path / "new", nothing)


def test_the_option_to_change_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/other").touch()
    assert check_writable_folder(tmp_path / "full") == tmp_path / "full"
    for path in (tmp_path / "file", tmp_path / "file/inside"):
        with pytest.raises(UserError, match="is a file. Give .* model.output"):
            check_writable_folder(path, "model.output")


def test_a_folder_is_filled_without_losing_its_other_files(tmp_path: Path) -> None:
    target = tmp_path / "deep/model"
    for text, part in (("one", "vae"), ("two", "unet"), ("three", "unet")):
        with filled_at_once(target) as folder:
            (folder / part).mkdir()
            (folder / part / "weights").write_text(text)
            (folder / "index").write_text(text)
            assert not target.exists() or (target / "index").read_text() != text
    files = [file for file in target.rglob("*") if file.is_file()]
    contents = {str(file.relative_to(target)): file.read_text() for file in files}
    assert contents == {"vae/weights": "one", "unet/weights": "three", "index": "three"}
    assert [entry.name for entry in target.parent.iterdir()] == ["model"]


def test_a_failure_while_filling_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "weights").write_text("former")
    for error, seen in ((KeyError(), KeyError), (OSError("disk full"), UserError)):
        with pytest.raises(seen), filled_at_once(target) as folder:
            (folder / "weights").write_text("ha")
            raise error
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert [entry.read_text() for entry in target.iterdir()] == ["former"]


def test_success_replaces_the_whole_folder(tmp_path: Path) -> None:
    target = tmp_path / "deep/result"
    for text in ("one", "two"):
        with written_at_once(target) as folder:
            (folder / f"{text}.txt").write_text(text)
            assert not (target / f"{text}.txt").exists()
    assert [file.name for file in target.iterdir()] == ["two.txt"]
    assert [entry.name for entry in target.parent.iterdir()] == ["result"]


def test_failure_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "result"
    with pytest.raises(KeyError), written_at_once(target) as folder:
        (folder / "half").touch()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    target.mkdir()
    (target / "former").touch()
    with pytest.raises(UserError, match="can't be written: disk full"), written_at_once(target) as folder:
        raise OSError("disk full")
    assert [entry.name for entry in tmp_path.iterdir()] == ["result"]
    assert [entry.name for entry in target.iterdir()] == ["former"]


def test_a_file_is_the_old_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_text_atomically(file, "one")
    with pytest.raises(KeyError), written_whole(file) as partial:
        partial.write_text("tw")
        assert unfinished(tmp_path) == [partial] and file.read_text() == "one"
        raise KeyError
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_text_atomically(file, "two")
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"] and file.read_text() == "one"
    write_text_atomically(file, "two")
    assert file.read_text() == "two"


@pytest.mark.parametrize("write", [written_at_once, filled_at_once])
def test_what_a_killed_process_left_is_removed(write: Any, tmp_path: Path) -> None:
    """But not what a living one still fills."""
    (tmp_path / ".out.new-01234567").mkdir()
    (tmp_path / ".out.new-01234567" / "file").write_text("x")
    with write(tmp_path / "out") as living, write(tmp_path / "out") as folder:
        assert living.is_dir()
        (folder / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    with (
        claimed(tmp_path / "run"),
        pytest.raises(UserError, match="another process is writing into .*run"),
        claimed(tmp_path / "run"),
    ):
        pass
    with claimed(tmp_path / "run"):
        pass
    assert not list((tmp_path / "run").iterdir())
