"""Trained halves in shards over processes: which strategy a run takes, the mesh of its processes, and FSDP2 over the
blocks that a family names.

fp32 masters, gradients and moments lie in shards; a block is gathered in the computing dtype when it is called, and its
gradient is averaged in fp32. What is frozen for good in a component (vision tower, VQ model, VAE, text encoders) stays
whole.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from glm_training.config import Config
from glm_training.engine.errors import SettingsError
from glm_training.engine.gathers import TRAINED, Gather, gathers, lying_bytes
from glm_training.models.family import Family
from glm_training.models.gathering import Sharing, draw_by_block
from glm_training.models.lora import reached_layers
from glm_training.models.weights import in_fp32
from glm_training.utils.distributed import World, gather_objects
from glm_training.utils.words import counted

LOWEST_TORCH = (2, 11)
"""Earlier ones gather a recomputed block once more than they let it go, and hang."""

SHARDABLE = ("adamw", "lion", "muon", "sgd", "adamw_schedule_free")
"""Update rules whose state follows the shards. Adafactor's rows and columns, Prodigy's sums over all weights and
bitsandbytes' blocks are of whole tensors."""

_SHARE_OF_DEVICE = 0.5
"""Of the memory of a device, what weights, gradients and moments may take without shards: the rest is activations."""

_M_MMAP_THRESHOLD = -3
"""In glibc's malloc.h: from what size on a block is a mapping of its own."""


@dataclass(frozen=True)
class Strategy:
    """How several processes share the work: by DDP, or by `shards`; and why. One process alone has no reason."""

    shards: Shards | None = None
    reason: str = ""

    def told(self) -> list[str]:
        """Lines for the user, where there is something to choose."""
        how = "each process holds all (ddp)" if self.shards is None else "the processes hold shards (fsdp)"
        drawing = [] if self.shards is None else [each.told() for each in self.shards.gathers]
        return [f"{how}: {self.reason}", *drawing] if self.reason else []


def check_strategy(config: Config, world: World) -> None:
    """Raises SettingsError, with all reasons, for a `distributed` section that cannot be followed here."""
    problems = strategy_problems(config, world.world_size)
    if config.distributed.strategy == "fsdp":
        problems += version_problems()
    if problems:
        raise SettingsError("\n".join(problems))


def strategy_problems(config: Config, processes: int) -> list[str]:
    """What of a configuration so many processes cannot follow, whatever is installed here, a line each."""
    settings, problems = config.distributed, list[str]()
    if settings.shard_size is not None and processes > 1 and processes % settings.shard_size:
        problems.append(
            f"distributed.shard_size is {settings.shard_size}, which does not divide the {processes} processes"
        )
    if settings.strategy == "fsdp":
        problems += unshardable(config)
    of_shards = {
        "shard_size": settings.shard_size is not None,
        "offload": settings.offload,
        "gather": settings.gather != "auto",
    }
    if settings.strategy == "ddp":
        problems += [
            f"distributed.{key} is of shards, and distributed.strategy is ddp: leave it out, or use fsdp"
            for key, given in of_shards.items()
            if given
        ]
    if config.training.offload_between_phases and processes > 1:
        problems.append(
            f"training.offload_between_phases is for one process, and there are {processes}: several need the weights "
            "to stay where they are; remove it"
        )
    return problems


def update_problems(config: Config, processes: int) -> list[str]:
    """Why `updates_per_rollout` of a run with reward steps does not go with so many processes, a line for each half;
    nothing for other runs.

    Among several, gradients are exchanged at each update, so that each batch of each process must have rows of all of
    them; one process may count its accumulation.
    """
    if not config.uses_reward():
        return []
    group, prompts = config.group(), config.training.batch_size
    if processes == 1:
        prompts *= config.training.gradient_accumulation_steps
    rows = {"ar": ("ar sample", group.plans), "dit": ("dit sample", group.plans * group.renders)}
    if config.reward.grpo.dit.method == "dgpo":  # the renders of a plan stay together
        rows["dit"] = ("dit group", group.plans)
    problems = []
    for part in config.parts():
        count = config.policy_for(part).updates_per_rollout
        what, each = rows[part]
        if prompts * each % count:
            problems.append(
                f"reward.grpo updates_per_rollout {count} does not divide the {counted(prompts * each, what)} that a "
                f"process draws at once (batch_size x {what.split()[1]}s per prompt; one process may count its "
                "accumulation)"
            )
    return problems


