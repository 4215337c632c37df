"""The memory of a GPU, phase by phase: what lies there all the time, and what each phase needs besides.

Everything is arithmetic over counts and sizes (`counting`) and passes (`passes`). All quantities are bytes of one GPU.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from glm_training.engine.gathers import TRAINED, fits_whole
from glm_training.engine.optimizers import SCHEDULE_FREE
from glm_training.models.family import DECODED_AT_ONCE
from glm_training.planning.counting import (
    METRIC_PARAMETERS,
    Items,
    Part,
    Phase,
    ar_sizes,
    count_parts,
    dit_sizes,
    moment_bytes,
    step_bytes,
    teacher_bytes,
    unet_sizes,
)
from glm_training.planning.models import Networks
from glm_training.planning.passes import (
    WIDE,
    ARSizes,
    DiTSizes,
    Pass,
    Precision,
    UNetSizes,
    ar_inference,
    ar_pass,
    dit_inference,
    dit_pass,
    guided,
    kv_cache,
    unet_inference,
    unet_pass,
    vae_decoding,
)
from glm_training.planning.run import QUANTIZED_BYTES, Half, Run

CONTEXT = 1 << 30
"""Assumed for what no tensor holds: the context of CUDA, workspaces of cuDNN and NCCL, gaps between blocks."""

RESIDENTS = ("ar", "dit", "vae")
"""Parts that take turns on the GPU under `training.offload_between_phases`."""

Sizes = TypeVar("Sizes", ARSizes, DiTSizes, UNetSizes)


class Memory:
    """The memory of a run whose model has these networks."""

    def __init__(self, run: Run, networks: Networks) -> None:
        self.run = run
        self.parts = count_parts(networks, run)
        self.by_name = {part.name: part for part in self.parts}
        self.halves = {half.name: half for half in run.halves}
        parts = networks.parts
        vae: Any = parts["vae"]
        self.vae_channels, wide = list(vae.config["block_out_channels"]), run.spares_vae and vae.config["force_upcast"]
        self.vae_size = WIDE if wide else run.dtype
        self.latent_channels: int = vae.config["latent_channels"]
        self.scale = 2 ** (len(self.vae_channels) - 1)
        self.unet: UNetSizes | None = None
        self.dit: DiTSizes | None = None
        self.ar: ARSizes | None = None
        if run.family == "sdxl":
            self.unet = self._gathering("unet", unet_sizes(parts["unet"]))
        else:
            self.dit = self._gathering("dit", dit_sizes(parts["transformer"]))
            self.ar = self._gathering("ar", ar_sizes(parts["vision_language_encoder"]))
            self.glyph_width: int = parts["text_encoder"].config.d_model  # type: ignore[union-attr, assignment]

    # -- what lies there all the time ----------------------------------------------------------------------------------

    def state(self, *, awake: bool, uses: Collection[str] = RESIDENTS, learns: Collection[str] = ()) -> Items:
        """Weights, optimizers and copies; `awake`: with the encoders that sleep on the CPU while steps run. Where parts
        take turns, of those only what the phase `uses`, and moments of those that it `learns`."""
        items: Items = dict.fromkeys(("weights", "gathered weights", "masters", "moments", "copies"), 0.0)
        for part in self._lying(awake, uses):
            here = self.here(part)
            items["weights"] += self._frozen_bytes(part) * here
            if not part.trained:
                continue
            half = self.halves[part.name]
            items["masters"] += WIDE * part.trained_count * here
            items["copies"] += WIDE * part.trained_count * len(half.copies) * here
            items["gathered weights"] += self._gathered(part)
            if self._has_moments(part, learns):
                items["moments"] += moment_bytes(half.rule, part.trained) * here
        if self.run.teachers:
            trained = [part for part in self.parts if part.trained]
            items["teachers"] = sum(teacher_bytes(self.run, part) * self.here(part) for part in trained)
        items["rewards"] = float(sum(WIDE * METRIC_PARAMETERS.get(name, 0) for name in self.run.metrics))
        items["context"] = float(CONTEXT)
        return items

    def _lying(self, awake: bool, uses: Collection[str]) -> list[Part]:
        away = {name for name in RESIDENTS if self.run.phased and name not in uses}
        return [part for part in self.parts if part.name not in away and (awake or not part.sleeps)]

    def _has_moments(self, part: Part, learns: Collection[str]) -> bool:
        return bool(part.trained) and (not self.run.phased or part.name in learns)

    def here(self, part: Part) -> float:
        """The share of a part that lies on this GPU all the time: all of it, its shard, or none of that."""
        if not part.trained:
            return 1.0
        return 0.0 if self.run.waits else 1 / self.run.shards

    def resident(self) -> float:
        """Of a process without shards: weights, gradients and moments, as `distributed.strategy: auto` counts them."""
        return sum(map(self._lasting, self.parts))

    def drawn_by_block(self, device: float) -> tuple[str, ...]:
        """Halves in shards that `distributed.gather: auto` gathers block by block while they draw, on devices of so
        many bytes."""
        lying = sum(self._lasting(part) * self.here(part) for part in self.parts)
        halves = {half.name: self._half(self.by_name[half.name]) for half in self.run.halves}
        return tuple(name for name, size in halves.items() if not fits_whole(lying, size, device))

    def _lasting(self, part: Part) -> float:
        """Weights, gradients and moments of a part, whole."""
        return self._frozen_bytes(part) + TRAINED * part.trained_count

    def _frozen_bytes(self, part: Part) -> float:
        return float(sum(count * size for size, count in self.frozen_sizes(part).items()))

    def frozen_sizes(self, part: Part) -> dict[float, int]:
        """Bytes of a frozen weight -> how many of a part have so many."""
        if part.trained and part.frozen and self.run.quantization != "none":
            return {QUANTIZED_BYTES[self.run.quantization]: part.wrapped, self.run.dtype: part.frozen - part.wrapped}
        return {self.size_of(part): part.frozen}

    def size_of(self, part: Part) -> int:
        """Bytes of a weight that is not trained and has no few bits."""
        return self.vae_size if part.name == "vae" and self.run.spares_vae else self.run.dtype

    def _gathered(self, part: Part) -> float:
        """FSDP holds two units of frozen weights whole, the one that computes and the next; and what is in none."""
        whole = self.run.strategy == "fsdp" and part.frozen
        return float(2 * part.unit + part.rest) * self.run.dtype if whole else 0.0

    def gradients(self, names: Iterable[str]) -> Items:
        """Of the parts named; DDP's buckets hold each once more. FSDP holds a unit's whole as the pass gives them and
        in fp32 as they are sent; and where there are replicas, what was sent to them until the pass ends."""
        own = [self.by_name[name] for name in names]
        found: Items = {"gradients": sum(WIDE * part.trained_count * self.here(part) for part in own)}
        if self.run.strategy == "ddp":
            found["gradient buckets"] = sum(WIDE * float(part.trained_count) for part in own)
        if self.run.strategy == "fsdp":
            given = self.run.low or WIDE
            found["gradient buckets"] = max((float((WIDE + given) * part.unit) for part in own), default=0.0)
            if self.run.shards < self.run.gpus:
                sent = max((part.trained_count for part in own), default=0)
                found["gradient buckets"] += WIDE * sent / self.run.shards
        return found

    def _gathering(self, name: str, sizes: Sizes) -> Sizes:
        """Under FSDP the casts of whole weights are those of two gathered units, and of what is in none."""
        if self.run.strategy != "fsdp" or not self.by_name[name].trained:
            return sizes
        return replace(sizes, weights=2 * self.by_name[name].unit + self.by_name[name].rest)

    @property
    def latent_places(self) -> int:
        """Places of a picture's latents."""
        return (self.run.height // self.scale) * (self.run.width // self.scale)

    def precision(self, name: str) -> Precision:
        """How passes of a part compute."""
        half: Half | None = self.halves.get(name)
        whole = half is not None and not half.lora.enabled
        if self.run.low is not None:
            return Precision(self.run.low, True, whole)
        return Precision(WIDE if whole else self.run.dtype, False, whole)

    # -- the phases ----------------------------------------------------------------------------------------------------

    def phases(self) -> list[Phase]:
        """In the order a run meets them."""
        found = self._reward() if self.run.method == "reward" else self._steps(self.run.method)
        if self.run.method == "distillation" and self.run.strategy == "fsdp":
            found.insert(0, self._phase("student draws", self._student(), awake=True))
        if self.run.supervises:
            found += self._steps("supervised", "SFT ")
        if self.run.evaluated:
            found.append(self._evaluation())
        return found

    def peak(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases(), key=lambda phase: phase.total)

    def _phase(
        self,
        name: str,
        *extra: Mapping[str, float],
        awake: bool = False,
        uses: Collection[str] = RESIDENTS,
        learns: Collection[str] = (),
    ) -> Phase:
        items = self.state(awake=awake, uses=uses, learns=learns)
        for more in extra:
            for label, size in more.items():
                items[label] = items.get(label, 0.0) + size
        lying = self._lying(awake, uses)
        moments = tuple(part.name for part in lying if self._has_moments(part, learns))
        return Phase(name, {key: size for key, size in items.items() if size}, tuple(p.name for p in lying), moments)

    def _reward(self) -> list[Phase]:
        run, awake = self.run, not self.run.caches
        store = self.rollout_store()
        pictures = {"pictures": 3.0 * WIDE * run.height * run.width * run.batch_size * run.group * run.accumulation}
        images = run.batch_size * run.group
        plans, drawn = self._at_once(run.batch_size * run.plans), self._at_once(images)
        decoded = min(images, run.vae_micro or images)
        found = [
            self._phase("rollout: plans", store, pictures, self._writing(plans), awake=awake, uses=["ar"]),
            self._phase(
                "rollout: renders", store, pictures, self._drawing(drawn), self._drawn_by(), awake=awake,
                uses=["dit", "vae"],
            ),
        ]  # fmt: skip
        if run.decodes:
            decoding = {"activations": self._decoding(decoded)}
            found.append(self._phase("rollout: decoding", store, pictures, decoding, awake=awake, uses=["vae"]))
        for half in run.halves:
            rows = plans if half.name == "ar" else drawn
            found += self._learning(half, rows, [half.name], store, awake=awake, alone=True)
        return found

    def _steps(self, method: str, label: str = "") -> list[Phase]:
        """Supervised and preference steps: the gradients of all parts lie there together."""
        run = self.run
        rows = run.batch_size * (2 if method == "preference" else 1)
        names, awake = [half.name for half in run.halves], not run.caches
        return [
            phase
            for half in run.halves
            for phase in self._learning(half, rows, names, {}, awake=awake, alone=False, label=label)
        ]

    def _learning(
        self, half: Half, rows: int, names: list[str], store: Items, *, awake: bool, alone: bool, label: str = ""
    ) -> list[Phase]:
        """The passes of a half and its optimizer's step; `alone`: of a reward step, in which each half has its turn."""
        label += half.title
        passed = self._pass(half.name, rows, guides=alone and self.run.guided)
        gradients = self.gradients(names)
        # the reference is asked between passes, that of tokens ahead of all of them
        absent = sum(gradients.values()) if half.name == "ar" else gradients.get("gradient buckets", 0.0)
        held = {"activations": max(passed.peak, self._compared(half, rows) - absent)}
        part = self.by_name[half.name]
        step = {"optimizer's temporaries": step_bytes(half.rule, part.trained) * self.here(part)}
        turns: dict[str, Any] = {"uses": names if alone else RESIDENTS, "learns": names}
        return [
            self._phase(f"{label}: forward and backward", store, gradients, held, awake=awake, **turns),
            self._phase(f"{label}: optimizer step", store, gradients, step, awake=awake, **turns),
        ]

    def _compared(self, half: Half, rows: int) -> float:
        """What the reference's pass takes, where its copy stands in for shards, which are set aside."""
        if self.run.strategy != "fsdp" or not any("reference" in copy for copy in half.copies):
            return 0.0
        at, adapters = self.precision(half.name), half.lora.enabled
        if half.name == "ar":
            assert self.ar is not None
            looked = ar_inference(self.ar, rows, self.run.read + self.run.written - 1, at, adapters=adapters)
        elif half.name == "unet":
            assert self.unet is not None
            looked = unet_inference(self.unet, rows, self.latent_places, at)
        else:
            assert self.dit is not None
            looked = dit_inference(self.dit, rows, self.run.seen, at, adapters=adapters)
        return looked + self._set_aside(half)

    def _set_aside(self, half: Half) -> float:
        """The weights of a half while a copy stands in for them: shards keep their place, and are copied away; of a
        whole half the two change places."""
        part = self.by_name[half.name]
        return WIDE * part.trained_count * self.here(part) if self.run.strategy == "fsdp" else 0.0

    def _drawn_by(self) -> Items:
        """What the slow policy that draws needs to stand in for the DiT half."""
        own = [half for half in self.run.halves if "policy that draws" in half.copies]
        return {"set aside": sum(map(self._set_aside, own))}

    def _shown(self) -> Items:
        """What averages need to be shown in place of the weights: schedule-free's are worked out then."""
        found = 0.0
        for half in self.run.halves:
            if half.shown:
                found += self._set_aside(half)
                part = self.by_name[half.name]
                found += WIDE * part.trained_count * self.here(part) if half.optimizer == SCHEDULE_FREE else 0.0
        return {"set aside": found}

    def _pass(self, name: str, rows: int, *, guides: bool) -> Pass:
        run, at = self.run, self.precision(name)
        if name == "ar":
            assert self.ar is not None
            tokens = self.run.read + self.run.written - 1
            return ar_pass(self.ar, rows, tokens, self.run.written, at, checkpointing=run.checkpointing)
        if self.unet is not None:
            return unet_pass(self.unet, rows, self.latent_places, at, checkpointing=run.checkpointing)
        assert self.dit is not None
        found = dit_pass(self.dit, rows, self.run.seen, at, checkpointing=run.checkpointing)
        return guided(found) if guides else found

    def _at_once(self, rows: int) -> int:
        return min(rows, self.run.micro or rows)

    def _writing(self, rows: int) -> Items:
        """Plans: prompts are read once for all their samples; each step then has logits in fp32 and fp64."""
        assert self.ar is not None
        prompts = min(rows, self.run.batch_size)
        at, gathered = self.precision("ar"), self._whole("ar")
        sizes = replace(self.ar, weights=0) if gathered else self.ar  # gathered as they compute: no casts
        chances = rows * self.ar.codes * (6 * WIDE + 8)
        return {
            "KV cache": kv_cache(self.ar, rows, self.run.read + self.run.written - 1, at.low),
            "activations": max(ar_inference(sizes, prompts, self.run.read, at, adapters=self._adapted("ar")), chances),
            "gathered weights": gathered,
        }

    def _drawing(self, rows: int) -> Items:
        assert self.dit is not None
        gathered = self._whole("dit")
        sizes = replace(self.dit, weights=0) if gathered else self.dit
        drawing = dit_inference(sizes, rows, self.run.seen, self.precision("dit"), adapters=self._adapted("dit"))
        return {"activations": drawing, "gathered weights": gathered}

    def _adapted(self, name: str) -> bool:
        half: Half | None = self.halves.get(name)
        return half is not None and half.lora.enabled

    def _whole(self, name: str) -> float:
        """What a half that lies in shards takes beside them while it draws: all of it, gathered once, or no more than
        in its passes."""
        part = self.by_name[name]
        if self.run.strategy != "fsdp" or not part.trained or name in self.run.by_block:
            return 0.0
        return self._half(part)

    def _half(self, part: Part) -> float:
        """A half that is gathered whole."""
        at = self.precision(part.name)
        return float(part.total * (at.low if at.whole else self.run.dtype))

    def _decoding(self, rows: int) -> float:
        return vae_decoding(self.vae_channels, rows, self.run.height * self.run.width, self.vae_size)

    def _student(self) -> Items:
        """What a distilled half needs to draw what it is trained on: shards are gathered whole for it."""
        return self._drawing(self.run.batch_size) if self.unet is None else self._denoising(self.run.batch_size)

    def _denoising(self, rows: int) -> Items:
        assert self.unet is not None
        gathered = self._whole("unet")
        sizes = replace(self.unet, weights=0) if gathered else self.unet
        return {
            "activations": unet_inference(sizes, rows, self.latent_places, self.precision("unet")),
            "gathered weights": gathered,
        }

    def _evaluation(self) -> Phase:
        """Pictures for scores and samples, with all encoders awake."""
        rows = self.run.evaluated
        decoding = self._decoding(min(rows, self.run.vae_micro or self.run.micro or DECODED_AT_ONCE[self.run.family]))
        needs: list[Items] = [{"activations": decoding}]
        if self.unet is not None:
            needs.append(self._denoising(rows * (2 if self.run.evaluation_guided else 1)))
        else:
            needs += [self._writing(rows), self._drawing(rows)]
        most = max(needs, key=lambda items: sum(items.values()))
        return self._phase("evaluation", most, self._shown(), awake=True)

    def rollout_store(self) -> Items:
        """What a reward step keeps of all its samples until its updates: latents on both sides of every noisy step and
        the result, means where they are kept, all in fp32; tokens, log-probs and supports; quoted words."""
        run = self.run
        if run.method != "reward":
            return {}
        images = run.batch_size * run.group * run.accumulation
        plans = run.batch_size * run.plans * run.accumulation
        latents = WIDE * self.latent_channels * self.latent_places
        kept = 1 + (run.noisy + 1 if run.noisy else 0) + (run.noisy if run.means else 0)
        assert self.ar is not None
        tokens = self.run.written * (8 + 4 + (-(-self.ar.codebook // 8) if run.keeps_support else 0))
        words = run.glyph_tokens * self.glyph_width * run.dtype
        return {"rollout store": images * (kept * latents + words) + plans * tokens}
