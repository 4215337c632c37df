"""Files of the Hugging Face hub, fetched into its cache: which of a repository's, how large, and whether they came
whole. The hub's library goes on where a download broke off; what came is then held against the hub's own checksums."""

from __future__ import annotations

import errno
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from glm_training.utils.downloads import AddressFile, DownloadError, in_bytes, require_room, sha256_of
from glm_training.utils.writable import expanded

_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""What no network raises."""

Choose = Callable[[Collection[str]], list[str]]
"""Of the names in a repository, those that are needed; none where something is lacking."""


@dataclass(frozen=True)
class HubFiles:
    """Those files of the repository `repository` (owner/name) that `choose` picks. needed_by: what asks for them."""

    needed_by: str
    repository: str
    choose: Choose
    revision: str | None = None

    @property
    def name(self) -> str:
        return self.repository

    @property
    def source(self) -> str:
        """The address of the hub."""
        from huggingface_hub import constants

        return constants.ENDPOINT

    def here(self) -> bool:
        """Whether the cache has all of them."""
        return bool(self.choose(self._cached()))

    def paths(self) -> list[Path]:
        """Where they lie in the cache; none where one is lacking."""
        folder = self._snapshot()
        return [] if folder is None else [folder / name for name in self.choose(self._cached())]

    def remaining(self) -> int:
        """Bytes that are to come. Raises DownloadError."""
        return sum(sibling.size or 0 for sibling in self._missing())

    def fetch(self) -> None:
        """Brings them into the cache, by one process of several. Raises DownloadError."""
        from huggingface_hub import constants

        cache = Path(constants.HF_HUB_CACHE)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / f".glm_training-{self.repository.replace('/', '--')}.lock"):
                missing = self._missing()
                size = sum(sibling.size or 0 for sibling in missing)
                require_room(cache, size, f"{self.needed_by}: {self.repository}")
                for sibling in missing:
                    self._fetch(sibling)
        except OSError as error:
            raise DownloadError(f"{self.needed_by}: {cache} cannot be written ({error})") from error

    def _missing(self) -> list[Any]:
        from huggingface_hub import HfApi, constants

        with _explained(self):
            found = HfApi().model_info(
                self.repository,
                revision=self.revision,
                files_metadata=True,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
        siblings = {sibling.rfilename: sibling for sibling in found.siblings or []}
        chosen = self.choose(siblings.keys())
        if not chosen:
            raise DownloadError(f"{self.needed_by}: {self.repository} on the hub lacks files that are needed of it")
        cached = self._cached()
        return [siblings[name] for name in chosen if name not in cached]

    def _snapshot(self) -> Path | None:
        """The folder in the cache that has what came of the revision; None where nothing did."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(self.repository, revision=self.revision, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError):
            return None

    def _cached(self) -> list[str]:
        folder = self._snapshot()
        if folder is None:
            return []
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

    def _fetch(self, sibling: Any) -> None:
        from huggingface_hub import hf_hub_download

        for _ in range(2):  # once more from the start, where what had come before was damaged
            with _explained(self):
                path = Path(hf_hub_download(self.repository, sibling.rfilename, revision=self.revision))
            if _is_whole(path, sibling):
                return
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        raise DownloadError(
            f"{self.needed_by}: {sibling.rfilename} of {self.repository} has not the checksum that the hub states"
        )


Wanted = AddressFile | HubFiles
"""What can be fetched."""


def is_offline(local_files_only: bool = False) -> bool:
    """Whether nothing is to be asked for: HF_HUB_OFFLINE, or the configuration says so."""
    from huggingface_hub import constants

    return local_files_only or bool(constants.HF_HUB_OFFLINE)


def hub_id(name: str) -> str | None:
    """`name` where it can only be meant for the hub: nothing lies there here, and it is written owner/name."""
    return name if not expanded(name).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) else None


def fetch_missing(wanted: Iterable[Wanted], tell: Callable[[str], None]) -> list[str]:
    """Fetches what is not here, telling what and how much; what could not be had, a line each."""
    problems = []
    for each in dict.fromkeys(wanted):
        if each.here():
            continue
        try:
            size = each.remaining()
            how_much = "" if size is None else f", {in_bytes(size)}"
            tell(f"fetching {each.name}{how_much}, for {each.needed_by}, from {each.source}")
            each.fetch()
        except DownloadError as error:
            problems.append(str(error))
    return problems


