"""What a checkpoint has to export: which weights, of which parts, on which model, and where its run is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from glm_training.checkpoint.manifest import MANIFEST, Manifest, read_manifest, verify_checkpoint
from glm_training.checkpoint.resume import files_of_state, load_state
from glm_training.checkpoint.run_record import RunRecord
from glm_training.checkpoint.state_tree import CheckpointError
from glm_training.config import Config, ConfigError
from glm_training.config.loading.load import config_from_yaml
from glm_training.engine.named_model import named_checkpoint
from glm_training.engine.optimizers import SCHEDULE_FREE
from glm_training.models.adapters import starting_adapters
from glm_training.models.loading import ModelLoadError
from glm_training.models.run_folders import INDEX, PIPELINE
from glm_training.utils.prompt_lines import PROMPTS
from glm_training.utils.writable import expanded, nearest_place

Kind = Literal["weights", "average", "shown"]
"""The weights under training; their slow average (training.ema); or what the run's own files hold, for an optimizer
whose weights under training are not those that it means."""


class ExportError(RuntimeError):
    """Nothing is exported, or not pushed; the message says why and what to do."""


@dataclass(frozen=True)
class Adapter:
    """The adapter of a part: its matrices by name (`blocks.0.to_q.lora_A.weight`), and PEFT's settings of it."""

    part: str
    weights: Mapping[str, Tensor]
    settings: Mapping[str, Any]

    @property
    def rank(self) -> int:
        return int(self.settings["r"])

    @property
    def alpha(self) -> float:
        return float(self.settings["lora_alpha"])

    @property
    def scale(self) -> float:
        """By which B A counts."""
        return self.alpha / self.rank

    def layers(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A [rank, in] and B [out, rank] by the layer's name, alphabetically."""
        names = sorted({name.partition(".lora_")[0] for name in self.weights})
        return {name: (self.weights[f"{name}.lora_A.weight"], self.weights[f"{name}.lora_B.weight"]) for name in names}


@dataclass(frozen=True)
class Source:
    """A checkpoint. `base`: the model that its run started from, or the one that was named in its place. `note`: which
    checkpoint of a run it is, where that was not said. `links`: a folder with its files, which stay there when the run
    deletes it; None reads them where they are."""

    folder: Path
    manifest: Manifest
    config: Config
    base: str
    note: str | None = None
    links: Path | None = None

    @staticmethod
    def read(place: str | Path, base: str | None = None) -> Source:
        """The checkpoint that `place` means, as `named_checkpoint` has it, or whose `pipeline` it is. Raises
        ExportError."""
        inside = expanded(place).parent
        if (inside / MANIFEST).is_file():
            place = inside
        try:
            folder, _, note = named_checkpoint(place, "CHECKPOINT")
            if folder is None and not expanded(place).exists():
                near = nearest_place(place)
                raise ExportError(f"there is no {place}" + ("" if near is None else f"; did you mean {near}?"))
            if folder is None:
                raise ExportError(
                    f"there is no checkpoint in {place}: name one, like runs/x/checkpoints/step-000100, or a run"
                )
            manifest = read_manifest(folder)
            config = config_from_yaml(manifest.metadata["config"])
        except (ModelLoadError, CheckpointError) as error:
            raise ExportError(str(error)) from error
        except KeyError as error:
            raise ExportError(f"{folder} does not say what it was trained with: it has no {error}") from error
        except ConfigError as error:
            raise ExportError(
                f"{folder} was made by a version of glm_training that had other keys: export it with that one\n{error}"
            ) from error
        return Source(folder, manifest, config, base or config.model.name, note)

    @property
    def files(self) -> Path:
        """Where its files are read."""
        return self.links or self.folder

    # -- what was trained ----------------------------------------------------------------------------------------------

    @property
    def family(self) -> str:
        return self.config.model.family

    @property
    def adapted(self) -> list[str]:
        """The trained parts that carry adapters."""
        return [part for part in self.config.parts() if self.config.lora_for(part).enabled]

    @property
    def rounded_base(self) -> str | None:
        """That adapters were trained over base weights in few bits, in words; None where those were in full."""
        kind = self.config.model.quantization
        if kind == "none":
            return None
        return f"trained over base weights in {kind}, and meant here for those in full: the run drew with the former"

    @property
    def whole(self) -> list[str]:
        """The parts that are trained themselves."""
        return [part for part in self.config.parts() if part not in self.adapted]

    @property
    def pipeline(self) -> Path | None:
        """The whole model in the checkpoint, adapters merged; None where it holds adapters alone."""
        folder = self.files / PIPELINE
        return folder if (folder / INDEX).is_file() else None

    @property
    def on_another_base(self) -> bool:
        """Whether its adapters are wanted on another model than they were trained on, which `pipeline` is made of."""
        return bool(self.adapted) and self.base != self.config.model.name

    def chosen(self, ema: bool | None) -> Kind:
        """Which weights are meant: the average, the others, or (None) those that the run writes itself. Raises
        ExportError for an average that was not kept, and for weights that mean nothing."""
        free = [part for part in self.config.parts() if self.config.optimizer_for(part).name == SCHEDULE_FREE]
        if free and ema is not None:
            raise ExportError(
                f"the optimizer of {free[0]} is {SCHEDULE_FREE}, whose own average is what the run writes: leave out "
                "--ema and --no-ema"
            )
        if ema and not self._averaged:
            raise ExportError(
                f"{self.folder} has no average of its weights, as the run had no training.ema.decay: leave out --ema"
            )
        if free:
            return "shown"
        return "average" if (self._averaged and self.config.training.ema.export if ema is None else ema) else "weights"

    def as_written(self, kind: Kind) -> bool:
        """Whether the run's own files, `pipeline` and `lora_<part>`, hold these weights."""
        return kind in ("shown", self.chosen(None))

    @property
    def _averaged(self) -> bool:
        return all(f"{part}_ema" in self.manifest.states for part in self.config.parts())

    def state(self, part: str, kind: Kind) -> dict[str, Tensor]:
        """The trained weights of a part by name, whole, as they were saved, which is verified. Raises ExportError."""
        name = f"{part}_{'ema' if kind == 'average' else 'weights'}"
        self.verify(*files_of_state(name, self.manifest))
        try:
            tree = load_state(self.files, name, self.manifest)
            return {key: value if isinstance(value, Tensor) else value.whole() for key, value in tree.items()}
        except CheckpointError as error:
            raise ExportError(str(error)) from error

    def adapter(self, part: str, kind: Kind) -> Adapter:
        """The adapter of a part. Raises ExportError, or ModelLoadError where there is none."""
        own = f"lora_{part}/"
        self.verify(*(name for name in self.manifest.files if name.startswith(own)))
        (found,) = starting_adapters("CHECKPOINT", [str(self.files / own)], [part])
        weights = found.weights()
        if not self.as_written(kind):
            state = {name.replace(".default.", "."): value for name, value in self.state(part, kind).items()}
            if state.keys() != weights.keys():
                raise ExportError(f"{self.folder}: states and lora_{part} have other layers")
            weights = state
        return Adapter(part, weights, found.settings)

    def verify(self, *names: str) -> None:
        """Reads files of the checkpoint, by their names in it, and compares them with its manifest. ExportError."""
        try:
            verify_checkpoint(self.files, only=names)
        except CheckpointError as error:
            raise ExportError(str(error)) from error

    # -- where it comes from -------------------------------------------------------------------------------------------

    @cached_property
    def run(self) -> Path | None:
        """The directory of the run, if it is here: with the log, the samples and the scores."""
        for folder in (self.folder.parent.parent, expanded(self.config.output_dir)):
            record = RunRecord.read(folder)
            if record is not None and record.run == self.manifest.run:
                return folder
        return None

    @property
    def samples(self) -> Path | None:
        """The pictures that the run drew at this step."""
        folder = None if self.run is None else self.run / "samples" / self.folder.name
        return folder if folder is not None and (folder / PROMPTS).is_file() else None
