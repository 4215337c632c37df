"""Counter-based randomness: every draw is named by (run seed, purpose, counters), never by process state.

Two draws with the same name are equal on every process, in every batch and after every resume; two draws with different
names are independent. Nothing here reads or writes a global generator.

Rows are drawn with Philox4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), keyed with 128 bits
of a BLAKE2b hash of the name. Torch's CPU generator is not used for rows: it keeps only the low 32 bits of a seed, and
its normal draws depend on the number of elements and on the vector unit of the processor.
"""

import hashlib
import operator
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor


def _digest(run_seed: int, purpose: str, counters: Sequence[int], size: int) -> bytes:
    """BLAKE2b of an encoding no two different names share: decimal integers and a length-prefixed purpose."""
    name = purpose.encode("utf-8")
    numbers = ",".join(str(operator.index(counter)) for counter in counters)
    encoded = b"glm_training:%d:%d:%b:%b" % (operator.index(run_seed), len(name), name, numbers.encode("ascii"))
    return hashlib.blake2b(encoded, digest_size=size).digest()


def derive_seed(run_seed: int, purpose: str, *counters: int) -> int:
    """A seed in [0, 2**63) that depends on the arguments alone, not on the process or on ``PYTHONHASHSEED``.

    Raises ``TypeError`` when the run seed or a counter is not an integer.
    """
    return int.from_bytes(_digest(run_seed, purpose, counters, 8), "little") >> 1


def make_generator(run_seed: int, purpose: str, *counters: int) -> torch.Generator:
    """A fresh CPU ``torch.Generator`` for the name, for code that wants one (``torch.randperm``).

    It keeps the low 32 bits of its seed: millions of streams are what :func:`normal` and :func:`uniform` are for.
    """
    generator = torch.Generator(device="cpu")
    generator.manual_seed(derive_seed(run_seed, purpose, *counters))
    return generator


def _row_generator(run_seed: int, purpose: str, counters: Sequence[int]) -> np.random.Generator:
    key = np.frombuffer(_digest(run_seed, purpose, counters, 16), dtype="<u8").astype(np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def normal(
    run_seed: int,
    purpose: str,
    counters: Sequence[tuple[int, ...]],
    shape: tuple[int, ...],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise ``[len(counters), *shape]``; row i is named by ``counters[i]`` and by nothing else.

    Drawn in fp32 on the CPU, then moved and cast, so that every device and dtype sees the same numbers.
    """
    rows = np.empty((len(counters), prod(shape)), dtype=np.float32)
    for row, name in zip(rows, counters, strict=True):
        _row_generator(run_seed, purpose, name).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(rows).reshape(len(counters), *shape).to(device=device, dtype=dtype)


def uniform(
    run_seed: int,
    purpose: str,
    counters: Sequence[tuple[int, ...]],
    shape: tuple[int, ...],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform draws in [0, 1), ``[len(counters), *shape]``; row i is named by ``counters[i]`` and by nothing else.

    Drawn in fp32 (24 bits). A narrower dtype could round up to 1, so it is held at the largest value below 1.
    """
    rows = np.empty((len(counters), prod(shape)), dtype=np.float32)
    for row, name in zip(rows, counters, strict=True):
        _row_generator(run_seed, purpose, name).random(out=row, dtype=np.float32)
    draws = torch.from_numpy(rows).reshape(len(counters), *shape).to(device=device, dtype=dtype)
    return draws.clamp(max=1.0 - torch.finfo(dtype).eps / 2)
