"""The processes of one run agree on what they are about to do, or none of them starts.

What decides the training is compared by content: settings, code, libraries, prompts, images, users' rewards, the
checkpoint, the loaded weights. Files may lie under another path on each node, as on disks of its own, where what is in
them is compared. Every function here is a collective: all processes call it, in the same order.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

import glm_training
from glm_training.config import Config, leaves
from glm_training.data.fingerprint import combined_digest, describe_drift
from glm_training.engine.errors import USER_ERRORS, TrainingError
from glm_training.models.family import Family
from glm_training.rewards.custom import is_class_spec, source_file
from glm_training.utils.distributed import DistributedError, World, broadcast_object, gather_objects
from glm_training.utils.redaction import redact
from glm_training.utils.writable import expanded

T = TypeVar("T")

LIBRARIES = ("torch", "torchvision", "transformers", "diffusers", "peft", "tokenizers", "numpy", "pillow")
"""Whose versions change what is computed: refused where they differ. Python and the GPUs may differ."""

PER_PROCESS = (
    "data.num_workers",
    "data.pin_memory",
    "model.local_files_only",
    "model.device_map",
    "cache.dir",
    "dpo.cache_dir",
)
"""Keys that each node may have its own way: they cannot change what is trained, nor when processes meet. What
`cache.dir` holds is named by its content."""

DATA = (
    "data.prompts_file",
    "data.source_images_dir",
    "data.target_images_dir",
    "data.pairs",
    "data.metadata_file",
    "reward.target_images_dir",
    "evaluation.eval_prompts_file",
    "evaluation.eval_target_images_dir",
    "evaluation.eval_source_images_dir",
    "evaluation.eval_pairs",
)
"""Paths of the data: `agree_on_data` compares what is read from them."""

MODELS = ("model.name", "model.taesd", "dmdr.initial_weights", "vgt.autoencoder", "vgt.repa.model")
"""Keys that name the weights of models; those of teachers and adapters, which have names of their own, come beside."""

FILES = (
    *MODELS,
    "checkpoint.resume_from",
    "dmdr.reward.clip_h_weights",
    "reward.options.text_accuracy.model_files",
    "reward.options.lpips.backbone_weights",
    "reward.options.aesthetic.clip_name",
    "reward.options.aesthetic.mlp_weights",
    "reward.options.clip_score.clip_name",
    "reward.options.pick_score.model_name",
    "reward.options.pick_score.processor_name",
    "reward.options.hps_v2.weights",
    "vgt.lpips_weights",
    "vgt.convnext_weights",
)
"""Keys that may name a file or folder of each node's own: what is in it is compared. Other values, and hub ids, are
compared as they are written."""

PLACES = ("output_dir", "checkpoint.save_dir", "checkpoint.lora_dir", "logging.log_dir")
"""Where the run writes: one place for all processes, wherever each was started."""

SAMPLE_BYTES = 1 << 20
_SHOWN = 8


@dataclass(frozen=True)
class Fact:
    """What processes must have in common, and how a message shows it."""

    value: str
    shown: str


# -- failures of one process -------------------------------------------------------------------------------------------


def together(world: World, doing: str, action: Callable[[], T]) -> T:
    """What `action` gives, once it went well on every process; inside it no process may wait for another.

    Where it fails on one, all leave: with their own error where all have the same; with a DistributedError that names
    the ranks where it is the user's to mend; else the one that failed with its own error, the others with a
    TrainingError that names it.
    """
    result: Any = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:  # whatever it is, the others must not wait for this process
        if world.world_size == 1:
            raise
        failure = error
    told = gather_objects(world, None if failure is None else _describe(failure))
    failed = {rank: item for rank, item in enumerate(told) if item is not None}
    if not failed:
        return result  # type: ignore[no-any-return]
    leave_together()
    if failure is not None and (len(set(told)) == 1 or not isinstance(failure, USER_ERRORS)):
        raise failure
    lines = [f"{doing} failed on rank {rank}: {text}" for rank, (_, text) in failed.items()]
    if all(expected for expected, _ in failed.values()):
        raise DistributedError("\n".join([*lines, "All processes stop; nothing was started."]))
    raise TrainingError("\n".join([*lines, "The output of those ranks has the traceback; this process stops as well."]))


def _describe(error: Exception) -> tuple[bool, str]:
    """Whether it is one of the user's to mend, and its text."""
    expected = isinstance(error, USER_ERRORS)
    return expected, str(error) if expected else f"{type(error).__name__}: {error}"


