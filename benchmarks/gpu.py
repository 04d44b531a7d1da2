"""All that docs/performance.md leaves open for want of a GPU, most important first, in a few minutes.

    python benchmarks/gpu.py --minutes 8 --into docs/performance.md
    python benchmarks/gpu.py --parts rates,step              some of the parts
    python benchmarks/gpu.py --small                         miniature networks; so without a GPU

Networks have the published shapes and random weights, made on the device; prompts are encoded beforehand
(random, too), for both sides. The parts run in a process of their own, one after another. Each has a limit of
time; one that fails, hangs or ends the process is noted with its message, and the next one begins. Results
are written after each part, to --output (JSON) and into the file of --into, between the lines
`<!-- gpu: begin -->` and `<!-- gpu: end -->`.

"Of the matrix rate" is the time that nine passes a sample would take at the measured rate of a product of two
large matrices (three for the student's forward and backward, two guided for each score, two for the update of
the LoRA teacher, whose own products are left out), by the time of the step.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import statistics
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from torch import Tensor
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import generate, memory, train_step
from benchmarks.measuring import GIB, machine, parser, table, times
from benchmarks.models import MODELS, random_parts
from lightning_modules import compiling
from lightning_modules.generator import make_generator
from lightning_modules.networks.backbones.calling import run_network
from lightning_modules.parallel import FullySharded
from lightning_modules.pipelines import multistep_scheduler, stock_pipeline

BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
GRACE = 30  # seconds that a part over its limit has to stop by itself
FEWEST = 10  # seconds left with which no part begins
PASSES = 9  # of a step, for each sample
RANK = 64
Numbers = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """On what the parts run.

    Attributes:
        small: miniature networks.
        gpu: whether there is one.
    """

    small: bool
    gpu: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.gpu else "cpu")

    def model(self, name: str) -> str:
        """The shape that stands for a model."""
        return f"{name}_small" if self.small else name


# --- the training step


class RandomTexts:
    """In the place of text encoders: random numbers that follow from the prompts."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def embed(self, prompts: list[str], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Real numbers, and masks of nothing."""
        random = torch.Generator(device).manual_seed(zlib.crc32("\n".join(prompts).encode()))
        found = {}
        for name, shape in self.shapes.items():
            size = (len(prompts), *shape)
            if name.endswith("mask"):
                found[name] = torch.ones(size, dtype=torch.long, device=device)
            else:
                found[name] = torch.randn(size, generator=random, device=device, dtype=dtype)
        return found


@contextmanager
def random_model(name: str, setting: Setting, side: int | None = None) -> Iterator[None]:
    """Whatever is loaded inside is this model with random weights, with latents of this side."""

    def load(path: Any, **unused: Any) -> Any:
        return random_parts(name, setting.device, side=side)

    def no_encoders(encoder: Any, *unused: Any) -> None:
        encoder.look_up_in(RandomTexts(MODELS[name].text))

    with (
        patch("lightning_modules.build.load_parts", load),
        patch("benchmarks.reference_loop.load_parts", load),
        patch("lightning_modules.build.use_prompt_cache", no_encoders),
        # on a processor compiling would take most of the time
        patch.object(compiling, "BACKEND", compiling.BACKEND if setting.gpu else "eager"),
    ):
        yield


def options(setting: Setting, batch: int, rounds: int = 6, per_round: int = 3, **changes: Any) -> Numbers:
    """As `train_step.main` makes them."""
    rounds, per_round = (rounds, per_round) if setting.gpu else (2, 1)
    return {
        "folder": "random weights", "changes": {"prompt_cache": "random", **changes}, "batch": batch,
        "precision": "bf16-mixed" if setting.gpu else "32-true", "threads": torch.get_num_threads(),
        "per_round": per_round, "steps": per_round * (rounds + 1), "rank": RANK,
    }  # fmt: skip


def step(setting: Setting, model: str, batch: int, compile: bool | str = False) -> Numbers:
    """Steps of this project and of the plain loop in turns."""
    name = setting.model(model)
    given = options(setting, batch, compile=compile)
    with random_model(name, setting):
        found = train_step.summary(train_step.measure_speed(given, ThreadPoolExecutor(1)))
    seconds, rate = found["seconds"]["project"][1], rates(setting)["flops"]
    of_rate = PASSES * batch * operations(name) / rate / seconds
    return {"model": MODELS[name].title, "batch": batch, "compile": compile, "of_rate": of_rate, **found}


