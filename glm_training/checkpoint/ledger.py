"""``ledger.json``: the run that a folder of checkpoints belongs to, and which it made, in the order it made them.

Only what the ledger lists may ever be deleted. A folder counts as listed while its manifest is byte for byte the one
the run wrote and nothing was added to it, so a checkpoint copied in, renamed or annotated by hand is the user's.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from glm_training.checkpoint.manifest import MANIFEST, digest_file, read_manifest
from glm_training.checkpoint.state_tree import CheckpointError

logger = logging.getLogger(__name__)

LEDGER = "ledger.json"


def step_of(name: str) -> int:
    """The step that the name of a checkpoint ends with; -1 without one."""
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


@dataclass(frozen=True)
class LedgerEntry:
    """A checkpoint this run made, or was about to make when it died."""

    name: str
    manifest_sha256: str


@dataclass(frozen=True)
class Ledger:
    """Entries from oldest to newest. ``run`` is the run's id, which its manifests carry as well; None where no run has
    begun or gone on here since runs have ids."""

    entries: tuple[LedgerEntry, ...] = ()
    run: str | None = None

    @staticmethod
    def read(checkpoints_dir: Path) -> "Ledger":
        """The ledger of a folder; when it is unreadable, an empty one and a warning: then nothing is deleted."""
        path = checkpoints_dir / LEDGER
        try:
            content = json.loads(path.read_bytes())
            rows, run = content["made_by_this_run"], content.get("run")
            entries = tuple(LedgerEntry(str(row["name"]), str(row["manifest_sha256"])) for row in rows)
            return Ledger(entries, None if run is None else str(run))
        except FileNotFoundError:
            return Ledger()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            logger.warning("%s cannot be read (%s): checkpoints made before now will not be deleted", path, error)
            return Ledger()

    def encoded(self) -> bytes:
        """The bytes of ``ledger.json``."""
        rows = [{"name": entry.name, "manifest_sha256": entry.manifest_sha256} for entry in self.entries]
        return json.dumps({"run": self.run, "made_by_this_run": rows}, indent=1).encode("ascii")

    def adding(self, entry: LedgerEntry) -> "Ledger":
        """This ledger with ``entry`` as the newest."""
        return Ledger((*(old for old in self.entries if old != entry), entry), self.run)

    def names(self) -> list[str]:
        """Names from oldest to newest; a name made twice stands where it was made last."""
        newest_first = dict.fromkeys(entry.name for entry in reversed(self.entries))
        return list(reversed(newest_first))

    def lineage(self, name: str) -> list[str]:
        """Names from ``name`` back to the first, without those of what was abandoned: made after an earlier step than
        theirs that the run then went back to."""
        found: list[str] = []
        newest_first = list(reversed(self.names()))
        for each in newest_first[newest_first.index(name) :] if name in newest_first else []:
            if not found or step_of(each) < step_of(found[-1]):
                found.append(each)
        return found

    def made(self, folder: Path, name: str) -> bool:
        """True when this run made what is in ``folder`` under ``name`` and nobody added a file to it."""
        try:
            entry = LedgerEntry(name, digest_file(folder / MANIFEST).sha256)
            if entry not in self.entries:
                return False
            expected = {MANIFEST, *read_manifest(folder).files}
        except (OSError, CheckpointError):
            return False
        return all(path.is_dir() or path.relative_to(folder).as_posix() in expected for path in folder.rglob("*"))
