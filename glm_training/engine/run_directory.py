"""The directory of a run: held by one run at a time, begun or continued, and what is laid out in it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial, reduce
from itertools import count
from operator import getitem
from pathlib import Path
from typing import Any

from glm_training.checkpoint.commit import begin_run, continue_run
from glm_training.checkpoint.ledger import LEDGER, Ledger
from glm_training.checkpoint.resume import NoCheckpointError, ResumePoint, holds_checkpoints, resolve_resume
from glm_training.checkpoint.run_record import RunRecord
from glm_training.checkpoint.shards import unshared
from glm_training.checkpoint.state_tree import CheckpointError
from glm_training.config import Config, iter_keys, resolved_yaml
from glm_training.engine.agreement import leave_together, together
from glm_training.engine.errors import SettingsError, TrainingError
from glm_training.engine.places import CHECKPOINTS, Place, places
from glm_training.engine.sessions import record_session
from glm_training.engine.setup import tracking_services
from glm_training.utils.console import Console
from glm_training.utils.distributed import World, barrier, broadcast_object
from glm_training.utils.failures import beside_training
from glm_training.utils.folder_lock import LOCK, FolderInUseError, FolderLock, in_use
from glm_training.utils.kept_rollouts import ROLLOUTS
from glm_training.utils.logging import RunLogger
from glm_training.utils.metrics_file import EVALUATIONS
from glm_training.utils.step_folders import keep_folders_until
from glm_training.utils.step_lines import keep_until

logger = logging.getLogger(__name__)

AUTO, LATEST = "auto", "latest"


@dataclass
class RunDirectory:
    """A directory that this run holds: nothing else trains there until it is given back.

    `point`: the checkpoint to resume from, verified; None for a run that starts. `continues`: whether the directory's
    own run made it, which then goes on; otherwise a new run begins, perhaps with the state of another. `clear`: on the
    main process, sets aside the run that is there, if it is to. `locks`: there, of every folder. `run`: the run's id,
    once it is laid out.
    """

    point: ResumePoint | None
    continues: bool
    clear: Callable[[], None] | None = None
    locks: FolderLocks | None = None
    run: str | None = None

    def make_room(self, world: World) -> None:
        """Sets aside the run that is there, where that was asked for; a collective. To be called once all that can be
        known is known to be right, and before anything is written."""
        if self.clear is not None:
            self.clear()
            self.clear = None
        barrier(world)

    def open(self, config: Config, world: World, total_steps: int, *, shared: bool = False) -> RunLogger:
        """Lays the directory out and opens its log; a collective. `shared`: all processes write the checkpoints, and
        must see their folder.

        A run that goes on within an interval of the log goes on with its figures too, so the line that the stop left of
        them is set aside: the interval gets the one line that it has without a stop.

        Raises SettingsError, on every process, where the disk does not take what is laid out.
        """
        log = together(world, "laying out the run directory", lambda: self._laid_out(config, world, total_steps))
        if shared:
            seen = partial(_require_seen, config.checkpoint_dir(), broadcast_object(world, self.run))
            together(world, "looking for the folder of checkpoints", seen)
        return log

    def _laid_out(self, config: Config, world: World, total_steps: int) -> RunLogger:
        try:
            return self._lay_out(config, world, total_steps)
        except (OSError, CheckpointError) as error:
            raise SettingsError(_not_laid_out(config, error)) from error

    def _lay_out(self, config: Config, world: World, total_steps: int) -> RunLogger:
        step = None if self.point is None else self.point.step
        within = step is not None and step < total_steps and step % config.logging.log_interval != 0
        if world.is_main:
            if self.continues and self.point is not None:
                self.run = continue_run(self.point.path)
            else:
                self.run = begin_run(config.checkpoint_dir())
            _sign(config, self.run)
            keep_until(config.output_dir / EVALUATIONS, -1 if step is None else step)
            with beside_training("setting aside pictures that are drawn again"):
                for name in ("samples", ROLLOUTS):
                    keep_folders_until(config.output_dir / name, -1 if step is None else step)
            record_session(config, world, step, total_steps)
        return RunLogger(
            config.output_dir,
            world,
            use_tensorboard=config.logging.use_tensorboard,
            services=tracking_services(config),
            log_dir=config.tensorboard_dir(),
            resume_step=step,
            within_interval=within,
            config=config.model_dump(mode="json"),
        )

    def confirm(self, config: Config) -> None:
        """On the main process, before it writes a checkpoint: the folders are this run's still. Those that somebody has
        renamed or removed meanwhile are laid out again, so that no other run begins there and this one can be resumed.

        Raises TrainingError where another run has begun there.
        """
        if self.locks is None or self.run is None:
            return
        taken: FolderInUseError | None = None
        with beside_training("taking the run directory again"):
            try:
                self._take_again(config, self.locks, self.run)
            except FolderInUseError as error:
                taken = error
        if taken is not None:
            raise TrainingError(
                f"{taken}. It has begun there since somebody renamed or removed the folder, or deleted its {LOCK}, "
                "while this run was writing there: nothing more is saved, so that the two do not mix"
            ) from taken

    def _take_again(self, config: Config, locks: FolderLocks, run: str) -> None:
        lost = locks.renew()
        if not lost:
            return
        if not (config.checkpoint_dir() / LEDGER).exists():
            begin_run(config.checkpoint_dir(), run)
        _sign(config, run)
        logger.warning(
            "%s: renamed, removed or unlocked by somebody while this run writes there. It goes on under that name; "
            "what it wrote before is where it was moved to",
            ", ".join(map(str, lost)),
        )


def _sign(config: Config, run: str) -> None:
    """Says in every folder of the run whose it is, and in `output_dir` what was asked for."""
    checkpoints = config.checkpoint_dir()
    for place in places(config):
        place.folder.mkdir(parents=True, exist_ok=True)
        inside = checkpoints.is_relative_to(place.folder)
        reached = checkpoints.relative_to(place.folder) if inside else checkpoints.absolute()
        RunRecord(run, datetime.now().astimezone().isoformat(" ", "seconds"), str(reached)).write(place.folder)
    (config.output_dir / "config.yaml").write_text(resolved_yaml(config), encoding="utf-8")


@contextmanager
def held_run_directory(
    config: Config,
    world: World,
    choose: Callable[[], ResumePoint | None],
    *,
    overwrite: bool = False,
    auto: bool = False,
) -> Iterator[RunDirectory]:
    """Inside, every folder that the run writes to is its own; a collective, decided by the main process.

    `choose` gives it the checkpoint to resume from (`chosen_point`), once nobody else can write there. A directory that
    holds a run is taken for resuming that alone. `overwrite` sets the run aside, whole, under a name beside it. `auto`
    lets one that has saved nothing start again in its place.

    Raises SettingsError, on every process: the run that is there already, the checkpoint that cannot be had.
    """
    with ExitStack() as locks:
        directory, problem, clear, held = None, None, None, None
        if world.is_main:
            try:
                held = FolderLocks(config, locks)
                directory, replaces = _take(config, choose, overwrite=overwrite, auto=auto)
                if replaces:
                    _check_movable(config, held)
                    clear = partial(_set_aside, config, held)
            except (SettingsError, CheckpointError, FolderInUseError) as error:
                directory, problem = None, str(error)
            except OSError as error:
                directory, problem = None, _not_laid_out(config, error)
        directory, problem = broadcast_object(world, (directory, problem))
        if directory is None:
            if world.world_size > 1:
                leave_together()
            raise SettingsError(problem)
        yield replace(directory, clear=clear, locks=held)


def _require_seen(folder: Path, run: str | None) -> None:
    """Raises SettingsError where `folder` is not that of the `run` whose ledger the main process has laid there."""
    if Ledger.read(folder).run != run:
        raise SettingsError(unshared(f"{folder} is not the folder that rank 0 has there"))


def _not_laid_out(config: Config, error: Exception) -> str:
    return (
        f"the run directory {config.output_dir} cannot be laid out: {error}. Free some space or correct what is in the "
        "way, or name another output_dir"
    )


def chosen_point(config: Config, *, auto: bool = False) -> ResumePoint | None:
    """The verified checkpoint to resume from, if the run is to; with `auto`, or where the configuration says so, its
    own newest one, or what the configuration says else where it has none. Raises CheckpointError."""
    which, folder = config.checkpoint.resume_from, config.checkpoint_dir()
    if auto or which == AUTO:
        try:
            return resolve_resume(folder, LATEST)
        except NoCheckpointError:
            which = None if which in (AUTO, LATEST) else which
    return None if which is None else resolve_resume(folder, which)


class FolderLocks:
    """The locks of all of a run's folders, each once whatever its names, until `stack` unwinds."""

    def __init__(self, config: Config, stack: ExitStack) -> None:
        self.folders = [place.folder for place in places(config)]
        self.stack = stack
        self.held: dict[Path, FolderLock] = {}
        self.take()

    def take(self) -> None:
        """Takes those that are not held. Raises FolderInUseError, and OSError where a disk takes no locks."""
        for folder in (folder.resolve() for folder in self.folders):
            if folder not in self.held:
                lock = FolderLock(folder)
                self.stack.callback(lock.release)
                lock.acquire()
                self.held[folder] = lock

    def renew(self) -> list[Path]:
        """The folders whose locks were gone, and are taken anew. Raises as `FolderLock.renew`."""
        return [folder for folder, lock in self.held.items() if not lock.renew()]

    def rename(self, folder: Path, target: Path) -> None:
        """Renames a folder with what is in it, and gives the locks there back."""
        moving = {path: lock for path, lock in self.held.items() if path.is_relative_to(folder)}
        for lock in moving.values() if sys.platform == "win32" else ():
            lock.release()  # Windows renames no folder with an open file in it
        os.rename(folder, target)
        for path, lock in moving.items():
            lock.moved(folder, target)
            lock.release()
            del self.held[path]