def operations(name: str) -> int:
    """Floating-point operations of one pass for one sample."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        run_network(MODELS[name].network(**MODELS[name].shape), *MODELS[name].inputs(1))
    return int(counter.get_total_flops())


def step_table(found: list[Numbers]) -> str:
    """A row for each setting."""
    head = ["", "batch", "compile", "steps/s", "plain loop", "ratio (95 %)", "of the matrix rate",
            "largest loss difference"]  # fmt: skip
    rows = [
        [
            one["model"], f"{one['batch']}", f"{one['compile']}".lower(),
            *(f"{1 / one['seconds'][side][1]:.3f}" for side in train_step.SIDES),
            times(one["speed_ratio"]), f"{100 * one['of_rate']:.0f} %",
            f"{max(one['loss_differences'].values()):.0e}",
        ]
        for one in found
    ]  # fmt: skip
    return table(head, rows)


def peak(setting: Setting, batch: int) -> Numbers:
    """Most memory allocated by this project and by the plain loop, and what benchmarks/memory.py computes."""
    name, given = setting.model("sd21"), options(setting, batch)
    needs = memory.Needs(*(memory.turns(name, size) for size in (2, 4)))
    computed = sum(memory.fixed(name, ema=True).values()) + needs.peak(batch)
    found: Numbers = {"model": MODELS[name].title, "batch": batch, "computed": computed / GIB}
    for side in train_step.SIDES if setting.gpu else ():
        release()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with random_model(name, setting):
            texts = {key: RandomTexts(MODELS[name].text).embed(prompts, setting.device, torch.bfloat16)
                     for key, prompts in (("null", [""]), ("text", ["a"] * batch))}  # fmt: skip
            train_step.measure_memory(given, side, texts)
        found[side] = (torch.cuda.max_memory_allocated() - before) / GIB
    return found


def peak_table(found: list[Numbers]) -> str:
    """GiB."""
    rows = [[one["model"], f"{one['batch']}", *(f"{one[key]:.2f}" if key in one else "not on a processor"
             for key in ("project", "reference", "computed"))] for one in found]  # fmt: skip
    return table(["", "batch", "most memory, GiB", "plain loop", "computed by memory.py"], rows)


class Seconds(L.Callback):
    """Time of each step."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_train_batch_start(self, *unused: Any) -> None:
        """Begin."""
        self.began = timer()

    def on_train_batch_end(self, *unused: Any) -> None:
        """End."""
        self.steps.append(timer() - self.began)


