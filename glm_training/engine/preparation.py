"""All that a run is made of besides the model, read and checked first; `glm-train validate` does that alone."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from glm_training.checkpoint.resume import ResumePoint
from glm_training.config import Config
from glm_training.data import ImageDataset, StatefulSampler, TrainingData
from glm_training.engine import setup
from glm_training.engine.adapters import adapter_digests, check_adapters
from glm_training.engine.agreement import agree_on_data, together
from glm_training.engine.errors import USER_ERRORS, SettingsError
from glm_training.engine.families import check_model, fetch_small_files
from glm_training.engine.fetching import fetch_scorers, scorers_to_fetch
from glm_training.engine.held_out_metrics import HeldOutMetrics, held_out_metrics
from glm_training.engine.optimizers import check_optimizer
from glm_training.engine.places import check_places
from glm_training.engine.resuming import agreed_resume, weights_digests
from glm_training.engine.sharding import check_strategy
from glm_training.models import quantization
from glm_training.models.loading import ModelNotHere
from glm_training.rewards import DifferentiableScorers, RewardCalculator
from glm_training.utils.console import Console
from glm_training.utils.distributed import World, pick_device

BuildData = Callable[[Config], tuple[TrainingData, ImageDataset]]
CheckSettings = Callable[[Config, World], None]
Choose = Callable[[], ResumePoint | None]


@dataclass
class Prepared:
    """Data, rewards and the checkpoint to resume from; `digests`: of the training data's items, by index. `notes` are
    worth telling the user."""

    dataset: TrainingData
    held_out: ImageDataset
    digests: dict[str, str]
    sampler: StatefulSampler
    total_steps: int
    calculator: RewardCalculator | None = None
    watched: HeldOutMetrics | None = None
    scorers: DifferentiableScorers | None = None
    resume: ResumePoint | None = None
    notes: list[str] = field(default_factory=list)


class Findings:
    """Errors of steps that do not need each other, to be told together."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside, an error that is the user's to mend ends the block and is kept."""
        try:
            yield
        except USER_ERRORS as error:
            self.errors.append(error)

    def report(self) -> None:
        """Raises what was found: an error as it is, several as one SettingsError."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise SettingsError("\n".join(str(error) for error in self.errors))


def prepare(
    config: Config,
    world: World,
    build_data: BuildData,
    check_settings: CheckSettings,
    choose: Choose,
    *,
    loads: bool = True,
) -> Prepared:
    """Reads and checks everything that can be known without weights; a collective.

    `choose` gives the main process the checkpoint to resume from, and raises CheckpointError. `loads`: whether the
    model is loaded next; else one that is not on this machine, and cannot be asked for, is a note.

    Raises one of USER_ERRORS, on every process, with all problems of its own kind and of those that it does not hide.
    """
    prepared = together(world, "preparing", lambda: _prepare(config, world, build_data, check_settings, loads))
    agree_on_data(world, _data_digests(prepared))
    prepared.resume = agreed_resume(config, world, prepared.digests, choose)
    return prepared


def _prepare(
    config: Config, world: World, build_data: BuildData, check_settings: CheckSettings, loads: bool
) -> Prepared:
    findings, notes, started = Findings(), list[str](), dict[str, str]()
    with findings.collecting():
        check_places(config, is_main=world.is_main)
    with findings.collecting():
        check_settings(config, world)
    with findings.collecting():
        _check_optimizers(config, world.device if loads else pick_device(config.model.device_map))
    with findings.collecting():
        check_strategy(config, world)
    with findings.collecting():
        _check_quantization(config)
    with findings.collecting():
        _check_speed(config, world.device if loads else pick_device(config.model.device_map))
    for service in setup.tracking_services(config):
        with findings.collecting():
            service.check()
    with findings.collecting():
        notes += compiling_told(config) + _look_at_model(config, loads)
        notes += check_adapters(config)
        started = adapter_digests(config) | weights_digests(config)
    prepared: Prepared | None = None
    with findings.collecting():
        dataset, held_out = build_data(config)
        sampler = setup.build_sampler(config, world, dataset)
        steps = setup.count_steps(config, sampler)
        notes += [*dataset.remarks, *held_out.remarks, *setup.sizes_told(config, dataset), *setup.cache_told(config)]
        prepared = Prepared(dataset, held_out, dataset.example_digests() | started, sampler, steps, notes=notes)
    # nothing large is fetched for a run that will not start
    if prepared is not None and not (findings.errors and scorers_to_fetch(config)):
        with findings.collecting():
            fetch_scorers(config, Console(enabled=world.is_main).line)
        for load in (_load_rewards, _load_watched, _load_scorers):
            with findings.collecting():
                load(config, world, prepared)
    findings.report()
    assert prepared is not None  # else something was found
    return prepared


def _check_optimizers(config: Config, device: torch.device) -> None:
    for name in dict.fromkeys(config.optimizer_for(part).name for part in config.parts()):
        check_optimizer(name, device)


def _check_quantization(config: Config) -> None:
    kind = config.model.quantization
    if kind != "none" and not quantization.is_available():
        raise SettingsError(f'model.quantization {kind} needs bitsandbytes: pip install "glm_training[bitsandbytes]"')


def _check_speed(config: Config, device: torch.device) -> None:
    problems = []
    if config.rollout.cuda_graph is True and device.type != "cuda":
        problems.append("rollout.cuda_graph true needs a GPU, and there is none here: set it to auto")
    if config.training.compile and device.type == "cuda" and importlib.util.find_spec("triton") is None:
        problems.append("training.compile needs the package triton on a GPU, which PyTorch brings along on Linux")
    compiler = os.environ.get("CXX") or "g++"  # what PyTorch calls
    if config.training.compile and device.type == "cpu" and shutil.which(compiler) is None:
        problems.append(f"training.compile needs a C++ compiler on the CPU, and there is no {compiler} (or set CXX)")
    if problems:
        raise SettingsError("\n".join(problems))


def compiling_told(config: Config) -> list[str]:
    """That a run which compiles stands still at first, in a line."""
    return ["training.compile: steps that meet a new shape compile first, for minutes"] * config.training.compile


def _look_at_model(config: Config, loads: bool) -> list[str]:
    """What of the model could not be checked."""
    try:
        fetch_small_files(config)
    except ModelNotHere as error:
        if loads:
            raise
        return [f"{str(error).splitlines()[0]}: its files, and lora targets, were not checked"]
    return check_model(config)


def _load_rewards(config: Config, world: World, prepared: Prepared) -> None:
    if setup.scores(config) and not config.names_metrics():
        prepared.calculator, notes = setup.build_default_rewards(config, world, prepared.held_out)
        prepared.notes += notes
    elif setup.scores(config):
        named = setup.datasets_to_score(config, prepared.dataset, prepared.held_out)
        prepared.calculator, notes = setup.build_rewards(config, world, named)
        prepared.notes += notes


def _load_watched(config: Config, world: World, prepared: Prepared) -> None:
    if setup.scores(config):
        trained = () if prepared.calculator is None else prepared.calculator.names.values()
        prepared.watched = held_out_metrics(config, world, prepared.held_out, trained)


def _load_scorers(config: Config, world: World, prepared: Prepared) -> None:
    prepared.scorers = setup.build_scorers(config, world, prepared.total_steps)


def _data_digests(prepared: Prepared) -> dict[str, dict[str, str]]:
    """Digests of all data that a run reads, by what messages call it."""
    digests = {"training data": prepared.digests, "held-out prompts": prepared.held_out.example_digests()}
    held_out_pairs = getattr(prepared.dataset, "held_out", None)
    if held_out_pairs is not None:
        digests["held-out pairs"] = held_out_pairs.example_digests()
    return digests