def leave_together() -> None:
    """From here on this process only has to tell why it ends. A launcher that sees another one end first would cut it
    short with SIGTERM."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def losses_explained(world: World) -> Iterator[None]:
    """Inside, an exchange that failed because another process ended becomes a TrainingError that says so."""
    try:
        yield
    except TrainingError:
        raise  # it is explained already
    except RuntimeError as error:
        if world.world_size == 1 or not any(sign in str(error) for sign in _LOST):
            raise
        leave_together()
        first = str(error).splitlines()[0][:200]
        raise TrainingError(
            f"another process of this run has ended, so this one (rank {world.rank}) stops as well; why is in the "
            f"other's output. --resume continues from the last checkpoint. ({first})"
        ) from error


_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo/transport", "NCCL")


# -- settings, code and libraries --------------------------------------------------------------------------------------


def agree(world: World, facts: Callable[[], Mapping[str, Fact]]) -> list[str]:
    """Which of the facts differ between processes, a line each: `key: a on rank 0, b on ranks 1, 2`.

    The same lines on every process. A fact that one process has and another has not counts as different.
    """
    if world.world_size == 1:
        return []
    own = facts()
    digest = hashlib.sha256(repr(sorted((key, fact.value) for key, fact in own.items())).encode()).hexdigest()
    if len(set(gather_objects(world, digest))) == 1:
        return []
    told = gather_objects(world, dict(own))
    lines = []
    for key in dict.fromkeys(key for each in told for key in each):
        ranks: dict[str | None, list[int]] = {}
        shown: dict[str | None, str] = {}
        for rank, each in enumerate(told):
            fact = each.get(key)
            value = None if fact is None else fact.value
            ranks.setdefault(value, []).append(rank)
            shown.setdefault(value, "nothing" if fact is None else fact.shown)
        if len(ranks) > 1:
            lines.append(f"{key}: " + "; ".join(f"{shown[value]} on {_ranks(who)}" for value, who in ranks.items()))
    return lines


def _ranks(ranks: Sequence[int]) -> str:
    listed = ", ".join(map(str, ranks[:_SHOWN])) + (f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else "")
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"


def refuse(world: World, lines: Sequence[str], remedy: str) -> None:
    """Raises DistributedError, on every process, when there are lines of what differs."""
    if not lines:
        return
    leave_together()
    listed = "\n".join(f"  {redact(line)}" for line in lines)
    raise DistributedError(f"the processes of this run differ, and nothing was started:\n{listed}\n{remedy}")


def agree_on_settings(config: Config, world: World) -> None:
    """Raises DistributedError, on every process, where settings, this package's code or its libraries differ."""
    lines = agree(world, lambda: setting_facts(config))
    refuse(world, lines, "Start all of them with the same command, files and installation.")


def setting_facts(config: Config) -> dict[str, Fact]:
    """What decides a run before its data is read."""
    facts: dict[str, Fact] = {}
    for key, value in leaves(config):
        if key in PLACES:
            path = "null" if value is None else os.path.abspath(value)
            facts[key] = Fact(path, path)
        elif key in FILES and isinstance(value, dict):
            facts |= {f"{key}.{name}": _file_fact(each) for name, each in value.items()}
        elif key in FILES:
            facts[key] = _file_fact(value)
        elif key not in (*PER_PROCESS, *DATA):
            facts[key] = Fact(repr(value), repr(value))
    for spec in own_rewards(config):
        file = source_file(spec)
        facts[f"source of the reward {spec}"] = Fact("none", "nothing") if file is None else _contents(file)
    facts |= {f"version of {name}": Fact(version(name), version(name)) for name in LIBRARIES}
    facts["version of glm_training"] = Fact(glm_training.__version__, glm_training.__version__)
    facts["code of glm_training"] = _contents(Path(glm_training.__file__).parent, "*.py")
    return facts