def growth(setting: Setting) -> Numbers:
    """This project's step by batch, by side of latents, and with all three roles on one base."""
    name, lora = setting.model("sd21"), {"rank": RANK, "alpha": RANK, "share_base": True}
    own = MODELS[name].latent[1]
    ways = [(4, own, 2), (1, own, 2), (16, own, 2), (4, own // 2, 2), (4, 3 * own // 2, 2), (4, own, 3)]
    found = []
    for batch, side, roles in ways:
        callback = Seconds()
        with random_model(name, setting, side):
            changes = {"student_lora": lora} if roles == 3 else {}
            train_step.train(options(setting, batch, **changes), callback, 5)
        seconds = statistics.median(callback.steps[2:])
        found.append({"batch": batch, "side": side, "roles": roles, "seconds": seconds})
        release()
    return {"model": MODELS[name].title, "ways": found}


def growth_table(found: list[Numbers]) -> str:
    """Milliseconds a step."""
    head = ["", "batch", "side of latents", "roles on one base", "ms a step", "times the first row"]
    rows = [
        [
            model["model"], f"{one['batch']}", f"{one['side']}", f"{one['roles']}",
            f"{1000 * one['seconds']:,.0f}", f"{one['seconds'] / model['ways'][0]['seconds']:.2f}",
        ]
        for model in found
        for one in model["ways"]
    ]  # fmt: skip
    return table(head, rows)


class Waiting(L.Callback):
    """Takes note of each place at which the program waits for the GPU, in the later steps."""

    def __init__(self, gpu: bool, first: int = 3) -> None:
        self.gpu, self.first = gpu, first
        self.begun, self.steps, self.places = 0, 0, Counter[str]()

    def on_train_batch_start(self, *unused: Any) -> None:
        """Begin to listen."""
        self.begun += 1
        if self.begun <= self.first or not self.gpu:
            return
        self._caught = warnings.catch_warnings(record=True)
        self._found = self._caught.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, *unused: Any) -> None:
        """Stop."""
        if self.begun <= self.first or not self.gpu:
            return
        torch.cuda.set_sync_debug_mode("default")
        self._caught.__exit__(None, None, None)
        self.steps += 1
        waits = [one for one in self._found if "synchroniz" in str(one.message)]
        self.places.update(f"{Path(one.filename).name}:{one.lineno}" for one in waits)


def waiting(setting: Setting) -> Numbers:
    """How often a step waits for the GPU, and where."""
    name, callback = setting.model("sd21"), Waiting(setting.gpu)
    with random_model(name, setting):
        train_step.train(options(setting, 2), callback, 6)
    places = {place: count / callback.steps for place, count in callback.places.items()}
    return {"model": MODELS[name].title, "steps": callback.steps, "places": places}


def waiting_table(found: list[Numbers]) -> str:
    """Waits a step by place."""
    (one,) = found
    rows = [[place, f"{count:.1f}"] for place, count in one["places"].items()]
    rows.append(["all", f"{sum(one['places'].values()):.1f}" if one["steps"] else "no GPU to wait for"])
    return table(["where the program waits for the GPU", "times a step"], rows)


def strategies(setting: Setting) -> Numbers:
    """Two steps under each strategy on one device, in miniature: their losses beside those of none."""
    losses: dict[str, list[float]] = {}

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *unused: Any) -> None:
            found.append(float(trainer.callback_metrics[train_step.LOSSES["lora"]]))

    for name, strategy in (("none", "auto"), ("DDP", "ddp"), ("FSDP2", FullySharded())):
        found = losses[name] = []
        with random_model("sd21_small", setting):
            train_step.train(options(setting, 2) | {"strategy": strategy}, Losses(), 2)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return {"losses": losses}


def strategies_table(found: list[Numbers]) -> str:
    """Losses of both steps."""
    rows = [[name, *(f"{x:.5f}" for x in losses)] for one in found for name, losses in one["losses"].items()]
    return table(["strategy, one device, miniature", "loss of step 1", "step 2"], rows)


# --- the rest


measured_rates: Numbers = {}


def rates(setting: Setting) -> Numbers:
    """Operations a second of a large matrix product and of a convolution, bytes a second of a large copy."""
    if not measured_rates:
        kind, size = (torch.bfloat16, 8192) if setting.gpu else (torch.float32, 1024)
        a, b = (torch.randn(size, size, device=setting.device).to(kind) for _ in range(2))
        source = torch.randn(2**28 if setting.gpu else 2**24, device=setting.device)
        target = torch.empty_like(source)
        measured_rates["flops"] = 2 * size**3 / median_seconds(lambda: a @ b)
        batch, channels, side = (16, 320, 64) if setting.gpu else (16, 96, 8)
        x = torch.randn(batch, channels, side, side, device=setting.device).to(kind)
        weight = torch.randn(channels, channels, 3, 3, device=setting.device).to(kind)
        seconds = median_seconds(lambda: torch.nn.functional.conv2d(x, weight, padding=1))
        measured_rates["convolution"] = 2 * x.numel() * weight[0].numel() / seconds
        measured_rates["bytes"] = 2 * source.nbytes / median_seconds(lambda: target.copy_(source))
    return dict(measured_rates)


def median_seconds(call: Callable[[], Any], count: int = 20) -> float:
    """Of some calls, after two that warm up."""
    seconds = []
    for turn in range(count + 2):
        began = timer()
        call()
        if turn > 1:
            seconds.append(timer() - began)
    return statistics.median(seconds)


def rates_table(found: list[Numbers]) -> str:
    """TFLOP/s and GB/s."""
    rows = [
        [f"{one['flops'] / 1e12:,.3f}", f"{one['convolution'] / 1e12:,.3f}", f"{one['bytes'] / 1e9:,.0f}"]
        for one in found
    ]
    head = ["matrix product, TFLOP/s", "convolution, 3×3", "copy, read and written, GB/s"]
    return table(head, rows)


