"""The model card of an export: what it is, what it was made from and how, what it scored, and what was verified."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import glm_training
from glm_training.config import Config
from glm_training.export.formats import Wanted
from glm_training.export.lora import DIFFUSERS_FILE, KOHYA_FILE
from glm_training.export.models import base_folder, folder_of
from glm_training.export.scrub import HIDDEN_SECTIONS, scrubbed, scrubbed_text
from glm_training.export.source import Source
from glm_training.utils.hub_files import hub_id
from glm_training.utils.metrics_file import METRICS
from glm_training.utils.step_lines import line_of, lines_of
from glm_training.utils.words import counted, number

CARD = "README.md"
METHODS = {
    "finetune": "supervised finetuning", "dpo": "direct preference optimization", "opd": "on-policy distillation",
    "dmdr": "distillation to few steps (DMDR)",
}  # fmt: skip
STOCK = {"glm_image": "GlmImagePipeline", "sdxl": "StableDiffusionXLPipeline"}
CLASSES = {
    "ar": "GlmImageForConditionalGeneration",
    "dit": "GlmImageTransformer2DModel",
    "unet": "UNet2DConditionModel",
}
_EVAL = "eval/"


def write_card(folder: Path, wanted: Wanted, name: str, verified: Sequence[str], licence: str | None) -> None:
    """README.md in the folder of an export. `verified`: what is known of it, a line each; `licence`: its identifier,
    or None for that of the base model, where its own card is here."""
    source = wanted.source
    licence = licence or base_licence(source)
    front = {key: value for key, value in _front(wanted, licence).items() if value is not None}
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    sections = [
        f"# {scrubbed_text(name)}",
        _what(wanted),
        "## Use\n\n" + _use(wanted),
        "## Training\n\n" + _table(["", ""], _training(source)),
        _rewards(source.config),
        _figures(source),
        "## Verified when it was written\n\n" + "\n".join(f"- {scrubbed_text(line)}" for line in verified),
        "## Licence\n\n" + _licence(licence),
        f"<details><summary>Configuration (what differs from the defaults)</summary>\n\n```yaml\n{_settings(source)}```"
        "\n\n</details>",
    ]
    text = "\n\n".join(each for each in sections if each)
    (folder / CARD).write_text(f"---\n{head}---\n\n{text}\n", encoding="utf-8")


def public_base(source: Source) -> str | None:
    """The hub id of the model that a run started from; None for one that is known by another name."""
    return hub_id(source.base) if source.base not in ("tiny", "tiny-random") else None


def base_licence(source: Source) -> str | None:
    """The licence that the base model's own card names; None where it is not here."""
    folder = base_folder(source.config, source.base)
    card = None if folder is None else folder / CARD
    if card is None or not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n"):
        return None
    try:
        front = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return None
    told = front.get("license") if isinstance(front, dict) else None
    return told if isinstance(told, str) else None


def _front(wanted: Wanted, licence: str | None) -> dict[str, Any]:
    source, base = wanted.source, public_base(wanted.source)
    vgt = source.family == "vgt"
    tags = ["glm_training", source.config.training.method]
    tags += ["lora"] if wanted.format == "lora" else []
    return {
        "license": licence,
        "library_name": "glm_training" if vgt else "diffusers",
        "pipeline_tag": None if vgt else "image-to-image" if source.config.training.mode == "i2i" else "text-to-image",
        "base_model": base,
        "base_model_relation": None if base is None else "adapter" if wanted.format == "lora" else "finetune",
        "tags": tags,
    }


