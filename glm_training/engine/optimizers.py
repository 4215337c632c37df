"""The update rule of a part, of torch or of the library that keeps it, with decoupled weight decay (arXiv:1711.05101).

adamw                Adam with decoupled decay, its moments in fp32 or bf16
adamw_8bit           the same, its moments in 8 bits (arXiv:2110.02861)
adafactor            the second moment of a matrix as a row and a column, steps clipped to an RMS of 1, under the
                     schedule's learning rate (arXiv:1804.04235)
prodigy              Adam that estimates the size of its steps (arXiv:2306.06101); the learning rate multiplies it
lion                 the sign of the momentum (arXiv:2302.06675)
muon                 the momentum of a matrix made orthogonal, at AdamW's scale (arXiv:2502.16982)
adamw_schedule_free  AdamW whose average of the weights stands in for a schedule (arXiv:2405.15682)
sgd                  with momentum
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.optim import Optimizer

from glm_training.config.sections.resolved import ResolvedOptimizer
from glm_training.engine.bf16_moments import BF16MomentsAdamW
from glm_training.engine.errors import SettingsError

DECOUPLED = "decoupled_weight_decay"
"""Key of an SGD group's decay. Torch's own `weight_decay` is L2 there: it adds to gradient and momentum."""

RATE_SCALE = "rate_scale"
"""Key of a group: its learning rate as a share of the part's."""

SCHEDULE_FREE = "adamw_schedule_free"

MUON_MOMENTUM = 0.95

_EXTRAS = {
    "adamw_8bit": ("bitsandbytes", "bitsandbytes"),
    "prodigy": ("prodigyopt", "prodigy"),
    "lion": ("lion_pytorch", "lion"),
    SCHEDULE_FREE: ("schedulefree", "schedulefree"),
}
"""The package that an update rule is in, and the extra that installs it."""

_STEPS_ON_A_CPU = Version("0.50")
"""The bitsandbytes whose optimizers do."""

Groups = list[dict[str, Any]]


def build_optimizer(
    settings: ResolvedOptimizer, parameters: Mapping[str, nn.Parameter], rate_scales: Mapping[str, float]
) -> Optimizer:
    """The optimizer of `parameters`, in one group that decays and one that does not, for each of the `rate_scales` by
    parameter name (1 for those without); Muon's matrices lie in groups of their own.

    Raises SettingsError for a rule that cannot run here.
    """
    check_optimizer(settings.name, next(iter(parameters.values())).device)
    kinds = {
        name: (
            settings.name == "muon" and is_hidden_matrix(name, p),
            settings.weight_decay if decays(name, p, settings) else 0.0,
            rate_scales.get(name, 1.0),
        )
        for name, p in parameters.items()
    }
    groups: Groups = [
        {
            "params": [parameters[name] for name, own in kinds.items() if own == (matrix, decay, scale)],
            "weight_decay": decay,
            RATE_SCALE: scale,
            _MATRICES: matrix,
        }
        for matrix, decay, scale in dict.fromkeys(kinds.values())
    ]
    return _BUILDERS[settings.name](settings, groups)


def decays(name: str, parameter: nn.Parameter, settings: ResolvedOptimizer) -> bool:
    """Whether weight decay acts on a parameter: on matrices and kernels, LoRA's among them, and on embeddings.

    Scales of norms and biases are vectors; pulled to zero they would switch channels off rather than simplify anything.
    """
    return settings.decay_norms_and_biases or (parameter.ndim >= 2 and name.rpartition(".")[2] != "bias")


def check_optimizer(name: str, device: torch.device) -> None:
    """Raises SettingsError for an update rule that cannot run here."""
    package, extra = _EXTRAS.get(name, ("torch", ""))
    if importlib.util.find_spec(package) is None:
        raise SettingsError(f'optimizer {name} needs {package}: pip install "glm_training[{extra}]"')
    if name == "adamw_8bit" and device.type == "cpu" and Version(version(package)) < _STEPS_ON_A_CPU:
        raise SettingsError(
            f"optimizer adamw_8bit needs bitsandbytes {_STEPS_ON_A_CPU} or newer on a CPU, and this is "
            f"{version(package)}: pip install -U bitsandbytes, or use adamw"
        )
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise SettingsError(f"optimizer muon needs torch 2.9 or newer, and this is {torch.__version__}: use adamw")