def generation(setting: Setting, batch: int) -> Numbers:
    """One-step generation beside the stock pipeline, and what a negative prompt adds."""
    parts = random_parts(setting.model("sd21"), setting.device, whole=True)
    kind = torch.bfloat16 if setting.gpu else torch.float32
    made = make_generator(parts, 999).eval().to(setting.device, kind)
    model = generate.Model(
        made, stock_pipeline(parts), stock_pipeline(parts, multistep_scheduler(parts.scheduler))
    )
    return generate.measure(model, batch, 12 if setting.gpu else 2)


def layouts(setting: Setting) -> Numbers:
    """A pass of the UNet without gradient, weights as they are and with channels in the last place."""
    name, batch = setting.model("sd21"), 32 if setting.gpu else 2
    network, found = random_parts(name, setting.device).denoiser, {}
    kind = torch.bfloat16 if setting.gpu else torch.float32
    network.to(kind)
    inputs = [
        torch.randn(batch, *MODELS[name].latent, device=setting.device),
        torch.full((batch,), 500, device=setting.device),
        RandomTexts(MODELS[name].text).embed(["a"] * batch, setting.device, kind),
    ]
    inputs[2] = SimpleNamespace(tensors=inputs[2])
    with torch.no_grad():
        for order in ("contiguous_format", "channels_last"):
            network.to(memory_format=getattr(torch, order))
            found[order] = median_seconds(lambda: run_network(network, *inputs), 10 if setting.gpu else 3)
    return {"model": MODELS[name].title, "batch": batch, "seconds": found}


def layouts_table(found: list[Numbers]) -> str:
    """Milliseconds."""
    rows = [[one["model"], f"{one['batch']}", *(f"{1000 * x:.1f}" for x in one["seconds"].values())]
            for one in found]  # fmt: skip
    return table(["pass without gradient", "samples", "as it is, ms", "channels last, ms"], rows)


