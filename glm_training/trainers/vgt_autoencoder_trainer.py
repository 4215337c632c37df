"""VGT's autoencoder: reconstruction, perception, distillation from its own beginnings, and later a discriminator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glm_training.algorithms.adversarial import update_averages
from glm_training.checkpoint.state_tree import StateTree
from glm_training.config import Config
from glm_training.config.schema import first
from glm_training.config.sections.base import Part as PartName
from glm_training.data import ImageDataset, TrainingData
from glm_training.engine import setup
from glm_training.engine.captioned_setup import build_captioned, build_held_out_images
from glm_training.engine.errors import SettingsError
from glm_training.engine.figures import mean_over_processes, stack_means
from glm_training.engine.parts import Part
from glm_training.engine.preparation import Prepared
from glm_training.engine.validation import RowFigures, Subject, passes
from glm_training.methods.autoencoding import Autoencoding, AutoencodingWeights
from glm_training.models.perceptual import ConvNextLogits, LpipsVgg
from glm_training.models.vgt.discriminator import PatchDiscriminator
from glm_training.models.vgt.family import VGT
from glm_training.trainers.base_trainer import BaseTrainer
from glm_training.utils.distributed import World, gather_tensor
from glm_training.utils.randomness import derive_seed, normal, uniform

AUTOENCODER: PartName = "autoencoder"
DISCRIMINATOR = "discriminator"
AVERAGES = f"{DISCRIMINATOR}_averages"

Seen = list[tuple[Tensor, Tensor]]
"""Reconstructions and images [B, 3, H, W] of each accumulation chunk."""


class VGTAutoencoderTrainer(BaseTrainer):
    """Both stages: what differs between them is in the configuration."""

    family: VGT

    def __init__(self, config: Config, world: World, prepared: Prepared) -> None:
        super().__init__(config, world, prepared)
        vgt = config.vgt
        self.autoencoder = self.parts[AUTOENCODER]
        self.discriminator = self.parts.get(DISCRIMINATOR)
        self.averages = torch.zeros(2, device=world.device)
        self.teacher = self.family.teacher if vgt.distillation_weight > 0 else None
        self.losses = Autoencoding(
            AutoencodingWeights(
                perceptual=vgt.perceptual_weight,
                distillation=vgt.distillation_weight,
                kl=vgt.kl_weight,
                adversarial=vgt.gan.weight,
                lecam=vgt.gan.lecam_weight,
            ),
            *(None if network is None else network.to(world.device) for network in perceptual_networks(config)),
        )

    # -- what there is to train ----------------------------------------------------------------------------------------

    @staticmethod
    def build_data(config: Config) -> tuple[TrainingData, ImageDataset]:
        training = build_captioned(config, captions=False)
        return training, build_held_out_images(config, training, captions=False, as_sources=True)

    @staticmethod
    def check_settings(config: Config, world: World) -> None:
        """That the files of the perceptual networks can be loaded."""
        perceptual_networks(config)

    def build_parts(self) -> dict[str, Part]:
        """The autoencoder and, where there is to be one, its discriminator."""
        config, gan, parts = self.config, self.config.vgt.gan, super().build_parts()
        if gan.start_step is None or gan.start_step >= self.total_steps:
            return parts
        seed = derive_seed(config.seed, "vgt/discriminator")
        network = PatchDiscriminator(gan.channels, gan.stages, seed=seed).to(self.world.device)
        settings = config.optimizer_for(AUTOENCODER)
        parts[DISCRIMINATOR] = Part(
            DISCRIMINATOR,
            network,
            dict(network.named_parameters()),
            replace(
                settings,
                learning_rate=first(gan.learning_rate, settings.learning_rate),
                warmup_steps=gan.warmup_steps,
            ),
            self.world,
            first_step=gan.start_step,
            total_steps=self.total_steps,
            find_unused_parameters=config.distributed.find_unused_parameters,
        )
        return parts

    # -- a step --------------------------------------------------------------------------------------------------------

    def training_step(self) -> dict[str, float]:
        chunks = self.config.training.gradient_accumulation_steps
        opponent = self._opponent()
        terms: list[tuple[int, dict[str, Tensor]]] = []
        seen: Seen = []
        self.family.train()
        with self.phase("VGT step"):
            for chunk in range(chunks):
                batch, positions = self.next_batch()
                images = batch.targets.to(self.world.device)
                with self.autocast():
                    features = None if self.teacher is None else self.teacher.features(images)
                self.check_stop()
                with self.autoencoder.accumulating(last=chunk == chunks - 1):
                    with self.autocast():
                        output = self.autoencoder.policy(images, *self._noise(images, positions))
                        term = self.losses.loss(
                            output,
                            images,
                            teacher_features=features,
                            discriminator=None if opponent is None else opponent.component,
                        )
                    self.check_stop()  # the last backward pass waits for all: each must have come this far
                    self.autoencoder.backward(term.loss / chunks)
                terms.append((term.rows, {**term.metrics, "loss": term.loss.detach()}))
                if opponent is not None:
                    seen.append((output.images.detach(), images))
            figures = self._update(self.autoencoder, terms)
            if opponent is not None:
                figures |= self._train_opponent(opponent, seen)
        return figures

    def _opponent(self) -> Part | None:
        """The discriminator, from its start on."""
        start = self.config.vgt.gan.start_step
        return None if start is None or self.step < start else self.discriminator

    def _noise(self, images: Tensor, positions: list[int]) -> tuple[Tensor | None, Tensor | None]:
        """Of the latents [B, C, h, w], of a strength drawn for each image, and of the posterior; named by the images'
        places in the run."""
        config, autoencoder, device = self.config, self.family.autoencoder, images.device
        stride = autoencoder.stride
        shape = (autoencoder.config.latent_channels, *(side // stride for side in images.shape[-2:]))
        names = [(position,) for position in positions]
        latent_noise = posterior_noise = None
        if config.vgt.latent_noise > 0:
            strength = config.vgt.latent_noise * uniform(config.seed, "vgt/noise strength", names, (1, 1, 1), device)
            latent_noise = strength * normal(config.seed, "vgt/latent noise", names, shape, device)
        if autoencoder.config.kl:
            posterior_noise = normal(config.seed, "vgt/posterior", names, shape, device)
        return latent_noise, posterior_noise

    def _train_opponent(self, part: Part, seen: Seen) -> dict[str, float]:
        """The discriminator's step on what the autoencoder made of the images before its own step."""
        # LeCam's penalty is of the means over the whole step, which no chunk of several knows
        whole = self._logit_means(part.component, seen) if len(seen) > 1 else None
        terms = []
        for chunk, (drawn, images) in enumerate(seen):
            with part.accumulating(last=chunk == len(seen) - 1):
                with self.autocast():
                    term = self.losses.discriminator_loss(
                        part.policy,
                        drawn,
                        images,
                        self.averages,
                        step_means=lambda own: self._over_processes(own) if whole is None else whole,
                    )
                part.backward(term.loss / len(seen))
            terms.append((term.rows, {**term.metrics, "loss": term.loss.detach()}))
        told = terms[-1][1]
        figures = self._update(part, terms)
        self.averages = update_averages(self.averages, told["real_logits"], told["fake_logits"])
        return figures

    @torch.no_grad()
    def _logit_means(self, discriminator: nn.Module, seen: Seen) -> Tensor:
        """[2]: of real and drawn pictures, over the chunks of all processes."""
        pairs = [
            torch.stack([discriminator(images.float()).mean(), discriminator(drawn.float()).mean()])
            for drawn, images in seen
        ]
        return self._over_processes(torch.stack(pairs).mean(dim=0))

    def _over_processes(self, means: Tensor) -> Tensor:
        return gather_tensor(self.world, means[None]).mean(dim=0)

    def _update(self, part: Part, terms: list[tuple[int, dict[str, Tensor]]]) -> dict[str, float]:
        figures = mean_over_processes(self.world, stack_means(terms)) | self.update(part)
        return {f"{part.name}/{key}": value for key, value in figures.items()}

    # -- what it is judged by ------------------------------------------------------------------------------------------

    def judged(self) -> Subject | None:
        return setup.judged_subject(self.config, self.held_out, "picture")

    @torch.no_grad()
    def judge(self) -> dict[str, Tensor]:
        """PSNR in dB of every image, and how much of it is over that of the image's mean colour."""
        found = RowFigures(len(self.held_out))
        self.family.eval()
        for rows, counts in passes(len(self.held_out), self.config.training.batch_size, self.world):
            self.signals.check()
            images = self._held_out_images(rows)
            drawn = self.family.autoencoder(images).images.clamp(0, 1)
            error = (drawn - images).square().flatten(1).mean(1)
            spread = (images - images.mean(dim=(2, 3), keepdim=True)).square().flatten(1).mean(1)
            psnr, flat = -10 * error.log10(), -10 * spread.log10()
            plain = (images.amax(dim=(2, 3)) == images.amin(dim=(2, 3))).all(dim=1)  # then it is no number
            over = (psnr - flat).where(~plain, torch.nan)
            found.add(rows, {"autoencoder/psnr": psnr, "autoencoder/psnr_over_flat": over}, counts=counts)
        return found.gathered(self.world)

    def _held_out_images(self, rows: list[int]) -> Tensor:
        sources = self.held_out.batch(rows).sources
        assert sources is not None  # they are what this family draws again
        return sources.to(self.world.device)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, StateTree]:
        return {} if self.discriminator is None else {AVERAGES: {"averages": self.averages}}

    def load(self, state: dict[str, StateTree]) -> None:
        """A checkpoint of a run that was to end before the discriminator's start, and is longer now, holds none: then
        it is as it was made."""
        if self.discriminator is not None and AVERAGES not in state:
            state = state | self.discriminator.state(with_optimizer=True) | self.extra_state()
        super().load(state)

    def load_extra_state(self, state: dict[str, StateTree]) -> None:
        if self.discriminator is not None:
            self.averages = state[AVERAGES]["averages"].to(self.world.device)


def perceptual_networks(config: Config) -> tuple[LpipsVgg | None, ConvNextLogits | None]:
    """Those of whose weights the configuration names a file. Raises SettingsError for files that do not fit."""
    vgt = config.vgt
    loaders: dict[str, tuple[Path | None, Callable[[Path], nn.Module]]] = {
        "lpips_weights": (vgt.lpips_weights, LpipsVgg),
        "convnext_weights": (vgt.convnext_weights, ConvNextLogits),
    }
    networks: list[Any] = []
    problems = []
    for key, (path, load) in loaders.items():
        networks.append(None)
        if path is None:
            continue
        try:
            networks[-1] = load(path)
        except (OSError, ValueError) as error:
            problems.append(f"vgt.{key}: {error}")
    if problems:
        raise SettingsError("\n".join(problems))
    return networks[0], networks[1]
