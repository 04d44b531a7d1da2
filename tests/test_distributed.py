"""Several processes are one: gradients, losses, checkpoints and the order of prompts."""

import copy
import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import DoublePrecision, Precision
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import cli
from callbacks.checkpoint import RunCheckpoint
from callbacks.evaluation import Evaluation
from callbacks.run_folder import RunFolder, read_checkpoint
from callbacks.samples import SampleGrid
from common.errors import UserError
from common.hashing import hash_tensors
from datamodules.prompts import PromptDataModule
from datamodules.real_pictures import RealPictures
from lightning_modules import parallel
from lightning_modules.build import Built, NetworkSettings, build_networks
from lightning_modules.checkpoints import read
from lightning_modules.diffusion.steps import Steps
from lightning_modules.distillation import OneStepDistillation
from lightning_modules.networks.decoder import LatentDecoder
from lightning_modules.networks.loading import load_parts
from lightning_modules.networks.lora import LoraSettings, StudentLoraSettings
from lightning_modules.networks.roles import ScoreModels
from lightning_modules.networks.student import load_student
from lightning_modules.networks.weight_files import WeightFiles
from lightning_modules.objectives.swiftbrush import SwiftBrush
from lightning_modules.optimization import RoleOptimization
from lightning_modules.parallel import FullySharded
from tests.backbones import FLOWS, without_t5
from tests.conftest import TOKENS
from tests.distributed_runs import run_processes
from tests.tiny_distillation import PROMPTS, Hooks, Pull, distillation, fit, trainer
from tests.tiny_judges import clip_settings, copied_clip

BATCH = 6
STEPS = 2


def sgd(rate: float) -> RoleOptimization:
    """Plain SGD, because Adam turns the rounding of a vanishing gradient into a full step; no clipping."""
    return RoleOptimization(lambda groups: torch.optim.SGD(groups, lr=rate), clip_norm=None)


def adam_roles() -> dict[str, Any]:
    """Optimizers with states; epsilon keeps Adam from turning rounding into steps."""
    return {role: RoleOptimization(lambda groups: torch.optim.Adam(groups, lr=1e-3, eps=1e-3))
            for role in ("student", "fake_score")}  # fmt: skip


class Notes(L.Callback):
    """What every step saw and did: prompts, losses, gradients, weights, by rank."""

    def __init__(self, module: OneStepDistillation) -> None:
        self.steps: list[dict[str, Any]] = []
        guard, module_ = module._guard, module
        step = guard.step

        def noted(optimizer: Any, optimization: Any, *rest: Any) -> Any:
            before = {n: p for n, p in module_.named_parameters() if p.grad is not None}
            kept: dict[str, Tensor] = {}
            clip = optimization.clip

            def after_averaging(parameters: Any) -> Tensor:
                kept.update({name: whole(p.grad) for name, p in before.items()})
                return clip(parameters)

            optimization.clip = after_averaging
            try:
                return step(optimizer, optimization, *rest)
            finally:
                optimization.clip = clip
                self.steps[-1].setdefault("gradients", {}).update(kept)

        guard.step = noted  # type: ignore[method-assign]

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, _: int) -> None:
        self.steps.append({"prompts": batch["prompts"]})

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        logged = trainer.callback_metrics.items()
        names = ("train/", "gradient_norm/")
        self.steps[-1]["losses"] = {name: float(value) for name, value in logged if name.startswith(names)}


