"""From scored rollouts to optimizer steps: which method a half learns by, and how its terms make up an update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from glm_training.algorithms.nft import DecaySchedule, old_policy_decay
from glm_training.config import Config
from glm_training.engine.figures import Interval, mean_over_processes, stack_means
from glm_training.engine.parts import Part
from glm_training.methods.ar_policy_gradient import ARPolicyGradient
from glm_training.methods.awm import AWM
from glm_training.methods.flow_policy_gradient import FlowPolicyGradient
from glm_training.methods.losses import DiTPolicies, MatchingDraws, MethodLoss
from glm_training.methods.nft import NFT
from glm_training.reinforcement.credit import Scored
from glm_training.reinforcement.rollout import Rollout, RolloutSettings
from glm_training.utils.distributed import World, gather_objects
from glm_training.utils.randomness import make_generator, normal

Terms = Callable[[int, Tensor], Iterator[MethodLoss]]
"""(chunk, rows of it) -> the terms of that slice."""

DiTMethod = FlowPolicyGradient | NFT | AWM


@dataclass(frozen=True)
class Learning:
    """What the updates of a training step need of its run; `step` counts the finished steps."""

    config: Config
    world: World
    parts: Mapping[str, Part]
    settings: RolloutSettings
    step: int
    autocast: Callable[[], AbstractContextManager[Any]]
    check_stop: Callable[[], None]
    """Raises StopRequested while the step can still be dropped; every process calls it equally often."""
    update: Callable[[Part], dict[str, float]]
    """The optimizer step of a half, with its figures."""

    def micro(self, rows: Tensor) -> tuple[Tensor, ...]:
        """`rows` in pieces of at most `rollout.micro_batch_size`."""
        return rows.split(self.settings.micro_batch_size or max(len(rows), 1))


def ar_method(config: Config) -> ARPolicyGradient:
    """What `reward.grpo` says of the AR half."""
    grpo, policy = config.reward.grpo, config.policy_for("ar")
    capped = grpo.ar.objective == "cispo"
    return ARPolicyGradient(
        clip=(0.0, grpo.ar.cispo_cap) if capped else (policy.clip_low, policy.clip_high),
        kl_coef=policy.kl_coef,
        level=grpo.ratio_level,
        aggregation=grpo.loss_aggregation,
        objective=grpo.ar.objective,
        entropy_coef=grpo.ar.entropy_coef,
        preview_weight=grpo.ar.preview_weight,
        large_weight=grpo.ar.large_weight,
    )


def dit_method(config: Config) -> DiTMethod:
    """What `reward.grpo` says of the DiT half."""
    dit, policy = config.reward.grpo.dit, config.policy_for("dit")
    clip = (policy.clip_low, policy.clip_high)
    if dit.method == "nft":
        return NFT(dit.nft_beta, dit.advantage_max, policy.kl_coef)
    if dit.method == "awm":
        return AWM(clip, policy.kl_coef, dit.huber)
    return FlowPolicyGradient(clip, policy.kl_coef, dit.ratio == "guard", dit.divergence_threshold)


# -- the AR half -------------------------------------------------------------------------------------------------------


def update_ar(run: Learning, method: ARPolicyGradient, chunks: list[Scored]) -> dict[str, float]:
    """The optimizer steps of the AR half on the plans of `chunks`."""
    part = run.parts["ar"]
    anchors = [_reference_scores(run, method, part, chunk.rollout) for chunk in chunks]

    def terms(chunk: int, rows: Tensor) -> Iterator[MethodLoss]:
        anchor = anchors[chunk]
        yield from method.losses(
            part.policy,
            chunks[chunk].rollout.plans.select(rows),
            chunks[chunk].plan_advantages[rows],
            None if anchor is None else anchor[rows],
        )

    return _optimise(run, part, chunks, run.settings.plans, terms, method.terms)


@torch.no_grad()
def _reference_scores(run: Learning, method: ARPolicyGradient, part: Part, rollout: Rollout) -> Tensor | None:
    """The reference's log-probs [B, T] of the drawn tokens, once per rollout."""
    if method.kl_coef == 0:
        return None
    rows = torch.arange(len(rollout.plans), device=run.world.device)
    with part.as_reference(), run.autocast():
        pieces = [method.score(part.component, rollout.plans.select(piece)) for piece in run.micro(rows)]
    return torch.cat(pieces)


# -- the DiT half ------------------------------------------------------------------------------------------------------


def update_dit(run: Learning, method: DiTMethod, chunks: list[Scored]) -> dict[str, float]:
    """The optimizer steps of the DiT half on the renders of `chunks`."""
    part, group = run.parts["dit"], run.settings.group
    policies = DiTPolicies(
        part.policy, part.component, None if part.reference is None else part.as_reference, part.as_old
    )
    if isinstance(method, FlowPolicyGradient):

        def terms(chunk: int, rows: Tensor) -> Iterator[MethodLoss]:
            scored = chunks[chunk]
            yield from method.losses(policies, scored.rollout.renders.select(rows), scored.render_advantages[rows])

        return _optimise(run, part, chunks, group, terms, len(chunks[0].rollout.renders.sde_indices))
    levels = _levels(run)
    draws = partial(_matching_draws, run, chunks, levels)
    if isinstance(method, AWM):
        olds = _old_densities(run, method, part, chunks, draws)

        def awm_terms(chunk: int, rows: Tensor) -> Iterator[MethodLoss]:
            scored, old = chunks[chunk], olds[chunk]
            yield from method.losses(
                policies,
                scored.rollout.renders.select(rows),
                scored.render_advantages[rows],
                draws(chunk, rows),
                None if old is None else old[rows],
            )

        return _optimise(run, part, chunks, group, awm_terms, len(levels))

    def nft_terms(chunk: int, rows: Tensor) -> Iterator[MethodLoss]:
        scored = chunks[chunk]
        yield from method.losses(
            policies, scored.rollout.renders.select(rows), scored.render_advantages[rows], draws(chunk, rows)
        )

    metrics = _optimise(run, part, chunks, group, nft_terms, len(levels))
    assert part.old is not None
    part.old.update(_old_decay(run.config, run.step))
    return metrics