def fetch_where_allowed(wanted: Iterable[Wanted], tell: Callable[[str], None]) -> list[str]:
    """`fetch_missing`, unless HF_HUB_OFFLINE forbids it."""
    return [] if is_offline() else fetch_missing(wanted, tell)


# -- which files -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exactly:
    """These files, by name."""

    files: tuple[str, ...]

    def __call__(self, names: Collection[str]) -> list[str]:
        return list(self.files) if all(file in names for file in self.files) else []


def transformers_weights(names: Collection[str]) -> list[str]:
    """config.json with the weights that transformers takes: as safetensors, or else as torch has them."""
    if "config.json" not in names:
        return []
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        if f"{stem}.{ending}" in names:
            return ["config.json", f"{stem}.{ending}"]
        index = f"{stem}.{ending}.index.json"
        shards = [name for name in names if re.fullmatch(rf"{stem}-\d+-of-\d+\.{ending}", name)]
        if index in names and shards and _all_shards(shards):
            return ["config.json", index, *sorted(shards)]
    return []


def tokenizer_files(names: Collection[str]) -> list[str]:
    """The JSON and text files beside each other that a tokenizer of transformers may read."""
    if "tokenizer.json" not in names and "vocab.json" not in names:
        return []
    return sorted(name for name in names if re.fullmatch(r"[^/]+\.(json|txt)", name) and ".index." not in name)


def model_folder(names: Collection[str]) -> list[str]:
    """A model with its processors, whatever lies where: JSON, text and weights as safetensors."""
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    small = sorted(name for name in names if name.endswith(_SMALL))
    return [*small, *weights] if "config.json" in names and weights and _all_shards(weights) else []


_SMALL = (".json", ".txt", ".model", ".jinja")


@dataclass(frozen=True)
class PipelineParts:
    """The folders `parts` of a diffusers pipeline: their small files, and the weights of those that are networks, as
    safetensors, in the variant fp16 where there is one and `half` asks for it, or where there is no other."""

    parts: tuple[str, ...]
    half: bool

    def __call__(self, names: Collection[str]) -> list[str]:
        chosen = ["model_index.json"]
        if chosen[0] not in names:
            return []
        for part in self.parts:
            inside = [name for name in names if name.startswith(f"{part}/")]
            if not inside:
                return []
            small = [name for name in inside if name.endswith(_SMALL)]
            weights = self._of_variant([name for name in inside if name.endswith(".safetensors")])
            if not _all_shards(weights) or (not weights and f"{part}/config.json" in inside):
                return []
            chosen += [*small, *weights]
        return sorted(chosen)

    def _of_variant(self, weights: Sequence[str]) -> list[str]:
        fp16 = [name for name in weights if ".fp16" in name]
        full = [name for name in weights if ".fp16" not in name]
        return fp16 if fp16 and (self.half or not full) else full


def _all_shards(names: Sequence[str]) -> bool:
    """Whether of files in parts, `..-00001-of-00003..`, all are among `names`."""
    counts = Counter(
        (name[: found.start()], found[1]) for name in names if (found := re.search(r"-\d+-of-(\d+)", name))
    )
    return all(count == int(stated) for (_, stated), count in counts.items())


def _is_whole(path: Path, sibling: Any) -> bool:
    """Whether a file has the checksum that the hub states of it: SHA-256 of large files, of others what git calls
    them. Where it states none there is nothing to hold it against."""
    if sibling.lfs is not None:
        return sha256_of(path) == sibling.lfs.sha256
    if sibling.blob_id is None:
        return True
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == sibling.blob_id


@contextmanager
def _explained(files: HubFiles) -> Iterator[None]:
    """Around what asks the hub: its errors, and those of the network, are DownloadErrors; a disk's stay as they are."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        yield
    except (hub_error(), OfflineModeIsEnabled, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _OF_DISKS:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DownloadError(
            f"{files.needed_by}: {files.repository} cannot be had from {files.source} ({reason})"
        ) from error


def hub_error() -> type[Exception]:
    """What the hub's client raises: HTTPError of httpx2, or of httpx before huggingface_hub 2."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]
