"""What another process makes of an export: `python -m glm_training.export.fresh JOB`.

It reads what was written with the stock classes, part after part, and draws with it where the job says so. JOB is a
JSON file; what was found goes to the file `result` that it names: lines to tell, and what is wrong, if anything.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.pipelines.glm_image.pipeline_glm_image import GlmImagePipeline
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from glm_training.engine.agreement import weights_digest
from glm_training.export.drawing import Drawing, stock_picture
from glm_training.export.formats import layers_per_block
from glm_training.export.lora import DIFFUSERS_FILE, KOHYA_FILE, PREFIX, kohya_name, require_change
from glm_training.export.models import around_parts, base_model, few_steps_of, folder_of, skeleton_of
from glm_training.export.source import Adapter, ExportError, Source
from glm_training.models.adapters import StartingAdapter, misfit, starting_adapters
from glm_training.models.family import Family, read_few_steps
from glm_training.models.glm_image.family import GLMImage
from glm_training.models.loading import ModelLoadError
from glm_training.models.sdxl.family import SDXL
from glm_training.models.vgt.autoencoder import Autoencoder
from glm_training.models.vgt.family import VGT
from glm_training.models.vgt.generator import Generator
from glm_training.utils.words import counted

STOCK_BOUND = 1e-3
"""How far a stock pipeline's own picture may be from ours, both in fp32: their sums run in other orders."""
FOLDED_BOUND = 1e-4
"""How far a picture may be whose adapter has alpha / rank multiplied in, where that is no power of two."""
VGT_CLASSES: dict[str, Any] = {"vgt_autoencoder": Autoencoder, "vgt_generator": Generator}


