"""Several processes on one CPU, forked from the test's own process, which has imported everything already."""

import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch


def run_processes(number: int, work: Callable[[], None], log: Path, launched: bool = True) -> None:
    """Call `work` in this many processes that see themselves as started by torchrun (`launched`).

    Raises:
        AssertionError: one of them failed; the message holds what it wrote.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(number):
        if (pid := os.fork()) == 0:
            if launched:
                os.environ |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number), "GROUP_RANK": "0",
                    "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                    "TORCHELASTIC_RUN_ID": "test",
                }  # fmt: skip
            _work_and_exit(work, log.with_suffix(f".{rank}"))
        children.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    written = "\n".join(log.with_suffix(f".{rank}").read_text()[-3000:] for rank in range(number))
    assert statuses == [0] * number, f"{statuses}\n{written}"


def _work_and_exit(work: Callable[[], None], log: Path) -> None:
    status = 1
    # renews PyTorch's pool of threads, which is broken in a fork: autograd's threads must not do it at once
    torch.set_num_threads(1)
    with log.open("w") as output:
        sys.stdout = sys.stderr = output
        try:
            with _as_rank():
                work()
            status = 0
        except BaseException:
            traceback.print_exc()
        output.flush()
        os._exit(status)


@contextmanager
def _as_rank() -> Iterator[None]:
    """Lightning has taken the rank of the test's process when it was imported."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    with patch.object(rank_zero_only, "rank", int(os.environ.get("RANK", 0))):
        yield
