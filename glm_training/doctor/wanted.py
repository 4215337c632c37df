"""What a configuration asks of the libraries besides those that every run needs."""

from __future__ import annotations

from collections.abc import Iterator

from glm_training.config import Config
from glm_training.data.captioned.layouts.tables.arrow import may_be_hub_id
from glm_training.doctor.commands import Asked, export, glm_train, pip_install
from glm_training.doctor.findings import Finding, failed, ok
from glm_training.doctor.installed import extras as extras_installed
from glm_training.doctor.worker import configuration
from glm_training.engine import setup
from glm_training.engine.errors import SettingsError
from glm_training.engine.optimizers import check_optimizer
from glm_training.utils.distributed import DistributedError, pick_device
from glm_training.utils.trackers import TrackerError

_OPTIMIZERS = {
    "adamw_8bit": "bitsandbytes",
    "prodigy": "prodigy",
    "lion": "lion",
    "adamw_schedule_free": "schedulefree",
}
"""Update rules of an extra, and its name."""

_NEWER = {"adamw_8bit": ("bitsandbytes",), "muon": ("torch", "torchvision")}
"""Update rules that need newer libraries than all else, and which."""

_KEYS = {"wandb": "WANDB_API_KEY", "swanlab": "SWANLAB_API_KEY", "trackio": "HF_TOKEN"}


def extras(asked: Asked) -> Iterator[Finding]:
    """The extras that the configuration needs, and keys of its trackers."""
    config = configuration(asked)
    wanted = extras_of(config)
    yield from extras_installed(wanted)
    for service in setup.tracking_services(config):
        try:
            service.check()
        except TrackerError as error:
            variable = next((key for key in _KEYS.values() if key in str(error)), None)
            if variable is not None:  # else it is the package, which was told
                yield failed(service.name, str(error), export(variable, "YOUR_KEY"))


def extras_of(config: Config) -> list[str]:
    """Names of the extras, in the order of pyproject.toml."""
    logging, options = config.logging, config.reward.options
    rules = {config.optimizer_for(part).name for part in config.parts()}
    named = {*config.scored_weights(), *config.reward.monitors.metrics} if config.reward.enabled else set()
    asked_for = {
        "wandb": logging.use_wandb,
        "swanlab": logging.use_swanlab,
        "trackio": logging.use_trackio,
        "bitsandbytes": config.model.quantization != "none",
        "pytesseract": "text_accuracy" in named and options.text_accuracy.engine == "pytesseract",
        "datasets": _of_the_hub(config),
        "hps": "hps_v2" in named or config.training.method == "dmdr",
    } | {extra: False for extra in ("prodigy", "lion", "schedulefree")}
    for rule, extra in _OPTIMIZERS.items():
        asked_for[extra] = asked_for[extra] or rule in rules
    return [extra for extra, wanted in asked_for.items() if wanted]


def _of_the_hub(config: Config) -> bool:
    """Whether pairs or pictures are a data set of the hub's library."""
    places = [one.path for one in config.data.images or ()]
    places += [config.data.pairs] if config.data.pairs is not None else []
    return any(not place.exists() and may_be_hub_id(place) for place in places)


def optimizers(asked: Asked) -> Iterator[Finding]:
    """Whether the update rules of the parts run on the device of the run, and whether there is one."""
    config = configuration(asked)
    try:
        device = pick_device(config.model.device_map)
    except DistributedError as error:
        yield failed("device", str(error), glm_train("train", asked, "model.device_map=null"))
        return
    for rule in dict.fromkeys(config.optimizer_for(part).name for part in config.parts()):
        try:
            check_optimizer(rule, device)
        except SettingsError as error:
            if rule in _NEWER:
                yield failed("optimizer", str(error), pip_install(*_NEWER[rule], options=["--upgrade"]))
            continue  # the other rules lack an extra alone, which was told
        yield ok("optimizer", f"{rule} steps on {device.type}")