def _take(
    config: Config, choose: Callable[[], ResumePoint | None], *, overwrite: bool, auto: bool
) -> tuple[RunDirectory, bool]:
    """What the run does in the directory, and whether another one is to be set aside for it."""
    point = choose()
    if point is not None and point.path.parent.resolve() == config.checkpoint_dir().resolve():
        if overwrite:
            raise SettingsError(
                f"the run in {config.output_dir} is to be continued from {point.path} and set aside (--overwrite) at "
                "once: do one of the two"
            )
        _require_one_run(config)
        return RunDirectory(point, True), False
    told = occupied_message(config)
    if told is not None and not overwrite:
        starts_again = point is None and (auto or config.checkpoint.resume_from == AUTO)
        if not (starts_again and _nothing_saved(config)):
            raise SettingsError(told)
    return RunDirectory(point, False), told is not None and overwrite


def _require_one_run(config: Config) -> None:
    """Raises SettingsError where a folder of the run that goes on belongs to another one."""
    every = places(config)
    runs = {place.key: place.run() for place in every}
    own = runs[CHECKPOINTS]
    for place in every:
        if own is not None and runs[place.key] not in (None, own) and place.occupied():
            raise SettingsError(
                f"{place.key} {place.folder} belongs to another run ({runs[place.key]}) than the checkpoints in "
                f"{config.checkpoint_dir()} ({own}): name a folder of its own"
            )


