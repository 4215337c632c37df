"""Users' rewards: finding a class by name and running its one-sample hook over a batch."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from glm_training.rewards.foreign import defined_at, place_of, shown, users_code
from glm_training.rewards.options import RewardOptions
from glm_training.rewards.types import (
    LARGEST_SCORE,
    MetricScores,
    RewardBatch,
    RewardConfigError,
    RewardError,
    RewardResult,
    RewardSampleError,
    to_pil,
)
from glm_training.utils.words import counted

OneSampleReward = Callable[[Image.Image, Image.Image | None, str], float]
CUSTOM = "custom"
"""The one component of a calculator of the user's own."""

FIGURES = frozenset(
    (
        *("total", "ar_total", "dit_total", "total_before_resampling", "group_std", "plan_variance_share"),
        *("zero_spread_groups", "skipped_samples", "resampled_groups"),
    )
)
"""Figures beside the components in `reward/<name>`."""

SAMPLES = 10
"""How many samples a message names."""


def is_class_spec(name: str) -> bool:
    """Whether ``name`` has the form "module:Class" or "path/to/file.py:Class"."""
    return ":" in name


def load_class(spec: str) -> type:
    """The class that ``spec`` names: "package.module:Class" (the current directory counts as importable) or
    "path/to/file.py:Class". Raises RewardConfigError naming what was tried."""
    place, _, class_name = spec.rpartition(":")
    if not place or not class_name.isidentifier():
        raise RewardConfigError(f'reward {spec!r} must be "module:Class" or "path/to/file.py:Class"')
    module = _load_file(place, spec) if place.endswith(".py") else _load_module(place, spec)
    found = vars(module).get(class_name)
    if isinstance(found, type):
        return found
    if inspect.isfunction(found):
        raise RewardConfigError(
            f"reward {spec!r}: {class_name}{defined_at(found)} is a function; make it the method compute_reward(self, "
            "generated_image, target_image, prompt) of a class, a subclass of glm_training.rewards.RewardCalculator"
        )
    kinds = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    classes = sorted(name for name, value in kinds.items() if value.__module__ == module.__name__) or sorted(kinds)
    where = getattr(module, "__file__", None) or f"module {place}"  # one that is built in has no file
    raise RewardConfigError(
        f"reward {spec!r}: {where} has no class {class_name!r}; its classes: {', '.join(classes) or 'none'}"
    )


