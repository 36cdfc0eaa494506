"""Files of the hub in its cache: downloaded side by side, tried again, and compared with the hub's checksums."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

from espalier import hub_cache
from espalier.errors import UserError
from espalier.hub_errors import explained, transient, unwritable
from espalier.progress import progress

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
ATTEMPTS = 3  # beside those that huggingface_hub makes itself
SIDE_BY_SIDE = 4  # downloads
ABANDONED = 3600  # seconds without a new byte, after which a partial file is a dead process's


@dataclass(frozen=True)
class Wanted:
    """One file of the hub."""

    kind: str  # model or dataset
    id: str
    revision: str
    path: str  # in the repository
    size: int  # bytes
    sha256: str | None  # of a large file; of others the hub tells git's object id
    oid: str
    what: str = field(compare=False)  # names the model or data set in a message

    @property
    def place(self) -> str:
        """Where it lies in the cache, below the root `hub`."""
        return f"{hub_cache.snapshot(self.kind, self.id, self.revision)}/{self.path}"

    @property
    def blobs(self) -> str:
        """The folder of what the links of all commits point to, below the root `hub`."""
        return f"{self.place.partition('/')[0]}/blobs"


def download(files: list[Wanted], known: dict) -> dict[Wanted, str]:
    """Download files that are not in the cache; return the sha256 of all. Whoever waits sees how far it is."""
    events: SimpleQueue[int | Future] = SimpleQueue()
    for blobs in {one.blobs for one in files}:
        _remove_abandoned(hub_cache.roots()["hub"] / blobs)
    failed = threading.Event()
    meter = _meter(events, failed)
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        jobs = {one: pool.submit(_file, one, known, events, meter) for one in dict.fromkeys(files)}
        for job in jobs.values():
            job.add_done_callback(events.put)
        total = math.ceil(sum(one.size for one in jobs) / 1e6)
        try:
            for _ in progress(_megabytes(events, len(jobs)), "prefetch, MB", total):
                pass
        except BaseException:
            failed.set()  # the other downloads end at their next bytes
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {one: job.result() for one, job in jobs.items()}


def _megabytes(events: SimpleQueue, jobs: int) -> Iterator[None]:
    """Yield once a megabyte until all jobs are done; raise the error of the first that fails."""
    arrived = said = 0
    while jobs:
        event = events.get()
        if isinstance(event, Future):
            event.result()
            jobs -= 1
        else:
            arrived += event
        while said < arrived // 1_000_000:
            said += 1
            yield


def _file(one: Wanted, known: dict, events: SimpleQueue, meter: type) -> str:
    """Have a file in the cache, whole; return its sha256."""
    from huggingface_hub import hf_hub_download

    place = hub_cache.roots()["hub"] / one.place
    if place.is_file() and place.stat().st_size == one.size:
        events.put(one.size)
        if (one.place, one.size) in known:
            return known[one.place, one.size]

    def get() -> str:
        hf_hub_download(one.id, one.path, repo_type=one.kind, revision=one.revision, tqdm_class=meter)
        return _checksum(place, one)

    if place.is_file() and place.stat().st_size != one.size:
        _forget(one)
    return tried(get, f"{one.what}, file {one.path},")


def _checksum(place: Path, one: Wanted) -> str:
    """Return a file's sha256; raises OSError, and removes the file, if it is not what the hub says."""
    found, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % one.size, usedforsecurity=False)
    with place.open("rb") as stream:
        while part := stream.read(1 << 20):
            found.update(part)
            git.update(part)
    if (found.hexdigest() != one.sha256) if one.sha256 else (git.hexdigest() != one.oid):
        _forget(one)
        raise OSError("its checksum is not the one that the hub says")
    return found.hexdigest()


def _forget(one: Wanted) -> None:
    """Remove a file from the cache: the link, and what it points to unless that lies elsewhere, as a group's copy."""
    root = hub_cache.roots()["hub"].resolve()
    target = (root / one.place).resolve()
    (root / one.place).unlink(missing_ok=True)
    if target.parent == root / one.blobs:
        target.unlink(missing_ok=True)


def _remove_abandoned(blobs: Path) -> None:
    """Remove partial files of processes that were killed; those of living ones are younger."""
    for partial in blobs.glob("*.incomplete"):
        try:
            if time.time() - partial.stat().st_mtime > ABANDONED:
                partial.unlink()
        except FileNotFoundError:
            pass  # it was finished at this moment


def _meter(events: SimpleQueue, failed: threading.Event) -> type:
    """Return what huggingface_hub takes for a bar: it tells how many bytes have come, and ends what is not needed."""

    class Meter:
        n, total = 0, None

        def __init__(self, **_: object):
            pass

        def __enter__(self) -> Meter:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: float = 1) -> None:
            if failed.is_set():
                raise RuntimeError("another download failed")
            events.put(int(count))

        def ignore(self, *_: object, **__: object) -> None:
            pass

        # Of a file in compressed chunks it counts the bytes that are written, and not also those that travel.
        update_transfer = set_postfix_str = set_transfer_postfix_str = refresh = close = ignore

    return Meter


def listed(files: list[Wanted], sums: dict[Wanted, str]) -> list[dict]:
    return [{"root": "hub", "path": one.place, "size": one.size, "sha256": sums[one]} for one in files]


def _no_room(reason: str | None) -> str:
    return (
        f"The hub's cache {hub_cache.roots()['hub'].parent} cannot be written ({reason}). Set HF_HOME to a folder that"
        " login and compute nodes share and that has room."
    )


def tried(action: Callable[[], T], what: str) -> T:
    """Return what `action` returns; tries again after an error that may pass. Raises UserError about `what`."""
    attempt = 0
    while True:
        attempt += 1
        _limit_waiting()
        try:
            return action()
        except UserError:
            raise
        except Exception as error:
            if (reason := unwritable(error)) is not None:
                raise UserError(_no_room(reason)) from error
            if attempt == ATTEMPTS or not transient(error):
                if (sentence := explained(error, what)) is None:
                    raise
                raise UserError(sentence) from error
            time.sleep(attempt)


def _limit_waiting() -> None:
    """Set a time limit for every answer of the hub: some of huggingface_hub's requests would wait for ever."""
    from huggingface_hub import get_session

    hooks = get_session().event_hooks
    if _limit not in hooks["request"]:
        get_session().event_hooks = {**hooks, "request": [*hooks["request"], _limit]}


def _limit(request: httpx.Request) -> None:
    from huggingface_hub import constants

    times = request.extensions.get("timeout", {})
    if all(value is None for value in times.values()):
        waits = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = dict.fromkeys(waits, constants.HF_HUB_DOWNLOAD_TIMEOUT)
