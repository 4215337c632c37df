"""A trained half of the model: its parameters, the policy that is called, optimizer, schedule and snapshots."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from glm_training.checkpoint.state_tree import (
    StateTree,
    load_optimizer_state_tree,
    optimizer_state_tree,
    shard_like,
)
from glm_training.config.sections.resolved import ResolvedOptimizer
from glm_training.engine.errors import NonFiniteError, TrainingError
from glm_training.engine.optimizers import RATE_SCALE, SCHEDULE_FREE, averaged_weights, build_optimizer
from glm_training.methods.losses import Context
from glm_training.models.library_versions import without_buffers_sent
from glm_training.models.snapshot import ParameterSnapshot
from glm_training.utils.distributed import World, any_flag
from glm_training.utils.words import counted

MAX_SKIPPED = 20
"""Updates in a row that fp16 loss scaling may skip: halved as often, its first scale of 65536 is below 1."""


Showing = Literal["evaluation", "export"]
"""What weights are shown for: samples and scores, or pipelines and adapters that are written."""


@dataclass
class WeightAverage:
    """A slow average of the trained weights, in fp32: in bf16 a step of a small share rounds to none.

    Until training step `start` it is the weights themselves; then `snapshot` moves by 1 - `decay` at each update.
    `shown`: where it stands in for the weights.
    """

    snapshot: ParameterSnapshot
    decay: float
    start: int
    shown: frozenset[Showing] = frozenset(("evaluation", "export"))

    def follow(self, training_step: int) -> None:
        """Moves on, after the optimizer step of `training_step` (from 0)."""
        self.snapshot.update(self.decay if training_step >= self.start else 0.0)


class Part:
    """One half under training. `policy` is `component`, inside DDP when there are several processes and it is not in
    shards. `exchanging`: a pass is under way in which the processes wait for each other's shards, or ended in an error.

    `rate_scales`: parameters whose learning rate is that share of the others'. `first_step`: the training step that is
    its first. `start`: the reference, where it is a copy. `ema`: what samples, scores and pipelines show in place of
    the weights, where it is kept.
    """

    def __init__(
        self,
        name: str,
        component: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        settings: ResolvedOptimizer,
        world: World,
        *,
        total_steps: int,
        find_unused_parameters: bool = False,
        loss_scaling: bool = False,
        rate_scales: Mapping[str, float] | None = None,
        first_step: int = 0,
    ) -> None:
        self.name = name
        self.component = component
        self.parameters = dict(parameters)
        self.settings = settings
        self.first_step = first_step
        self.total_steps = total_steps
        self.world = world
        self.policy: nn.Module = component
        if world.world_size > 1 and not isinstance(component, FSDPModule):
            self.policy = replicated(component, find_unused_parameters=find_unused_parameters)
        self.exchanging = False
        if isinstance(component, FSDPModule):
            component.register_forward_pre_hook(lambda *_: self._exchange(True))
            component.register_forward_hook(lambda *_: self._exchange(False))
        self.optimizer = build_optimizer(settings, self.parameters, rate_scales or {})
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=loss_scaling)
        self.skipped = 0
        self.reference: Context | None = None
        self.start: ParameterSnapshot | None = None
        self.average: ParameterSnapshot | None = None
        self.old: ParameterSnapshot | None = None
        self.ema: WeightAverage | None = None

    def _exchange(self, now: bool) -> None:
        self.exchanging = now

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`."""
        self.exchanging = isinstance(self.component, FSDPModule)
        self.scaler.scale(loss).backward()
        self.exchanging = False

    def has_gradient(self, loss: Tensor) -> bool:
        """Whether a gradient of `loss` that is not zero reaches a trained weight. Gradients stay as they were."""
        trained = [parameter for parameter in self.parameters.values() if parameter.requires_grad]
        if not isinstance(self.component, FSDPModule):
            found = torch.autograd.grad(loss, trained, allow_unused=True) if loss.requires_grad and trained else ()
            return any(bool((gradient != 0).any()) for gradient in found if gradient is not None)
        # what is gathered has its gradient in the sharded weight alone, and only after a backward pass of all processes
        before = [parameter.grad for parameter in trained]
        for parameter in trained:
            parameter.grad = None
        if loss.requires_grad:
            loss.backward()
        own = [cast(DTensor, parameter.grad).to_local() for parameter in trained if parameter.grad is not None]
        for parameter, gradient in zip(trained, before, strict=True):
            parameter.grad = gradient
        return any_flag(self.world, any(bool((gradient != 0).any()) for gradient in own))

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of one term: gradients are exchanged at the last one only, those of shards at
        each, since they would lie whole on every process in between."""
        if isinstance(self.policy, DistributedDataParallel) and not last:
            return self.policy.no_sync()
        return nullcontext()

    def step(self, training_step: int) -> dict[str, float]:
        """One optimizer step with the rate of `training_step` (from 0); clears the gradients.

        Returns gradient norm (before clipping) and learning rate, and of Prodigy the rate that it found. With loss
        scaling a gradient that overflows is left out, and the scale lowered; `skipped_updates` counts those in a row.
        Raises NonFiniteError, before anything is changed, for a gradient that is not finite without it, and after
        `MAX_SKIPPED` of them with it.
        """
        rate = self.learning_rate(training_step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group[RATE_SCALE]
        # first of all: the norm and the clip are those of the true gradients
        self.scaler.unscale_(self.optimizer)
        parameters = list(self.parameters.values())
        total = nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
        if isinstance(total, DTensor):
            total = total.full_tensor()
        norm = total.item()
        if not math.isfinite(norm) and not self.scaler.is_enabled():  # before clipping spreads it over all gradients
            raise NonFiniteError(f"the gradient norm of the {self.name} half is {norm}", training_step)
        nn.utils.clip_grads_with_norm_(parameters, self.settings.max_grad_norm or math.inf, total)
        self.scaler.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.follow(training_step)
        figures = {"grad_norm": norm, "learning_rate": rate}
        if self.settings.name == "prodigy":
            figures["found_rate"] = rate * self.optimizer.param_groups[0]["d"]
        if self.scaler.is_enabled():
            figures |= self._adapt_scale(training_step)
        return figures

    def _adapt_scale(self, training_step: int) -> dict[str, float]:
        """Lowers the loss scale after an overflow, raises it after many steps without one."""
        before = self.scaler.get_scale()
        self.scaler.update()
        scale = self.scaler.get_scale()
        self.skipped = self.skipped + 1 if scale < before else 0
        if self.skipped >= MAX_SKIPPED:
            raise NonFiniteError(
                f"fp16 gradients of the {self.name} half overflowed in {counted(self.skipped, 'update')} in a row, "
                f"down to a loss scale of {scale:g}",
                training_step,
            )
        return {"loss_scale": scale, "skipped_updates": float(self.skipped)}

    def learning_rate(self, training_step: int) -> float:
        """The rate of `training_step` (from 0): w warmup steps of k / (w + 1) of it, k = 1 .. w, then all of it; from
        there constant, or down to `min_lr_ratio`, which the last step of the run has. All counted from `first_step`."""
        settings, own = self.settings, training_step - self.first_step
        if own < settings.warmup_steps:
            return settings.learning_rate * (own + 1) / (settings.warmup_steps + 1)
        if settings.scheduler == "constant":
            return settings.learning_rate
        span = max(1, self.total_steps - self.first_step - 1 - settings.warmup_steps)
        factor = remaining_rate(settings, min(1.0, (own - settings.warmup_steps) / span))
        return settings.learning_rate * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * factor)

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, the component is what the KL is measured against, without gradient: the starting model, or the slow
        `average` of the trained one."""
        if self.reference is None:
            raise TrainingError(f"{self.name}: no reference was kept because kl_coef is 0")
        with torch.no_grad(), self.reference():
            yield

    @contextmanager
    def as_old(self) -> Iterator[None]:
        """Inside, the component is the slow policy that draws (DiffusionNFT); itself where none is kept."""
        if self.old is None:
            yield
            return
        with self.old.applied():
            yield

    def as_shown(self, showing: Showing) -> AbstractContextManager[Any]:
        """Inside, the component has the weights that are shown for `showing`: its average, where one is kept; no
        gradients then. What trained comes back bit for bit."""
        if self.ema is not None:
            return self.ema.snapshot.applied() if showing in self.ema.shown else nullcontext()
        if self.settings.name != SCHEDULE_FREE:
            return nullcontext()
        return self.snapshot(values=averaged_weights(self.optimizer, self.parameters)).applied()

    def snapshot(
        self, dtype: torch.dtype | None = None, values: Mapping[str, Tensor] | None = None
    ) -> ParameterSnapshot:
        """A copy of the trained weights, or `values` in their place, that can stand in for them."""
        return ParameterSnapshot(self.parameters, dtype, self.component, values)

    def place_copies(self, device: torch.device) -> None:
        """Moves the copies that are kept of the weights."""
        for snapshot in (self.start, *(snapshot for _, snapshot in self._snapshots())):
            if snapshot is not None:
                snapshot.to(device)

    def place_optimizer(self, device: torch.device) -> None:
        """Moves what the optimizer remembers; counters stay on the CPU, where it keeps them."""
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    state[key] = value.to(device)

    def state(self, *, with_optimizer: bool) -> dict[str, StateTree]:
        """Named states for a checkpoint. The starting model as reference is not among them: the run loads it anew."""
        weights: dict[str, Any] = {name: parameter.detach() for name, parameter in self.parameters.items()}
        state: dict[str, StateTree] = {f"{self.name}_weights": weights}
        if with_optimizer:
            state[f"{self.name}_optimizer"] = optimizer_state_tree(self.optimizer, self.parameters)
            if self.scaler.is_enabled():
                state[f"{self.name}_scaler"] = {"scaler": self.scaler.state_dict(), "skipped": self.skipped}
        for kind, snapshot in self._snapshots():
            state[f"{self.name}_{kind}"] = cast(StateTree, snapshot.state_dict())
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, StateTree]) -> None:
        """Takes what `state` gave: weights, moments and snapshots. What the configuration says of the optimizer stays.

        Raises TrainingError or CheckpointError when the checkpoint does not fit the run.
        """
        weights = cast(Mapping[str, Tensor], state[f"{self.name}_weights"])
        if weights.keys() != self.parameters.keys():
            raise TrainingError(
                f"the checkpoint's {self.name} weights do not fit: {len(weights.keys() ^ self.parameters.keys())} "
                "names differ; resume with the model and lora settings of the run that saved it"
            )
        for name, parameter in self.parameters.items():  # before any is taken: a single row would go to all of them
            if weights[name].shape != parameter.shape:
                raise TrainingError(
                    f"the checkpoint's {self.name} weights do not fit: {name} has the shape "
                    f"{list(weights[name].shape)}, and here {list(parameter.shape)}; resume with the model and lora "
                    "settings of the run that saved it"
                )
        for name, parameter in self.parameters.items():
            parameter.copy_(shard_like(weights[name], parameter))
        if f"{self.name}_optimizer" not in state:
            raise TrainingError(
                "the checkpoint was saved with checkpoint.save_optimizer: false and cannot be resumed; start a new run "
                "with model.name, or lora.start_from, set to it"
            )
        load_optimizer_state_tree(self.optimizer, self.parameters, state[f"{self.name}_optimizer"])
        scaling = cast(dict[str, Any] | None, state.get(f"{self.name}_scaler"))
        if self.scaler.is_enabled() and scaling is not None:
            self.scaler.load_state_dict(scaling["scaler"])
            self.skipped = scaling["skipped"]
        for kind, snapshot in self._snapshots():
            values = cast(Mapping[str, Tensor] | None, state.get(f"{self.name}_{kind}"))
            if values is None:  # a run that kept none, resumed with `resume.accept`: it starts with what was loaded
                snapshot.copy_from_current()
            else:
                own = snapshot.state_dict()
                fitting = {name: shard_like(value, own[name]) for name, value in values.items() if name in own}
                snapshot.load_state_dict({**values, **fitting})

    def _snapshots(self) -> list[tuple[str, ParameterSnapshot]]:
        """The slow copies that training moves, by name."""
        ema = None if self.ema is None else self.ema.snapshot
        named = [("old", self.old), ("average", self.average), ("ema", ema)]
        return [(kind, snapshot) for kind, snapshot in named if snapshot is not None]