def _what(wanted: Wanted) -> str:
    source, config = wanted.source, wanted.source.config
    adapted, whole = " and ".join(source.adapted), " and ".join(source.whole)
    trained = " and ".join([f"LoRA adapters of its {adapted}"] * bool(adapted) + [f"the {whole}"] * bool(whole))
    method = METHODS[config.training.method]
    if config.uses_reward():
        method = "reinforcement learning on rewards (GRPO)"
    merged = ", which are merged into it" if wanted.merge and source.adapted else ""
    if wanted.format == "lora":
        text = f"LoRA adapters for the {adapted} of {_base_name(source)}, trained by {method}."
        if whole:
            text += f" The {whole} was trained whole beside them and is not in here; they belong with it."
    else:
        form = "A pipeline" if wanted.format == "pipeline" else "The trained parts of a pipeline"
        text = f"{form} made from {_base_name(source)} by training {trained}{merged}, by {method}."
    if config.model.adapters:
        text += f" The run began with {len(config.model.adapters)} earlier adapters merged into that model" + (
            "; these belong on it with those." if wanted.format == "lora" else "."
        )
    if source.rounded_base is not None:
        text += f" The adapters were {source.rounded_base}."
    if wanted.kind == "average":
        text += " The weights are the slow average (EMA) of those under training."
    return text


def _base_name(source: Source) -> str:
    base = public_base(source)
    return scrubbed_text(source.base) if base is None else f"[{base}](https://huggingface.co/{base})"


def use_lines(wanted: Wanted, place: str) -> list[str]:
    """Code with stock libraries that draws with what lies at `place`; of VGT, which they do not have, with this
    package. Types are named: without one diffusers takes fp32 and transformers that of the files, and parts of several
    types do not draw together."""
    source, parts = wanted.source, wanted.source.config.parts()
    if source.family == "vgt":
        if wanted.format == "pipeline":
            return ["from glm_training.models.vgt.family import VGT", f'model = VGT.load("{place}")']
        (part,) = parts
        module = f"from glm_training.models.vgt.{part} import {part.title()}"
        return [module, f'{part} = {part.title()}.from_pretrained("{place}/{part}")']
    stock, base = STOCK[source.family], public_base(source) or Path(source.base).name
    chosen = None if wanted.format == "lora" else wanted.dtype  # of adapters it says nothing of the model
    own = source.config.model.torch_dtype if chosen is None else str(chosen).removeprefix("torch.")
    dtype = f"dtype=torch.{own}"
    heads, lines, given = ["import torch", f"from diffusers import {stock}"], list[str](), ""
    if wanted.format == "safetensors":
        for part in parts:
            library = "transformers" if part == "ar" else "diffusers"
            heads.append(f"from {library} import {CLASSES[part]}")
            folder = folder_of(part)
            lines.append(f'{folder} = {CLASSES[part]}.from_pretrained("{place}", subfolder="{folder}", {dtype})')
            given += f"{folder}={folder}, "
    model = place if wanted.format == "pipeline" else base
    lines.append(f'pipe = {stock}.from_pretrained("{model}", {given}{dtype})')
    if wanted.format == "lora":
        heads += ["from peft import PeftModel"] if "ar" in source.adapted else []
        lines += _adapter_lines(source, place)
    if source.family == "sdxl" and _few_steps(source) and wanted.format != "pipeline":  # a pipeline has its own
        heads.append("from diffusers import LCMScheduler")
        options = f"original_inference_steps={source.config.dmdr.student_steps}, clip_sample=False"
        lines.append(f"pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, {options})")
    return heads + lines


def _adapter_lines(source: Source, place: str) -> list[str]:
    lines = []
    if "unet" in source.adapted:
        lines.append(f'pipe.load_lora_weights("{place}", weight_name="{DIFFUSERS_FILE}")')
    if "dit" in source.adapted:
        file = f'weight_name="{DIFFUSERS_FILE}"'
        lines.append(f'pipe.transformer.load_lora_adapter("{place}", prefix="transformer", {file})')
    if "ar" in source.adapted:
        lines.append(f'PeftModel.from_pretrained(pipe.vision_language_encoder, "{place}/lora_ar")')
    return lines


def _few_steps(source: Source) -> bool:
    return source.config.training.method == "dmdr"


