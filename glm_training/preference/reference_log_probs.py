"""What the AR half said of every pair before it was trained: two numbers per pair, in place of a second model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from glm_training.checkpoint.state_tree import StateTree
from glm_training.engine.errors import TrainingError
from glm_training.utils.distributed import World, gather_objects
from glm_training.utils.words import counted


class ReferenceLogProbs:
    """Log-probs, in nats, of the token sequences of both images, by the digest of the pair. They are constant."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._values: dict[str, tuple[float, float]] = {}

    def lacking(self, digests: Sequence[str]) -> list[str]:
        """Those of `digests` that are not known yet, each once."""
        return [digest for digest in dict.fromkeys(digests) if digest not in self._values]

    def add(self, found: dict[str, tuple[float, float]]) -> None:
        """Takes what every process found: digest -> (preferred, rejected)."""
        for values in gather_objects(self.world, found):
            self._values |= values

    def rows(self, digests: Sequence[str]) -> Tensor:
        """[2 B] fp32 on the CPU: of the preferred images, then of the rejected. Raises TrainingError for a pair without
        its numbers."""
        missing = self.lacking(digests)
        if missing:
            raise TrainingError(f"{counted(len(missing), 'pair')} without reference log-probs: not there at the start")
        values = torch.tensor([self._values[digest] for digest in digests], dtype=torch.float32)
        return values.T.flatten()

    def state(self) -> StateTree:
        """Everything, for a checkpoint."""
        return {"pairs": list(self._values), "log_probs": torch.tensor(list(self._values.values())).view(-1, 2)}

    def load(self, state: StateTree) -> None:
        """Takes what `state` gave."""
        named = cast(dict[str, Any], state)
        rows = named["log_probs"].tolist()
        self._values = {pair: (float(a), float(b)) for pair, (a, b) in zip(named["pairs"], rows, strict=True)}
