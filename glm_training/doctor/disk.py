"""Whether there is room where a run writes, and which other disk has it where there is none."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from glm_training.doctor.commands import Asked, export, glm_train
from glm_training.doctor.findings import Finding, failed, note, ok
from glm_training.doctor.weights import cache_folder
from glm_training.doctor.worker import configuration
from glm_training.engine.families import model_files
from glm_training.engine.places import place_problems
from glm_training.models.loading import ModelLoadError
from glm_training.planning.disk import Disk, checkpoints
from glm_training.planning.memory import Memory
from glm_training.planning.models import PUBLISHED, read_networks
from glm_training.planning.run import read_run
from glm_training.utils.writable import why_unwritable

GB = 10**9
MOUNTS = Path("/proc/mounts")
QUICK = "configs/quickstart.yaml"
"""The small run, from a clone."""

SCRATCH = 50 * 10**6
"""Bytes that a step of the tiny model writes, and libraries beside it, with room to spare: it was 2 MB."""

SMALL_RUN = 600 * 10**6
"""Bytes of a run of the tiny model: four checkpoints of 0.1 GB at once, with pictures, rounded up."""

LARGEST = 36 * GB
"""Bytes of zai-org/GLM-Image in the cache."""

MEMORY = {"tmpfs", "ramfs", "devtmpfs", "proc", "sysfs", "squashfs", "iso9660", "overlay"}
"""Kinds of file systems that no run should be moved to, of those that are mounted by themselves."""


def machine(asked: Asked) -> Iterator[Finding]:
    """Room for a small run here, for weights, and for temporary files; with a configuration for the latter alone."""
    runs = Path.cwd() / "runs"
    if not asked.paths:
        yield _room("disk for runs", runs, SMALL_RUN, _moved)
        free = free_bytes(cache_folder())
        if free < LARGEST:
            told = (
                f"{free / GB:.1f} GB free for weights in {cache_folder()}; zai-org/GLM-Image takes {LARGEST / GB:.0f}"
            )
            other = elsewhere(LARGEST, cache_folder())
            yield note("disk for weights", told, [] if other is None else export("HF_HOME", str(other / "huggingface")))
        else:
            yield ok("disk for weights", f"{free / GB:.1f} GB free in {cache_folder()}")
    yield _room("disk for temporary files", _temporary(), SCRATCH, lambda other: export("TMPDIR", str(other)))


def _moved(other: Path) -> list[str]:
    """The small run on another disk; where its configuration is not, there is another folder to begin runs in."""
    if not Path(QUICK).is_file():
        return ["cd", shlex.quote(str(other))]
    return glm_train("train", Asked((QUICK,)), f"output_dir={other / 'runs' / 'quickstart'}")


def _temporary() -> Path:
    """The folder of temporary files. Python passes over one that is full, and libraries of other languages do not."""
    named = os.environ.get("TMPDIR")
    return Path(named) if named else Path(tempfile.gettempdir())


def run(asked: Asked) -> Iterator[Finding]:
    """The folders that the configuration names, and room for its checkpoints and for its model."""
    config = configuration(asked)
    name = config.output_dir.name
    for problem in place_problems(config):
        other = elsewhere(SMALL_RUN, config.output_dir) or Path.home()
        key, _, why = problem.partition(": ")
        changed = f"{key}={other / 'runs' / name}"
        yield failed("folder", f"{key}: {why}", glm_train("train", asked, changed))
    try:
        networks = read_networks(config.model.family, config.model.name, config.model.revision)
    except ModelLoadError as error:
        yield note("disk for checkpoints", f"not worked out: {str(error).splitlines()[0]}")
        return
    memory = Memory(read_run(config), networks)
    key = "output_dir" if config.checkpoint.save_dir is None else "checkpoint.save_dir"
    yield _for_checkpoints(checkpoints(config, memory), key, name, asked)
    lacking = [each for each in model_files(config) if each.needed_by == "model.name" and not each.here()]
    if lacking and config.model.name in PUBLISHED.values():
        size = 2 * sum(part.total for part in memory.parts)
        yield _room("disk for the model", cache_folder(), size,
                    lambda other: export("HF_HOME", str(other / "huggingface")))  # fmt: skip


def _for_checkpoints(disk: Disk, key: str, name: str, asked: Asked) -> Finding:
    count = disk.held or 2
    size = int(disk.each * count)
    told = f"{count} checkpoints of {disk.each / GB:.2f} GB, {disk.free / GB:.2f} GB free for {disk.folder}"
    title, facts = "disk for checkpoints", {"needed": size, "free": disk.free, "folder": str(disk.folder)}
    if disk.fits and disk.free > 0:
        return ok(title, told, **facts)
    other = elsewhere(size, disk.folder)
    if other is not None:
        told += f"; {other} has {free_bytes(other) / GB:.1f} GB:"
        return failed(title, told, glm_train("train", asked, f"{key}={other / 'runs' / name}"), **facts)
    if disk.each * 2 <= disk.free:
        told += "; to keep one, beside the one that is written:"
        return failed(title, told, glm_train("train", asked, "checkpoint.save_total_limit=1"), **facts)
    return failed(title, f"{told}, and no disk here has room; what takes it:", _largest(disk.folder), **facts)


def _room(title: str, folder: Path, needed: int, move: Callable[[Path], Sequence[str]]) -> Finding:
    """Whether `folder`, which need not exist yet, has `needed` bytes and takes files."""
    free = free_bytes(folder)
    facts = {"needed": needed, "free": free, "folder": str(folder)}
    unwritable = why_unwritable(folder)
    if unwritable is None and free >= needed and _has_names(folder):
        return ok(title, f"{free / GB:.1f} GB free in {folder}, {needed / GB:.2f} needed", **facts)
    told = f"{free / GB:.3f} GB free in {folder}, {needed / GB:.2f} needed"
    if not _has_names(folder):
        told += ", and it takes no more files whatever their size"
    if unwritable is not None:
        told = f"{told}: {unwritable}"
    other = elsewhere(needed, folder)
    if other is None:
        return failed(title, f"{told}, and no disk here has room; what takes it:", _largest(folder), **facts)
    return failed(title, f"{told}; {other} has {free_bytes(other) / GB:.1f} GB:", move(other), **facts)


def _largest(folder: Path) -> list[str]:
    return [
        "du",
        "-xh",
        "--max-depth=2",
        shlex.quote(str(_existing(folder))),
        "|",
        "sort",
        "-h",
        "|",
        "tail",
        "-n",
        "20",
    ]


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write to the file system of `folder`."""
    return shutil.disk_usage(_existing(folder)).free


