"""A copy of some parameters that can stand in for them: KL reference, NFT's old policy, EMA weights.

Give it the parameters that are trained and nothing else: with LoRA those are the adapters, and the snapshot of a 9B
model is a few MB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

_swapped: set[int] = set()  # ids of parameters that stand swapped out at this moment, by whichever snapshot


class ParameterSnapshot:
    """Values of `params` at one time: a name -> parameter mapping, or parameters in order (named "0", "1", ..).

    `dtype` is what the copy is kept in, the parameters' own by default; take fp32 for a slow average of bf16
    parameters, which would otherwise round every small update away. `values` by name stand in the place of a copy.
    Parameters that FSDP2 sharded need the `module` they belong to. Raises ValueError for no parameters, and for sharded
    ones without `module`.
    """

    def __init__(
        self,
        params: Mapping[str, torch.nn.Parameter] | Iterable[torch.nn.Parameter],
        dtype: torch.dtype | None = None,
        module: torch.nn.Module | None = None,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        named = params if isinstance(params, Mapping) else {str(i): param for i, param in enumerate(params)}
        if not named:
            raise ValueError("a snapshot of no parameters: is the component trainable?")
        if module is None and any(isinstance(param, DTensor) for param in named.values()):
            raise ValueError("a snapshot of sharded parameters needs `module`, the FSDP module they belong to")
        self._module = module
        self._params: dict[str, torch.nn.Parameter] = dict(named)
        self._values: dict[str, Tensor] = dict(values or {}) or {
            name: param.detach().to(dtype or param.dtype, copy=True) for name, param in self._params.items()
        }

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters hold the snapshot's values; after, their own again, also when an exception leaves.

        Gradients are off inside: a graph built here would be walked back with the wrong weights. Where the parameters
        hold another snapshot's values already, as a reference is asked while the average of the weights is judged,
        those come back after.
        """
        ids = {id(param) for param in self._params.values()} - _swapped  # the outermost block gives them back
        _swapped.update(ids)
        stored: dict[str, Tensor] = {}
        try:
            for name, param in self._params.items():
                stored[name] = _exchange(param, self._values[name])
            self._forget_copies()
            with torch.no_grad():
                yield
        finally:
            for name, values in stored.items():
                _exchange(self._params[name], values)
            self._forget_copies()
            _swapped.difference_update(ids)

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Exponential moving average: snapshot = decay * snapshot + (1 - decay) * current.

        Raises ValueError for a decay outside [0, 1] and RuntimeError while the parameters are swapped out.
        """
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie in [0, 1], got {decay}")
        self._require_own_values()
        for name, param in self._params.items():
            value = self._values[name]
            value.lerp_(param.detach().to(value.dtype), 1 - decay)

    @torch.no_grad()
    def copy_from_current(self) -> None:
        """Take the parameters' present values. Raises RuntimeError while they are swapped out."""
        self._require_own_values()
        for name, param in self._params.items():
            self._values[name].copy_(param.detach())

    def to(self, device: torch.device) -> None:
        """Moves the values to `device`; the parameters stay where they are."""
        self._values = {name: value.to(device) for name, value in self._values.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The snapshot's values by name: the tensors themselves, not copies."""
        return dict(self._values)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take values written by `state_dict`. Raises ValueError when names or shapes differ."""
        if state.keys() != self._values.keys():
            different = sorted(state.keys() ^ self._values.keys())
            raise ValueError(f"snapshot state does not fit: {len(different)} names differ, first {different[:3]}")
        for name, value in self._values.items():
            if state[name].shape != value.shape:
                raise ValueError(
                    f"snapshot state of {name} has shape {list(state[name].shape)}, not {list(value.shape)}"
                )
            value.copy_(state[name])

    def _forget_copies(self) -> None:
        """Copies of the weights that are kept by parameter, not by value: autocast's casts, what FSDP left gathered.

        FSDP keeps the root's weights gathered between forwards.
        """
        torch.clear_autocast_cache()
        for child in () if self._module is None else self._module.modules():
            if isinstance(child, FSDPModule):
                child.reshard()

    def _require_own_values(self) -> None:
        if any(id(param) in _swapped for param in self._params.values()):
            raise RuntimeError(
                "cannot update a snapshot while its parameters are swapped out by a snapshot's `applied()`; leave that "
                "block first"
            )


@torch.no_grad()
def _exchange(param: torch.nn.Parameter, values: Tensor) -> Tensor:
    """Put `values` into `param` and return what it held.

    A plain parameter changes its storage, which costs nothing. A sharded one must keep it (FSDP gathers from there), so
    the contents are copied.
    """
    if isinstance(param, DTensor):
        before = param.detach().clone()
        param.copy_(values)
        return before
    before = param.data
    param.data = values.to(param.dtype)
    return before