def _nothing_saved(config: Config) -> bool:
    """Whether what is there is a run without a checkpoint, which may start again in its place."""
    output, checkpoints, *others = places(config)
    own = output.run()
    if own is None and checkpoints.folder.is_relative_to(output.folder):
        own = checkpoints.run()  # the record may be damaged; what lies inside has another
    strangers = [place for place in (checkpoints, *others) if place.occupied() and place.run() != own]
    foreign = [path for place in (output, checkpoints, *others) for path in place.foreign()]
    return own is not None and not strangers and not foreign


def occupied_message(config: Config) -> str | None:
    """What a run that starts meets in its folders, and the ways on; None where they are free."""
    taken = _taken(config)
    if not taken:
        return None
    lines = []
    for place in taken:
        lines += [f"{place.key}: {path} is no run's, and would be written over" for path in place.foreign()]
        if _occupied(config, place):
            record = RunRecord.read(place.folder)
            since = "" if record is None else f", of {record.started}"
            lines.append(f"{place.key}: {place.folder} holds a run already{since}")
    ways = [f"another {' and '.join(place.key for place in taken)}: both are kept where they are"]
    if any(_occupied(config, place) for place in taken):
        if holds_checkpoints(config.checkpoint_dir()):
            ways.insert(0, "--resume: it goes on")
        elif _nothing_saved(config):
            ways.insert(0, "--resume auto: it starts again in its place, as nothing was saved yet")
    renamed = ", ".join(str(_free_sibling(place.folder)) for place in taken)
    ways.append(f"--overwrite: it is renamed, whole, to {renamed}, and the new run takes its place")
    return "\n".join([*lines, "Choose one:", *(f"  {way}" for way in ways)])


