"""Users' rewards: finding a class by name and running its one-sample hook over a batch."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image

from glm_training.rewards.types import (
    MetricScores,
    RewardBatch,
    RewardConfigError,
    RewardError,
    RewardSampleError,
    to_pil,
)

OneSampleReward = Callable[[Image.Image, Image.Image | None, str], float]


def is_class_spec(name: str) -> bool:
    """Whether ``name`` has the form "module:Class" or "path/to/file.py:Class"."""
    return ":" in name


def load_class(spec: str) -> type:
    """The class that ``spec`` names: "package.module:Class" (the current directory counts as importable) or
    "path/to/file.py:Class". Raises RewardConfigError naming what was tried."""
    place, _, class_name = spec.rpartition(":")
    if not place or not class_name.isidentifier():
        raise RewardConfigError(f'reward {spec!r} must be "module:Class" or "path/to/file.py:Class"')
    module = _load_file(Path(place), spec) if place.endswith(".py") else _load_module(place, spec)
    found = vars(module).get(class_name)
    if not isinstance(found, type):
        classes = sorted(name for name, value in vars(module).items() if isinstance(value, type))
        raise RewardConfigError(
            f"reward {spec!r}: {module.__file__} has no class {class_name!r}; "
            f"its classes: {', '.join(classes) or 'none'}"
        )
    return found


def source_file(spec: str) -> Path | None:
    """Where the code of a class spec lies, without running it; None where no file of it can be found."""
    place = spec.rpartition(":")[0]
    if place.endswith(".py"):
        file = Path(place).expanduser()
        return file if file.is_file() else None
    try:
        _import_from_here()
        found = importlib.util.find_spec(place)
    except Exception:  # whatever a package of the user's raises on import; `load_class` reports it
        return None
    return None if found is None or found.origin is None else Path(found.origin)


def _import_from_here() -> Path:
    """Makes the current directory importable, as `python -m` does and a console script does not; that directory."""
    here = Path.cwd()
    if str(here) not in sys.path:
        sys.path.insert(0, str(here))
    return here


def _load_module(name: str, spec: str) -> ModuleType:
    here = _import_from_here()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise RewardConfigError(f"reward {spec!r}: module {name} needs {error.name!r}, which is missing") from error
        raise RewardConfigError(
            f"reward {spec!r}: no module {name!r} in {here} or in the installed packages; give a file as "
            '"path/to/file.py:Class", or run from the directory that holds the module'
        ) from error


def _load_file(path: Path, spec: str) -> ModuleType:
    full = path.expanduser().resolve()
    if not full.is_file():
        raise RewardConfigError(
            f"reward {spec!r}: there is no file {full}; a relative path starts at the current directory"
        )
    name = f"{full.stem}_{hashlib.blake2b(str(full).encode(), digest_size=6).hexdigest()}"
    if name not in sys.modules:
        found = importlib.util.spec_from_file_location(name, full)
        assert found is not None and found.loader is not None  # holds for every *.py path
        module = importlib.util.module_from_spec(found)
        sys.modules[name] = module
        try:
            found.loader.exec_module(module)
        except ModuleNotFoundError as error:
            del sys.modules[name]
            raise RewardConfigError(f"reward {spec!r}: {full} needs {error.name!r}, which is missing") from error
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def score_samples(reward: OneSampleReward, batch: RewardBatch, owner: str) -> MetricScores:
    """Call ``reward(generated_image, target_image or None, prompt)`` for every sample.

    A RewardSampleError it raises, or a return value that is not a finite number, is that sample's failure. Any other
    exception of the user's code becomes a RewardError that names it, so that a run can stop where it can resume.
    ``owner`` names the class in messages.
    """
    generated = to_pil(batch.images)
    targets: list[Image.Image | None] = [None] * len(batch)
    if batch.targets is not None:
        targets = list(to_pil(batch.targets))
    scores = MetricScores(torch.zeros(len(batch)))
    for row, (image, target, prompt) in enumerate(zip(generated, targets, batch.prompts, strict=True)):
        batch.raise_if_stopped()
        try:
            scores.values[row] = _number(reward(image, target, prompt), owner)
        except RewardSampleError as error:
            scores.failures[row] = str(error)
        except RewardError:
            raise
        except Exception as error:  # whatever the user's code may meet
            raise RewardError(f"{owner}.compute_reward raised {type(error).__name__}: {error}") from error
    return scores


def _number(value: object, owner: str) -> float:
    """``value`` as a float; 0-d tensors count as numbers."""
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, Real) or not math.isfinite(value):
        raise RewardSampleError(f"{owner}.compute_reward returned {value!r}; it must return a finite number")
    return float(value)