def _use(wanted: Wanted) -> str:
    text = "```python\n" + "\n".join(use_lines(wanted, "FOLDER")) + "\n```"
    if wanted.format == "lora":
        text += "\n\n`lora_*` are PEFT's folders"
        if any(part != "ar" for part in wanted.source.adapted):
            text += (
                f", `{DIFFUSERS_FILE}` is diffusers' file and `{KOHYA_FILE}` that of kohya's scripts and what reads it"
            )
        text += "; all of them are of full strength at a weight of 1."
    if _few_steps(wanted.source):
        steps, told = wanted.source.config.dmdr.student_steps, wanted.source.config.dmdr.one_step_timestep
        options = f"num_inference_steps={steps}" if told is None else f"timesteps=[{told}]"
        text += f"\n\nDraw in {counted(steps, 'step')} without guidance: `{options}, guidance_scale=0`."
    return text


def _training(source: Source) -> list[list[str]]:
    config, manifest = source.config, source.manifest
    size = config.data.image_size
    data = scrubbed_text(str(config.dataset_file()))
    digests = manifest.metadata.get("data", {})
    digest = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    rows = [
        ["base model", scrubbed_text(source.base) + (f" at {config.model.revision}" if config.model.revision else "")],
        ["method", config.training.method + (f", mode {config.training.mode}" if source.family == "glm_image" else "")],
        ["steps", str(manifest.step)],
        ["data", f"{data}, digest of all that was read `{digest[:12]}`"],
        ["size", f"{size.width} x {size.height} px"],
    ]
    for part in config.parts():
        lora, settings = config.lora_for(part), config.optimizer_for(part)
        how = f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}" if lora.enabled else "all weights"
        rows.append([part, f"{how}; {settings.name}, learning rate {settings.learning_rate:g}"])
    rows.append(["run", f"`{manifest.run}`, checkpoint `{source.folder.name}`"])
    rows.append(["exported with", f"glm_training {glm_training.__version__}" + _commit()])
    return rows


def _commit() -> str:
    """The commit of this package, where it lies in a repository."""
    where = Path(glm_training.__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(where), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:  # installed into somebody else's repository
        return ""
    changed = ", with changes" if git("status", "--porcelain", "--untracked-files=no", ".") else ""
    return f", commit `{git('rev-parse', 'HEAD')}`{changed}"


def _rewards(config: Config) -> str:
    if not config.uses_reward():
        return ""
    weights = config.scored_weights()
    rows = [[scrubbed_text(name), f"{weight:g}"] for name, weight in weights.items()]
    if config.reward.calculator is not None:
        rows = [[scrubbed_text(config.reward.calculator), "its own"]]
    return "## Rewards\n\n" + _table(["metric", "weight"], rows)


def _figures(source: Source) -> str:
    """Held-out figures of this step beside the first ones of the run, from its log."""
    file = None if source.run is None else source.run / METRICS
    now = None if file is None else line_of(file, source.manifest.step, prefix=_EVAL)
    if file is None or now is None:
        return ""
    first = next(line for line in lines_of(file) if any(key.startswith(_EVAL) for key in line))
    rows = [
        [scrubbed_text(key.removeprefix(_EVAL)), number(first.get(key)), number(value)]
        for key, value in now.items()
        if key.startswith(_EVAL)
    ]
    heads = ["figure", f"step {first['step']}", f"step {source.manifest.step}"]
    return "## Figures of evaluations during the run\n\n" + _table(heads, rows)


def _licence(licence: str | None) -> str:
    if licence is None:
        return "None was named: what holds for the base model holds for what is made of it."
    return f"`{licence}`."


def _settings(source: Source) -> str:
    tree = source.config.model_dump(mode="json", exclude_defaults=True)
    kept = {key: value for key, value in tree.items() if key not in HIDDEN_SECTIONS}
    return yaml.safe_dump(scrubbed(kept), sort_keys=False, allow_unicode=True, width=120)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
