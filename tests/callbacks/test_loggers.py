"""metrics.csv over several sessions."""

import csv
from pathlib import Path

import pytest
import torch

from callbacks.loggers import MetricsCSV


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_values_of_a_step_share_a_row_and_new_columns_are_added(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"loss": 0.1 + 0.2}, step=1)
    logger.log_metrics({"loss": torch.tensor(0.5), "lr": 1e-6}, step=2)
    logger.log_metrics({"val/fd": 3.0}, step=2)
    logger.log_metrics({"loss": float("nan")}, step=3)
    logger.finalize("success")
    assert read(tmp_path / "metrics.csv") == [
        {"step": "1", "loss": "0.30000000000000004", "lr": "", "val/fd": ""},
        {"step": "2", "loss": "0.5", "lr": "1e-06", "val/fd": "3"},
        {"step": "3", "loss": "nan", "lr": "", "val/fd": ""},
    ]


def test_a_resumed_session_keeps_earlier_rows_and_drops_later_ones(tmp_path: Path) -> None:
    first = MetricsCSV(tmp_path)
    for step in range(1, 6):
        first.log_metrics({"loss": step / 8}, step=step)
    first.finalize("failed")
    second = MetricsCSV(tmp_path, resume_step=3)
    assert len(read(tmp_path / "metrics.csv")) == 5, "nothing is dropped before the run has begun"
    second.log_metrics({"other": 1.5}, step=4)
    second.finalize("success")
    rows = read(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["loss"] for row in rows] == ["0.125", "0.25", "0.375", ""]
    assert rows[-1]["other"] == "1.5"


def test_a_row_cut_short_by_a_kill_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n1,0.5\n2,0.25\n3")
    logger = MetricsCSV(tmp_path, resume_step=2)
    logger.log_metrics({"loss": 0.75}, step=3)
    logger.finalize("success")
    assert [(row["step"], row["loss"]) for row in read(path)] == [("1", "0.5"), ("2", "0.25"), ("3", "0.75")]


def test_flush_makes_the_row_visible_and_more_values_of_its_step_join_it(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"loss": 0.5}, step=1)
    assert read(tmp_path / "metrics.csv") == []
    logger.flush()
    assert read(tmp_path / "metrics.csv") == [{"step": "1", "loss": "0.5"}]
    logger.log_metrics({"val/fd": 2.5}, step=1)
    logger.finalize("success")
    assert read(tmp_path / "metrics.csv") == [{"step": "1", "loss": "0.5", "val/fd": "2.5"}]


def test_a_row_that_was_flushed_for_a_checkpoint_is_not_lost(tmp_path: Path) -> None:
    """Killed before the next row or later: it is in the file, and a repeated validation joins it."""
    for later_rows in (0, 1):
        folder = tmp_path / str(later_rows)
        killed = MetricsCSV(folder)
        for step in (1, 2):
            killed.log_metrics({"loss": step / 8, "lr": 1.0}, step=step)
        killed.flush()
        for step in range(3, 3 + later_rows):
            killed.log_metrics({"loss": step / 8}, step=step)
        resumed = MetricsCSV(folder, resume_step=2)
        resumed.finalize("failed")  # a checkpoint that is refused leaves the file as it is
        assert [row["step"] for row in read(folder / "metrics.csv")] == ["1", "2"]
        resumed.log_metrics({"val/fd": 2.5}, step=2)  # the validation that was interrupted
        resumed.log_metrics({"loss": 0.375}, step=3)
        resumed.finalize("success")
        assert [tuple(row.values()) for row in read(folder / "metrics.csv")] == [
            ("1", "0.125", "1", ""), ("2", "0.25", "1", "2.5"), ("3", "0.375", "", "")
        ]  # fmt: skip


def test_repeated_tests_at_one_step_are_rows_of_their_own(tmp_path: Path) -> None:
    for value in (3.5, 4.5):
        logger = MetricsCSV(tmp_path, filename="metrics_test.csv")
        logger.log_metrics({"test/fd": value}, step=2)
        logger.finalize("success")
    assert [row["test/fd"] for row in read(tmp_path / "metrics_test.csv")] == ["3.5", "4.5"]


def test_a_log_without_values_leaves_no_row(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({}, step=1)
    logger.finalize("success")
    assert read(tmp_path / "metrics.csv") == []


def test_a_measurement_repeated_in_a_resumed_session_replaces_the_first(tmp_path: Path) -> None:
    first = MetricsCSV(tmp_path)
    first.log_metrics({"loss": 0.5}, step=2)
    first.flush()
    first.log_metrics({"test/fd": 3.0, "test/clip": 0.25}, step=2)
    first.finalize("success")
    second = MetricsCSV(tmp_path, resume_step=2)
    second.log_metrics({"test/fd": 3.5, "test/clip": 0.5}, step=2)
    second.finalize("success")
    assert read(tmp_path / "metrics.csv") == [
        {"step": "2", "loss": "0.5", "test/fd": "3.5", "test/clip": "0.5"},
    ]


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\xff\xfe", b'step,a\n1,"' + b"x" * 2_000_000, None])
def test_a_damaged_table_is_kept_aside(content: bytes | None, tmp_path: Path) -> None:
    table = tmp_path / "metrics.csv"
    table.mkdir() if content is None else table.write_bytes(content)
    logger = MetricsCSV(tmp_path, 3)
    with pytest.warns(UserWarning, match="can't be continued .* it is kept as metrics.damaged-"):
        logger.log_metrics({"a": 1.0}, 4)
    logger.finalize("success")
    assert table.read_text().split() == ["step,a", "4,1"]
    (aside,) = tmp_path.glob("metrics.damaged-*")
    assert aside.is_dir() if content is None else aside.read_bytes() == content