def whole(tensor: Any) -> Tensor:
    """A copy of a gradient, gathered if it is in shards."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(
    teacher: Path, folder: Path, *more: L.Callback, strategy: Any = "auto", devices: int = 1,
    micro: int | None = None, every: int = STEPS,
    double: bool = False, steps: int = STEPS, ckpt: Path | None = None, save: bool = False,
    watch: Callable[[L.Trainer], None] | None = None, real: RealPictures | None = None, **settings: Any,
) -> None:  # fmt: skip
    """Train the tiny model; each process writes its notes, checkpoints come to `folder`."""
    L.seed_everything(0, verbose=False)
    roles = {"student": sgd(20.0), "fake_score": sgd(20.0)}
    module = distillation(teacher, **(roles | settings))
    notes = Notes(module)
    data = PromptDataModule(
        PROMPTS, batch_size=BATCH, micro_batch_size=micro, eval_captions=PROMPTS, eval_size=2, real=real
    )
    saving = [RunCheckpoint(every, keep_step_checkpoints=2)] if save else []
    callbacks = [notes, *more, RunFolder(folder), *saving]
    run = trainer(
        folder, steps, callbacks, devices=devices, strategy=strategy, enable_checkpointing=save,
        log_every_n_steps=1,
        # not by its name, by which Lightning refuses float64 in shards
        plugins=[DoublePrecision() if double else Precision()],
    )  # fmt: skip
    if double:
        module.double()
    run.fit(module, data, ckpt_path=str(ckpt) if ckpt else None)
    if watch is not None:
        watch(run)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: whole(p) for name, p in module.named_parameters() if p.requires_grad}
    ema = {name: whole(p) for name, p in module.ema.shadow.items()} if module.ema else {}
    torch.save({"steps": notes.steps, "weights": weights, "ema": ema}, folder / f"notes_{run.global_rank}.pt")


def notes(folder: Path, rank: int = 0) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / f"notes_{rank}.pt", weights_only=True)
    return content


def relative_distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Largest difference of any tensor's entries by the largest entry of all tensors of the first."""
    assert first.keys() == second.keys() and first
    scale = max(float(value.abs().max()) for value in first.values())
    distance = max(float((second[name] - value).abs().max()) for name, value in first.items())
    return distance / scale if scale else distance


