"""How prompts scale: making a store, starting, resuming late, streaming, and the memory all of it takes.

    python benchmarks/data.py                     10 million synthetic prompts
    python benchmarks/data.py --prompts 200000    a quick look

Every figure is taken in a process of its own. The store has just been written, so it is read from the
operating system's cache, not from the disk: one that is larger than the free memory is slower, a page for
each prompt. Time and size of making grow in proportion to the number of prompts, and so does its memory (8 to
20 bytes a prompt, to find repeats). The order is computed, so a late start costs what an early one does.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if TYPE_CHECKING:  # the imports are part of what is measured
    from datamodules.prompts import PromptDataModule

SUBJECTS = ("a lighthouse", "two dogs", "an old car", "a bowl of soup", "the harbour", "a paper boat")
PLACES = ("by the sea", "in the snow", "under a bridge", "on a table", "at night", "in a crowded street")
REPEATED = 100  # one prompt in so many is a repeat of an earlier one
MIB = 2**20


def synthetic_prompts(count: int) -> Iterator[str]:
    """Prompts of some 50 characters, each different but for the repeats."""
    for number in range(count):
        one = number // 2 if number % REPEATED == REPEATED - 1 else number
        yield f"{SUBJECTS[one % 6]} {PLACES[one // 6 % 6]}, photograph number {one}"


def data_module(path: str, batch_size: int, workers: int = 0) -> "PromptDataModule":
    """The data module of a run; every source gets a store, however small it is."""
    from datamodules import sources
    from datamodules.prompts import PromptDataModule

    sources.IN_MEMORY_BYTES = 0
    return PromptDataModule(path, batch_size, num_workers=workers, deduplicate=True)


def make(path: str, batch_size: int) -> dict[str, float]:
    """Make the store: seconds, its bytes, prompts kept, memory at its largest above that of the imports."""
    import datasets  # noqa: F401

    from common.environment import peak_resident_bytes

    module, before = data_module(path, batch_size), psutil.Process().memory_info().rss
    start = time.perf_counter()
    module.prepare_data()
    seconds = time.perf_counter() - start
    (size,) = {file.stat().st_size for file in Path(os.environ["ONE_STEP_CACHE"]).rglob("*.arrow")}
    kept = sum(len(texts) for texts in module._prompts.open())
    return {"seconds": seconds, "bytes": size, "memory": peak_resident_bytes() - before, "kept": kept}


def start(path: str, batch_size: int, position: int) -> dict[str, float]:
    """Seconds for the imports, and from there to the first batch at a position of the stream."""
    began = time.perf_counter()
    import datamodules.prompts  # noqa: F401

    imported = time.perf_counter()
    module = data_module(path, batch_size)
    module.load_state_dict({"position": position})
    module.setup("fit")
    next(iter(module.train_dataloader()))
    return {"imports": imported - began, "seconds": time.perf_counter() - imported}


def stream(path: str, batch_size: int, workers: int, seconds: float) -> dict[str, float]:
    """Prompts per second of a loader; private memory of its processes, and how much that grew meanwhile."""
    loader = iter(data_module(path, batch_size, workers).train_dataloader())
    for _ in range(100):  # workers start, buffers fill
        next(loader)
    before, count, began = private_memory(), 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        count += len(next(loader)["prompts"])
    elapsed = time.perf_counter() - began
    return {"rate": count / elapsed, "count": count, "growth": private_memory() - before}


def private_memory() -> int:
    """Bytes that this process and its children share with no other; the mapped file is not in it."""
    process = psutil.Process()
    return sum(one.memory_full_info().uss for one in [process, *process.children(recursive=True)])


def apart(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """Run a measurement in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(path: str, count: int, batch_size: int, workers: list[int], seconds: float) -> list[list[str]]:
    """All rows of the table."""
    made, late = apart(make, path, batch_size), int(0.9 * count)
    starts = {place: apart(start, path, batch_size, place) for place in (0, late)}
    rows = [
        ["source file", f"{Path(path).stat().st_size / MIB:,.0f} MiB"],
        ["making it a store", f"{made['seconds']:,.1f} s, {made['bytes'] / MIB:,.0f} MiB"],
        ["- prompts kept", f"{made['kept']:,} of {count:,}"],
        ["- memory above the imports", f"{made['memory'] / MIB:,.0f} MiB"],
        ["imports", f"{starts[0]['imports']:.1f} s"],
        *([f"start at prompt {place:,}", f"{found['seconds']:.2f} s"] for place, found in starts.items()),
    ]
    for number in workers:
        found = apart(stream, path, batch_size, number, seconds)
        rate = f"{found['rate'] / max(number, 1):,.0f}"
        rows.append([f"prompts a second and worker, {number or 'no'} worker(s)", rate])
        growth = f"{found['growth'] / MIB:+.1f} MiB over {found['count']:,.0f} prompts"
        rows.append(["- growth of private memory", growth])
    return rows


def main() -> None:
    """Measure and print."""
    from benchmarks import measuring  # here, since it takes imports that are measured

    reader = measuring.parser(__doc__)
    add = reader.add_argument
    add("--prompts", type=int, default=10_000_000, help="how many (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="prompts per batch (default: %(default)s)")
    add("--workers", type=int, nargs="*", default=[0, 1, 2], help="(default: 0 1 2)")
    add("--seconds", type=float, default=10, help="of each streaming (default: %(default)s)")
    add("--folder", help="where files lie meanwhile (default: the temporary folder)")
    given = reader.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        os.environ["ONE_STEP_CACHE"] = f"{folder}/cache"
        path = f"{folder}/prompts.txt"
        with open(path, "w", encoding="utf-8") as file:
            for prompt in tqdm(synthetic_prompts(given.prompts), "Synthetic prompts", given.prompts):
                file.write(prompt + "\n")
        rows = measure(path, given.prompts, given.batch_size, given.workers, given.seconds)
    measuring.write(measuring.table(["", f"{given.prompts:,} prompts"], rows), rows, given.output)


if __name__ == "__main__":
    main()
