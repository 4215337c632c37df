"""Whether the weights of the model are here, whole, and which downloads were broken off."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from glm_training.config import Config
from glm_training.doctor.commands import Asked, reinstall
from glm_training.doctor.findings import Finding, failed, note, ok
from glm_training.doctor.scorers import download
from glm_training.doctor.worker import configuration
from glm_training.engine.errors import SettingsError
from glm_training.engine.families import check_model, model_files
from glm_training.models.loading import ModelLoadError, damage
from glm_training.planning.models import PUBLISHED
from glm_training.utils.hub_files import HubFiles, is_offline

NAME = "model"
GB = 1e9


def model(asked: Asked) -> Iterator[Finding]:
    """The model's files in the cache of the hub, or in its folder."""
    config = configuration(asked)
    try:
        files = model_files(config)
        for each in files:
            yield _in_cache(each, asked)
        if not any(each.needed_by == "model.name" for each in files):
            notes = check_model(config)
            yield ok(f"{NAME} {config.model.name}", "; ".join(["its files are here", *notes]))
    except SettingsError as error:  # of the configuration, whatever the machine
        yield note(NAME, f"{error}\nglm-train validate tells all that is wrong with a configuration")
    except ModelLoadError as error:
        yield _not_here(config, error, asked)


def _not_here(config: Config, error: ModelLoadError, asked: Asked) -> Finding:
    if config.model.name == "tiny":
        return failed(NAME, str(error), reinstall())
    published = PUBLISHED.get(config.model.family)
    if published is None:
        return failed(NAME, f"{error}\nTo try the machine, take the tiny one:", download(asked, "model.name=tiny"))
    return failed(NAME, f"{error}\nOr take it from the hub:", download(asked, f"model.name={published}"))


def _in_cache(files: HubFiles, asked: Asked) -> Finding:
    name = f"{NAME} {files.repository}"
    if not files.here():
        begun = _blobs_begun(cache_folder() / _folder_of(files.repository))
        size = sum(blob.stat().st_size for blob in begun)
        folder = cache_folder() / _folder_of(files.repository)
        some = any(path.is_file() for path in (folder / "snapshots").rglob("*"))
        state = "only a part of it is in the cache" if some or begun else "it is not in the cache"
        told = f", and {size / GB:.2f} GB of a download that broke off" if begun else ""
        return failed(name, f"{state} ({cache_folder()}){told}", download(asked))
    torn = [path for path in files.paths() if path.suffix == ".safetensors" and damage(path) is not None]
    if torn:
        told = f"damaged: {', '.join(path.name for path in torn)} ({damage(torn[0])})"
        both = [shlex.quote(str(place)) for path in torn for place in dict.fromkeys((path, path.resolve()))]
        return failed(name, told, ["rm", *both, "&&", *download(asked)])
    return ok(name, "its files are in the cache, whole")


def broken_off(asked: Asked) -> Iterator[Finding]:
    """Downloads into the cache that were killed. huggingface_hub 2 does not go on with what they left."""
    folder = cache_folder()
    if not os.path.isdir(folder):  # nor is there any where one may not look
        yield ok("downloads", f"nothing was fetched into {folder} yet")
        return
    unfinished = {place: begun for place in sorted(folder.glob("*--*")) if (begun := _blobs_begun(place))}
    for place, begun in unfinished.items():
        kind, _, rest = place.name.partition("--")
        size = sum(blob.stat().st_size for blob in begun) / GB
        told = f"of {rest.replace('--', '/')} broke off, {size:.2f} GB lie in the cache; to fetch all of it:"
        offline = ["HF_HUB_OFFLINE=0"] if is_offline() else []
        typed = [] if kind == "models" else ["--repo-type", kind.removesuffix("s")]
        removed = [shlex.quote(str(blob)) for blob in begun]
        command = [*offline, "hf", "download", *typed, rest.replace("--", "/"), "&&", "rm", *removed]
        yield note("downloads", told, command)
    if not unfinished:
        yield ok("downloads", f"none is broken off in {folder}")


def cache_folder() -> Path:
    """Of the hub's library."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _folder_of(repository: str) -> str:
    return f"models--{repository.replace('/', '--')}"


def _blobs_begun(place: Path) -> list[Path]:
    """What was received of files that never came whole."""
    return sorted((place / "blobs").glob("*.incomplete"))