def assert_same_numbers(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    """Losses and gradients of all steps, weights and averages at the end."""
    for first, second in zip(one["steps"], other["steps"], strict=True):
        for name, value in first["losses"].items():
            assert second["losses"][name] == pytest.approx(value, rel=100 * tolerance, abs=1e-7), name
    # VSD's first gradient is zero, the fake score being the teacher still; a later one is a difference of
    # networks that differ by rounding already
    for step, role, factor in ((0, "student.", 1), (0, "scores.", 1), (1, "student.", 10)):
        gradients = [run["steps"][step]["gradients"] for run in (one, other)]
        parts = [{n: g for n, g in run.items() if n.startswith(role)} for run in gradients]
        assert relative_distance(*parts) <= factor * tolerance, (step, role)
    assert relative_distance(one["weights"], other["weights"]) <= 10 * tolerance
    assert relative_distance(one["ema"], other["ema"]) <= 10 * tolerance


@pytest.fixture
def any_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64 is refused for training; here it shows that differences are rounding."""
    monkeypatch.setattr("lightning_modules.distillation.check_trainer", lambda trainer: None)


@pytest.mark.parametrize(("double", "tolerance"), [(True, 1e-6), (False, 1e-4)])
def test_two_processes_have_the_gradients_of_one(
    double: bool, tolerance: float, tiny_sd: Path, tmp_path: Path, any_precision: None
) -> None:
    """Half the batch each, in micro-batches of one; DDP neither searches for unused weights nor sends any."""
    train(tiny_sd, tmp_path / "one", double=double)
    synchronized: list[bool] = []

    def two() -> None:
        plain = parallel.without_sync

        def watched(model: Any) -> Any:
            assert isinstance(model, DistributedDataParallel) and not model.find_unused_parameters
            synchronized.append(True)
            return plain(model)

        parallel_name = "lightning_modules.distillation.without_sync"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parallel_name, watched)
            train(tiny_sd, tmp_path / "two", strategy="ddp", devices=2, micro=1, double=double)
        assert len(synchronized) == STEPS

    run_processes(2, two, tmp_path / "log")
    one, ranks = notes(tmp_path / "one"), [notes(tmp_path / "two", rank) for rank in (0, 1)]
    assert_same_numbers(one, ranks[0], tolerance)
    assert relative_distance(ranks[0]["weights"], ranks[1]["weights"]) == 0
    for step in range(STEPS):
        assert sum((run["steps"][step]["prompts"] for run in ranks), []) == one["steps"][step]["prompts"]


def test_a_run_goes_on_with_another_number_of_processes(tiny_sd: Path, tmp_path: Path) -> None:
    """Two steps by two processes, two more by one or three: the prompts of the run by one process alone."""
    train(tiny_sd, tmp_path / "whole", steps=4)
    expected = [step["prompts"] for step in notes(tmp_path / "whole")["steps"]]
    two = tmp_path / "two"
    run_processes(2, lambda: train(tiny_sd, two, strategy="ddp", devices=2, save=True), tmp_path / "log")
    ckpt = two / "checkpoints" / "last.ckpt"
    train(tiny_sd, tmp_path / "one", steps=4, ckpt=ckpt)
    three = tmp_path / "three"
    run_processes(
        3, lambda: train(tiny_sd, three, strategy="ddp", devices=3, steps=4, ckpt=ckpt), tmp_path / "log"
    )
    assert [step["prompts"] for step in notes(tmp_path / "one")["steps"]] == expected[2:]
    shares = [[step["prompts"] for step in notes(three, rank)["steps"]] for rank in range(3)]
    assert [sum(parts, []) for parts in zip(*shares)] == expected[2:]
    assert len({tuple(parts) for parts in shares[0]}) == 2 and all(len(p) == 2 for s in shares for p in s)
    assert relative_distance(notes(tmp_path / "whole")["weights"], notes(three)["weights"]) <= 1e-3


@pytest.mark.parametrize(("lora", "decoded"), [("adapter", 3), ("full copy", 1)])
def test_shards_are_ddp(
    lora: str, decoded: int, tiny_sd: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 on two processes: DDP's losses, first gradients, weights, average, pictures and scores.

    With clipping of gradients, and an image loss for which one process decodes more than the other.
    """
    monkeypatch.setenv("ONE_STEP_CACHE", str(tmp_path / "cache"))
    scoring = str(copied_clip(tiny_clip, tmp_path / "scoring"))
    clipped = {role: RoleOptimization(lambda groups: torch.optim.SGD(groups, lr=20.0), clip_norm=1e-3)
               for role in ("student", "fake_score")}  # fmt: skip
    settings: dict[str, Any] = clipped | ({} if lora == "adapter" else {"lora": None})
    settings |= {"image_losses": clip_settings(tiny_clip, images_per_update=decoded), "decode_slice": 1}

    def sharded() -> None:
        def all_in_shards(run: L.Trainer) -> None:
            module: Any = run.lightning_module
            assert all(isinstance(p, DTensor) for p in module.student.parameters())
            assert all(isinstance(p, DTensor) for p in module.scores.parameters())
            assert all(isinstance(p, DTensor) for p in module.generator.prompt_encoder.parameters())
            autoencoder = list(module.generator.decoder.parameters())
            assert all(isinstance(p, DTensor) for p in autoencoder)
            share = module.memory_parts()["autoencoder"][0] / sum(p.numel() for p in autoencoder)
            assert 0.5 <= share < 0.55 or run.global_rank

        run_one("fsdp", FullySharded(), all_in_shards)

    def run_one(name: str, strategy: Any, watch: Callable[[L.Trainer], None] | None = None) -> None:
        grid = SampleGrid(num_images=3, teacher_steps=2)
        scores = Evaluation(
            scoring, None, final_size=3, batch_size=2, teacher_rows=False, timing_batch_size=1
        )
        train(tiny_sd, tmp_path / name, grid, scores, strategy=strategy, devices=2, watch=watch, **settings)
        assert scores.final is not None
        result = scores.final.metrics["clip_score"]
        assert result["num_images"] == 3
        torch.save(result["value"], tmp_path / name / "score.pt")

    for work in (sharded, lambda: run_one("ddp", "ddp")):
        run_processes(2, work, tmp_path / "log")
    ddp, fsdp = (tmp_path / name for name in ("ddp", "fsdp"))
    assert_same_numbers(notes(ddp), notes(fsdp), 1e-4)
    assert notes(ddp)["steps"][0]["losses"]["train/student_clip"] > 0.1
    assert torch.load(fsdp / "score.pt") == pytest.approx(torch.load(ddp / "score.pt"), rel=1e-4)
    for name in ("step_0.png", f"step_{STEPS}.png"):
        pictures = [np.asarray(Image.open(run / "samples" / name)).astype(int) for run in (ddp, fsdp)]
        assert abs(pictures[0] - pictures[1]).max() <= 1 and pictures[0].std() > 1


@pytest.mark.parametrize("adapters", [True, False])
def test_shards_from_the_files_are_those_of_whole_networks(
    adapters: bool, backbone_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Bit for bit; no process reads more of a weight than its share, nor holds the network at any time."""
    lora = LoraSettings(rank=2, alpha=4.0, targets=["to_q", "to_v"])
    settings = NetworkSettings(
        str(backbone_folder("sd3")), Steps((999,)), lora if adapters else None, None,
        StudentLoraSettings(rank=2, alpha=4.0) if adapters else None, None, False,
    )  # fmt: skip
    read: list[Tensor] = []

    def build(in_shards: bool) -> Built:
        torch.manual_seed(0)
        built = build_networks(replace(settings, in_shards=in_shards), SwiftBrush())
        networks = [built.student, *built.scores.networks()]
        own = [p for n in networks for name, p in n.named_parameters() if "lora_" not in name]
        assert all(p.is_meta is in_shards for p in own)
        parallel.shard_networks(networks, mesh, built.parts.weights)
        return built

    def work() -> None:
        torch.distributed.init_process_group("gloo")
        nonlocal mesh
        mesh = init_device_mesh("cpu", (2,))
        whole = build(False)
        with pytest.MonkeyPatch.context() as patch:
            rows = WeightFiles.rows
            patch.setattr(WeightFiles, "rows", lambda *given: read.append(rows(*given)) or read[-1])
            ours = build(True)
        assert ours.student_base == whole.student_base
        pairs = [(ours.student, whole.student), (ours.scores, whole.scores)]
        for one, other in pairs:
            expected = dict(other.named_parameters())
            for name, parameter in one.named_parameters():
                assert parameter.requires_grad is expected[name].requires_grad
                assert torch.equal(parameter.to_local(), expected[name].to_local()), name  # type: ignore[operator]
        # each network's share, which is half of it and what can't be halved
        size = sum(p.numel() for p in load_parts(settings.teacher).denoiser.parameters())
        assert 0.5 <= sum(x.numel() for x in read) / (len(ours.scores.networks()) + 1) / size < 0.52
        x, t = torch.randn(1, *ours.parts.latent_shape), torch.tensor([500])
        outputs = [
            network(x, t, built.generator.prompt_encoder.encode(["a cat"])).epsilon
            for built in (ours, whole) for network in (built.networks.student, built.networks.fake_score)
        ]  # fmt: skip
        assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
        outputs[0].sum().backward()
        assert any(p.grad is not None for p in ours.student.parameters())

    mesh: Any = None
    run_processes(2, work, tmp_path / "log")


def test_text_encoders_and_autoencoders_in_shards_do_the_same(
    backbone_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Also where one process has nothing to decode, and nothing to differentiate."""

    def through(decoder: LatentDecoder, latents: Tensor) -> list[Tensor]:
        pictures = decoder.decode(latents)
        with torch.no_grad():
            again = decoder.encode(pictures)
        return [pictures, again, *torch.autograd.grad(pictures.square().sum(), latents)]

    def work() -> None:
        torch.distributed.init_process_group("gloo")
        mesh, rank = init_device_mesh("cpu", (2,)), torch.distributed.get_rank()
        for name in FLOWS:
            parts = load_parts(backbone_folder(name), without=("denoiser",))
            encoder = parts.backbone.prompt_encoder(parts)
            expected, whole = encoder.embed(PROMPTS[:2]), sum(p.numel() for p in encoder.parameters())
            parallel.shard_text_encoders(encoder, mesh)
            found, shards = encoder.embed(PROMPTS[:2]), [p.to_local() for p in encoder.parameters()]  # type: ignore[operator]
            assert 0.5 <= sum(x.numel() for x in shards) / whole < 0.55 or rank
            assert all(torch.equal(found[key], value) for key, value in expected.items()), name
            decoder = LatentDecoder(parts.vae, slice_size=1)
            whole = sum(p.numel() for p in decoder.parameters())
            latents = torch.randn(2, parts.backbone.latent_channels(parts.vae), 4, 4, requires_grad=True)
            outputs = through(decoder, latents)
            parallel.shard_autoencoders([parts.vae], mesh)
            ours = through(decoder, latents[: 2 - 2 * rank])
            shards = [p.to_local() for p in decoder.parameters()]  # type: ignore[operator]
            assert 0.5 <= sum(x.numel() for x in shards) / whole < 0.6 or rank
            assert all(torch.equal(x, y[: len(x)]) for x, y in zip(ours, outputs, strict=True)), name

    for name in FLOWS:
        backbone_folder(name)
    run_processes(2, work, tmp_path / "log")


def test_networks_without_shards_are_averaged(smaller_sd: Path, tmp_path: Path) -> None:
    """Those of the objective, beside shards in one optimizer: one norm for both, equal on all processes."""
    fsdp = tmp_path / "fsdp"
    run_processes(
        2, lambda: train(smaller_sd, fsdp, strategy=FullySharded(), devices=2, objective=Pull(3.0)),
        tmp_path / "log",
    )  # fmt: skip
    train(smaller_sd, tmp_path / "one", objective=Pull(3.0))
    one, ranks = notes(tmp_path / "one"), [notes(fsdp, rank) for rank in (0, 1)]
    assert relative_distance(ranks[0]["weights"], ranks[1]["weights"]) == 0
    assert_same_numbers(one, ranks[0], 1e-4)


class ThreeCopies(ScoreModels):
    """The fake score's adapter on frozen weights of its own, not the teacher's."""

    def __init__(self, base: torch.nn.Module, *settings: Any) -> None:
        super().__init__(copy.deepcopy(base), *settings)
        self.untouched = base.requires_grad_(False).eval()

    @contextmanager
    def teacher_network(self) -> Iterator[torch.nn.Module]:
        yield self.untouched

    def networks(self) -> list[torch.nn.Module]:
        return [*super().networks(), self.untouched]


def test_three_roles_on_one_base_are_three_copies_in_two_processes(
    backbone_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The same losses for 20 steps; without and with gradient checkpointing, under DDP and in shards.

    And those of one process. The teacher is Stable Diffusion 3 without T5, whose zeros are counted.
    """
    teacher = without_t5(backbone_folder("sd3"), tmp_path / "sd3")

    def losses(
        strategy: Any, copies: bool = False, checkpointing: bool = False, processes: int = 2
    ) -> list[dict[str, float]]:
        lora = StudentLoraSettings(rank=2, alpha=4.0, targets=["to_q", "to_k"], share_base=not copies)
        module = distillation(
            teacher, student_lora=lora, start_timestep=999, gradient_checkpointing=checkpointing,
            student=sgd(20.0), fake_score=sgd(20.0), ema_decay=None,
        )  # fmt: skip
        found: list[dict[str, float]] = []
        lengths = set[int]()

        def watch_texts(m: OneStepDistillation) -> None:
            hook = m.scores.base.context_embedder.register_forward_hook  # type: ignore[union-attr, operator]
            hook(lambda _, inputs, output: lengths.add(output.shape[1]))

        def note(m: OneStepDistillation) -> None:
            logged = m.trainer.callback_metrics.items()
            found.append({n: float(x) for n, x in logged if n.startswith(("train/", "gradient_norm/"))})

        with pytest.MonkeyPatch.context() as patch:
            if copies:
                patch.setattr("lightning_modules.build.ScoreModels", ThreeCopies)
            fit(
                module, tmp_path, 20, Hooks(watch_texts, note), batch_size=2, strategy=strategy,
                devices=processes,
            )  # fmt: skip
        assert lengths == {TOKENS + 1}
        if copies:
            assert isinstance(module.scores, ThreeCopies)
        elif strategy == "ddp":
            inside = {id(p) for p in module.scores.base.parameters()}
            assert module.student is not None
            assert all(id(p) in inside for p in module.student.parameters() if not p.requires_grad)
        return found

    def work() -> None:
        for strategy in ("ddp", FullySharded):
            ways = [(True, False), (False, False), (False, True)]
            runs = [losses(strategy if isinstance(strategy, str) else strategy(), *way) for way in ways]
            assert runs[0][0]["gradient_norm/student"] == 0 and runs[0][-1]["gradient_norm/student"] > 1e-5
            for run in runs[1:]:
                assert len(run) == 20
                for ours, expected in zip(run, runs[0], strict=True):
                    assert ours == pytest.approx(expected, rel=1e-6, abs=1e-9)
            for ours, expected in zip(runs[0], alone, strict=True):
                assert ours == pytest.approx(expected, rel=1e-6, abs=1e-9)

    alone = losses("auto", processes=1)
    run_processes(2, work, tmp_path / "log")


@pytest.fixture(scope="module")
def shards(smaller_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two steps whose checkpoints are a folder of shards or one file, and the same resumed after one.

    All in one pair of processes, as each takes long to learn how its operations act on shards. The objective
    trains a network of its own, whole on each process, and its first gradient isn't zero: so there are
    optimizer states of all kinds after one step.
    """
    root = tmp_path_factory.mktemp("shards")

    def work() -> None:
        for folder in (True, False):
            for name in ("whole", "resumed"):
                step_1 = root / str(folder) / "whole" / "checkpoints" / "step_1.ckpt"
                train(
                    smaller_sd, root / str(folder) / name, devices=2, save=True, every=1,
                    strategy=FullySharded(save_distributed_checkpoint=folder),
                    ckpt=None if name == "whole" else step_1, objective=Pull(3.0), **adam_roles(),
                )  # fmt: skip

    run_processes(2, work, root / "log")
    return root


@pytest.mark.parametrize("folder", [True, False])
def test_checkpoints_of_shards(folder: bool, shards: Path, smaller_sd: Path, tmp_path: Path) -> None:
    """Resuming, consolidating, exporting."""
    root = shards / str(folder)
    last = root / "whole" / "checkpoints" / "step_1.ckpt"
    assert last.is_dir() is folder
    assert sorted(path.name for path in last.parent.iterdir()) == ["last.ckpt", "step_1.ckpt", "step_2.ckpt"]
    assert read_checkpoint(last)["global_step"] == 1
    whole_run, resumed = notes(root / "whole"), notes(root / "resumed")
    assert relative_distance(whole_run["weights"], resumed["weights"]) == 0
    assert relative_distance(whole_run["ema"], resumed["ema"]) == 0

    final = root / "resumed" / "checkpoints" / "last.ckpt"
    student = load_student(final).parts.denoiser.state_dict()
    assert relative_distance(resumed["ema"], {n: student[n] for n in resumed["ema"]}) == 0
    online = load_student(final, "online").parts.denoiser.state_dict()
    own = {n.removeprefix("student."): p for n, p in resumed["weights"].items() if n.startswith("student.")}
    assert relative_distance(own, {name: online[name] for name in own}) == 0
    cli.main(["export", "--checkpoint", str(final), "--output", str(tmp_path / "exported")])
    if folder:
        one_file = tmp_path / "one.ckpt"
        cli.main(["consolidate", "--checkpoint", str(last), "--output", str(one_file)])
        assert hash_tensors(read(one_file)["state_dict"]) == hash_tensors(read(last)["state_dict"])
    train(smaller_sd, tmp_path / "alone", ckpt=last, save=True, objective=Pull(3.0), **adam_roles())
    alone = notes(tmp_path / "alone")
    assert len(alone["steps"]) == 1, "one process goes on from what two have saved"
    assert relative_distance(alone["weights"], resumed["weights"]) <= 1e-4


def test_a_full_disk_leaves_the_old_shards(tiny_sd: Path, tmp_path: Path) -> None:
    """The file system refuses the second process's shard, then what the first one alone writes."""
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    real = torch.save

    class SavesTwice(L.Callback):
        """After the checkpoint of the second step."""

        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step != STEPS:
                return
            saving = next(c for c in trainer.callbacks if isinstance(c, RunCheckpoint))  # type: ignore[attr-defined]
            if trainer.global_rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (16384, resource.RLIM_INFINITY))
            with pytest.raises(UserError, match="of step 2 cannot be written.*File too large.*as it was"):
                saving.save(trainer)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            with pytest.MonkeyPatch.context() as patch:
                if trainer.global_rank == 0:
                    patch.setattr(torch, "save", full)
                with pytest.raises(UserError, match="cannot be written.*No space left.*as it was"):
                    saving.save(trainer)

    def full(content: Any, file: Any, *rest: Any, **how: Any) -> None:
        if isinstance(file, Path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(content, file, *rest, **how)

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        train(tiny_sd, tmp_path / "run", SavesTwice(), strategy=FullySharded(), devices=2, steps=3, save=True)

    run_processes(2, work, tmp_path / "log")
    assert sorted(path.name for path in last.parent.iterdir()) == ["last.ckpt", "step_2.ckpt"]
    assert [read_checkpoint(last.with_name(f"{n}.ckpt"))["global_step"] for n in ("step_2", "last")] == [2, 3]


def test_a_signal_to_one_process_stops_all_after_a_saved_step(tiny_sd: Path, tmp_path: Path) -> None:
    def stopped() -> None:
        class Signal(L.Callback):
            def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
                if trainer.global_rank == 1 and trainer.global_step == 2:
                    os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(SIGTERMException):
            train(tiny_sd, tmp_path / "run", Signal(), strategy="ddp", devices=2, steps=9, save=True)

    run_processes(2, stopped, tmp_path / "log")
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 3


def test_a_bucket_that_is_exactly_full_is_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_BUCKET_BYTES", 32)  # of two weights, then of one, then of what is left

    def work() -> None:
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
        weights = [torch.nn.Parameter(torch.zeros(size)) for size in (4, 4, 8, 3)]
        for weight in weights:
            weight.grad = torch.full_like(weight, 1.0 + 2 * rank)
        parallel.average_gradients(weights)
        assert all(torch.equal(weight.grad, torch.full_like(weight, 2.0)) for weight in weights)  # type: ignore[arg-type]

    run_processes(2, work, tmp_path / "log")


def test_weights_beside_shards_begin_as_the_first_process_has_them(tmp_path: Path) -> None:
    def work() -> None:
        torch.distributed.init_process_group("gloo")
        weights = [torch.nn.Parameter(torch.full((3,), float(torch.distributed.get_rank() + 1)))]
        parallel.same_on_all_processes(weights)
        assert torch.equal(weights[0].data, torch.ones(3))

    run_processes(2, work, tmp_path / "log")