def averaged_weights(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The weights that schedule-free is judged by, by name: x = y + (1 - 1 / beta1)(z - y), of the weights y under
    training and the sequence z; those that never had a gradient as they are."""
    beta1 = optimizer.param_groups[0]["betas"][0]
    averaged = {}
    for name, parameter in parameters.items():
        newest = optimizer.state.get(parameter, {}).get("z", parameter)
        averaged[name] = parameter.detach().lerp(newest.detach().to(parameter.device), 1 - 1 / beta1)
    return averaged


# -- the rules ---------------------------------------------------------------------------------------------------------


def _adam_options(settings: ResolvedOptimizer) -> dict[str, Any]:
    return {"lr": settings.learning_rate, "betas": (settings.beta1, settings.beta2), "eps": settings.epsilon}


def _adamw(settings: ResolvedOptimizer, groups: Groups) -> Optimizer:
    if settings.moments_dtype == "bfloat16":
        return BF16MomentsAdamW(groups, **_adam_options(settings))
    return torch.optim.AdamW(groups, **_adam_options(settings))


def _adamw_8bit(settings: ResolvedOptimizer, groups: Groups) -> Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups, **_adam_options(settings))


def _adafactor(settings: ResolvedOptimizer, groups: Groups) -> Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=settings.learning_rate, scale_parameter=False, relative_step=False)


def _prodigy(settings: ResolvedOptimizer, groups: Groups) -> Optimizer:
    from prodigyopt import Prodigy

    # as its authors advise for diffusion models: neither Adam's first steps nor the warmup inflate the estimate
    return Prodigy(groups, **_adam_options(settings), use_bias_correction=True, safeguard_warmup=True)


def _lion(settings: ResolvedOptimizer, groups: Groups) -> Optimizer:
    from lion_pytorch import Lion

    return Lion(groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2))


def _schedule_free(settings: ResolvedOptimizer, groups: Groups) -> Optimizer:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(groups, **_adam_options(settings))
    for group in optimizer.param_groups:
        group["train_mode"] = True  # for good: what is shown is a copy, since the library's way to and fro rounds
    return optimizer


def _sgd(settings: ResolvedOptimizer, groups: Groups) -> Optimizer:
    """p <- p (1 - lr decay) - lr m with m <- momentum m + gradient."""
    for group in groups:
        group[DECOUPLED] = group.pop("weight_decay")
    optimizer = torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.beta1)
    optimizer.register_step_pre_hook(_decay)  # a step that loss scaling leaves out decays nothing
    return optimizer


@torch.no_grad()
def _decay(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        moving = [parameter for parameter in group["params"] if parameter.grad is not None]
        if moving and group[DECOUPLED]:
            torch._foreach_mul_(moving, 1 - group["lr"] * group[DECOUPLED])


_MATRICES = "matrices"
"""Key of a group: whether Muon moves it."""


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon moves a parameter: matrices, LoRA's among them, but for embeddings and the head over the
    vocabulary, whose rows are a choice each and no map from space to space."""
    words = name.split(".")
    outer = any("embed" in word for word in words) or "lm_head" in words
    return parameter.ndim == 2 and words[-1] != "bias" and not outer


class MuonAdamW(Optimizer):
    """torch's Muon for the groups of hidden matrices and its AdamW for the others, as one optimizer with one state."""

    def __init__(self, settings: ResolvedOptimizer, groups: Groups) -> None:
        super().__init__(groups, {"lr": settings.learning_rate})
        matrices = [group for group in self.param_groups if group[_MATRICES]]
        others = [group for group in self.param_groups if not group[_MATRICES]]
        self._inner: list[Optimizer] = []
        if matrices:
            # at AdamW's scale: both halves of the optimizer then share a learning rate and a decay
            muon = torch.optim.Muon(matrices, momentum=MUON_MOMENTUM, adjust_lr_fn="match_rms_adamw")
            self._inner.append(muon)
        if others:
            self._inner.append(torch.optim.AdamW(others, **_adam_options(settings)))
        self.param_groups = [group for inner in self._inner for group in inner.param_groups]
        self._share()

    def _share(self) -> None:
        """Gives the two optimizers inside the groups and the state that this one has."""
        for inner in self._inner:
            matrices = isinstance(inner, torch.optim.Muon)
            inner.param_groups = [group for group in self.param_groups if group[_MATRICES] == matrices]
            inner.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = None if closure is None else closure()
        for inner in self._inner:
            inner.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `Optimizer.load_state_dict`, which puts new groups and a new state in place of the old."""
        super().load_state_dict(state_dict)
        self._share()


_BUILDERS: dict[str, Callable[[ResolvedOptimizer, Groups], Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "adafactor": _adafactor,
    "prodigy": _prodigy,
    "lion": _lion,
    "muon": MuonAdamW,
    SCHEDULE_FREE: _schedule_free,
    "sgd": _sgd,
}
