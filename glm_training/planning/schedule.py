"""How long a run is: samples and updates of a step, steps of the run, and days at a given rate."""

from __future__ import annotations

from dataclasses import dataclass

from glm_training.config import Config
from glm_training.data.text_lines import read_text
from glm_training.planning.run import Run

RATE = "images per second of a GPU, drawn or looked at, with all that a step does for one"


@dataclass(frozen=True)
class Schedule:
    """A step draws `prompts` over all processes, and of each `images`; updates: optimizer steps, by half. items: of the
    training data, None where they were not counted; steps: of the run, None where that depends on them."""

    prompts: int
    images: int
    updates: dict[str, int]
    items: int | None
    steps: int | None

    def days(self, rate: float, gpus: int) -> float | None:
        """Days at `rate` images per second and GPU."""
        return None if self.steps is None else self.steps * self.images / (rate * gpus) / 86_400


def schedule(config: Config, run: Run, items: int | None = None) -> Schedule:
    """The schedule of a run over `items` training items, counted where they are lines of a text."""
    prompts = run.batch_size * run.accumulation * run.gpus
    images = prompts * (run.group if run.method == "reward" else 2 if run.method == "preference" else 1)
    counted = _items(config) if items is None else items
    steps = config.training.max_steps
    if steps is None and counted is not None:  # whole batches of all processes; an epoch's rest begins the next
        draws = -(-config.training.num_epochs * counted // (run.batch_size * run.gpus))
        steps = -(-draws // run.accumulation)
    return Schedule(prompts, images, {half.name: half.updates for half in run.halves}, counted, steps)


def _items(config: Config) -> int | None:
    """Prompts of a text of prompts, or records of JSON lines; None for other data."""
    path = config.data.metadata_file or config.data.prompts_file
    if path is None or path.suffix not in (".txt", ".jsonl") or not path.is_file():
        return None
    text = read_text(path)
    return None if text.problems else len(text.lines)
