"""The adapters of earlier runs that a run starts from: `model.adapters` and `lora.start_from`."""

from __future__ import annotations

from glm_training.config import Config
from glm_training.engine.errors import SettingsError
from glm_training.engine.families import FAMILIES, adapters_to_merge, adapters_to_train_on
from glm_training.engine.teachers import check_teachers, teacher_adapters
from glm_training.models.adapters import StartingAdapter, malformed, misfit, unlike
from glm_training.models.run_folders import pipeline_in
from glm_training.utils.downloads import sha256_of


def check_adapters(config: Config) -> list[str]:
    """Whether the adapters fit the model, as far as it is here; returns what is worth telling of them, a line each.

    Raises ModelLoadError or SettingsError.
    """
    check_teachers(config)
    merged, begun = adapters_to_merge(config), adapters_to_train_on(config)
    problems = [reason for each in [*merged, *begun] if (reason := _problem(config, each)) is not None]
    if problems:
        raise SettingsError("\n".join(problems))
    notes = [f"{each.folder} is merged into the {each.part} before training" for each in merged]
    both = [part for part in config.parts() if config.lora_for(part).enabled and part in {each.part for each in merged}]
    notes += [
        f"adapters of the {part} that this run saves belong on the model with those that it merged" for part in both
    ]
    notes += [f"{each.folder} is what the adapters of the {each.part} start from" for each in begun]
    if begun:
        fresh = [part for part in config.parts() if config.lora_for(part).enabled]
        fresh = [part for part in fresh if part not in {each.part for each in begun}]
        notes += [
            f"{config.lora.start_from} has no adapter of the {part}: that begins with a fresh one" for part in fresh
        ]
    return notes


def _problem(config: Config, adapter: StartingAdapter) -> str | None:
    """Why an adapter does not fit; None where it does, and where the model is not here to tell."""
    if reason := malformed(adapter):
        return reason
    skeleton = FAMILIES[config.model.family].skeleton
    source = pipeline_in(config.model.name)
    module = None if skeleton is None else skeleton(source, adapter.part, config.model.revision)
    if module is None:
        return None
    if adapter in adapters_to_merge(config):
        return misfit(adapter, module)
    (part,) = [part for part in config.parts() if part == adapter.part]
    lora = config.lora_for(part)
    return unlike(adapter, module, lora.targets, lora.rank, lora.alpha)


def adapter_digests(config: Config) -> dict[str, str]:
    """SHA-256 of each adapter, by key and place: a resume must start from the same."""
    adapters = [*adapters_to_merge(config), *adapters_to_train_on(config)]
    adapters += [each for found in teacher_adapters(config).values() for each in found]
    return {f"{each.key} {each.folder}": sha256_of(each.file) for each in adapters}
