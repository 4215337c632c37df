"""What a run needs from elsewhere: files of its metrics, and for `glm-train download` of its model too."""

from __future__ import annotations

from collections.abc import Callable

from glm_training.config import Config
from glm_training.data.captioned.layouts.tables.arrow import may_be_hub_id
from glm_training.data.captioned.options import Reading, SetOptions
from glm_training.data.captioned.recognise import open_sets
from glm_training.data.problems import DataError
from glm_training.engine.errors import SettingsError
from glm_training.engine.families import model_files
from glm_training.engine.reward_setup import differentiable_options, reward_options
from glm_training.rewards import DifferentiableScorers, RewardCalculator
from glm_training.rewards.reward_calculator import METRICS
from glm_training.utils.distributed import World
from glm_training.utils.hub_files import Wanted, fetch_missing, is_offline


def scorer_files(config: Config) -> list[Wanted]:
    """Of the metrics that the configuration names, those that train and those that only watch, and of the scorers of a
    distillation. What scores by a class of the user's says nothing of its files."""
    scored = config.uses_reward() or (config.reward.enabled and config.evaluation.enabled)
    named = {*config.scored_weights()} if scored and config.reward.calculator is None else set()
    watched = {*config.reward.monitors.metrics} if scored else set()
    own = {name: 1.0 for name in METRICS if name in named | watched}
    wanted = RewardCalculator(own, options=reward_options(config)).wanted() if own else []
    if config.training.method == "dmdr" and config.dmdr.cold_start_steps is not None:
        wanted += DifferentiableScorers(differentiable_options(config), World().device).wanted()
    return list(dict.fromkeys(wanted))


def scorers_to_fetch(config: Config) -> list[Wanted]:
    """The `scorer_files` that are not here, where they may be asked for; else their absence is an error."""
    if is_offline(config.model.local_files_only):
        return []
    return [each for each in scorer_files(config) if not each.here()]


def fetch_scorers(config: Config, tell: Callable[[str], None]) -> None:
    """Fetches `scorers_to_fetch`. Raises SettingsError with what could not be had; what loads it says what to do."""
    if problems := fetch_missing(scorers_to_fetch(config), tell):
        raise SettingsError("\n".join(problems))


def run_files(config: Config) -> list[Wanted]:
    """All that a run needs: the model, and the files of its metrics."""
    return list(dict.fromkeys([*model_files(config), *scorer_files(config)]))


def fetch_datasets(config: Config, tell: Callable[[str], None]) -> list[str]:
    """Fetches those of `data.images` that are named by their id on the hub, into the cache of their library; what could
    not be had, a line each."""
    problems: list[str] = []
    for one in config.data.images or ():
        if one.path.exists() or not may_be_hub_id(one.path):
            continue
        tell(f"fetching the dataset {one.path.as_posix()}")
        options = SetOptions(one.path, cap_source=one.cap_source, split=one.split)
        try:
            open_sets(
                [options], Reading(config.model.component != "autoencoder", sources=config.training.mode == "i2i")
            )
        except DataError as error:
            problems.append(str(error))
    return problems
