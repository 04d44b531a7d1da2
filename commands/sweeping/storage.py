"""Where a sweep's trials are kept, and which process keeps which of them."""

from __future__ import annotations

import os
import socket
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands.sweeping.settings import SweepSettings
from common.errors import UserError, first_line

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

_LOCK_SECONDS = 10


def import_optuna() -> Any:
    """The optuna package, quiet.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError('sweep needs Optuna, which is not installed: pip install -e ".[sweep]"') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def open_storage(settings: SweepSettings) -> BaseStorage:
    """The storage that the settings name; a file and its folder are made.

    Raises:
        UserError: the file cannot be written or the database cannot be reached.
    """
    optuna = import_optuna()
    address = settings.storage or str(settings.folder / "study.journal")
    try:
        if "://" in address:
            return _database(address)
        Path(address).parent.mkdir(parents=True, exist_ok=True)
        # a driver killed while it was writing leaves its lock; the others wait so long for it
        lock = optuna.storages.journal.JournalFileSymlinkLock(address, grace_period=_LOCK_SECONDS)
        backend = optuna.storages.journal.JournalFileBackend(address, lock)
        return optuna.storages.JournalStorage(backend)
    except Exception as error:  # each database driver raises its own types
        raise UserError(f"{settings.path}: cannot open the storage {address}: {first_line(error)}") from error


def _database(address: str) -> BaseStorage:
    """A database as storage; two drivers that make its tables at the same moment do not harm each other."""
    for _ in range(5):
        try:
            return _connected(address)
        except Exception as error:  # the loser of that race; each database driver raises its own types
            if "exist" not in str(error).lower() and "unique" not in str(error).lower():
                raise
            time.sleep(0.5)
    return _connected(address)


def _connected(address: str) -> BaseStorage:
    from optuna.storages import RDBStorage
    from sqlalchemy import event

    if not address.startswith("sqlite"):
        return RDBStorage(address)
    # Python's sqlite3 begins a transaction at its first write only, so that two drivers may read the same
    # state and both act on it; with this, whoever begins first is alone until it has written.
    storage = RDBStorage(address, engine_kwargs={"connect_args": {"timeout": 60, "isolation_level": None}})
    event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return storage


def this_process() -> str:
    """Machine, process id and (where /proc tells) start time, which tells two processes of one id apart."""
    return f"{_machine()}|{os.getpid()}|{_started(os.getpid())}"


def _machine() -> str:
    """Host name and (where /proc tells) boot and process namespace: copies of a machine or container have
    one name, and the process ids of one say nothing of the other.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def is_alive(owner: str) -> bool | None:
    """Whether the process lives; None if it belongs to another machine."""
    machine, pid, started = owner.split("|")
    if machine != _machine():
        return None
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _started(int(pid)) == started