def main(job_file: str) -> None:
    """Does the job; a problem of the export is a result."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    found: dict[str, Any] = {"lines": [], "problem": None}
    try:
        found["lines"] = list(_looked_at(job))
    except (ExportError, ModelLoadError) as error:
        found["problem"] = str(error)
    Path(job["result"]).write_text(json.dumps(found), encoding="utf-8")


def _looked_at(job: dict[str, Any]) -> Iterator[str]:
    folder, source = Path(job["folder"]), Source.read(job["checkpoint"], job["base"])
    yield finite(folder)
    if job["format"] == "lora":
        yield from _adapters(source, folder)
    else:
        for each in sorted(path.parent for path in folder.rglob("config.json")):
            if any(each.glob("*.safetensors")):
                reload_part(each)
        classes = "class of this package" if source.family == "vgt" else "stock class"
        yield f"each network was loaded again by its {classes} in another process, no weight missing or left over"
    if job["drawing"] is not None:
        tensors = load_file(job["expected"])
        drawing = Drawing.of_json(job["drawing"], tensors.get("sources"))
        draw = _draw_adapters if job["format"] == "lora" else _draw_whole
        yield from draw(source, folder, job["format"], drawing, tensors.get("images"))


def finite(folder: Path) -> str:
    """That every number in the files of weights is finite, a tensor at a time. Raises ExportError."""
    count = 0
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                value = file.get_tensor(name)
                if value.is_floating_point() and not value.isfinite().all():
                    raise ExportError(
                        f"{path.relative_to(folder)}: {name} is not finite in {value.dtype}: choose another --dtype"
                    )
                count += 1
    return f"{counted(count, 'tensor')}, all of them finite"


def reload_part(folder: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The network in `folder`, as its stock class reads it, in the dtype of its files unless one is given. Raises
    ExportError where a weight is missing or left over."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own = next(iter(sorted(folder.glob("*.safetensors"))))
    with safe_open(own, "pt") as file:
        dtype = dtype or file.get_tensor(next(iter(file.keys()))).dtype
    kind = config.get("model_type")
    try:
        if kind in VGT_CLASSES:
            return VGT_CLASSES[kind].from_pretrained(folder, dtype=dtype)
        library, name = ("diffusers", config["_class_name"]) if "_class_name" in config else ("transformers", None)
        stock = getattr(importlib.import_module(library), name or config["architectures"][0])
        model, told = stock.from_pretrained(str(folder), output_loading_info=True, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ExportError(f"{folder.name} cannot be loaded again: {error}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told.get(what):
            raise ExportError(f"{folder.name}, loaded again, has {what.replace('_', ' ')}: {list(told[what])[:3]}")
    return model


def _adapters(source: Source, folder: Path) -> Iterator[str]:
    """The files of adapters against each other, and against the model where its configuration is here."""
    fitted = 0
    for part in source.adapted:
        (peft,) = starting_adapters("--out", [str(folder / f"lora_{part}")], [part])
        require_change(Adapter(part, peft.weights(), peft.settings))  # a small number may be 0 in another dtype
        skeleton = skeleton_of(source.config, source.base, part)
        if skeleton is not None:
            if reason := misfit(peft, skeleton):
                raise ExportError(reason)
            fitted += 1
        if part in PREFIX:
            _same_strength(folder, part, peft, layers_per_block(source))
            yield f"the files for diffusers and kohya's readers have the full strength by their tensors alone ({part})"
    if fitted == len(source.adapted):
        yield "every matrix has a linear layer of its shape in the model"


def _same_strength(folder: Path, part: str, adapter: StartingAdapter, layers_per_block: int | None) -> None:
    """Raises ExportError unless what two files say by tensors alone is what PEFT reads with its settings."""
    peft, prefix = adapter.weights(), PREFIX[part]
    kohya, plain = load_file(folder / KOHYA_FILE), load_file(folder / DIFFUSERS_FILE)
    for layer in adapter.layers():
        a, b = (peft[f"{layer}.lora_{side}.weight"].float() for side in "AB")
        scale, rank, name = adapter.scale(layer), len(a), kohya_name(layer, layers_per_block)
        kind = torch.finfo(peft[f"{layer}.lora_B.weight"].dtype)  # in which B is rounded, in either file
        size = b.abs() + kind.tiny * max(1.0, 1 / scale)  # numbers below have steps of tiny eps
        bound = (2 * kind.eps + 2 * (rank + 2) * torch.finfo(torch.float32).eps) * scale * (size @ a.abs())
        try:
            own = [plain[f"{prefix}.{layer}.lora_{side}.weight"].float() for side in "AB"]
            down, up, alpha = (
                kohya[f"{name}.{each}"].float() for each in ("lora_down.weight", "lora_up.weight", "alpha")
            )
        except KeyError as error:
            raise ExportError(f"the files of the {part}'s adapter lack {error}") from error
        for file, found in ((DIFFUSERS_FILE, own[1] @ own[0]), (KOHYA_FILE, alpha / len(down) * (up @ down))):
            if ((found - scale * (b @ a)).abs() > bound).any():
                raise ExportError(f"{file}: {layer} has not the strength that PEFT's settings give it")


# -- pictures ----------------------------------------------------------------------------------------------------------


def _draw_whole(source: Source, folder: Path, form: str, drawing: Drawing, expected: Tensor | None) -> Iterator[str]:
    if form == "pipeline":
        pipe, family = load_pipeline(source.family, folder)
    else:
        family = around_parts(source)
        for part in source.config.parts():
            loaded = reload_part(folder / folder_of(part), torch.float32)
            family.module(part).load_state_dict(loaded.state_dict())
        pipe = None if source.family == "vgt" else family.to_pipeline()
    images = drawing.by(family)
    by = "this package" if source.family == "vgt" else "stock classes"
    yield from _compared(images, expected, 0.0, by)
    yield from _stock(pipe, family, drawing, images)
    weights = weights_digest(family.module("ar")) if _writes_tokens_alone(source) else None
    del pipe, family
    yield from _changed(source, drawing, images, weights)


def _draw_adapters(source: Source, folder: Path, form: str, drawing: Drawing, expected: Tensor | None) -> Iterator[str]:
    try:
        family = base_model(source, torch.float32)
    except ModelLoadError as error:
        yield f"nothing was drawn with it: {error}"
        return
    few_steps_of(source, family)
    before = drawing.by(family)
    pipe, exact = family.to_pipeline(), True
    for part in source.adapted:
        (peft,) = starting_adapters("--out", [str(folder / f"lora_{part}")], [part])
        scale = (peft.alpha or 1) / (peft.rank or 1)
        if part == "ar":
            PeftModel.from_pretrained(pipe.vision_language_encoder, str(folder / "lora_ar"))
        elif part == "dit":
            pipe.transformer.load_lora_adapter(str(folder), prefix="transformer", weight_name=DIFFUSERS_FILE)
        else:
            pipe.load_lora_weights(str(folder), weight_name=DIFFUSERS_FILE)
        exact = exact and (part == "ar" or torch.frexp(torch.tensor(scale)).mantissa.item() == 0.5)
    images = drawing.by(family)
    yield from _compared(images, expected, 0.0 if exact else FOLDED_BOUND)
    yield from _stock(pipe, family, drawing, images)
    yield difference(images, before, source.base, trained=_writes_tokens_alone(source))  # `_adapters` saw them not zero


def load_pipeline(kind: str, folder: Path) -> tuple[Any, Family]:
    """The stock pipeline of a folder in fp32, and our family around it; VGT, which has none, from our own class."""
    if kind == "vgt":
        return None, VGT.load(str(folder))
    stock: Any = GlmImagePipeline if kind == "glm_image" else StableDiffusionXLPipeline
    pipe = stock.from_pretrained(str(folder), dtype=torch.float32, use_safetensors=True)
    family: Family = GLMImage.from_pipeline(pipe) if kind == "glm_image" else SDXL.from_pipeline(pipe)
    few = read_few_steps(folder)
    if few is not None:
        family.draw_in_few_steps(few)
    return pipe, family


def _compared(images: Tensor, expected: Tensor | None, bound: float, by: str = "stock classes") -> Iterator[str]:
    if not images.isfinite().all():
        raise ExportError("what it draws is not finite")
    if expected is None:
        return
    off = (images - expected).abs().max().item()
    if off > bound:
        raise ExportError(
            f"it does not draw what the weights of the checkpoint draw: pictures differ by up to {off:.3g} of 1, where "
            f"{bound:g} is allowed"
        )
    yield f"loaded by {by} it draws what the trainer draws with these weights, " + (
        "bit for bit in fp32" if off == 0 else f"to {off:.1g} of 1 in fp32"
    )


def _stock(pipe: Any, family: Family, drawing: Drawing, images: Tensor) -> Iterator[str]:
    drawn = None if pipe is None else stock_picture(pipe, family, drawing)
    if drawn is None:
        return
    off = (drawn - images[0]).abs().max().item()
    if off > STOCK_BOUND:
        raise ExportError(f"the stock pipeline's own picture differs by {off:.3g} of 1; {STOCK_BOUND:g} is allowed")
    given = "noise and tokens" if "ar" in family.components else "noise"
    yield f"so does the stock pipeline's own call, given the same {given}, to {off:.1g}"


def _writes_tokens_alone(source: Source) -> bool:
    """Whether the AR half alone was trained: other weights of it may write the same tokens, and draw the same."""
    return source.config.parts() == ("ar",)


def _changed(source: Source, drawing: Drawing, images: Tensor, weights: str | None) -> Iterator[str]:
    """`weights`: the digest of those that were exported, where pictures alone do not tell."""
    try:
        family = base_model(source, torch.float32)
    except ModelLoadError:
        yield f"not compared with {source.base}, which is not here"
        return
    few_steps_of(source, family)
    trained = weights is not None and weights != weights_digest(family.module("ar"))
    yield difference(images, drawing.by(family), source.base, trained=trained)


def difference(images: Tensor, before: Tensor, base: str, *, trained: bool = False) -> str:
    """How far pictures are from those of the model that the run began with. Raises ExportError where they are those,
    unless the AR half is known to have other weights, which is `trained`."""
    off = (images - before).abs()
    if off.max() == 0 and trained:
        same = "its AR half has other weights, and writes the same tokens for these prompts"
        return f"its pictures are those of {base}: {same}"
    if off.max() == 0:
        raise ExportError(f"it draws what {base} draws, bit for bit: the training changed nothing")
    mean, most = off.mean().item(), off.max().item()
    return f"its pictures differ from those of {base}: by {mean:.2g} of 1 on average, at most {most:.2g}"


if __name__ == "__main__":
    main(sys.argv[1])
