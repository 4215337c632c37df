"""The best evaluation of a run, whose checkpoint is kept: which figure decides, and what a resumed run finds of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from glm_training.checkpoint.best import Best, read_best
from glm_training.checkpoint.commit import checkpoint_name, name_best
from glm_training.checkpoint.ledger import Ledger
from glm_training.checkpoint.manifest import MANIFEST
from glm_training.config import Config
from glm_training.utils.console import Console
from glm_training.utils.distributed import World, broadcast_object
from glm_training.utils.failures import beside_training
from glm_training.utils.metrics_file import METRICS
from glm_training.utils.step_lines import lines_of

TOTAL = "eval/total"


class BestCheckpoint:
    """`best`: the evaluation so far that no other beats, of those whose checkpoint is there; None without one.

    The main process decides, and the others do as it says. The file `checkpoints/best` is moved after the checkpoint
    that it names was committed: it always names a whole one, or the one before.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.world = world
        self.folder = config.checkpoint_dir()
        self.log = config.output_dir / METRICS
        self.active = config.checkpoint.keep_best and config.evaluation.enabled
        self.rewarded = config.uses_reward()
        self.best: Best | None = None
        self._to_name = False

    def improved_by(self, step: int, figures: Mapping[str, float | None]) -> Best | None:
        """The evaluation after `step` steps with these `figures`, as they are logged, if it is the best so far; of
        equal ones that is the first. A collective."""
        if not self.active:
            return None
        found = judged(step, figures, self.rewarded) if self.world.is_main else None
        if found is not None and self.best is not None and self.best.figure == found.figure:
            found = found if self.best.beaten_by(found.score) else None
        return broadcast_object(self.world, found)

    def name(self, best: Best) -> None:
        """Its checkpoint was committed: from here on it is the best one. Where the disk does not take the file no run
        ends: the next save is the first that could remove what it names, and begins with it (`settle`)."""
        self._decide(best)

    def tell(self, console: Console) -> None:
        """Says which it is, if there is one."""
        self._try_to_settle()
        if self.best is not None:
            console.line(f"best checkpoint: {self.best.told()}: {self.folder / self.best.name}")

    def recall(self, step: int, since: int) -> None:
        """Of a run that goes on after `step` steps: the best of its evaluations from step `since` on, of which that
        step's or an earlier checkpoint is there still; `best` then names it. A collective.

        Those of steps that the run has gone back behind count no more.
        """
        if not self.active:
            return
        self._decide(broadcast_object(self.world, self._known(step, since) if self.world.is_main else None))

    def _known(self, step: int, since: int) -> Best | None:
        own = {each for each in Ledger.read(self.folder).lineage(checkpoint_name(step)) if self._is_there(each)}
        logged = [judged(line["step"], line, self.rewarded) for line in lines_of(self.log)]
        every = [read_best(self.folder), *logged]  # the file too: the log may have lost lines to a full disk
        known = [each for each in every if each is not None and each.name in own and each.step >= max(since, 1)]
        best: Best | None = None
        for each in sorted(known, key=lambda each: each.step):
            if each.figure == known[-1].figure and (best is None or best.beaten_by(each.score)):
                best = each
        return best

    def _is_there(self, name: str) -> bool:
        return Path(self.folder, name, MANIFEST).is_file()

    def settle(self) -> None:
        """On the main process, ahead of a save: has `best` name what it could not before. Raises SaveError."""
        if self._to_name and self.world.is_main and read_best(self.folder) != self.best:
            name_best(self.folder, self.best)
        self._to_name = False

    def _decide(self, best: Best | None) -> None:
        self.best, self._to_name = best, True
        self._try_to_settle()

    def _try_to_settle(self) -> None:
        with beside_training("naming the best checkpoint", "the run goes on; the next save tries again"):
            self.settle()


def judged(step: int, figures: Mapping[str, float | None], rewarded: bool) -> Best | None:
    """What decides of an evaluation's `figures`, as they are logged; None where nothing does, or it is not finite.

    In a run with rewards (`rewarded`) the held-out total. Otherwise the held-out loss, of several halves their sum; the
    PSNR of an autoencoder; or the total.
    """
    losses = sorted(name for name in figures if name.startswith("eval/") and name.endswith("/loss"))
    psnr = [name for name in figures if name.startswith("eval/") and name.endswith("/psnr")]
    total = [TOTAL] if TOTAL in figures else []
    chosen = next((names for names in ([total] if rewarded and total else [losses, psnr[:1], total]) if names), [])
    values = [value for name in chosen if (value := figures[name]) is not None]
    if not chosen or len(values) < len(chosen) or not math.isfinite(score := math.fsum(values)):
        return None
    return Best(checkpoint_name(step), step, " + ".join(chosen), score, higher_is_better=chosen is not losses)
