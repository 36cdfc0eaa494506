"""One training in several processes, a device each: weights, gradients and optimizer states are divided among them.

FSDP2 (Zhao et al. 2023, 2304.11277; `torch.distributed.fsdp.fully_shard`) over the blocks and what is around them. In
one process every function here does nothing, so that methods and the training loop have one text for both.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from espalier.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


SECONDS_TO_END = 10.0  # given to the other processes when one has failed
PATIENCE = timedelta(hours=4)  # for one another: process 0 may be writing a large state


def launched() -> bool:
    """Return whether this is one of several processes, started by `launch` or by torchrun."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(processes: int, command: Sequence[str]) -> int:
    """Run `command` in as many processes, which find each other; return the first exit status that is not 0, or 0.

    When one fails the others are stopped. SIGTERM is handed on to all of them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    running = [
        subprocess.Popen(command, env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    previous = signal.signal(signal.SIGTERM, lambda *_: [one.terminate() for one in running])
    try:
        while True:
            codes = [one.poll() for one in running]
            failed = [code for code in codes if code]
            if failed or None not in codes:
                return failed[0] if failed else 0
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGTERM, previous)
        _end(running)


def _end(running: list[subprocess.Popen]) -> None:
    """Wait for processes that are about to end, and kill those that are not, stuck waiting for one that failed."""
    deadline = time.monotonic() + SECONDS_TO_END
    for one in running:
        try:
            one.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.kill()


@contextlib.contextmanager
def group(device: str) -> Iterator[None]:
    """Join the other processes, if there are any, for the time of the block; `device` is cpu or cuda.

    A UserError ends every process but the first here, with a line that says which process it was.
    """
    if not launched():
        yield
        return
    import torch

    _end_with_parent()
    local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"{os.environ['WORLD_SIZE']} processes were asked for, and this machine has"
                f" {torch.cuda.device_count()} GPUs: give --processes at most as many."
            )
        torch.cuda.set_device(local)
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield
    except UserError as error:
        if rank() > 0:
            sys.exit(f"error in process {rank()}: {error}")
        raise
    finally:
        torch.distributed.destroy_process_group()


def _end_with_parent() -> None:
    """Have this process killed when the launcher is: one left over would go on writing where the next run writes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def size() -> int:
    """Return the number of processes."""
    import torch

    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """Return the number of this process; 0 is the one that writes."""
    import torch

    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def refuse(what: str) -> None:
    """Raise UserError where there are several processes."""
    if size() > 1:
        raise UserError(f"{what} runs in one process: leave --processes at 1.")


def loading_device(device: str) -> str:
    """Return where a model is loaded that `shard` gets: whole models wait in main memory."""
    return device if size() == 1 else "cpu"


def shard(model: PreTrainedModel, device: str) -> None:
    """Divide the parameters of a model among the processes, in place, block by block.

    From here on each process draws its own random numbers, so that their dropouts are independent.
    """
    if size() == 1:
        return
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    from espalier.models.anatomy import blocks_of

    mesh = init_device_mesh(device, (size(),))
    for part in (*blocks_of(model), model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            # Each process's loss is its share of the whole batch's mean: gradients are added up, not averaged.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    torch.manual_seed(torch.initial_seed() + rank())


def whole(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return a copy of a parameter or of its optimizer state, all of it, on the CPU; None but in process 0."""
    from torch.distributed.tensor import DTensor

    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.to("cpu", copy=True) if rank() == 0 else None


def divided(value: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Return `value`, which process 0 holds whole, on the device of the parameter `like` and divided as that is."""
    import torch
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return value.to(like.device, copy=True)
    device = like.to_local().device
    value = torch.empty(like.shape, dtype=like.dtype) if value is None else value
    return distribute_tensor(value.to(device), like.device_mesh, like.placements)


def undivided(
    model: PreTrainedModel, fresh: Callable[[], PreTrainedModel], always: bool = False
) -> PreTrainedModel | None:
    """Return a model whose weights are not divided: in one process itself, unless a fresh one is `always` wanted.

    Otherwise `fresh`, a model as it was before the training, with all weights that were trained; only process 0 makes
    it and the others get None.
    """
    if size() == 1 and not always:
        return model
    import torch

    trained = {name: whole(one) for name, one in model.named_parameters() if one.requires_grad}
    if rank() > 0:
        return None
    made = fresh()
    with torch.no_grad():
        for name, one in made.named_parameters():
            if name in trained:
                one.copy_(trained[name])
    return made.eval()


def number(tensor: torch.Tensor) -> float:
    """Return the value of a tensor that holds one number, which may be divided."""
    from torch.distributed.tensor import DTensor

    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).item()


def total(values: list[float]) -> list[float]:
    """Return the sums of some numbers over all processes."""
    if size() == 1:
        return values
    import torch

    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def from_first(value: Any) -> Any:
    """Return the plain value that process 0 gives."""
    if size() == 1:
        return value
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def from_all(value: Any) -> list:
    """Return the plain values of all processes, in order."""
    if size() == 1:
        return [value]
    import torch

    values = [None] * size()
    torch.distributed.all_gather_object(values, value)
    return values
