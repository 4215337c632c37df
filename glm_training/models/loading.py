"""What loading any pipeline has in common: one error that says what to do, and the checks before a loader starts."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from glm_training.utils.hub_files import hub_error
from glm_training.utils.writable import expanded

logger = logging.getLogger(__name__)
T = TypeVar("T")

_WEIGHT_FILES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")


class ModelLoadError(RuntimeError):
    """A model could not be loaded; the message says from where, why, and what to do."""


class ModelNotHere(ModelLoadError):
    """A hub id that the local cache does not hold, while the hub cannot be asked: what is in it is not known here."""


@contextmanager
def load_errors_explained(where: str, remedy: str = "") -> Iterator[None]:
    """Inside, what a Hugging Face loader raises becomes a ModelLoadError: `where` it failed, why, and the `remedy`."""
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError, hub_error()) as error:
        raise ModelLoadError(
            f"cannot load {where}: {_first_line(error)}" + (f"\nWhat to do: {remedy}" if remedy else "")
        ) from error


@dataclass(frozen=True)
class PipelineKind:
    """What a pipeline folder of one kind of model holds. `example`: a hub id of that kind; `classes`: the pipelines
    that its model_index.json may declare; `parts`: its folders; `networks`: those of them with weights."""

    name: str
    example: str
    classes: Sequence[str]
    parts: Sequence[str]
    networks: Sequence[str]


def check_pipeline_folder(folder: Path, kind: PipelineKind) -> None:
    """Raise ModelLoadError naming everything that keeps `folder` from being a whole pipeline of its `kind`; of weights
    the headers are read alone."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelLoadError(
            f"{folder} has no model_index.json: model.name must be a whole {kind.name} pipeline folder, like "
            f"{kind.example} or one that was exported here, not the folder of one component"
        )
    try:
        declared = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ModelLoadError(f"{index} is not valid JSON ({error}); copy or download it again") from error
    if declared not in kind.classes:
        raise ModelLoadError(f"{index} declares a {declared}, not a {kind.classes[0]}")
    missing = [part for part in kind.parts if not (folder / part).is_dir()]
    if missing:
        raise ModelLoadError(
            f"{folder} is incomplete: it lacks the folders {', '.join(missing)}; copy or download them again"
        )
    problems = [problem for part in kind.networks if (problem := _network_problem(folder / part)) is not None]
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ModelLoadError(
            f"cannot load the folder {folder}: it is incomplete or damaged; copy or download it again:\n{listed}"
        )


