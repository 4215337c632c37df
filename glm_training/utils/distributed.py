"""Processes of one run: who this process is, and the few collectives training needs.

Launch with ``torchrun``, or with ``srun`` and ``MASTER_ADDR`` set. Every helper takes the :class:`World`; with one
process it does what its name means for one, and ``torch.distributed`` is never initialised.
"""

from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from glm_training.utils.launch import DistributedError, Launch, announce_fault, meet, read_launch

T = TypeVar("T")
COLLECTIVE_TIMEOUT = timedelta(minutes=60)


@dataclass(frozen=True)
class World:
    """This process among those of the run. ``rank`` counts over all nodes, ``local_rank`` within this node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and draws progress."""
        return self.rank == 0


def pick_device(device: str | None, local_rank: int = 0, processes: int = 1) -> torch.device:
    """Where a process computes, as `model.device_map` and its place on the machine say. Raises DistributedError."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type != "cuda":
        return chosen
    if not torch.cuda.is_available():
        raise DistributedError(f"model.device_map is {device!r}, but torch sees no CUDA device; use 'cpu' or null")
    if chosen.index is not None and processes > 1:
        raise DistributedError(
            f"model.device_map is {device!r}, one GPU, for {processes} processes; use 'cuda' or null: each process "
            "takes a GPU of its own"
        )
    index = local_rank if chosen.index is None else chosen.index
    if index >= torch.cuda.device_count():
        raise DistributedError(
            f"local rank {local_rank} needs CUDA device {index}, but {torch.cuda.device_count()} are visible; "
            f"start at most that many processes per node (`torchrun --nproc-per-node {torch.cuda.device_count()} ...`)"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def init_world(enabled: bool, backend: str | None, device: str | None = None) -> World:
    """Join the run's other processes, if the launcher started any.

    Args:
        enabled: ``distributed.enabled``; false while the launcher started several processes is an error.
        backend: ``nccl``, ``gloo`` or None for the one that fits the device. Not looked at for one process.
        device: ``model.device_map``: ``cuda``, ``cpu`` or None for CUDA where there is one, with one GPU per process,
            chosen by local rank; or ``cuda:<number>`` for the only process.

    Raises:
        DistributedError: naming the variable or the key to change.
    """
    launch = read_launch()
    try:
        chosen = _device(launch, enabled, backend, device)
    except DistributedError as error:
        announce_fault(str(error))  # the others may have none, and would wait
        raise
    if launch.world_size > 1:
        _join(launch, backend, chosen)
    return World(launch.rank, launch.world_size, launch.local_rank, chosen)


def _device(launch: Launch, enabled: bool, backend: str | None, device: str | None) -> torch.device:
    if launch.world_size > 1 and not enabled:
        raise DistributedError(
            f"the launcher started {launch.world_size} processes, but distributed.enabled is false; "
            "set distributed.enabled: true, or start one process with plain `python`"
        )
    if launch.world_size > 1 and backend == "nccl" and not torch.cuda.is_available():
        raise DistributedError(
            "distributed.backend is nccl, but torch sees no CUDA device on this machine; set distributed.backend: gloo"
        )
    if backend not in (None, "nccl", "gloo"):
        raise DistributedError(f"distributed.backend is {backend!r}; allowed: nccl (CUDA), gloo (CPU)")
    return pick_device(device, launch.local_rank, launch.world_size)


def _join(launch: Launch, backend: str | None, device: torch.device) -> None:
    # nccl moves CUDA tensors only; CPU tensors and pickled objects of the same run go through gloo.
    use_nccl = device.type == "cuda" and backend != "gloo"
    chosen = "cpu:gloo,cuda:nccl" if use_nccl else "gloo"
    dist.init_process_group(
        backend=chosen,
        store=meet(launch, chosen),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )


def gather_tensor(world: World, tensor: Tensor) -> Tensor:
    """Rows of every process, in rank order: ``[b_rank, ...] -> [sum of b_rank, ...]`` on the caller's device, detached.

    Processes may hold different numbers of rows (none included); the other dimensions and the dtype must agree.
    """
    if world.world_size == 1:
        return tensor.detach()
    # As bytes over the CPU group: any dtype goes through, and gloo gathers CPU tensors only.
    data = tensor.detach().to("cpu").contiguous()
    row_bytes = prod(data.shape[1:]) * data.element_size()
    counts = gather_objects(world, data.shape[0])
    padded = torch.zeros(max(counts) * row_bytes, dtype=torch.uint8)
    flat = data.as_strided((data.numel(),), (1,))  # reshape keeps an odd stride where there is one element
    padded[: data.shape[0] * row_bytes] = flat.view(torch.uint8)
    received = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(received, padded)
    rows = [part[: count * row_bytes] for part, count in zip(received, counts, strict=True)]
    return torch.cat(rows).view(data.dtype).reshape(sum(counts), *data.shape[1:]).to(tensor.device)


def gather_objects(world: World, obj: T) -> list[T]:
    """``obj`` of every process, in rank order, on every process. Pickled on the wire between them, never to a file."""
    if world.world_size == 1:
        return [obj]
    received: list[Any] = [None] * world.world_size
    dist.all_gather_object(received, obj)
    return received


def broadcast_object(world: World, obj: T) -> T:
    """The main process's ``obj``, on every process."""
    if world.world_size == 1:
        return obj
    box: list[Any] = [obj if world.is_main else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def any_flag(world: World, flag: bool) -> bool:
    """True on every process when any process passed true: a stop signal or a failure that all must act on together."""
    if world.world_size == 1:
        return bool(flag)
    raised = torch.tensor([int(flag)])
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())


def barrier(world: World) -> None:
    """Wait until every process is here."""
    if world.world_size > 1:
        # A gathered number, not dist.barrier: nccl's barrier guesses a device, and this one waits on the CPU.
        gather_objects(world, world.rank)


def shutdown(world: World) -> None:
    """Leave the process group; safe to call twice, and for one process."""
    if world.world_size > 1 and dist.is_initialized():
        dist.destroy_process_group()
