"""How a distilled model is to be drawn from: a small file in its pipeline folder, which stock diffusers passes over."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "few_steps.json"


@dataclass(frozen=True)
class FewSteps:
    """A model drawn from in `steps` steps without guidance.

    `one_step_timestep`: what the network of a one-step SDXL is told of pure noise; None for the last timestep.
    """

    steps: int
    one_step_timestep: int | None = None

    def write(self, folder: str | Path) -> None:
        """Into a pipeline folder."""
        (Path(folder) / FILE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")


def read_few_steps(folder: str | Path) -> FewSteps | None:
    """What `FewSteps.write` left in `folder`; None for a model that is not distilled. Raises ValueError for a file that
    cannot be read."""
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        return FewSteps(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not say how to draw: {error}") from error