def _occupied(config: Config, place: Place) -> bool:
    """Whether a run left something in a place, or in the folders inside `output_dir` that are of the run there: one
    that was stopped before its first figure has its checkpoint alone."""
    own = place.run()
    inside = [other for other in places(config)[1:] if other.folder.resolve().is_relative_to(place.folder.resolve())]
    return place.occupied() or (own is not None and any(one.occupied() and one.run() == own for one in inside))


def _taken(config: Config) -> list[Place]:
    """The places in which something is, from the outermost one; those inside one that is taken go with it."""
    found: dict[Path, Place] = {}
    for place in sorted(places(config), key=lambda place: len(place.folder.resolve().parts)):
        folder = place.folder.resolve()
        if (_occupied(config, place) or place.foreign()) and not any(folder.is_relative_to(other) for other in found):
            found[folder] = place
    return list(found.values())


def _check_movable(config: Config, locks: FolderLocks) -> None:
    """Raises SettingsError where setting the places aside would take away what the run, or another one, needs there."""
    for place in _taken(config):
        needed = _needed_in(place.folder.resolve(), config, locks)
        if needed:
            raise SettingsError(
                f"{place.key} {place.folder} cannot be set aside (--overwrite) with {', '.join(needed)} in it: name "
                "another folder"
            )


def _set_aside(config: Config, locks: FolderLocks) -> None:
    """Renames every place in which something is; the new folders are this run's again."""
    while taken := _taken(config):
        place = taken[0]
        folder = place.folder.resolve()  # of a link, what it leads to: the link stays
        aside = _free_sibling(folder)
        try:
            locks.rename(folder, aside)
            if place.folder.is_symlink():
                folder.mkdir()
            locks.take()
        except (OSError, FolderInUseError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise SettingsError(
                f"{place.key} {place.folder} cannot be set aside as {aside} ({reason}): name another folder"
            ) from error
        Console().line(f"set aside: {place.folder} is now {aside}")


def _free_sibling(folder: Path) -> Path:
    """`NAME.old-1` beside the folder, or the first such name that is free."""
    real = folder.resolve()
    names = (real.with_name(f"{real.name}.old-{number}") for number in count(1))
    return next(path for path in names if not os.path.lexists(path))


def _needed_in(folder: Path, config: Config, locks: FolderLocks) -> list[str]:
    """What may not be renamed with `folder`: the current folder, what the configuration reads, runs of others."""
    needed = ["the current folder"] if Path.cwd().is_relative_to(folder) else []
    written = [*(place.key for place in places(config)), "cache.dir", "dpo.cache_dir"]
    settings = config.model_dump()
    for key in iter_keys():
        value: Any = reduce(getitem, key.split("."), settings)
        if isinstance(value, str | Path) and key not in written and os.path.lexists(value):
            path = Path(value).resolve()
            if path != folder and path.is_relative_to(folder):
                needed.append(f"{key} ({value})")
    for path in folder.rglob(LOCK):
        if path.parent.resolve() not in locks.held and in_use(path.parent):
            needed.append(f"a run that is in {path.parent}")
    return needed