def _network_problem(folder: Path) -> str | None:
    """What keeps a network from being read from its folder. A variant (fp16) may stand in for the full weights."""
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        return f"{folder.name}/config.json cannot be read ({error.strerror})"
    except ValueError as error:
        return f"{folder.name}/config.json is not valid JSON ({error})"
    split: list[set[str]] = []
    for index in folder.glob("*.safetensors.index*.json"):
        try:
            split.append(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{folder.name}/{index.name} cannot be read ({error})"
    files = {file.name for file in folder.glob("*.safetensors")}
    whole = [{name} for name in sorted(files.difference(*split))] + split
    if not whole:
        return f"{folder.name} holds no weights as safetensors"
    if not any(names <= files for names in whole):
        lacking = min((sorted(names - files) for names in whole), key=len)
        return f"{folder.name} lacks {', '.join(lacking[:3])}" + (" and more" if len(lacking) > 3 else "")
    damaged = [f"{folder.name}/{name} ({fault})" for name in sorted(files) if (fault := damage(folder / name))]
    return f"damaged: {', '.join(damaged)}" if damaged else None


def damage(file: Path) -> str | None:
    """What is wrong with a safetensors file by its header and its size; None where nothing is."""
    try:
        with safe_open(file, framework="pt"):
            return None
    except (OSError, SafetensorError) as error:
        return _first_line(error)


def hub_options(
    name: str, file: str, *, revision: str | None, local_files_only: bool, key: str = "model.name"
) -> dict[str, Any]:
    """`revision` and `local_files_only` for the loader of the hub id `name`, whose first file is `file`.

    The hub is asked once, for at most `HF_HUB_ETAG_TIMEOUT` seconds; when it cannot give the model the local cache is
    used alone, with a warning. Loaders by themselves try again for half a minute, or wait without limit. Raises
    ModelLoadError, naming the `key` of the configuration, when the cache has not even begun to hold the model; a
    ModelNotHere where the hub could not be asked.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        reason = f"{key} {name} is neither a folder here nor a hub id (owner/name): {_first_line(error)}"
        raise ModelLoadError(reason) from error
    remedy = hub_remedy(name, key)
    fault, asked = ("model.local_files_only is set", False) if local_files_only else (None, True)
    if not local_files_only:
        fault, remedy, asked = _hub_fault(name, revision, key)
    if fault is not None:
        if not isinstance(try_to_load_from_cache(name, file, revision=revision), str):
            kind = ModelLoadError if asked else ModelNotHere
            raise kind(f"cannot load {name}: {fault}, and it is not in the local cache\nWhat to do: {remedy}")
        if not local_files_only:
            logger.warning("%s: %s; loading what the local cache holds", name, fault)
    return {"revision": revision, "local_files_only": fault is not None}


def check_hub_class(name: str, options: Mapping[str, Any], classes: Sequence[str]) -> None:
    """Raise ModelLoadError unless the hub id `name` declares one of the pipelines `classes`; fetches one small file.

    `options` are those of `hub_options`.
    """
    with load_errors_explained(f"{name} from the Hugging Face hub or its local cache", hub_remedy(name)):
        declared = json.loads(Path(hf_hub_download(name, "model_index.json", **options)).read_bytes())["_class_name"]
    if declared not in classes:
        raise ModelLoadError(
            f"{name} is a {declared}, not a {classes[0]}: correct model.name, or model.family (--family of sample)"
        )


def _hub_fault(name: str, revision: str | None, key: str) -> tuple[str | None, str, bool]:
    """Why the hub cannot give `name`, None when it can; what to do about it; and whether the hub says so itself."""
    remedy = hub_remedy(name, key)
    try:
        HfApi().model_info(name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except GatedRepoError:
        access = f"ask for access at {constants.ENDPOINT}/{name}, and log in here: hf auth login"
        return "the hub gives it to those with access only", access, True
    except RepositoryNotFoundError:
        correct = f"correct {key}; for a private model: hf auth login"
        return "the hub has no such model, or it is private", correct, True
    except RevisionNotFoundError:
        return f"the hub has no revision {revision!r} of it", "correct model.revision", True
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE forbids to ask the hub", remedy, False
    except HfHubHTTPError as error:
        refused = error.response.status_code in (401, 403)
        remedy = "log in again: hf auth login" if refused else remedy
        return f"the hub does not give it ({_first_line(error)})", remedy, refused
    except (hub_error(), OSError, ValueError) as error:  # ValueError: another page in place of the hub's answer
        return f"the hub cannot be reached ({_first_line(error)})", remedy, False
    return None, remedy, True


def hub_remedy(name: str, key: str = "model.name") -> str:
    """What a user can do about a hub id, given under `key`, that cannot be reached."""
    return (
        f"download it where there is a network (hf download {name}), then run again with "
        f"model.local_files_only: true; or set {key} to a local folder with the checkpoint"
    )


def parts_at_hand(name: str, parts: Sequence[str], revision: str | None = None) -> Path | None:
    """The folder with `parts` of the pipeline `name`: itself, or a hub id's in the local cache; None where any lacks.
    Never asks the hub."""
    folder = expanded(name)
    if not folder.is_dir():
        if looks_like_path(name):
            return None
        try:
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError):
            return None
    return folder if all((folder / part).is_dir() for part in parts) else None


def fetch_parts(name: str, parts: Sequence[str], *, revision: str | None, local_files_only: bool) -> None:
    """Brings the small files (JSON, text) of `parts` of a hub id into the local cache; nothing for another `name`.

    Raises ModelLoadError where the hub cannot give the model and the cache has not begun to hold it.
    """
    if expanded(name).is_dir() or looks_like_path(name) or parts_at_hand(name, parts, revision) is not None:
        return
    options = hub_options(name, "model_index.json", revision=revision, local_files_only=local_files_only)
    if options["local_files_only"]:
        return
    patterns = [f"{part}/*.{suffix}" for part in parts for suffix in ("json", "txt", "model", "jinja")]
    with load_errors_explained(f"{name} from the Hugging Face hub", hub_remedy(name)):
        snapshot_download(name, revision=revision, allow_patterns=["model_index.json", *patterns])


def published_configuration(family: str, part: str) -> dict[str, Any]:
    """The configuration of a network of the published model of a family, as it ships with the package."""
    place = Path(__file__).parent / family / "published" / f"{part}.json"
    settings: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    settings.pop("source")
    return settings


def looks_like_path(name: str) -> bool:
    """Whether `name` cannot be a hub id (owner/name) of a model: a file of weights is none either."""
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or "\\" in name or name.endswith(_WEIGHT_FILES)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def read_typed_config(
    folder: str | Path, name: str, model_type: str, what: str, build: Callable[[dict[str, Any], str], T]
) -> T:
    """What `build` makes of the JSON file `name` of a model's folder (its values, its path), which says what it is by
    its `model_type`. Raises ModelLoadError without that file or for one that is wrong."""
    path = Path(folder) / name
    if not path.is_file():
        raise ModelLoadError(f"there is no {what} in {folder}: it has no {name}")
    with load_errors_explained(f"the {what} in {folder}"):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        if not isinstance(values, dict) or values.pop("model_type", None) != model_type:
            raise ValueError(f'{path} is not of a {what}: it has no "model_type": "{model_type}"')
        return build(values, str(path))