def _file_fact(value: Any) -> Fact:
    """What is in the file or folder that `value` names, or `value` where it names none."""
    here = value is not None and expanded(value).exists()
    return _contents(expanded(value)) if here else Fact(repr(value), repr(value))


def own_rewards(config: Config) -> list[str]:
    """The metrics and the calculator that are classes of the user's."""
    reward = config.reward
    named = [*sorted(reward.metric_names()), *reward.monitors.metrics, reward.calculator or ""]
    return [name for name in dict.fromkeys(named) if is_class_spec(name)]


def _contents(path: Path, pattern: str = "*") -> Fact:
    digest = contents_digest(path, pattern)
    return Fact(digest, f"{path} (contents {digest[:12]})")


def contents_digest(path: Path, pattern: str = "*") -> str:
    """SHA-256 (hex) of a file, or of a folder's files by relative path, as far as `pattern` takes them.

    Of a file over 2 MiB its size, beginning and end are taken: reading tens of gigabytes on every process would take
    minutes, and the headers of weights lie there. Hidden files and what Python compiles are left out.
    """
    digest = hashlib.sha256()
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob(pattern) if file.is_file() and not _is_hidden(file, path))
    for file in files:
        name = file.relative_to(path).as_posix() if file != path else ""
        digest.update(f"{name}\0".encode(errors="surrogateescape"))
        try:
            digest.update(_sample(file))
        except OSError as error:
            digest.update(f"cannot be read: {error.strerror}".encode())
    return digest.hexdigest()


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "__pycache__")) for part in file.relative_to(folder).parts)


def _sample(file: Path) -> bytes:
    with file.open("rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        handle.seek(0)
        if size <= 2 * SAMPLE_BYTES:
            return b"%d:" % size + handle.read()
        head = handle.read(SAMPLE_BYTES)
        handle.seek(-SAMPLE_BYTES, os.SEEK_END)
        return b"%d:" % size + head + handle.read()


# -- data and weights --------------------------------------------------------------------------------------------------


def agree_on_data(world: World, digests: Mapping[str, Mapping[str, str]]) -> None:
    """Raises DistributedError, on every process, where items differ from rank 0's; `digests` by index, by the name of
    the data. Their order counts."""
    if world.world_size == 1:
        return
    lines = []
    for name, own in digests.items():
        told = gather_objects(world, combined_digest(own))
        if len(set(told)) == 1:
            continue
        changes = describe_drift(broadcast_object(world, dict(own)), own) or (
            ["the same items in another order"] if told[world.rank] != told[0] else []
        )
        for rank, found in enumerate(gather_objects(world, [*changes[:_SHOWN], *_more(changes)])):
            lines += [f"{name}, rank {rank} beside rank 0: {line}" for line in found]
    refuse(world, lines, "Give all of them the same prompts and images.")


def _more(changes: Sequence[str]) -> list[str]:
    return [f"and {len(changes) - _SHOWN} more"] if len(changes) > _SHOWN else []


def agree_on_weights(family: Family, world: World) -> None:
    """Raises DistributedError, on every process, where the loaded weights differ: another version of a hub id in a
    node's cache, say. DDP would hide it for what is trained, and nothing would for the frozen parts."""
    lines = agree(world, partial(_weight_facts, family))
    refuse(world, lines, "Give all of them the same model.name and model.revision, and the same files under it.")


def _weight_facts(family: Family) -> dict[str, Fact]:
    facts = {}
    for name in family.components:
        digest = weights_digest(family.component(name))
        facts[f"weights of {name}"] = Fact(digest, digest[:12])
    return facts


@torch.no_grad()
def weights_digest(module: torch.nn.Module) -> str:
    """A digest of all parameters and buffers of a network, from a sum of each one's bits as integers: exact, whatever
    the device and the order of the sum."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        bits = tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
        digest.update(f"{name} {tuple(tensor.shape)} {bits.sum(dtype=torch.int64).item()}\n".encode())
    return digest.hexdigest()
