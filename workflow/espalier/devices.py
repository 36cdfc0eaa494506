"""GPUs of one machine among its jobs: each holds as many as it asked for, alone, until it ends.

Snakemake counts the resource `gpu`, and unlike a cluster's scheduler it gives a job no GPU of its own. Here a job takes
the operating system's lock (flock) on each of its GPUs: the lock ends with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from espalier.errors import UserError

LOCKS = Path("/tmp/espalier-gpus")  # one folder for all studies and users of a machine
SECONDS_BETWEEN_LOOKS = 0.5


def present() -> dict[str, str]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES allows: the name that it has, or would have, for each, and its UUID.

    As CUDA does, it leaves out all that follow a name of no kind of GPU, such as -1 or NoDevFiles.
    """
    try:
        command = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        lines = []
    uuids = dict(line.replace(" ", "").split(",") for line in lines if "," in line)
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = uuids if shown is None else [name.strip() for name in shown.split(",") if name.strip()]
    known = itertools.takewhile(lambda name: name.isdecimal() or name.startswith(("GPU-", "MIG-")), names)
    return {name: uuids.get(name, name) for name in known}


def run(count: int, command: Sequence[str]) -> NoReturn:
    """Become `command`, in this same process, once `count` GPUs are taken for it; raises UserError as `take`."""
    take(count)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        raise UserError(f"{command[0]} could not be started: {error.strerror}.") from None


def take(count: int) -> None:
    """Wait until `count` GPUs are free, at least one, hold them until this process ends, and have CUDA see no other.

    Who waits is not overtaken: otherwise a job of several GPUs might wait for ever. Raises UserError where the machine
    has fewer GPUs, or whose folder of locks cannot be used.
    """
    gpus = present()
    if count > len(gpus):
        known = f"those that may be used are {', '.join(gpus)}" if gpus else "nvidia-smi finds none that may be used"
        raise UserError(f"The resource 'gpu' of this job is {count}, and of this machine's GPUs, {known}.")
    _make_folder()
    terminated = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a job may ignore it; one that waits may not
    turn = _open("turn")
    fcntl.flock(turn, fcntl.LOCK_EX)
    taken: dict[str, int] = {}
    said = False
    while len(taken) < count:
        for name, uuid in gpus.items():
            if name not in taken and len(taken) < count and (file := _lock(uuid)) is not None:
                taken[name] = file
        if len(taken) < count:
            if not said:
                print(f"waiting for GPUs: {count} of {', '.join(gpus)}", file=sys.stderr, flush=True)
            said = True
            time.sleep(SECONDS_BETWEEN_LOOKS)
    os.close(turn)
    signal.signal(signal.SIGTERM, terminated)
    for file in taken.values():
        os.set_inheritable(file, True)  # an open file is the lock: it must outlive a change of program
    # The names are those of nvidia-smi, which counts by bus; by itself CUDA counts the fastest GPU first.
    os.environ.update(CUDA_VISIBLE_DEVICES=",".join(taken), CUDA_DEVICE_ORDER="PCI_BUS_ID")


def _make_folder() -> None:
    """Make the locks' folder, in which every user makes files and nobody deletes another's: a deleted lock is none.

    Raises UserError where something else has its name: to follow another user's link would be to change what it names.
    """
    with contextlib.suppress(FileExistsError), _modes_as_given():
        LOCKS.mkdir(0o1777)
    if LOCKS.is_symlink() or not LOCKS.is_dir():
        raise UserError(f"{LOCKS} is not a folder, but locks of this machine's GPUs are to be in it: delete it.")


def _open(name: str) -> int:
    """Return an open file of the locks' folder, made if it is missing; any user may read it, which is to lock it."""
    file = LOCKS / name.replace("/", "_")  # MIG-GPU-<uuid>/1/0 is a part of a GPU
    try:
        with contextlib.suppress(FileExistsError), _modes_as_given():
            return os.open(file, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o644)
        # Without O_CREAT, which the kernel refuses for another user's file in such a folder.
        return os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise UserError(f"{file}, the lock of a GPU, cannot be opened: {error.strerror}.") from None


@contextlib.contextmanager
def _modes_as_given() -> Iterator[None]:
    """Have files and folders made with the mode that is given, whatever this user's umask keeps from others."""
    usual = os.umask(0)
    try:
        yield
    finally:
        os.umask(usual)


def _lock(uuid: str) -> int | None:
    """Return the open, locked file of a GPU, or None if another process holds it."""
    file = _open(uuid)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file
