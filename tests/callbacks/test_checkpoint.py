"""When checkpoints are written, under which names, and that they are always complete."""

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

import callbacks.checkpoint as files
from callbacks.checkpoint import RunCheckpoint
from callbacks.resume import differences, explain_mismatch
from callbacks.run_folder import RunFolder, read_checkpoint
from common.errors import UserError
from lightning_modules.checkpoints import read
from tests.tiny_run import TinyData, TinyModule, TinyTwoRoles


def train(
    folder: Path, callback: RunCheckpoint, steps: int, module: TinyModule | None = None, **kwargs: Any
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[RunFolder(folder), callback], num_sanity_val_steps=0,
        check_val_every_n_epoch=None, **({"limit_val_batches": 0} | kwargs),
    )  # fmt: skip
    torch.manual_seed(0)
    trainer.fit(module or TinyModule(), TinyData())
    return trainer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def step_of(folder: Path, name: str) -> int:
    return int(torch.load(folder / "checkpoints" / name, weights_only=True)["global_step"])


@pytest.mark.parametrize("module", [TinyModule, TinyTwoRoles])
def test_names_and_steps_are_updates_of_the_first_role(module: type[TinyModule], tmp_path: Path) -> None:
    train(tmp_path, RunCheckpoint(every_n_steps=2, keep_step_checkpoints=2), 7, module())
    assert names(tmp_path) == ["last.ckpt", "step_4.ckpt", "step_6.ckpt"]
    assert (step_of(tmp_path, "step_4.ckpt"), step_of(tmp_path, "last.ckpt")) == (4, 7)


def test_top_level_keys_are_lightnings_and_all_is_plain(tmp_path: Path) -> None:
    train(tmp_path, RunCheckpoint(), 1)
    loaded = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert {"epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "callbacks",
            "optimizer_states", "lr_schedulers"} <= loaded.keys()  # fmt: skip


@pytest.mark.parametrize(("mode", "expected"), [("min", 6), ("max", 2)])
def test_best_follows_the_metric(mode: str, expected: int, tmp_path: Path, monkeypatch: Any) -> None:
    def validation_step(self: TinyModule, batch: torch.Tensor, batch_idx: int) -> None:
        self.log(
            "val/score", {2: 3.0, 4: 2.0, 6: 1.0, 8: float("nan")}[self.trainer.global_step], batch_size=1
        )

    monkeypatch.setattr(TinyModule, "validation_step", validation_step)
    callback = RunCheckpoint(every_n_steps=3, monitor="val/score", mode=mode)
    train(tmp_path, callback, 8, limit_val_batches=1, val_check_interval=2)
    assert step_of(tmp_path, "best.ckpt") == expected
    assert callback.best_step == expected
    assert step_of(tmp_path, "last.ckpt") == 8


def test_a_run_shorter_than_its_first_validation_has_a_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = RunCheckpoint(every_n_steps=2)
    train(tmp_path, callback, 3, limit_val_batches=1, val_check_interval=5)
    assert names(tmp_path) == ["best.ckpt", "last.ckpt"]
    assert step_of(tmp_path, "best.ckpt") == 3 and callback.best_score is None
    assert "best.ckpt is last.ckpt, not decided by val/frechet_distance" in caplog.text
    train(tmp_path, RunCheckpoint(), 4, limit_val_batches=1, val_check_interval=5)
    assert step_of(tmp_path, "best.ckpt") == 4, "still the last one"


def test_the_best_score_of_another_run_does_not_count(tmp_path: Path) -> None:
    callback = RunCheckpoint()
    callback.load_state_dict({"best_score": -1.0, "best_step": 7, "random_states": None})
    train(tmp_path, callback, 2, limit_val_batches=1, val_check_interval=2)
    assert callback.best_step == step_of(tmp_path, "best.ckpt") == 2


def test_no_validation_no_best(tmp_path: Path) -> None:
    train(tmp_path / "off", RunCheckpoint(), 1)
    train(tmp_path / "unwanted", RunCheckpoint(monitor=None), 1, limit_val_batches=1, val_check_interval=5)
    assert names(tmp_path / "off") == names(tmp_path / "unwanted") == ["last.ckpt"]