def _levels(run: Learning) -> tuple[int, ...]:
    """The noise levels of this step: all of the schedule, or a random choice of `timesteps_per_sample`."""
    steps = run.settings.num_inference_steps
    wanted = run.config.reward.grpo.dit.timesteps_per_sample
    if wanted is None or wanted >= steps:
        return tuple(range(steps))
    order = torch.randperm(steps, generator=make_generator(run.config.seed, "nft/levels", run.step))
    return tuple(sorted(order[:wanted].tolist()))


def _matching_draws(
    run: Learning, chunks: list[Scored], levels: tuple[int, ...], chunk: int, rows: Tensor
) -> MatchingDraws:
    """The noise of the given rows of a chunk, named by prompt and sample."""
    rollout, group = chunks[chunk].rollout, run.settings.group
    final = rollout.renders.final
    names = [(rollout.positions[row // group], row % group) for row in rows.tolist()]

    def noise(level: int) -> Tensor:
        return normal(run.config.seed, f"nft/{level}", names, tuple(final.shape[1:]), device=final.device)

    return MatchingDraws(levels, noise)


def _old_densities(
    run: Learning,
    method: AWM,
    part: Part,
    chunks: list[Scored],
    draws: Callable[[int, Tensor], MatchingDraws],
) -> list[Tensor | None]:
    """AWM's densities [rows, levels] under the policy that drew, per chunk; None where one update needs no other."""
    if run.config.policy_for("dit").updates_per_rollout == 1:
        return [None] * len(chunks)
    olds: list[Tensor | None] = []
    for index, chunk in enumerate(chunks):
        rows = torch.arange(len(chunk.rollout.renders.final), device=run.world.device)
        with run.autocast():
            pieces = [
                method.densities(part.component, chunk.rollout.renders.select(piece), draws(index, piece))
                for piece in run.micro(rows)
            ]
        olds.append(torch.cat(pieces))
    return olds


def _old_decay(config: Config, step: int) -> float:
    decay = config.reward.grpo.dit.old_decay
    if isinstance(decay, float):
        return decay
    schedule: DecaySchedule = "ramp" if decay == "fast" else "late_ramp"
    return old_policy_decay(step, schedule)


# -- both --------------------------------------------------------------------------------------------------------------


def _optimise(
    run: Learning, part: Part, chunks: list[Scored], rows_per_prompt: int, terms: Terms, terms_per_slice: int
) -> dict[str, float]:
    """`updates_per_rollout` optimizer steps; row r of the step belongs to update r mod their number.

    The loss of an update is the mean over those of its rows that have a score, over chunks and processes: the others
    count neither in it nor in its KL, as if they had not been drawn. Each term's loss is a mean over its rows, scaled
    to its share of that (DDP averages, hence the factor). An update none of whose rows has a score is left out.
    """
    grpo = run.config.reward.grpo
    updates = run.config.policy_for("ar" if part.name == "ar" else "dit").updates_per_rollout
    collected: list[tuple[int, dict[str, Tensor]]] = []
    taken = Interval()
    for update in range(updates):
        slices = _slices(run, part, chunks, rows_per_prompt, update, updates)
        counted = sum(gather_objects(run.world, sum(count for *_, count in slices)))
        if counted == 0:
            continue
        total = len(slices) * terms_per_slice
        done = 0
        for index, rows, count in slices:
            stream = terms(index, rows)
            for _ in range(terms_per_slice):
                done += 1
                run.check_stop()
                with part.accumulating(last=done == total):
                    with run.autocast():
                        term = next(stream)
                    part.backward(term.loss * (count * run.world.world_size / counted))
                if count:
                    collected.append((count, term.metrics | {"loss": term.loss.detach() * terms_per_slice}))
        taken.add(run.update(part))
    if part.average is not None:
        part.average.update(grpo.reference_decay)
    seen = sum(count for count, _ in collected)
    metrics = mean_over_processes(run.world, stack_means(collected), seen) | taken.figures()
    return {f"{part.name}/{name}": value for name, value in metrics.items()}


def _slices(
    run: Learning, part: Part, chunks: list[Scored], rows_per_prompt: int, update: int, updates: int
) -> list[tuple[int, Tensor, int]]:
    """(chunk, rows of it with a score, how many) of one of the `updates`, in pieces that go through the model at once.

    Every process has equally many, so that all poll and exchange gradients equally often: a piece without any score
    keeps one row, and counts as none.
    """
    slices = []
    for index, chunk in enumerate(chunks):
        # on the CPU: a choice of rows by what is in a tensor would wait for the device
        rows = torch.arange(len(chunk.rollout.prompts) * rows_per_prompt)
        rows = rows[(rows + chunk.first_prompt * rows_per_prompt) % updates == update]
        scored = chunk.has_score("ar" if part.name == "ar" else "dit")
        for piece in run.micro(rows):
            kept = piece[scored[piece]]
            if len(piece):
                slices.append((index, (kept if len(kept) else piece[:1]).to(run.world.device), len(kept)))
    return slices
