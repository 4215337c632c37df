"""Preference tuning: SDXL's UNet, GLM-Image's DiT, its AR half, or both halves, on pairs of images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from glm_training.checkpoint.state_tree import StateTree
from glm_training.config import Config
from glm_training.data import ImageDataset, T2IDataset
from glm_training.data.dataset import sizes_of
from glm_training.data.preference.dataset import PreferenceDataset, distinct_prompts, pair_digest
from glm_training.data.preference.scan import load_pairs
from glm_training.engine import setup
from glm_training.engine.encoding.ahead import Progress
from glm_training.engine.errors import TrainingError
from glm_training.engine.families import prompt_reader
from glm_training.engine.figures import mean_divisor, mean_over_processes, stack_means
from glm_training.engine.parts import Part
from glm_training.engine.preparation import Prepared
from glm_training.engine.validation import LEVELS, RowFigures, Subject, passes
from glm_training.methods.losses import MethodLoss
from glm_training.methods.preference import (
    DiffusionFinetuning,
    DiffusionPreference,
    Policies,
    SequencePreference,
    sequence_log_probs,
)
from glm_training.methods.supervised import TokenCrossEntropy
from glm_training.models.denoising import Denoiser, Levels
from glm_training.models.lora import has_lora
from glm_training.preference.encoded_pairs import EncodedPairs
from glm_training.preference.pair_families import build_pairs
from glm_training.preference.reference_log_probs import ReferenceLogProbs
from glm_training.trainers.encoding_trainer import EncodingTrainer
from glm_training.utils.distributed import World
from glm_training.utils.randomness import normal, uniform
from glm_training.utils.signals import StopRequested
from glm_training.utils.words import counted

TURBO_LEVELS = 4
STATE = "dpo"


class DPOTrainer(EncodingTrainer):
    """Diffusion-DPO for what denoises and DPO for the AR half, or (`dpo.loss: sft`) finetuning on the preferred images.

    The reference is the starting model: adapters off; for full finetuning a copy of the starting weights that stands in
    for the trained ones while it computes. The AR half's is a table of log-probs. Draws are named by a pair's place in
    the run's sequence of samples: one process and several see the same.
    """

    dataset: PreferenceDataset

    def __init__(self, config: Config, world: World, prepared: Prepared) -> None:
        super().__init__(config, world, prepared)
        self.encoder = build_pairs(config, self.family, world, self.encoding)
        self.denoisers: dict[tuple[int, int], Denoiser] = {}
        self.references = ReferenceLogProbs(world)

    # -- what it is built of -------------------------------------------------------------------------------------------

    @staticmethod
    def build_data(config: Config) -> tuple[PreferenceDataset, ImageDataset]:
        """The pairs, with the held-out ones in `held_out`, and the prompts that samples are drawn for: of the held-out
        pairs, where there are some."""
        assert config.data.pairs is not None  # else config.checks refused it
        dataset = _pairs(config, config.data.pairs)
        if config.evaluation.eval_pairs is not None:
            dataset.held_out = _pairs(config, config.evaluation.eval_pairs)
            dataset.remarks += [line for line in dataset.held_out.remarks if line not in dataset.remarks]
        own = distinct_prompts((dataset.held_out or dataset).pairs, config.evaluation.num_eval_samples)
        prompts = T2IDataset(own, height=dataset.height, width=dataset.width)
        return dataset, setup.build_evaluation_dataset(config, prompts)

    def build_parts(self) -> dict[str, Part]:
        """The trained parts, each that denoises with its reference."""
        parts = super().build_parts()
        if self.config.dpo.loss == "dpo":
            for name, part in parts.items():
                if name != "ar" or has_lora(self.family.module(name)):
                    setup.keep_reference(part, self.family.module(name), "start")
        return parts

    def prepare(self) -> None:
        """Fills the cache, and the table of the AR half's reference."""
        datasets = [data for data in (self.dataset, self.dataset.held_out) if data is not None]
        with self.phase("encoding"):
            self.encoder.fill(datasets, self.console, self.signals.check)
            if self._compares_sequences():
                for dataset in datasets:
                    self._fill_references(dataset)

    def extra_state(self) -> dict[str, StateTree]:
        return {STATE: self.references.state()} if self._compares_sequences() else {}

    def load_extra_state(self, state: dict[str, StateTree]) -> None:
        if self._compares_sequences() and STATE in state:
            self.references.load(state[STATE])

    def images_of(self, items: int) -> int:
        return items * (2 if self.config.dpo.loss == "dpo" else 1)

    # -- a step --------------------------------------------------------------------------------------------------------

    def training_step(self) -> dict[str, float]:
        """One optimizer step of every part, over all accumulation chunks; the figures of the log."""
        chunks = self.config.training.gradient_accumulation_steps
        rows, seen = self.sampler.rows_ahead(chunks), 0
        collected: dict[str, list[tuple[int, dict[str, Tensor]]]] = {name: [] for name in self.parts}
        figures: dict[str, float] = {}
        self.family.train()
        with self.phase("preference step"):
            for chunk in range(chunks):
                batch, positions = self.next_batch()
                names = [(position,) for position in positions]
                draws = uniform(self.config.seed, "dpo/level", names, (2,))
                encoded = self.encoder.encode(batch, draws[:, 1] < self.config.dpo.prompt_dropout)
                noise = self._noise(encoded, self.config.seed, "dpo/noise", names)
                levels = self._levels(draws[:, 0], self.encoder.size_of(batch.pairs))
                self.check_stop()
                divisor = mean_divisor(rows, len(positions), self.world)
                seen += len(positions)
                for name, part in self.parts.items():
                    with part.accumulating(last=chunk == chunks - 1):
                        with self.autocast():
                            term = self._loss(part, part.policy, encoded, noise, levels)
                        self.check_stop()  # the last backward pass waits for all: each must have come this far
                        part.backward(term.loss / divisor)
                    collected[name].append((term.rows, term.metrics | {"loss": term.loss.detach()}))
            for name, part in self.parts.items():
                metrics = mean_over_processes(self.world, stack_means(collected[name]), seen) | self.update(part)
                figures |= {f"{name}/{key}": value for key, value in metrics.items()}
        return figures

    def _loss(
        self, part: Part, network: torch.nn.Module, pairs: EncodedPairs, noise: Tensor | None, levels: Levels
    ) -> MethodLoss:
        """The term of one part; `network` is its trained network, perhaps inside DDP."""
        dpo, training = self.config.dpo, self.config.training
        if part.name == "ar":
            assert pairs.prompt is not None and pairs.tokens is not None
            if dpo.loss == "sft":
                plain = TokenCrossEntropy(training.preview_loss_weight, training.large_loss_weight)
                return plain.loss(network, pairs.prompt, pairs.tokens)
            reference = self.references.rows(self._pair_digests(pairs))
            return SequencePreference(dpo.ar_beta).loss(network, pairs.prompt, pairs.tokens, reference)
        assert pairs.clean is not None and noise is not None
        denoiser = self._denoiser(self.encoder.size_of(pairs.pairs))
        if dpo.loss == "sft":
            finetuning = DiffusionFinetuning(denoiser, dpo.min_snr_gamma)
            return finetuning.loss(network, pairs.clean, pairs.condition, noise=noise, levels=levels)
        method = DiffusionPreference(denoiser, dpo.beta, dpo.min_snr_gamma)
        policies = Policies(network, part.component, part.as_reference)
        return method.loss(policies, pairs.clean, pairs.condition, noise=noise, levels=levels)

    def _noise(self, pairs: EncodedPairs, seed: int, purpose: str, names: Sequence[tuple[int, ...]]) -> Tensor | None:
        """[B, C, h, w] on the device, one for both images of a pair; None where nothing denoises."""
        if pairs.clean is None:
            return None
        return normal(seed, purpose, names, tuple(pairs.clean.shape[1:]), device=self.world.device)

    def _levels(self, u: Tensor, size: tuple[int, int]) -> Levels:
        """The noise levels at draws `u` [B] in [0, 1) of images of a (height, width), on the device."""
        denoiser = self._denoiser(size)
        if self.config.dpo.timesteps == "turbo":
            levels = denoiser.sampling_levels(TURBO_LEVELS).select((u * TURBO_LEVELS).long())
        else:
            levels = denoiser.levels(u)
        return levels.to(self.world.device)

    def _denoiser(self, size: tuple[int, int]) -> Denoiser:
        if size not in self.denoisers:
            self.denoisers[size] = self.family.denoiser(*size)
        return self.denoisers[size]

    # -- the AR half's reference ---------------------------------------------------------------------------------------

    def _compares_sequences(self) -> bool:
        return "ar" in self.parts and self.config.dpo.loss == "dpo"

    def _pair_digests(self, pairs: EncodedPairs) -> list[str]:
        return [pair_digest(pair, self.encoder.digests) for pair in pairs.pairs]

    @torch.no_grad()
    def _fill_references(self, dataset: PreferenceDataset) -> None:
        """Log-probs of the pairs that the table lacks, under the starting model. A stop keeps what is there."""
        part = self.parts["ar"]
        places = {pair_digest(pair, self.encoder.digests): row for row, pair in enumerate(dataset.pairs)}
        lacking = self.references.lacking(list(places))
        if not lacking:
            return
        if self.step > 0 and part.reference is None:
            raise TrainingError(
                f"{counted(len(lacking), 'new pair')} since the start of the run, and the starting weights to compare "
                "with are gone: train adapters (lora.ar.enabled), or start a new run"
            )
        wanted, pixels = [places[digest] for digest in lacking], sizes_of(dataset)
        own = passes(len(dataset), self.config.training.batch_size, self.world, wanted, pixels=pixels)
        self.console.line(f"asking the starting model about {counted(len(lacking), 'pair')} once")
        progress = Progress(self.console, sum(len(rows) for rows, counts in own if counts), "compared")
        found: dict[str, tuple[float, float]] = {}
        self.family.train()
        try:
            for rows, counts in own:
                values = self._reference_of(part, self.encoder.encode(dataset.batch(rows)))
                if counts:
                    found |= {digest: values[digest] for digest in lacking if digest in values}
                    progress.add(len(rows))
                self.signals.check()
        except StopRequested:  # on all processes together
            self.references.add(found)
            raise
        self.references.add(found)
        progress.finish()

    def _reference_of(self, part: Part, pairs: EncodedPairs) -> dict[str, tuple[float, float]]:
        assert pairs.prompt is not None and pairs.tokens is not None
        with nullcontext() if part.reference is None else part.as_reference(), self.autocast():
            values = sequence_log_probs(part.component, pairs.prompt, pairs.tokens).view(2, -1).T.tolist()
        return {digest: (a, b) for digest, (a, b) in zip(self._pair_digests(pairs), values, strict=True)}

    # -- held-out pairs ------------------------------------------------------------------------------------------------

    def judged(self) -> Subject:
        pairs = self._judged_pairs()
        settings = self.config.dpo.model_dump(mode="json", exclude={"cache", "cache_dir", "vae_batch_size"})
        digests = json.dumps([pairs.example_digests(), settings])
        name = setup.evaluated(self.config, "pair")
        return Subject(name, tuple(pair.prompt for pair in pairs.pairs), hashlib.sha256(digests.encode()).hexdigest())

    def _judged_pairs(self) -> PreferenceDataset:
        """The held-out pairs; without any, the first training pairs."""
        held_out = self.dataset.held_out
        return self.dataset.first(self.config.evaluation.num_eval_samples) if held_out is None else held_out

    @torch.no_grad()
    def judge(self) -> dict[str, Tensor]:
        """Figures of each part on the pairs that are `judged`, every one at the same noise and levels at each
        evaluation.

        Raises StopRequested, on all processes together.
        """
        dataset, seed = self._judged_pairs(), self.config.evaluation.seed
        found = RowFigures(len(dataset))
        self.family.eval()
        pixels = sizes_of(dataset)
        for rows, counts in passes(len(dataset), self.config.training.batch_size, self.world, pixels=pixels):
            self.signals.check()
            batch = dataset.batch(rows)
            encoded = self.encoder.encode(batch)
            for level in range(LEVELS):
                names = [(pair.index, level) for pair in batch.pairs]
                noise = self._noise(encoded, seed, "dpo/held-out noise", names)
                u = (level + uniform(seed, "dpo/held-out level", names, (1,))[:, 0]) / LEVELS
                for name, part in self.parts.items():
                    if name == "ar" and level > 0:
                        continue  # has no levels
                    each = self._loss(part, part.component, encoded, noise, self._levels(u, pixels[rows[0]])).each
                    found.add(rows, {f"{name}/{key}": values for key, values in each.items()}, counts=counts)
        self.signals.check()
        return found.gathered(self.world)


def _pairs(config: Config, path: Path) -> PreferenceDataset:
    data = config.data
    reader = prompt_reader(config)
    report = load_pairs(
        path,
        split=data.pairs_split,
        max_bad_fraction=data.max_bad_fraction,
        num_workers=data.num_workers,
        reader=reader,
        buckets=setup.buckets(config),
    )
    dataset = PreferenceDataset(
        report.pairs,
        height=data.image_size.height,
        width=data.image_size.width,
        crop=config.dpo.crop,
        seed=config.seed,
        num_workers=data.num_workers,
        pin_memory=data.pin_memory,
    )
    dataset.remarks = report.remarks if reader is not None else [setup.unread(config)]
    if config.dpo.vae_batch_size is not None:
        dataset.remarks.append("dpo.vae_batch_size does nothing: images are encoded one at a time")
    if report.ties:
        dataset.remarks.append(f"{report.ties} of {counted(report.total, 'pair')} in {path}: ties, which were dropped")
    if report.quarantined:
        dataset.remarks.append(f"{counted(len(report.quarantined), 'fault')} in {path}: their pairs are left out")
    return dataset
