"""The benchmarks on tiny models: what they compare is the same work, and their figures add up."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import generate, gpu
from benchmarks.generate import summary
from benchmarks.measuring import interval
from benchmarks.memory import EIGHT_BIT, GIB, LiveMemory, Needs, fixed, gpu_autocast, room, turns
from benchmarks.models import write_model
from lightning_modules.networks.loading import load_parts


def test_medians_and_their_intervals() -> None:
    # of 6 values the smallest is above the median with probability 1/64, of 20 the sixth with 0.0207
    assert interval([5, 1, 3, 2, 6, 4]) == [1, 3.5, 6]
    assert interval(list(range(20, 0, -1))) == [6, 10.5, 15]
    assert interval([2.0, 1.0]) == [1.0, 1.5, 2.0]


# --- generation


def test_ratios_and_what_is_added() -> None:
    seconds = {
        "network": [2.0], "whole": [3.0], "stock": [4.0], "teacher": [60.0], "cfg": [4.0],
        "nasa, first": [2.5], "nasa, later": [2.1], "nag, first": [3.0], "nag, later": [2.5],
    }  # fmt: skip
    found = summary(seconds)
    assert found["whole_over_stock"][1] == 0.75
    assert found["teacher_over_whole"][1] == 20
    assert {name: value[1] for name, value in found["added_to_network"].items()} == pytest.approx(
        {"cfg": 1.0, "nasa, first": 0.25, "nasa, later": 0.05, "nag, first": 0.5, "nag, later": 0.25}
    )
    assert found["added_to_whole"]["nasa, later"][1] == pytest.approx(0.1 / 3)
    assert found["milliseconds"]["whole"] == 3000


def test_generation_is_measured_beside_the_stock_pipeline(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(tiny_sd), "--batch", "1", "3", "--rounds", "1", "--threads", "1"]
    generate.main([*options, "--output", str(tmp_path / "out" / "generate.json")])
    results = json.loads((tmp_path / "out" / "generate.json").read_text())["numbers"]
    for one, batch in zip(results, (1, 3), strict=True):
        assert one["batch"] == batch
        assert one["difference_from_stock"] < 1e-4  # the same pictures
        assert min(one["milliseconds"].values()) > 0
        assert one["milliseconds"]["teacher"] > one["milliseconds"]["stock"]
    blocks = capsys.readouterr().out.split("\n\n")
    tables = [block.strip().splitlines() for block in blocks if block.startswith("| batch")]
    assert len(tables) == 2
    for table in tables:
        assert len({line.count("|") for line in table}) == 1 and len(table) == 4


def test_impossible_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        generate.main(["--rounds", "0"])
    assert "must be at least 1" in capsys.readouterr().err


def test_a_model_with_random_weights_is_a_model_like_any(tmp_path: Path) -> None:
    write_model(tmp_path / "model", small=True)
    parts = load_parts(tmp_path / "model")
    assert parts.latent_shape == (4, 16, 16) and parts.tokenizers[0].model_max_length == 77
    assert parts.picture_size == (128, 128)


# --- memory


def test_live_memory_of_a_known_computation() -> None:
    """A product of 4 KiB matrices: its result, then the two gradients; what is dropped counts no more."""
    with torch.device("meta"):
        x, layer = torch.empty(32, 32), nn.Linear(32, 32, bias=False)
    with LiveMemory() as memory:
        y = layer(x)
        assert memory.live == 4096
        z = y.view(-1).relu()
        assert memory.live == 2 * 4096  # a view is no memory of its own
        z.sum().backward()
        assert layer.weight.grad is not None
        del y, z
        assert memory.live == 4096 and max(memory.history) >= 4 * 4096


def test_casts_of_autocast() -> None:
    with torch.device("meta"):
        x, layer = torch.empty(2, 4, 8, 8), nn.Conv2d(4, 4, 1)
    norm, text = nn.GroupNorm(2, 4, device="meta"), torch.empty(1, 2, 16, 8, device="meta")
    with gpu_autocast():
        assert layer(x).dtype == torch.bfloat16 and norm(layer(x)).dtype == torch.float32
        assert nn.functional.scaled_dot_product_attention(text, text, text).dtype == torch.bfloat16
    assert nn.functional.linear is torch._C._nn.linear  # put back


def test_estimate_of_a_small_network() -> None:
    """It grows in proportion to the batch, is less with checkpoints, and holds the gradients."""
    plain, saving = (
        Needs(*(turns("sd21_small", batch, checkpointing=on) for batch in (2, 4))) for on in (False, True)
    )
    parts = fixed("sd21_small")
    assert saving.peak(16) < 0.6 * plain.peak(16)
    assert parts["student"] <= saving.peak(1) < plain.peak(1)  # gradients at least
    assert plain.peak(3) == pytest.approx(max(turns("sd21_small", 3)), rel=1e-3)  # sizes are rounded up
    assert parts["optimizer states"] == 2 * (parts["student"] + parts["fake score"])
    small = fixed("sd21_small", state=EIGHT_BIT)["optimizer states"]
    assert small < 0.3 * parts["optimizer states"] + 2 * parts["fake score"]
    assert fixed("sd21_small", lora=True)["student's base"] == parts["student"] // 2  # bfloat16


def test_largest_micro_batch() -> None:
    """Of two moments the first decides for small batches, the second, which grows faster, for large ones."""
    need = Needs([11, 8], [13, 16])
    assert [need.peak(batch) for batch in (1, 2, 3, 4)] == [10, 11, 12, 16]
    assert [need.largest(size) for size in (9, 10, 11.5, 15, 16)] == [0, 1, 2, 3, 4]
    assert room(11.0) == 9.5 * GIB


# --- the script for a GPU

SMALL = gpu.Setting(small=True, gpu=False)


def part(run: Any) -> gpu.Part:
    return gpu.Part("Rates", "a part", run)


def test_a_part_that_fails_or_hangs_is_noted() -> None:
    def fail(setting: gpu.Setting) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\n Tried")

    def hang(setting: gpu.Setting) -> Any:
        while True:
            time.sleep(0.01)

    assert gpu.attempt(part(fail), SMALL, 5)["error"] == "OutOfMemoryError: CUDA out of memory. Tried"
    assert gpu.attempt(part(hang), SMALL, 1)["error"] == "TimeoutError: not done in 1 s"
    assert gpu.attempt(part(lambda setting: {"one": 1}), SMALL, 5)["numbers"] == {"one": 1}


def test_the_next_part_begins_when_the_process_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Everything is saved after each part, and the page shows tables and what failed."""
    workers, saved = list[Any](), list[int]()
    found: list[Any] = [
        {"numbers": {"flops": 5e13, "convolution": 2e13, "bytes": 2e9}, "took": 1},
        {"error": "ended with -9"},
    ]

    class Worker:
        def __init__(self, setting: gpu.Setting) -> None:
            workers.append(self)

        def run(self, place: int, limit: int) -> Any:
            assert limit <= gpu.PARTS[place].limit
            return found[min(place, 1)]

        def stop(self) -> None:
            pass

    monkeypatch.setattr(gpu, "Worker", Worker)
    results = gpu.run_all([0, 1, 2], SMALL, 100, lambda results: saved.append(len(results)))
    assert (len(workers), saved) == (2, [1, 2, 3, 3])
    text = gpu.markdown(results)
    assert "| 50.000 | 20.000 | 2 |" in text and "- step sd21 16, compiled: ended with -9" in text
    page = tmp_path / "page.md"
    page.write_text(f"before\n{gpu.BEGIN}\nold\n{gpu.END}\nafter\n")
    gpu.put_into(page, text)
    assert page.read_text() == f"before\n{gpu.BEGIN}\n{text}\n{gpu.END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no lines"):
        gpu.put_into(page, text)
    assert "no time left" in gpu.markdown(gpu.run_all([0], SMALL, 5, lambda results: None))


def test_both_sides_compute_the_same_on_rectified_flow() -> None:
    """Which the public script does not have."""
    found = gpu.step(SMALL, "sd35m", 2)
    assert found["losses"]["project"]["student"][-1] > 0
    assert max(found["loss_differences"].values()) < 1e-4
    assert found["of_rate"] > 0 and found["model"] in gpu.step_table([found])
