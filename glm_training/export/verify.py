"""An export is verified before it has its name: by another process, and against what the run itself drew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from glm_training.export.drawing import Drawing, drawing_of, own_pictures
from glm_training.export.formats import Wanted
from glm_training.export.models import around_parts, base_folder, cast, trainers_model
from glm_training.export.source import ExportError, Source
from glm_training.models.family import Family
from glm_training.models.loading import ModelLoadError
from glm_training.models.lora import adapter_parameters
from glm_training.utils.tensor_file import write_tensor_file

LARGEST_DRAWN = 2 * 2**30
"""Bytes of a model's files up to which it is drawn with unless told otherwise: on the CPU, in fp32."""
MERGED_BOUND = 1e-3
"""How far a merged model's picture may be from that of the adapters beside the layers, both in fp32."""
LEVEL = 1 / 255


def draws_by_itself(source: Source) -> bool:
    """Whether the model is small enough to be drawn with unasked."""
    if source.pipeline is not None:
        sizes = [record.size for name, record in source.manifest.files.items() if name.startswith("pipeline/")]
    else:
        folder = base_folder(source.config, source.base)
        sizes = [] if folder is None else [path.stat().st_size for path in folder.rglob("*.safetensors")]
    return sum(sizes) <= LARGEST_DRAWN


def verified(wanted: Wanted, folder: Path, draw: bool) -> list[str]:
    """What is known of the export in `folder`, a line each. `draw`: pictures are drawn, on the CPU in fp32, which takes
    the memory of one model at a time, here and in the other process. Raises ExportError for what is wrong."""
    source = wanted.source
    lines = [] if source.rounded_base is None else [f"adapters {source.rounded_base}"]
    with TemporaryDirectory(prefix="glm-export-") as scratch:
        job = {"checkpoint": str(source.files), "base": source.base, "format": wanted.format, "folder": str(folder)}
        place = Path(scratch)
        if draw:
            drawing = drawing_of(source)
            expected, told = _expected(wanted, drawing)
            lines += told
            tensors = {"images": expected, "sources": drawing.sources}
            write_tensor_file(place / "expected", {k: v for k, v in tensors.items() if v is not None}, {"format": "pt"})
        else:
            lines.append("no picture was drawn with it (--draw)")
        drawn = drawing.as_json() if draw else None
        found = _in_another_process(place, {**job, "expected": str(place / "expected"), "drawing": drawn})
    return found + lines


def _in_another_process(scratch: Path, job: dict[str, object]) -> list[str]:
    """What `fresh` finds. Raises ExportError."""
    result = scratch / "result.json"
    (scratch / "job.json").write_text(json.dumps({**job, "result": str(result)}), encoding="utf-8")
    threads = str(torch.get_num_threads())  # sums in another number of threads are other sums
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""}
    done = python("-m", "glm_training.export.fresh", str(scratch / "job.json"), changes=environment)
    if done.returncode != 0 or not result.is_file():
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise ExportError(f"the export cannot be read in another process: {last}")
    found = json.loads(result.read_text(encoding="utf-8"))
    if found["problem"] is not None:
        raise ExportError(f"the export is not what it should be: {found['problem']}")
    return list(found["lines"])


def python(*words: str, changes: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`python WORDS` in an environment with `changes`."""
    return subprocess.run([sys.executable, *words], env=os.environ | changes, capture_output=True, text=True)


def _expected(wanted: Wanted, drawing: Drawing) -> tuple[Tensor | None, list[str]]:
    """What the export should draw, by the model under training as the checkpoint's states have it; and how far that is
    from what the run drew. None where the model that adapters belong on is not here."""
    source = wanted.source
    try:
        family = trainers_model(source, wanted.kind, torch.float32, adapters_alone=wanted.format == "lora")
    except ModelLoadError as error:
        return None, [f"not compared with the trainer's own picture: {error}"]
    trained = drawing.by(family)
    if wanted.format == "lora" and source.whole:  # the run's own samples are of both halves
        lines = [f"the {' and '.join(source.whole)}, trained whole, is not in it (--format safetensors --merge)"]
    else:
        lines = _beside_samples(wanted, drawing, trained)
    if not (wanted.merge and source.adapted) and wanted.dtype is None:
        return trained, lines
    if wanted.format == "lora":
        rounded = _rounded_adapters(family, wanted)
    else:
        del family
        rounded = _rounded_parts(wanted) if wanted.format == "safetensors" else cast(wanted.model(), torch.float32)
    exported = drawing.by(rounded)
    off = (exported - trained).abs()
    full = (wanted.dtype or getattr(torch, source.config.model.torch_dtype)) == torch.float32
    if full and off.max() > MERGED_BOUND:
        raise ExportError(f"the merged model's pictures are {off.max().item():.3g} of 1 from those of the adapters")
    what = "merging them" if wanted.dtype is None else f"rounding to {str(wanted.dtype).removeprefix('torch.')}"
    lines.append(
        f"{what} moves its pictures by {off.mean().item():.2g} of 1 on average, at most {off.max().item():.2g}"
    )
    return exported, lines


def _rounded_adapters(family: Family, wanted: Wanted) -> Family:
    assert wanted.dtype is not None
    for part in wanted.source.adapted:
        for parameter in adapter_parameters(family.module(part)).values():
            parameter.data = parameter.data.to(wanted.dtype).float()
    return family


def _rounded_parts(wanted: Wanted) -> Family:
    """The trained parts as they are written, in the rest of the model, which is not."""
    written = wanted.model()
    weights = {part: written.module(part).state_dict() for part in wanted.source.config.parts()}
    del written
    family = around_parts(wanted.source)
    for part, values in weights.items():
        family.module(part).load_state_dict(values)
    return family


def _beside_samples(wanted: Wanted, drawing: Drawing, trained: Tensor) -> list[str]:
    """Told, and not judged: the run may have drawn on another device, or in another precision."""
    own = own_pictures(wanted.source, drawing, wanted.kind)
    if own is None:
        return ["the run's own samples of these weights are not here"]
    off = (trained - own).abs().max().item()
    name = f"samples/{wanted.source.folder.name}"
    if off <= 1.5 * LEVEL:  # half a level is their own rounding
        return [f"these are the pictures in {name} of the run, to a level of 255"]
    kind = wanted.source.config.model.quantization
    why = "on another device or in another precision" if kind == "none" else f"with base weights in {kind}"
    return [f"they differ by up to {off:.2g} of 1 from {name} of the run: it drew {why}"]
