"""How a code is drawn from logits, and how its log-probability is defined: the same for sampling and for replay.

Logits are cut to the codebook, divided by the temperature, restricted to the kept support (top-p), and renormalised.
Draws invert the cumulative distribution at given uniforms, so a row's token depends on its own logits and uniform only.

B rows, T tokens, K codes of the codebook.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_GATHER = 0x0102040810204080
"""Times eight bytes of 0 or 1, read as one little-endian number: byte k lands on bit 56 + k, and nothing carries."""

HEAD = 128
"""On the CPU, as many of the most probable codes are sorted first; a trained model's nucleus seldom needs more."""


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """bool [..., K]: the fewest most probable codes whose probabilities [..., K] sum to `top_p` (Holtzman et al. 2020).

    Codes as probable as the last one kept are kept too, so the set does not depend on how a sort breaks ties.
    """
    descending = _descending(probabilities, top_p)
    more_probable = descending.cumsum(-1) - descending
    least = descending.masked_fill_(more_probable >= top_p, torch.inf).amin(-1, keepdim=True)
    return probabilities >= least


def _descending(probabilities: Tensor, top_p: float) -> Tensor:
    """The largest probabilities [..., k], sorted, at least as many as sum to `top_p` in every row."""
    if probabilities.device.type == "cpu" and probabilities.shape[-1] > HEAD:  # elsewhere the check would be a wait
        head = probabilities.topk(HEAD, dim=-1).values
        if bool((head.sum(-1) > top_p + 1e-4).all()):  # clear of how the sums are rounded
            return head
    return probabilities.sort(-1, descending=True).values


def pack_support(support: Tensor) -> Tensor:
    """uint8 [..., ceil(K/8)] of bool [..., K]: code k is bit k % 8 of byte k // 8."""
    missing = -support.shape[-1] % 8
    whole = F.pad(support, (0, missing)) if missing else support.clone(memory_format=torch.contiguous_format)
    return (whole.view(torch.int64) * _GATHER >> 56).to(torch.uint8)


def unpack_support(packed: Tensor, num_codes: int) -> Tensor:
    """bool [..., num_codes] of what `pack_support` made."""
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(-2)[..., :num_codes].bool()


def chosen_log_probs(logits: Tensor, tokens: Tensor, *, temperature: float, support: Tensor | None) -> Tensor:
    """fp32 [...] log-probs of `tokens` [...] under `logits` [..., K]; `support` is packed, uint8 [..., ceil(K/8)]."""
    scaled = _scaled(logits, temperature, support)
    losses = F.cross_entropy(scaled.flatten(0, -2), tokens.flatten(), reduction="none")
    return -losses.view(tokens.shape)


def entropies(logits: Tensor, *, temperature: float, support: Tensor | None) -> Tensor:
    """fp32 [...] entropies (nats) of the distribution that `chosen_log_probs` scores with, >= 0."""
    log_probs = _scaled(logits, temperature, support).log_softmax(-1)
    inside = log_probs.exp()
    # outside the support 0 * -inf would be NaN
    return -(inside * torch.where(inside > 0, log_probs, 0.0)).sum(-1)


def all_log_probs(logits: Tensor, *, temperature: float, support: Tensor | None) -> Tensor:
    """fp32 [..., K] log-probs of every code under the distribution that `chosen_log_probs` scores with; -inf outside
    the support."""
    return _scaled(logits, temperature, support).log_softmax(-1)


def divergences(logits: Tensor, others: Tensor, *, temperature: float, support: Tensor | None) -> Tensor:
    """fp32 [...] KL(p || q) in nats, sum p (log p - log q) over the codes, >= 0: p is the distribution that
    `chosen_log_probs` scores with, `others` [..., K] are the log-probs of q over the same support. With gradient in
    p."""
    log_probs = all_log_probs(logits, temperature=temperature, support=support)
    inside = log_probs.exp()
    # outside the support 0 * (-inf + inf) would be NaN
    return (inside * torch.where(inside > 0, log_probs - others, 0.0)).sum(-1)


def _scaled(logits: Tensor, temperature: float, support: Tensor | None) -> Tensor:
    scaled = logits.float()
    if temperature != 1:  # a pass over all of them, and one back, for nothing
        scaled = scaled / temperature
    if support is None:
        return scaled
    return scaled.masked_fill(~unpack_support(support, scaled.shape[-1]), -torch.inf)


class TokenSampler:
    """Draws one code per row and step, and keeps the tokens, their log-probs and supports until `result`.

    A draw is work of the device alone, on tensors that stay where they are, and which step it is the device counts: a
    CUDA graph of one draw makes all of them.
    """

    def __init__(self, uniforms: Tensor, num_codes: int, *, temperature: float, top_p: float, do_sample: bool) -> None:
        """`uniforms` [B, T] in [0, 1); not read when `do_sample` is False, the most probable code is taken then."""
        self.uniforms = uniforms
        self.num_codes = num_codes
        self.temperature = temperature
        self.top_p = top_p
        self.do_sample = do_sample
        rows, device = len(uniforms), uniforms.device
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        """[1]: tokens drawn so far."""
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=device)
        """[B, 1]: the ones drawn last."""
        self._tokens = torch.zeros(uniforms.shape, dtype=torch.long, device=device)
        self._log_probs = torch.full(uniforms.shape, torch.nan, device=device)  # what is never drawn is not finite
        packed = (*uniforms.shape, -(-num_codes // 8))
        self._support = torch.zeros(packed, dtype=torch.uint8, device=device) if top_p < 1 else None

    def draw(self, logits: Tensor) -> None:
        """Draws the tokens of the next step from its logits [B, >= K]."""
        log_probs = (logits[:, : self.num_codes].float() / self.temperature).log_softmax(-1)
        probabilities = log_probs.exp()
        if self._support is not None:
            kept = nucleus(probabilities, self.top_p)
            probabilities *= kept
            self._support.index_copy_(1, self.step, pack_support(kept)[:, None])
        # fp64: a GPU's parallel scan rounds every prefix its own way, and in fp32 a rounding step at a code of
        # probability 0 is wide enough to be drawn
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        if self.do_sample:
            target = self.uniforms.index_select(1, self.step) * total
            # right: a draw of 0 passes over codes of probability 0; clamped: NaN has no place, and `result` finds it
            token = torch.searchsorted(cumulative, target, right=True).clamp_(max=self.num_codes - 1)
        else:
            token = log_probs.argmax(-1, keepdim=True)
        self._tokens.index_copy_(1, self.step, token)
        self._log_probs.index_copy_(1, self.step, log_probs.gather(-1, token) - total.log().float())
        self.token.copy_(token)
        self.step += 1

    def drawn(self, step: int) -> tuple[Tensor, Tensor]:
        """Copies of the tokens [B] and log-probs [B] of one step."""
        return self._tokens[:, step].clone(), self._log_probs[:, step].clone()

    def take_back(self, step: int) -> None:
        """The draw of `step`, 1 at least, and of all after it is due again."""
        self.step.fill_(step)
        self.token.copy_(self._tokens[:, step - 1 : step])

    def result(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """tokens [B, T], log-probs [B, T] fp32, packed supports [B, T, ceil(K/8)] or None.

        Raises `FloatingPointError` when the model gave a logit that is not finite.
        """
        if not bool(self._log_probs.isfinite().all()):
            raise FloatingPointError(
                "the AR model gives logits that are not finite: check the checkpoint, the dtype (fp16 overflows; use "
                "bf16 or fp32) and whether the last update diverged"
            )
        return self._tokens, self._log_probs, self._support