@contextmanager
def as_shown(parts: Mapping[str, Part], showing: Showing) -> Iterator[None]:
    """Inside, every part is `Part.as_shown`."""
    with ExitStack() as stack:
        for part in parts.values():
            stack.enter_context(part.as_shown(showing))
        yield


def remaining_rate(settings: ResolvedOptimizer, progress: float) -> float:
    """The share of the learning rate after `progress` in [0, 1] of the steps that follow the warmup: 1 at 0, 0 at 1.

    `cosine_with_restarts` has as many half waves as `cycles`, each from 1 to 0; `polynomial` is (1 - progress) to the
    `power`.
    """
    if settings.scheduler == "linear":
        return 1 - progress
    if settings.scheduler == "polynomial":
        return (1 - progress) ** settings.power
    if settings.scheduler == "cosine_with_restarts" and progress < 1:
        progress = settings.cycles * progress % 1
    return 0.5 * (1 + math.cos(math.pi * progress))


def replicated(component: nn.Module, *, find_unused_parameters: bool) -> DistributedDataParallel:
    """`component` in DDP, whose gradients are laid out at the first step as at all later ones.

    DDP groups gradients into buckets in the order in which those of its first backward pass came, from the second pass
    on. Among three processes or more the order of the terms of a sum depends on where in a bucket it lies: after a
    resume a step would be other than without a stop. So a pass of zero gradients comes first.
    """
    # buffers are frozen and were compared at the start: sending them at each forward would be waiting in vain
    policy = DistributedDataParallel(component, find_unused_parameters=find_unused_parameters, **without_buffers_sent())
    if not find_unused_parameters:  # else buckets stay as they are
        trained = [parameter for parameter in component.parameters() if parameter.requires_grad]
        component.forward = lambda: torch.stack([0 * each.sum().float() for each in trained]).sum()  # type: ignore[method-assign]
        with torch.enable_grad():
            policy().backward()
        del component.forward
        for parameter in trained:
            parameter.grad = None
    return policy
