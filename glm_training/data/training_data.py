"""What a trainer asks of its training data, whatever is in it."""

from collections.abc import Sequence
from typing import Any, Protocol


class TrainingData(Protocol):
    """Items by position, in batches; ``remarks`` are what is worth telling of them, one line each."""

    remarks: list[str]

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int], *, epoch: int | Sequence[int] = 0) -> Any:
        """The items at positions ``indices``; ``epoch`` decides random crops and flips, one for all or one for each."""
        ...

    def prefetch(self, indices: Sequence[int]) -> None:
        """Start reading what a coming batch needs."""
        ...

    def example_digests(self) -> dict[str, str]:
        """Index -> SHA-256 of each item, for ``describe_drift``."""
        ...

    def close(self) -> None:
        """Stop what reads ahead."""
        ...
