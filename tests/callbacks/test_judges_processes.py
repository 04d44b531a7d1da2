"""Metrics of several pictures a prompt on 2 and 3 processes, 7 prompts of 3: the values of one process."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from callbacks.metrics.aesthetic import Aesthetic
from callbacks.metrics.base import ImageMetric
from callbacks.metrics.diversity import DiversityLpips, Vendi
from callbacks.metrics.emoji_geneval import EmojiTaskAccuracy
from callbacks.metrics.geneval import GenEvalAccuracy
from callbacks.metrics.image_reward import ImageReward
from callbacks.metrics.measure import Results, measure_set
from callbacks.metrics.pick_score import PickScore
from datamodules.evaluation_sets import EvaluationSet
from datamodules.task_prompts import EMOJI_TASKS, GENEVAL_TASKS
from tests.callbacks.judge_files import judges_folder
from tests.callbacks.networks import pictures
from tests.callbacks.test_diversity import classifier_file

PROMPTS = [f"number {i // 3}" for i in range(21)]


def write_prompts(folder: Path) -> None:
    """Both benchmarks' files for these prompts."""
    include = [{"class": "dog", "count": 1, "color": "red"}]
    fields = {"style": "noto", "background": "red"}
    for name, tasks in [("geneval", GENEVAL_TASKS), ("emoji", EMOJI_TASKS)]:
        lines = [
            {
                "tag": tasks[i % 6],
                "prompt": f"number {i}",
                "include": include,
                "object": "ab"[i % 2],
                **fields,
            }
            for i in range(7)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))


def measure(folder: Path, batch_size: int, rank: int = 0, world: int = 1) -> tuple[Results, Results]:
    """Results of ``measure_set``, and of the same pictures dealt out one by one, as Lightning does."""
    judges, images = str(folder / "judges"), pictures(21, seed=3, height=48, width=48)
    metrics: list[ImageMetric] = [
        Vendi(f"{judges}/clip-vit-large-patch14"), PickScore(judges=judges), Aesthetic(judges=judges),
        ImageReward(judges=judges), DiversityLpips("squeeze", f"{folder}/squeezenet.pth"),
        EmojiTaskAccuracy(f"{folder}/emoji.jsonl", f"{judges}/clip-vit-large-patch14"),
        GenEvalAccuracy(f"{folder}/geneval.jsonl", judges=judges, shortest=64, longest=64),
    ]  # fmt: skip
    for metric in metrics:
        metric.bind()
    drawn = EvaluationSet("set", PROMPTS, list(range(21)))
    dealt = measure_set(lambda prompts, seeds: images[seeds], drawn, metrics, batch_size)
    share, found = list(range(rank, 21, world)), Results()
    for metric in metrics:
        metric.prepare(PROMPTS)
        metric.update(images[share], [PROMPTS[i] for i in share], None, share)
        found |= metric.results()
    return dealt, found


def _process(rank: int, folder: Path, world: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    torch.save(measure(folder, 5, rank, world), folder / f"{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_an_uneven_set(world: int, tmp_path: Path, tiny_clip: Path) -> None:
    judges_folder(tiny_clip, tmp_path / "judges")
    write_prompts(tmp_path)
    classifier_file(tmp_path)
    alone, _ = measure(tmp_path, 40)
    # Forked, because starting afresh imports everything again; one thread, so there is nothing to inherit.
    mp.start_processes(_process, args=(tmp_path, world), nprocs=world, start_method="fork")
    for rank in range(world):
        for together in torch.load(tmp_path / f"{world}-{rank}.pt"):
            assert list(together) == list(alone)
            for name, result in alone.items():
                assert together[name]["num_images"] == result["num_images"], name
                assert together[name]["value"] == pytest.approx(result["value"], rel=1e-6), name
                assert together[name]["details"] == result["details"], name
