"""When the DiT is asked and how far each step goes.

The two do not share a scale. The DiT is conditioned on the *unshifted* ``trunc(linspace(1000, 1, S+1)[:-1]) - 1``; the
Euler step runs on *shifted* sigmas, mu / (mu + 1/u - 1) with mu = max_shift * sqrt(patches / base) + base_shift.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from glm_training.models.glm_image.dit_types import FlowSchedule

_UNSUPPORTED = (
    "invert_sigmas",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)
ON_GRID = 1e-3
"""Of a step: by less than this is a fp32 k / 1000, times 1000, above k."""


def check_scheduler(scheduler: FlowMatchEulerDiscreteScheduler) -> None:
    """Raise ValueError when the scheduler's config asks for something other than shifted Euler steps."""
    wrong = [name for name in _UNSUPPORTED if scheduler.config[name]]
    if wrong:
        raise ValueError(
            f"scheduler_config.json sets {', '.join(wrong)}, but GLM-Image is sampled and trained with plain shifted "
            "Euler steps; set them to false or null"
        )


def shift_parameter(scheduler: FlowMatchEulerDiscreteScheduler, patches: int) -> float:
    """mu for an image of `patches` DiT patches (16x16 px each): max_shift * sqrt(patches / base) + base_shift."""
    config = scheduler.config
    return (patches / config["base_image_seq_len"]) ** 0.5 * config["max_shift"] + config["base_shift"]


def shift_sigmas(scheduler: FlowMatchEulerDiscreteScheduler, u: Tensor, patches: int) -> Tensor:
    """sigma = shift(u): `u` in [0, 1], any shape, to the noise level the step runs on; same shape, fp32."""
    u = u.float()
    if scheduler.config["use_dynamic_shifting"]:
        return scheduler.time_shift(shift_parameter(scheduler, patches), 1.0, u)
    return scheduler.shift * u / (1 + (scheduler.shift - 1) * u)


def flow_schedule(scheduler: FlowMatchEulerDiscreteScheduler, steps: int, patches: int) -> FlowSchedule:
    """The stock pipeline's schedule of `steps` steps for an image of `patches` DiT patches, on the CPU.

    Raises ValueError when `steps` is not between 1 and the number of training timesteps.
    """
    train_steps = scheduler.config["num_train_timesteps"]
    if not 1 <= steps <= train_steps:
        raise ValueError(f"num_inference_steps must be between 1 and {train_steps}, got {steps}")
    timesteps = np.linspace(train_steps, 1.0, steps + 1)[:-1].astype(np.int64).astype(np.float32)
    private = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)  # set_timesteps writes into the scheduler
    private.set_timesteps(
        steps, device="cpu", sigmas=timesteps / train_steps, timesteps=timesteps, mu=shift_parameter(scheduler, patches)
    )
    return FlowSchedule(timesteps=private.timesteps - 1, sigmas=private.sigmas)


def training_sigmas(scheduler: FlowMatchEulerDiscreteScheduler, u: Tensor, patches: int) -> tuple[Tensor, Tensor]:
    """`u` [B] in [0, 1] -> (timestep [B], sigma [B]), fp32, of the level k = ceil(1000 u) in 1 .. 1000.

    t = k - 1 and sigma = shift(k / 1000) are the pairs that samplers ask for. Uniform u give every k equally often:
    t = 999 too, the pure noise with which all sampling starts, which a t rounded down never reaches. Raises ValueError
    for u outside [0, 1].
    """
    u, steps = u.float(), scheduler.config["num_train_timesteps"]
    if not bool(((u >= 0) & (u <= 1)).all()):
        raise ValueError("u must lie in [0, 1]: it is the unshifted noise level")
    k = (u * steps - ON_GRID).ceil().clamp(1, steps)
    return k - 1, shift_sigmas(scheduler, k / steps, patches)


def schedule_tensor(value: Tensor, batch: int, device: torch.device) -> Tensor:
    """A 0-dim CPU schedule entry as ``[batch]`` on `device`, filled there (no copy that makes the host wait)."""
    return torch.full((batch,), float(value), device=device, dtype=torch.float32)
