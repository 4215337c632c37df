"""Where a run writes: which folders, by the keys that name them, and whether they take files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glm_training.checkpoint.best import BEST
from glm_training.checkpoint.commit import POINTER
from glm_training.checkpoint.ledger import LEDGER, Ledger
from glm_training.checkpoint.run_record import RECORD, RunRecord
from glm_training.config import Config
from glm_training.engine.errors import SettingsError
from glm_training.utils.metrics_file import EVALUATIONS, METRICS
from glm_training.utils.writable import why_not_appended, why_unwritable

OUTPUT, CHECKPOINTS, ADAPTERS, EVENTS = "output_dir", "checkpoint.save_dir", "checkpoint.lora_dir", "logging.log_dir"
LEFT_BY_RUNS = {
    OUTPUT: (METRICS, EVALUATIONS, "samples/step-*", "rollouts/step-*", "loss_logs/*"),
    CHECKPOINTS: ("step-*", ".partial-step-*", ".replaced-step-*"),
    ADAPTERS: ("step-*",),
    EVENTS: ("events.out.tfevents.*",),
}
"""What a run that came to anything leaves in each of its folders; an empty file does not count."""

REWRITTEN = ("config.yaml", "args.json")
"""Files of `output_dir` that a run writes anew when it begins."""

APPENDED = (METRICS, EVALUATIONS, "train.log")


@dataclass(frozen=True)
class Place:
    """A folder that belongs to one run alone, and the key that names it."""

    key: str
    folder: Path

    def occupied(self) -> bool:
        """Whether a run left something here that is worth keeping."""
        return any(
            path.is_dir() or path.lstat().st_size > 0
            for pattern in LEFT_BY_RUNS[self.key]
            for path in self.folder.glob(pattern)
        )

    def run(self) -> str | None:
        """The id of the run that this is a folder of; None where it has none, or one from before runs had ids."""
        if self.key == CHECKPOINTS:
            return Ledger.read(self.folder).run
        record = RunRecord.read(self.folder)
        return None if record is None else record.run

    def foreign(self) -> list[Path]:
        """Files here that a run would write over and none has written."""
        if self.key != OUTPUT or RunRecord.read(self.folder) is not None or (self.folder / METRICS).exists():
            return []
        return [path for name in REWRITTEN if (path := self.folder / name).exists()]


def places(config: Config) -> list[Place]:
    """Every folder that the run must have for itself, `output_dir` first. The cache of what encoders give is not
    among them: its files are named by content and appear whole, so runs may share it."""
    found = [Place(OUTPUT, config.output_dir), Place(CHECKPOINTS, config.checkpoint_dir())]
    if config.checkpoint.save_lora:
        found.append(Place(ADAPTERS, config.lora_dir()))
    if config.logging.use_tensorboard:
        found.append(Place(EVENTS, config.tensorboard_dir()))
    return found


def check_places(config: Config, *, is_main: bool) -> None:
    """Raises SettingsError with every place that this process is to write to and cannot."""
    problems = place_problems(config, is_main=is_main)
    if problems:
        raise SettingsError("\n".join(problems))


def place_problems(config: Config, *, is_main: bool = True) -> list[str]:
    """Every place that this process is to write to and cannot, with its key; tried there, with nothing left behind.

    `is_main`: whether this is the process that writes all but the cache.
    """
    problems: dict[str, None] = {}
    output = config.output_dir
    if is_main:
        problem = why_unwritable(output)
        if problem is not None:
            problems[f"{OUTPUT}: {problem}"] = None
    for key, folder, given in _folders(config, is_main):
        if given or not problems:  # what lies in a bad output_dir is bad for that one reason
            problem = why_unwritable(folder)
            if problem is not None:
                problems[f"{key}: {problem}"] = None
    if is_main:
        problems |= dict.fromkeys(_in_the_way(config))
    for name in (*APPENDED, *REWRITTEN) if is_main and why_unwritable(output) is None else ():
        problem = why_not_appended(output / name)
        if problem is not None:
            problems[f"{OUTPUT}: {problem}"] = None
    return list(problems)


def _in_the_way(config: Config) -> list[str]:
    """What would make a save fail, or spoil what it made: folders under the names of files that a run replaces, and
    copies of the adapters in the checkpoints themselves, which then are no longer what was saved."""
    found = [
        f"{place.key}: {path} is a folder, not a file"
        for place in places(config)
        for name in ((RECORD, LEDGER, POINTER, BEST) if place.key == CHECKPOINTS else (RECORD,))
        if (path := place.folder / name).is_dir() and not path.is_symlink()
    ]
    if config.checkpoint.save_lora and config.lora_dir().resolve() == config.checkpoint_dir().resolve():
        found.append(f"{ADAPTERS}: {config.lora_dir()} is {CHECKPOINTS} too, where it would change what was saved")
    return found


def _folders(config: Config, is_main: bool) -> list[tuple[str, Path, bool]]:
    """Folders besides `output_dir` that this process writes to: key, folder, and whether the key is given."""
    found = []
    if is_main:
        given = {
            CHECKPOINTS: config.checkpoint.save_dir,
            ADAPTERS: config.checkpoint.lora_dir,
            EVENTS: config.logging.log_dir,
        }
        found = [(place.key, place.folder, given[place.key] is not None) for place in places(config)[1:]]
        inside = ("samples", "loss_logs") if config.training.method == "dmdr" else ("samples",)
        found += [(OUTPUT, config.output_dir / name, False) for name in inside]
    if config.data.images is not None:
        found.append(("data.index_dir", config.index_dir(), config.data.index_dir is not None))
    if config.caches():
        older = config.cache.dir is None and config.dpo.cache_dir is not None
        key = "dpo.cache_dir" if older else "cache.dir"
        found.append((key, config.encoded_cache_dir(), older or config.cache.dir is not None))
    return found