def version_problems() -> list[str]:
    """Why the torch that is installed has no shards; nothing where it has."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version >= LOWEST_TORCH:
        return []
    wanted = ".".join(map(str, LOWEST_TORCH))
    return [f"distributed.strategy fsdp needs torch {wanted} or newer, and this is {torch.__version__}"]


def unshardable(config: Config) -> list[str]:
    """What of a configuration shards cannot do, a line each."""
    problems = []
    for part in config.parts():
        rule = config.optimizer_for(part).name
        if rule not in SHARDABLE:
            problems.append(
                f"the optimizer {rule} of the {part} half does not work on shards: use one of {', '.join(SHARDABLE)}, "
                "or distributed.strategy: ddp"
            )
        if config.optimizer_for(part).moments_dtype != "float32":
            problems.append(
                f"moments of the {part} half in {config.optimizer_for(part).moments_dtype} do not work on shards: use "
                "moments_dtype float32, or distributed.strategy: ddp"
            )
    if config.model.quantization != "none":
        problems.append(
            f"model.quantization {config.model.quantization} does not work on shards, which would be cut through its "
            "blocks: use distributed.strategy: ddp, or model.quantization: none"
        )
    if config.training.mixed_precision == "fp16":
        problems.append("training.mixed_precision fp16 does not work on shards: use bf16, or distributed.strategy: ddp")
    return problems


def choose(config: Config, family: Family, world: World) -> Strategy:
    """What `distributed.strategy` says, or for `auto`: DDP where weights, gradients and moments leave half of the
    smallest device, else FSDP. The same on every process."""
    if world.world_size == 1:
        return Strategy()
    asked = config.distributed.strategy
    there = min(gather_objects(world, device_bytes(world)))
    if asked != "auto":
        return Strategy(
            _shards(config, family, world, there) if asked == "fsdp" else None, "as distributed.strategy says"
        )
    needed = resident_bytes(config, family)
    told = f"weights, gradients and moments take {needed / 1e9:.1f} of {there / 1e9:.0f} GB on each device"
    if whole_fits(needed, there):
        return Strategy(None, told)
    problems = version_problems() + unshardable(config)
    if problems:
        return Strategy(None, f"{told}, and shards are not to be had: {problems[0]}")
    return Strategy(_shards(config, family, world, there), told)


def _shards(config: Config, family: Family, world: World, device: float) -> Shards:
    return Shards(config, world, gathers(config, family, config.distributed.shard_size or world.world_size, device))


def whole_fits(resident: float, device: float) -> bool:
    """Whether `auto` leaves each process a whole copy: `resident` bytes of weights, gradients and moments on a device
    of so many bytes."""
    return resident <= _SHARE_OF_DEVICE * device


def may_shard(config: Config, world: World) -> bool:
    """Whether a run may come to lie in shards: it is then loaded on the CPU first."""
    return world.world_size > 1 and config.distributed.strategy != "ddp"


def resident_bytes(config: Config, family: Family) -> int:
    """What a process holds of the model without shards, and of the gradients and moments of what is trained; of DMDR
    with the guidance network, which is made later."""
    return int(lying_bytes(config, family, 1.0)) + (
        guidance_bytes(config, family) if config.training.method == "dmdr" else 0
    )


def guidance_bytes(config: Config, family: Family) -> int:
    """Of a copy of the half that DMDR distils, as it is loaded, under an adapter that is trained."""
    part = config.parts()[0]
    module: Any = family.module(part)
    frozen = sum(p.numel() for name, p in module.named_parameters() if "lora_" not in name)
    layers = [module.get_submodule(name) for name in reached_layers(module, config.lora_for(part).targets)]
    trained = config.dmdr.guidance_rank * sum(layer.in_features + layer.out_features for layer in layers)
    return frozen * getattr(torch, config.model.torch_dtype).itemsize + trained * TRAINED


def device_bytes(world: World) -> int:
    """Memory that this process may count on: its GPU's, or its part of the machine's."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    import psutil

    return psutil.virtual_memory().total // world.world_size


