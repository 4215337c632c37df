"""AdamW with both moments in bf16: half the bytes of torch's, which keeps them as its parameters are, in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from glm_training.utils.randomness import derive_seed

_DROPPED_BITS = 16
"""Of fp32's 32, those that bf16 lacks: the lowest of the fraction."""


class BF16MomentsAdamW(Optimizer):
    """AdamW (arXiv:1711.05101) that computes in fp32, and keeps its moments m and v in bf16 from step to step.

    They are rounded up or down by chance, so that what is kept is right on average (`stochastically_rounded`). To the
    nearest, v would stand still: a step takes at most 1 - beta2 of it, 0.001, and neighbours in bf16 lie 0.004 to 0.008
    of it apart, so it would never fall again after a large gradient.

    The draws are named by the step: every process of a run has the same, and so has a resume.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of all parameters that have a gradient."""
        loss = None if closure is None else closure()
        draws: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group, draws)
        return loss

    def _move(self, parameter: Tensor, group: dict[str, Any], draws: dict[torch.device, torch.Generator]) -> None:
        state = self.state[parameter]
        if not state:
            empty = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state |= {"step": torch.tensor(0.0), "exp_avg": empty, "exp_avg_sq": empty.clone()}
        state["step"] += 1
        count, (beta1, beta2), gradient = int(state["step"].item()), group["betas"], parameter.grad.float()  # type: ignore[union-attr]
        if parameter.device not in draws:
            generator = torch.Generator(parameter.device)
            generator.manual_seed(derive_seed(0, "optimizer/moments", count))
            draws[parameter.device] = generator
        m = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
        v = state["exp_avg_sq"].float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        state["exp_avg"].copy_(stochastically_rounded(m, draws[parameter.device]))
        state["exp_avg_sq"].copy_(stochastically_rounded(v, draws[parameter.device]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        spread = v.div_(1 - beta2**count).sqrt_().add_(group["eps"])
        parameter.addcdiv_(m, spread, value=-group["lr"] / (1 - beta1**count))


def stochastically_rounded(values: Tensor, generator: torch.Generator) -> Tensor:
    """`values`, fp32 and finite, in bf16: each one of its two neighbours, the upper with the share of the way that it
    lies up from the lower, so that the mean is the value (arXiv:1502.02551). What bf16 has stays."""
    noise = torch.randint(
        0, 1 << _DROPPED_BITS, values.shape, dtype=torch.int32, device=values.device, generator=generator
    )
    # the magnitude lies in the low 31 bits in order: adding to them and cutting off rounds it up now and then
    bits = values.contiguous().view(torch.int32).add(noise).bitwise_and_(-1 << _DROPPED_BITS)
    return bits.view(torch.float32).to(torch.bfloat16)
