"""An export on the Hugging Face hub."""

from __future__ import annotations

import shlex
from pathlib import Path

from glm_training.export.source import ExportError
from glm_training.utils.hub_files import hub_error, is_offline


def check_push(repository: str | None, folder: Path, *, public: bool) -> None:
    """What can be known before anything is written: the name, the network's switch, a login. Raises ExportError."""
    if repository is None:
        return
    later = f"leave --push out and push later: {by_hand(repository, folder, public=public)}"
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ExportError(f"--push {repository}: {str(error).splitlines()[0]}") from error
    if repository.count("/") != 1:
        raise ExportError(f"--push {repository}: write owner/name")
    if is_offline():
        raise ExportError(f"--push: HF_HUB_OFFLINE is set: unset it, or {later}")
    if get_token() is None:
        raise ExportError(f"--push: nobody is logged in to the hub here: hf auth login, or set HF_TOKEN; or {later}")


def by_hand(repository: str, folder: Path, *, public: bool) -> str:
    """The command that does what `push` does; without `--private` it makes a repository for everyone."""
    return shlex.join(["hf", "upload", repository, str(folder), *([] if public else ["--private"])])


def push(folder: Path, repository: str, *, public: bool, message: str) -> str:
    """Uploads all files of `folder` as one commit; a repository that is not there is made, for its owner alone unless
    `public`. Gives its address. Raises ExportError; the folder stays."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        made = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=str(folder), commit_message=message)
    except (hub_error(), OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"{folder} was exported and not pushed to {api.endpoint}/{repository}: {reason}\n"
            f"What to do: mend that, then {by_hand(repository, folder, public=public)}"
        ) from error
    return str(made)