def _has_names(folder: Path) -> bool:
    """Whether the file system takes another file; some do not count them."""
    if not hasattr(os, "statvfs"):
        return True
    found = os.statvfs(_existing(folder))
    return found.f_files == 0 or found.f_favail > 0


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if os.path.isdir(place))  # False where one may not look


def elsewhere(needed: int, folder: Path) -> Path | None:
    """The folder of this user, on another disk than `folder`, with the most room; None where none has `needed`."""
    here = _existing(folder).stat().st_dev
    found = {place: free_bytes(place) for place in _places() if place.stat().st_dev != here}
    best = max(found, key=lambda place: found[place], default=None)
    return best if best is not None and found[best] >= needed else None


def _places() -> Iterator[Path]:
    """Folders that take files: the home folder, the present one, and those that disks are mounted at."""
    mounted, user = list(_mounted()), Path.home().name
    for place in dict.fromkeys([Path.home(), Path.cwd(), *mounted, *(disk / user for disk in mounted)]):
        if os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK):  # others' folders are none, and no error
            yield place


def _mounted() -> Iterator[Path]:
    """Where disks are mounted; the system writes blanks in names as `\\040`."""
    text = MOUNTS.read_bytes().decode("utf-8", "surrogateescape") if MOUNTS.is_file() else ""
    for line in filter(None, text.split("\n")):
        _, place, kind, *_ = line.split(" ")
        if kind not in MEMORY and not place.startswith("/proc"):
            yield Path(re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), place))