def test_a_metric_that_is_not_logged_is_named_once(tmp_path: Path) -> None:
    callback = RunCheckpoint(monitor="val/fid")
    with pytest.warns(UserWarning, match="val/fid.*its metrics are: val/frechet_distance") as caught:
        train(tmp_path, callback, 4, limit_val_batches=1, val_check_interval=2)
    assert len([one for one in caught if "val/fid" in str(one.message)]) == 1
    assert names(tmp_path) == ["last.ckpt"]


def test_the_first_metric_that_is_logged_decides(tmp_path: Path) -> None:
    """By what is better of it; a metric of the project's own is known, another is not."""
    callback = RunCheckpoint(monitor=["val/fid", "val/frechet_distance"], mode="auto")
    train(tmp_path, callback, 4, limit_val_batches=1, val_check_interval=2)
    assert callback.best_monitor == "val/frechet_distance" and callback.best_score is not None
    assert step_of(tmp_path, "best.ckpt") == callback.best_step
    kept = callback.state_dict()
    assert kept["best_monitor"] == "val/frechet_distance"
    with pytest.raises(UserError, match="val/score"):
        RunCheckpoint(monitor=["val/fid", "val/score"], mode="auto")


def test_a_kill_while_saving_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    train(tmp_path, RunCheckpoint(), 1)
    real = os.replace

    def die(source: Any, target: Any) -> None:
        if Path(target).name == "last.ckpt":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(files.os, "replace", die)
    with pytest.raises(SystemExit):
        train(tmp_path, RunCheckpoint(), 2)
    monkeypatch.undo()
    assert step_of(tmp_path, "last.ckpt") == 1
    assert "saving.tmp" in names(tmp_path)
    train(tmp_path, RunCheckpoint(), 3)
    assert names(tmp_path) == ["last.ckpt"], "the leftover is gone"
    assert step_of(tmp_path, "last.ckpt") == 3


def test_an_error_in_a_step_is_not_saved_and_one_in_a_validation_is(tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*_: Any) -> None:
        raise OSError("gone")

    TinyModule.at_step = (3, fail)
    try:
        with pytest.raises(OSError, match="gone"):
            train(tmp_path / "a", RunCheckpoint(every_n_steps=2), 5)
    finally:
        TinyModule.at_step = None
    assert step_of(tmp_path / "a", "last.ckpt") == 2
    monkeypatch.setattr(TinyModule, "validation_step", fail)
    with pytest.raises(OSError, match="gone"):
        train(tmp_path / "b", RunCheckpoint(every_n_steps=2), 5, limit_val_batches=1, val_check_interval=3)
    assert step_of(tmp_path / "b", "last.ckpt") == 3


