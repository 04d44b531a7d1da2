"""The benchmark of generation on a tiny model: what it compares is the same work, and its figures add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import generate
from benchmarks.generation_rounds import interval, summary


def test_medians_and_their_intervals() -> None:
    # of 6 values the smallest is above the median with probability 1/64, of 20 the sixth with 0.0207
    assert interval([5, 1, 3, 2, 6, 4]) == [1, 3.5, 6]
    assert interval(list(range(20, 0, -1))) == [6, 10.5, 15]
    assert interval([2.0, 1.0]) == [1.0, 1.5, 2.0]


def test_ratios_and_what_is_added() -> None:
    seconds = {
        "network": [2.0], "whole": [3.0], "stock": [4.0], "decode": [1.0], "tiny": [0.25], "cfg": [4.0],
        "nasa, first": [2.5], "nasa, later": [2.1], "nag, first": [3.0], "nag, later": [2.5],
        "network, compiled": [1.0], "decode, compiled": [0.5], "whole, compiled": [1.5],
    }  # fmt: skip
    found = summary(seconds, {"teacher": [60.0], "whole": [3.0]})
    assert found["whole_over_stock"][1] == 0.75
    assert found["teacher_over_whole"][1] == 20
    assert found["decode_over_tiny"][1] == 4
    assert {name: value[1] for name, value in found["added_to_network"].items()} == pytest.approx(
        {"cfg": 1.0, "nasa, first": 0.25, "nasa, later": 0.05, "nag, first": 0.5, "nag, later": 0.25}
    )
    assert found["added_to_whole"]["nasa, later"][1] == pytest.approx(0.1 / 3)
    assert found["share_of_cfgs"]["nasa, later"][1] == pytest.approx(0.05)
    assert found["share_of_cfgs"]["nag, later"][1] == pytest.approx(0.25)
    assert found["compiled_speedup"]["network"][1] == 2
    assert found["milliseconds"]["whole"] == 3000


def test_generation_is_measured_beside_the_stock_pipeline(tiny_sd: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- generation emoji -->\nold\n<!-- end of generation emoji -->\nafter\n")
    options = ["--model", str(tiny_sd), "--batch", "1", "3", "--rounds", "1", "--threads", "1"]
    generate.main([*options, "--output", str(tmp_path / "out"), "--into", str(page)])
    facts = json.loads((tmp_path / "out" / "emoji.json").read_text())
    for one, batch in zip(facts["results"], (1, 3), strict=True):
        assert one["batch"] == batch
        assert one["difference_from_stock"] < 1e-4  # the same pictures
        assert min(one["milliseconds"].values()) > 0
        counted = one["operations"]
        assert counted["cfg"] == 2 * counted["network"]
        assert counted["network"] < counted["nasa, later"] < counted["nasa, first"] < counted["cfg"]
        assert one["milliseconds"]["teacher"] > one["milliseconds"]["stock"]
    text = (tmp_path / "out" / "emoji.md").read_text()
    assert page.read_text() == (
        f"before\n<!-- generation emoji -->\n{text}<!-- end of generation emoji -->\nafter\n"
    )
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| batch")]
    assert len(tables) == 3
    for table in tables:
        assert len({line.count("|") for line in table}) == 1 and len(table) == 4


def test_impossible_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--rounds", "0"], ["--clock", "cpu", "--threads", "2"]):
        with pytest.raises(SystemExit):
            generate.main(options)
    assert "must be at least 1" in capsys.readouterr().err