SECTIONS: dict[str, Callable[[list[Numbers]], str]] = {
    "Rates": rates_table, "Training step": step_table, "Generation": generate.markdown,
    "Memory": peak_table, "Growth": growth_table, "Waiting": waiting_table, "Layout": layouts_table,
    "Strategies": strategies_table,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One measurement.

    Attributes:
        section: where its numbers are shown.
        name: for --parts, and in messages.
        run: measures.
        limit: most seconds that it may take.
    """

    section: str
    name: str
    run: Callable[[Setting], Numbers]
    limit: int = 60


def step_part(model: str, batch: int, limit: int = 60, compile: bool | str = False) -> Part:
    kind = {False: "", True: ", compiled"}.get(compile, f", {compile}")
    return Part(
        "Training step", f"step {model} {batch}{kind}", lambda s: step(s, model, batch, compile), limit
    )


PARTS = (
    Part("Rates", "rates", rates),
    step_part("sd21", 16, 90),
    step_part("sd21", 16, 200, compile=True),
    step_part("sd21", 4),
    step_part("sd21", 1),
    Part("Generation", "generation 1", lambda setting: generation(setting, 1)),
    Part("Generation", "generation 16", lambda setting: generation(setting, 16 if setting.gpu else 2), 90),
    Part("Memory", "memory 4", lambda setting: peak(setting, 4), 90),
    Part("Waiting", "waiting", waiting),
    step_part("pixart", 4),
    step_part("sd35m", 4, 90),
    step_part("sd21", 1, 150, compile="reduce-overhead"),
    Part("Growth", "growth", growth, 90),
    Part("Layout", "layout", layouts),
    Part("Strategies", "strategies", strategies),
    step_part("pixart", 4, 150, compile=True),
    step_part("sd35m", 4, 150, compile=True),
)  # fmt: skip


# --- running them


def release() -> None:
    """Forget compiled code and free memory."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def attempt(part: Part, setting: Setting, limit: int) -> Numbers:
    """The part's numbers, or why there are none."""

    def too_long(*unused: Any) -> None:
        raise TimeoutError(f"not done in {limit} s")

    former, began = signal.signal(signal.SIGALRM, too_long), time.monotonic()
    signal.alarm(limit)
    try:
        found: Numbers = {"numbers": part.run(setting)}
    except Exception as error:  # whatever it is: the other parts are still worth their time
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
    release()
    return found | {"took": time.monotonic() - began}


def serve(pipe: Connection, setting: Setting) -> None:
    """Run the parts that are asked for, by their places in PARTS."""
    pipe.send("ready")  # imports are no part's time
    while True:
        place, limit = pipe.recv()
        pipe.send(attempt(PARTS[place], setting, limit))


class Worker:
    """A process that runs parts; another one takes its place when it dies or hangs."""

    def __init__(self, setting: Setting) -> None:
        self.pipe, other = get_context("spawn").Pipe()
        self.process = get_context("spawn").Process(target=serve, args=(other, setting))
        self.process.start()
        other.close()
        self.ready = False

    def run(self, place: int, limit: int) -> Numbers:
        """Result of one part."""
        try:
            self.ready = self.ready or bool(self.pipe.recv())
            self.pipe.send((place, limit))
            if self.pipe.poll(limit + GRACE):
                found: Numbers = self.pipe.recv()
                return found
            return {"error": f"not done in {limit} s, and did not stop"}
        except (EOFError, OSError):
            self.process.join(GRACE)
            return {"error": f"the process ended with {self.process.exitcode}"}

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.join()


def run_all(
    places: Sequence[int], setting: Setting, seconds: float, save: Callable[[dict[str, Numbers]], None]
) -> dict[str, Numbers]:
    """Results by the parts' names, handed on after each part.

    Args:
        places: which of PARTS, in this order.
        seconds: for all of them.
    """
    began, results, worker = time.monotonic(), dict[str, Numbers](), None
    for place in places:
        part, left = PARTS[place], int(seconds - (time.monotonic() - began))
        if left < FEWEST:
            results[part.name] = {"error": "no time left"}
            continue
        print(f"[{time.monotonic() - began:4.0f} s] {part.name} …", flush=True)
        worker = worker or Worker(setting)
        found = results[part.name] = worker.run(place, min(part.limit, left))
        if "took" not in found:
            worker.stop()
            worker = None
        save(results)
        print(found.get("error") or SECTIONS[part.section]([found["numbers"]]), flush=True)
    if worker is not None:
        worker.stop()
    save(results)
    return results


def markdown(results: dict[str, Numbers]) -> str:
    """A table for each section, and what failed."""
    blocks = []
    for section, render in SECTIONS.items():
        parts = [part for part in PARTS if part.section == section and part.name in results]
        if found := [results[part.name]["numbers"] for part in parts if "numbers" in results[part.name]]:
            blocks.append(render(found))
    failed = [f"- {name}: {found['error']}" for name, found in results.items() if "error" in found]
    return "\n\n".join([*blocks, *(["Not measured:", "\n".join(failed)] if failed else [])])


def put_into(page: Path, text: str) -> None:
    """Write the text between the marks of a page.

    Raises:
        ValueError: it has no such marks.
    """
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no lines {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    reader = parser(__doc__)
    reader.set_defaults(output=Path("outputs/gpu.json"))
    reader.add_argument("--minutes", type=float, default=8, help="for all of it (default: %(default)s)")
    reader.add_argument("--parts", help="names or beginnings of names, e.g. rates,step (default: all)")
    reader.add_argument("--small", action="store_true", help="miniature networks; always without a GPU")
    reader.add_argument("--into", type=Path, help="a page that gets the tables, e.g. docs/performance.md")
    return reader.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Numbers]:
    """Measure, print and save."""
    given = arguments(argv)
    wanted = tuple(given.parts.split(",")) if given.parts else ("",)
    places = [place for place, part in enumerate(PARTS) if part.name.startswith(wanted)]
    gpu = torch.cuda.is_available()
    setting = Setting(given.small or not gpu, gpu)
    command, where = machine("miniature networks" if setting.small else "random weights")

    def save(results: dict[str, Numbers]) -> None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        facts = {"command": command, "where": where, "parts": results}
        given.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        if given.into is not None:
            put_into(given.into, f"\n`{command}`\n\n{where}\n\n{markdown(results)}\n")

    results = run_all(places, setting, 60 * given.minutes, save)
    print(f"\n`{command}`\n\n{where}\n\n{markdown(results)}")
    return results


if __name__ == "__main__":
    main()