def mesh_of(config: Config, world: World) -> DeviceMesh:
    """One dimension of shards, or replicas of `distributed.shard_size` shards each, neighbours within a node."""
    size, kind = config.distributed.shard_size, world.device.type
    if size is None or size == world.world_size:
        # a group of its own: a process that failed sends word by the group of all, while others wait for its shards
        return DeviceMesh.from_group(dist.new_group(), kind, mesh_dim_names=("shard",))
    return init_device_mesh(kind, (world.world_size // size, size), mesh_dim_names=("replicate", "shard"))


class Shards:
    """FSDP2 over components, under one configuration."""

    def __init__(self, config: Config, world: World, gathers: Iterable[Gather] = ()) -> None:
        """`gathers`: how halves are gathered while they draw; whole, where nothing is said."""
        self.mesh = mesh_of(config, world)
        self.gathers, self.device = list(gathers), world.device
        dtype = torch.bfloat16 if config.training.mixed_precision == "bf16" else None
        # inputs keep their dtype: timesteps in bf16 would be other timesteps
        self.precision = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        waits = config.distributed.offload and world.device.type == "cuda"  # on the CPU they wait already
        self.offload = CPUOffloadPolicy() if waits else OffloadPolicy()
        if world.device.type == "cpu":
            give_back_freed_memory()

    def shard(self, component: nn.Module, units: Iterable[nn.Module], whole: Iterable[nn.Module] = ()) -> None:
        """Shards `component` in place: each of `units`, then what is left, but for the modules of `whole`.

        What is trained comes to fp32 unit by unit: a whole copy in fp32 is never there.
        """
        kept = {parameter for module in whole for parameter in module.parameters()}
        for module in (*units, component):
            in_fp32(parameter for parameter in module.parameters() if parameter.requires_grad)
            fully_shard(
                module,
                mesh=self.mesh,
                mp_policy=self.precision,
                offload_policy=self.offload,
                ignored_params=kept,
            )
        # what is called first may be a part, which would take itself for the root
        component._get_fsdp_state()._lazy_init()  # type: ignore[operator, union-attr]

    def shard_family(self, family: Family, parts: Iterable[str]) -> None:
        """Shards the components that are trained."""
        for part in parts:
            self.shard(family.component(part), family.sharding_units(part), family.frozen())
            if self.mesh.device_type == "cpu":
                leave_file(family.module(part), family.frozen())
        for gather in self.gathers:
            if gather.by_block:
                draw_by_block(family.component(gather.part), Sharing(self.mesh.get_group("shard"), self.device))


def give_back_freed_memory() -> None:
    """From here on tensors of 4 MiB or more go back to the system when they are freed, under glibc.

    By itself it keeps blocks of up to 32 MiB once it has seen one freed, and what is gathered and let go between
    activations and gradients leaves holes among them. Smaller ones are not worth the faults that new pages cost. What
    the user says in MALLOC_MMAP_THRESHOLD_ stays.
    """
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 4 << 20)


def leave_file(module: nn.Module, frozen: Iterable[nn.Module]) -> None:
    """Copies what is frozen within `module` out of the file that it was loaded from.

    Weights are read by mapping their file into memory, where all of it stays as long as one of them lies there.
    """
    inside = set(module.modules())
    for part in (part for part in frozen if part in inside):
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.data = tensor.data.clone()