def test_folders_of_sharded_checkpoints_are_replaced_whole(tmp_path: Path) -> None:
    for content in ("old", "new"):
        temporary = tmp_path / "saving.tmp"
        temporary.mkdir()
        (temporary / "meta.pt").write_text(content)
        files.publish(temporary, [tmp_path / "last.ckpt", tmp_path / "best.ckpt"])
    assert (tmp_path / "last.ckpt" / "meta.pt").read_text() == "new"
    assert (tmp_path / "best.ckpt" / "meta.pt").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_kill_while_a_sharded_checkpoint_is_replaced_loses_none(tmp_path: Path) -> None:
    """Between the two renames there is no last.ckpt; the old one gets its name back."""
    for name in ("last.old.tmp", "best.ckpt", "best.old.tmp", "saving.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.pt").write_text(name)
    files.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert (tmp_path / "last.ckpt" / "meta.pt").read_text() == "last.old.tmp"
    assert (tmp_path / "best.ckpt" / "meta.pt").read_text() == "best.ckpt"


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system takes the first 4 KiB of the second checkpoint, then says what a full disk says."""
    train(tmp_path, RunCheckpoint(), 1)
    before = (tmp_path / "checkpoints" / "last.ckpt").read_bytes()

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > 4096:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(files, "open", lambda path, mode: Full(path, mode), raising=False)
    message = "step 2 cannot be written.*No space left.*are untouched.*--ckpt_path last"
    with pytest.raises(UserError, match=message):
        train(tmp_path, RunCheckpoint(every_n_steps=2), 4)
    assert (tmp_path / "checkpoints" / "last.ckpt").read_bytes() == before
    assert names(tmp_path) == ["last.ckpt"]
    monkeypatch.undo()
    train(tmp_path, RunCheckpoint(every_n_steps=2), 3)
    assert step_of(tmp_path, "last.ckpt") == 3


def test_nothing_is_left_in_the_folder_for_temporary_files(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit):
        train(tmp_path, RunCheckpoint(), 1)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_checkpoints_of_another_version_are_refused(tmp_path: Path) -> None:
    train(tmp_path, RunCheckpoint(), 1)
    path = tmp_path / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    assert content.pop("checkpoint_format") == 1
    torch.save(content, path)
    read_checkpoint(path)  # the first version wrote no number
    torch.save(content | {"checkpoint_format": 2}, path)
    with pytest.raises(UserError, match="a later version.*format 2, this one reads 1.*export its student"):
        read_checkpoint(path)


@pytest.mark.parametrize("setting", [{"every_n_steps": 0}, {"mode": "least"}, {"keep_step_checkpoints": -2}])
def test_bad_settings(setting: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(setting))):
        RunCheckpoint(**setting)


def test_differences_compare_only_what_both_have() -> None:
    stored = {"a": {"b": 1, "gone": 2}, "list": [{"x": 1}, {"x": 2}], "ckpt_path": "old"}
    now = {"a": {"b": 3, "new": 4}, "list": [{"x": 1}, {"x": 5}], "ckpt_path": "new"}
    assert differences(stored, now) == [("a.b", 1, 3), ("list.1.x", 2, 5)]


def test_mismatches_name_the_first_key(tmp_path: Path) -> None:
    for other, expected in [
        (torch.nn.Linear(2, 1), "mismatch for weight: copying a param with shape torch.Size([1, 2])"),
        (torch.nn.Linear(3, 1, bias=False), 'Missing key(s) in state_dict: "bias"'),
        (torch.nn.Sequential(torch.nn.Linear(3, 1)), 'Missing key(s) in state_dict: "weight"'),
    ]:
        with pytest.raises(RuntimeError) as caught:
            torch.nn.Linear(3, 1).load_state_dict(other.state_dict())
        message = explain_mismatch(caught.value, tmp_path / "x.ckpt")
        assert message is not None and expected in message
    assert explain_mismatch(RuntimeError("CUDA out of memory"), tmp_path) is None


def test_random_states_are_those_of_the_checkpoint_at_the_first_batch(tmp_path: Path) -> None:
    """A run that fails after a validation draws, once resumed, what the uninterrupted run draws."""

    class Draws(Callback):
        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []
            self.fails_at = -1

        def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
            if trainer.global_step == self.fails_at:
                raise RuntimeError("power cut")

        def on_train_batch_end(self, *_: object) -> None:
            self.seen.append(torch.rand(1))

    def run(folder: Path, draws: Draws) -> None:
        last = folder / "checkpoints" / "last.ckpt"
        trainer = Trainer(
            accelerator="cpu", max_steps=4, max_epochs=-1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=2,
            check_val_every_n_epoch=None, callbacks=[RunFolder(folder), draws, RunCheckpoint(2)],
        )  # fmt: skip
        torch.manual_seed(0)
        trainer.fit(TinyModule(), TinyData(), ckpt_path=str(last) if last.exists() else None)

    alone, cut = Draws(), Draws()
    run(tmp_path / "alone", alone)
    cut.fails_at = 2
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "cut", cut)
    cut.fails_at = -1
    run(tmp_path / "cut", cut)
    assert torch.equal(torch.cat(alone.seen), torch.cat(cut.seen)) and len(alone.seen) == 4


def test_a_file_gives_way_to_a_folder_of_shards_and_back(tmp_path: Path) -> None:
    for is_folder in (False, True, False):
        temporary = tmp_path / "saving.tmp"
        if is_folder:
            temporary.mkdir()
            (temporary / "meta.pt").write_text("x")
        else:
            temporary.write_text("x")
        files.publish(temporary, [tmp_path / "last.ckpt"])
        assert (tmp_path / "last.ckpt").is_dir() == is_folder
        assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EROFS, "permissions"),
        (errno.ENOENT, "bring it back"),
        (errno.EIO, "disk"),
    ],
)
def test_each_failure_to_write_has_its_advice(number: int, advice: str) -> None:
    assert advice in files.why_not_written(OSError(number, "told"))
    assert files.why_not_written(RuntimeError("of another kind")) == "of another kind"


def test_a_damaged_checkpoint_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"w": torch.ones(10_000)}}, path)
    read(path)
    data = bytearray(path.read_bytes())
    data[20_000:20_200] = bytes(200)
    path.write_bytes(data)
    with pytest.raises(UserError, match="does not match its check sum"):
        read(path)
