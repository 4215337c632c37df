"""Flow matching of VGT's latent tokens, with the head's features drawn towards a vision encoder's (REPA)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from glm_training.algorithms.flow_tokens import TIME_SHIFT, noised, token_times
from glm_training.methods.losses import MethodLoss
from glm_training.models.vgt.generator import Prediction
from glm_training.models.vgt.sequence import Prompts

PredictTokens = Callable[[Prompts, Tensor, Tensor, Tensor, Tensor], Prediction]
"""`Generator.forward`, perhaps inside DDP."""


@dataclass(frozen=True)
class TokenFlow:
    """Mean over all tokens of |velocity - (clean - noise)|^2 / C, plus `repa_weight` times the mean of -cos(features,
    teacher's features) where the generator has a REPA head (arXiv:2410.06940)."""

    time_shift: float = TIME_SHIFT
    repa_weight: float = 0.5

    def loss(
        self,
        policy: PredictTokens,
        prompts: Prompts,
        latents: Tensor,
        order: Tensor,
        *,
        draws: Tensor,
        noise: Tensor,
        teacher: Tensor | None = None,
    ) -> MethodLoss:
        """`latents`, `noise` [B, C, h, w]; `order` long [L] or [B, L]; `draws` standard normal [B, L], one noise level
        for each token; `teacher` [B, L, R] in raster order. A dropped caption is an empty prompt among `prompts`.

        Raises ValueError for shapes, and for a REPA head without a teacher or the other way round.
        """
        times = token_times(draws, self.time_shift)
        noisy, target = noised(latents.flatten(2).transpose(1, 2), noise.flatten(2).transpose(1, 2), times)
        prediction = policy(prompts, latents, order, noisy, times)
        flow = (prediction.velocity.float() - target).square().mean(dim=(1, 2))
        each, metrics = flow, {"flow_loss": flow.detach().mean()}
        alignment = _alignment(prediction.features, teacher)
        if alignment is not None:
            each = flow + self.repa_weight * alignment
            metrics["repa_loss"] = alignment.detach().mean()
        return MethodLoss(each.mean(), len(latents), metrics, {"loss": each.detach()})


def _alignment(features: Tensor | None, teacher: Tensor | None) -> Tensor | None:
    """-cos between features and the teacher's [B, L, R], mean over the tokens: [B] fp32."""
    if features is None and teacher is None:
        return None
    if features is None or teacher is None:
        raise ValueError("a teacher's features and a generator with a REPA head (repa) go together: one is missing")
    if features.shape != teacher.shape:
        raise ValueError(f"the teacher's features must be {list(features.shape)}, got {list(teacher.shape)}")
    return -F.cosine_similarity(features.float(), teacher.detach().float(), dim=-1).mean(dim=1)