def source_file(spec: str) -> Path | None:
    """Where the code of a class spec lies, without running it; None where no file of it can be found."""
    place = spec.rpartition(":")[0]
    if place.endswith(".py"):
        return _file_at(place)
    try:
        _import_from_here()
        found = importlib.util.find_spec(place)
    except (Exception, SystemExit):  # whatever a package of the user's does on import; `load_class` reports it
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
    with _importing(spec, f"module {name}"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise
            raise RewardConfigError(
                f"reward {spec!r}: no module {name!r} in {here} or in the installed packages; give a file as "
                '"path/to/file.py:Class", or run from the directory that holds the module'
            ) from error


def _file_at(place: str) -> Path | None:
    """The file there, links resolved; None without one, and for a name that no file can have."""
    try:
        full = Path(place).expanduser().resolve()
        return full if full.is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL in it, the home folder of nobody
        return None


def _load_file(place: str, spec: str) -> ModuleType:
    full = _file_at(place)
    if full is None:
        raise RewardConfigError(
            f"reward {spec!r}: there is no file {os.path.abspath(os.path.expanduser(place))}; a relative path "
            "starts at the current directory"
        )
    name = f"{full.stem}_{hashlib.blake2b(str(full).encode(), digest_size=6).hexdigest()}"
    if name not in sys.modules:
        found = importlib.util.spec_from_file_location(name, full)
        assert found is not None and found.loader is not None  # holds for every *.py path
        module = importlib.util.module_from_spec(found)
        sys.modules[name] = module
        try:
            with _importing(spec, str(full)):
                found.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


@contextmanager
def _importing(spec: str, what: str) -> Iterator[None]:
    """Around an import of the user's code: whatever goes wrong becomes a RewardConfigError that says where."""
    with users_code(f"reward {spec!r}: importing {what}", RewardConfigError):
        try:
            yield
        except ModuleNotFoundError as error:
            raise RewardConfigError(
                f"reward {spec!r}: {what} needs {error.name!r}, which is missing{place_of(error)}"
            ) from error
        except SystemExit as error:  # a script without a guard
            raise RewardConfigError(
                f"reward {spec!r}: importing {what} ended the program with exit({error.code!r}){place_of(error)}; what "
                'a program does belongs under `if __name__ == "__main__":`'
            ) from error


def score_samples(reward: OneSampleReward, batch: RewardBatch, owner: str) -> MetricScores:
    """Call ``reward(generated_image, target_image or None, prompt)`` for every sample.

    A RewardSampleError it raises, or a return value that is not a finite number, is that sample's failure. Any other
    exception of the user's code becomes a RewardError that names it and its place, so that a run can stop where it can
    resume. ``owner`` names the class in messages.
    """
    generated = to_pil(batch.images)
    targets: list[Image.Image | None] = [None] * len(batch)
    if batch.targets is not None:
        targets = list(to_pil(batch.targets))
    what = f"{owner}.compute_reward"
    scores = MetricScores(torch.zeros(len(batch)))
    for row, (image, target, prompt) in enumerate(zip(generated, targets, batch.prompts, strict=True)):
        batch.raise_if_stopped()
        try:
            with users_code(what):
                scores.values[row] = _number(reward(image, target, prompt), f"{what}{defined_at(reward)}")
        except RewardSampleError as error:
            scores.failures[row] = shown(str(error))
    return scores


def _number(value: object, what: str) -> float:
    """``value`` as a float that fp32 can hold; tensors and arrays without dimensions count as numbers."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.ndim == 0:
        value = None if value is np.ma.masked else value.item()
    number = math.nan
    if isinstance(value, Real):
        try:
            number = float(value)
        except OverflowError:  # of an integer or a fraction
            number = math.inf
    if not abs(number) <= LARGEST_SCORE:
        raise RewardSampleError(
            f"{what} returned {shown(repr(value), 80)}; it must return a finite number, of at most {LARGEST_SCORE:.2g}"
        )
    return number


HOOKS = {"compute_reward": ("generated_image", "target_image", "prompt"), "compute_rewards": ("batch",)}
"""The two functions that a reward may override, and what they are called with."""


def check_overrides(kind: type, base: type, spec: str) -> None:
    """Raises RewardConfigError for a class that overrides none of `HOOKS`: `base` would score in its place."""
    if any(getattr(kind, name) is not getattr(base, name) for name in HOOKS):
        return
    own = sorted({name for one in kind.__mro__ if one not in base.__mro__ for name in vars(one)} - set(dir(base)))
    nearest = next((near for name in HOOKS for near in difflib.get_close_matches(name, own, n=1)), None)
    hint = f", though {nearest!r}: rename that" if nearest else ""
    raise RewardConfigError(
        f"reward {spec!r}: {kind.__name__}{class_at(kind)} has neither compute_reward(self, generated_image, "
        f"target_image, prompt) nor compute_rewards(self, batch){hint}"
    )


def class_at(kind: type) -> str:
    """` (file:line)` where a class begins; empty where that is not known."""
    try:
        return f" ({inspect.getsourcefile(kind)}:{inspect.getsourcelines(kind)[1]})"
    except (OSError, TypeError):
        return ""


def _gives_nothing(hook: Callable[..., object]) -> bool:
    """Whether its text has no `return` with a value and raises nothing; false where the text is not to be had."""
    try:
        nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(hook)))))
    except (OSError, TypeError, SyntaxError):
        return False
    ends = any(isinstance(node, ast.Raise) or (isinstance(node, ast.Return) and node.value) for node in nodes)
    return isinstance(nodes[1], ast.FunctionDef) and not ends


def check_hooks(calculator: object, spec: str) -> None:
    """Raises RewardConfigError unless the two functions that a reward may override take what they are called with,
    return something and are no coroutines."""
    for name, given in HOOKS.items():
        with users_code(f"reward {spec!r}: {type(calculator).__name__}.{name}", RewardConfigError):
            hook = getattr(calculator, name)
        where = f"reward {spec!r}: {type(calculator).__name__}.{name}{defined_at(hook)}"
        if not callable(hook):
            raise RewardConfigError(f"{where} is no function but {shown(repr(hook), 80)}")
        if inspect.iscoroutinefunction(hook):
            raise RewardConfigError(f"{where} is `async`, and is called as a plain function")
        if _gives_nothing(hook):
            raise RewardConfigError(f"{where} returns nothing: it has no `return` with a value")
        try:
            inspect.signature(hook).bind(*given)
        except TypeError as error:
            raise RewardConfigError(f"{where} must take ({', '.join(given)}): {error}") from error
        except ValueError:
            continue  # of C code, which does not say


class Calculator(Protocol):
    """What a trainer asks for scores: RewardCalculator, or a subclass of the user's."""

    options: RewardOptions

    @property
    def is_custom(self) -> bool:
        """Whether code of the user's scores."""

    def compute_rewards(self, batch: RewardBatch) -> RewardResult:
        """Scores a batch."""


def score_batch(calculator: Calculator, batch: RewardBatch) -> RewardResult:
    """``calculator.compute_rewards(batch)``, as trainers ask for it: what the user's own may return is looked at first.

    Raises RewardError naming the place in the user's code and what is wrong, RewardSampleError for samples without a
    total where ``on_error`` is "error", and what ``compute_rewards`` raises.
    """
    what = f"{type(calculator).__name__}.compute_rewards"
    with users_code(what):
        # a copy for the user's code, which may write into it
        result = calculator.compute_rewards(batch.select(range(len(batch))) if calculator.is_custom else batch)
        where = f"{what}{defined_at(calculator.compute_rewards)}"
        if not isinstance(result, RewardResult):
            raise RewardError(f"{where} returned {shown(repr(result), 80)}; it must return a RewardResult")
        total = _column(result.total, len(batch), f"{where}: total")
        components = {
            str(name): _column(values, len(batch), f"{where}: components[{name!r}]")
            for name, values in result.components.items()
        }
        unsuited = [name for name in components if name in FIGURES or not name.isprintable()]
        if unsuited:
            raise RewardError(f"{where}: components cannot be called {', '.join(map(repr, unsuited))}")
        failures = {int(row): shown(str(reason)) for row, reason in result.failures.items()}
        absent = [row for row in failures if not 0 <= row < len(batch)]
        if absent:
            raise RewardError(f"{where}: failures names sample {absent[0]} of {counted(len(batch), 'sample')}")
        failures |= {
            row: f"{where}: the total is {total[row].item()}"
            for row in (~total.isfinite()).nonzero().flatten().tolist()
            if row not in failures
        }
        stop_at(failures, batch, calculator.options.on_error)
    total[sorted(failures)] = math.nan
    return replace(result, total=total, components=components or {CUSTOM: total.clone()}, failures=failures)


def _column(values: object, count: int, what: str) -> torch.Tensor:
    """[count] fp32 on the CPU of ``values``; infinite ones are not a number."""
    column = torch.as_tensor(values).detach()
    if column.shape != (count,):
        raise RewardError(f"{what} has the shape {list(column.shape)}; for {count} samples it must be [{count}]")
    if column.is_complex():
        raise RewardError(f"{what} holds complex numbers")
    column = column.to("cpu", torch.float32, copy=True)
    return column.masked_fill_(column.isinf(), math.nan)


def stop_at(failures: Mapping[int, str], batch: RewardBatch, on_error: str) -> None:
    """Raises RewardSampleError for samples without a score, unless they are to be left out."""
    if not failures or on_error == "skip":
        return
    lines = [f"sample {row} ({shown(batch.prompts[row], 80)!r}): {failures[row]}" for row in sorted(failures)[:SAMPLES]]
    raise RewardSampleError(
        f"{len(failures)} of {counted(len(batch), 'sample')} could not be scored (reward.on_error: skip leaves such "
        "samples out)\n" + "\n".join(lines)
    )
