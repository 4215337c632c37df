"""From scored rollouts to optimizer steps: which method a half learns by, and how its terms make up an update.

B rows of a chunk (plans or renders), R rows of a slice, T tokens of a plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from glm_training.algorithms.nft import DecaySchedule, old_policy_decay
from glm_training.config import Config
from glm_training.config.sections.base import Part as PartName
from glm_training.engine.figures import Interval, mean_over_processes, stack_means
from glm_training.engine.parts import Part
from glm_training.methods.ar_policy_gradient import ARPolicyGradient
from glm_training.methods.awm import AWM
from glm_training.methods.dgpo import DGPO
from glm_training.methods.flow_policy_gradient import FlowPolicyGradient
from glm_training.methods.losses import DiTPolicies, MatchingDraws, MethodLoss
from glm_training.methods.nft import NFT
from glm_training.models.glm_image.dit_types import Trajectory
from glm_training.models.glm_image.positions import generation_grids
from glm_training.reinforcement.credit import Scored
from glm_training.reinforcement.rollout import RolloutSettings
from glm_training.utils.distributed import World, gather_objects
from glm_training.utils.randomness import make_generator, normal

DiTMethod = FlowPolicyGradient | NFT | AWM | DGPO

PLANS_ON_CPU = 8
"""A few plans' activations are memory that the process has already; of many each tensor is new, and the system clears
it page by page."""


@dataclass(frozen=True)
class Slice:
    """Rows [R] of chunk `chunk` that go through a half together, in optimizer step `update` of the rollout; `counted`
    of them count: all, or none where the one row has no score and keeps the processes in step. `weight`: what a row
    counts against those of slices of another size.

    Every pass over a rollout takes the same slices: in low precision the rows beside a row change how it is rounded,
    and a log-prob of another grouping is off by more than a clip range.
    """

    update: int
    chunk: int
    rows: Tensor
    counted: int
    weight: float = 1.0


Terms = Callable[[Slice], Iterator[MethodLoss]]


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

    def micro(self, rows: Tensor, half: str) -> tuple[Tensor, ...]:
        """`rows` of a half in pieces of at most `rollout.micro_batch_size`; without one all together, plans on the CPU
        `PLANS_ON_CPU`."""
        few = half == "ar" and self.world.device.type == "cpu"
        return rows.split(self.settings.micro_batch_size or (PLANS_ON_CPU if few else max(len(rows), 1)))


def ar_method(config: Config) -> ARPolicyGradient:
    """What `reward.grpo` says of the AR half."""
    grpo, policy = config.reward.grpo, config.policy_for("ar")
    capped, constant = grpo.ar.objective == "cispo", grpo.loss_aggregation == "constant"
    size = config.data.image_size
    grids = generation_grids(size.height, size.width, config.training.mode) if constant else ()
    return ARPolicyGradient(
        clip=(0.0, grpo.ar.cispo_cap) if capped else (policy.clip_low, policy.clip_high),
        kl_coef=policy.kl_coef,
        level=grpo.ratio_level,
        aggregation=grpo.loss_aggregation,
        objective=grpo.ar.objective,
        entropy_coef=grpo.ar.entropy_coef,
        preview_weight=grpo.ar.preview_weight,
        large_weight=grpo.ar.large_weight,
        similarity_weighting=grpo.ar.similarity_weighting,
        constant_length=sum(rows * columns for rows, columns in grids) if constant else None,
    )


def dit_method(config: Config) -> DiTMethod:
    """What `reward.grpo` says of the DiT half."""
    dit, policy = config.reward.grpo.dit, config.policy_for("dit")
    clip = (policy.clip_low, policy.clip_high)
    if dit.method == "nft":
        return NFT(dit.nft_beta, dit.advantage_max, policy.kl_coef)
    if dit.method == "awm":
        return AWM(clip, policy.kl_coef, dit.huber)
    if dit.method == "dgpo":
        return DGPO(dit.dgpo_beta, clip, policy.kl_coef)
    return FlowPolicyGradient(
        clip, policy.kl_coef, dit.ratio == "guard", dit.divergence_threshold, dit.noise_weighting, dit.kl_form
    )


# -- the AR half -------------------------------------------------------------------------------------------------------


def update_ar(run: Learning, method: ARPolicyGradient, chunks: list[Scored]) -> dict[str, float]:
    """The optimizer steps of the AR half on the plans of `chunks`."""
    part, rescores = run.parts["ar"], run.config.rescores()
    slices = [
        replace(piece, weight=method.row_weight(chunks[piece.chunk].rollout.plans.prompt))
        for piece in ar_slices(run, chunks)
    ]
    olds = [chunk.rollout.plans.log_probs for chunk in chunks]
    if rescores:
        olds = _scores(run, method, part, chunks, [piece for piece in slices if piece.update > 0])
    anchors = None
    if method.kl_coef > 0:
        with part.as_reference():
            anchors = _scores(run, method, part, chunks, slices)

    def terms(piece: Slice) -> Iterator[MethodLoss]:
        plans, weights = chunks[piece.chunk].rollout.plans.select(piece.rows), chunks[piece.chunk].token_weights
        on_policy = rescores and piece.update == 0
        yield from method.losses(
            part.policy,
            plans if on_policy else replace(plans, log_probs=olds[piece.chunk][piece.rows]),
            chunks[piece.chunk].plan_advantages[piece.rows],
            None if anchors is None else anchors[piece.chunk][piece.rows],
            on_policy=on_policy,
            token_weights=None if weights is None else weights[piece.rows],
        )

    return optimise(run, part, chunks, run.settings.plans, slices, terms, method.terms)


@torch.no_grad()
def _scores(
    run: Learning, method: ARPolicyGradient, part: Part, chunks: list[Scored], slices: list[Slice]
) -> list[Tensor]:
    """Log-probs [B, T] of the drawn tokens of each chunk under the present weights; those of rows outside `slices`
    stay as they were drawn."""
    scores = [chunk.rollout.plans.log_probs.clone() for chunk in chunks]
    for piece in slices:
        run.check_stop()
        with run.autocast():
            found = method.score(part.component, chunks[piece.chunk].rollout.plans.select(piece.rows))
        if piece.counted:
            scores[piece.chunk][piece.rows] = found
    return scores


# -- the DiT half ------------------------------------------------------------------------------------------------------


def update_dit(run: Learning, method: DiTMethod, chunks: list[Scored]) -> dict[str, float]:
    """The optimizer steps of the DiT half on the renders of `chunks`."""
    part, group, siblings = run.parts["dit"], run.settings.group, run.settings.renders
    slices = _slices(run, part, chunks, group, siblings if isinstance(method, DGPO) else 1)
    policies = DiTPolicies(
        part.policy, part.component, None if part.reference is None else part.as_reference, part.as_old
    )
    if isinstance(method, FlowPolicyGradient):
        rescores = run.config.rescores()
        renders = [chunk.rollout.renders for chunk in chunks]
        if rescores:
            renders = _rescored(run, method, part, renders, [piece for piece in slices if piece.update > 0])

        def terms(piece: Slice) -> Iterator[MethodLoss]:
            trajectory = renders[piece.chunk].select(piece.rows)
            advantages = chunks[piece.chunk].render_advantages[piece.rows]
            yield from method.losses(policies, trajectory, advantages, on_policy=rescores and piece.update == 0)

        return optimise(run, part, chunks, group, slices, terms, len(renders[0].sde_indices))
    levels = _levels(run)
    draws = partial(_matching_draws, run, chunks, levels)
    if isinstance(method, AWM | DGPO):
        olds = _old_densities(run, method, part, chunks, slices, draws)

        def awm_terms(piece: Slice) -> Iterator[MethodLoss]:
            scored, rows = chunks[piece.chunk], piece.rows
            trajectory, advantages = scored.rollout.renders.select(rows), scored.render_advantages[rows]
            old = None if piece.update == 0 else olds[piece.chunk][rows]
            if isinstance(method, DGPO):
                plans = rows.div(siblings, rounding_mode="floor")
                yield from method.losses(policies, trajectory, advantages, plans, draws(piece.chunk, rows), old)
            else:
                yield from method.losses(policies, trajectory, advantages, draws(piece.chunk, rows), old)

        return optimise(run, part, chunks, group, slices, awm_terms, len(levels))

    def nft_terms(piece: Slice) -> Iterator[MethodLoss]:
        scored, rows = chunks[piece.chunk], piece.rows
        yield from method.losses(
            policies, scored.rollout.renders.select(rows), scored.render_advantages[rows], draws(piece.chunk, rows)
        )

    metrics = optimise(run, part, chunks, group, slices, nft_terms, len(levels))
    assert part.old is not None
    # after the last update: until then it is the policy that drew
    part.old.update(_old_decay(run.config, run.step))
    return metrics


def _levels(run: Learning) -> tuple[int, ...]:
    """The noise levels of this step: all of the schedule's `noisiest_share`, or a random choice of
    `timesteps_per_sample`."""
    share = run.config.reward.grpo.dit.noisiest_share * run.settings.num_inference_steps
    steps = max(1, math.ceil(share - 1e-9))  # .28 of 25 are 7, and their product is a bit more
    wanted = run.config.reward.grpo.dit.timesteps_per_sample
    if wanted is None or wanted >= steps:
        return tuple(range(steps))
    order = torch.randperm(steps, generator=make_generator(run.config.seed, "nft/levels", run.step))
    return tuple(sorted(order[:wanted].tolist()))


def _matching_draws(
    run: Learning, chunks: list[Scored], levels: tuple[int, ...], chunk: int, rows: Tensor
) -> MatchingDraws:
    """The noise of the given rows of a chunk, named by prompt and sample; DGPO's, by prompt and plan, since renders
    that are compared differ by nothing else then."""
    rollout, group = chunks[chunk].rollout, run.settings.group
    final = rollout.renders.final
    shared = run.settings.renders if run.config.reward.grpo.dit.method == "dgpo" else 1
    names = [(rollout.positions[row // group], row % group // shared * shared) for row in rows.tolist()]

    def noise(level: int) -> Tensor:
        # AWM and DGPO draw under this name as well: another one would give its runs other numbers
        return normal(run.config.seed, f"nft/{level}", names, tuple(final.shape[1:]), device=final.device)

    return MatchingDraws(levels, noise)


@torch.no_grad()
def _rescored(
    run: Learning, method: FlowPolicyGradient, part: Part, renders: list[Trajectory], slices: list[Slice]
) -> list[Trajectory]:
    """`renders` with the log-probs, and the means where they are kept, of a replay of `slices`."""
    log_probs = [trajectory.log_probs.clone() for trajectory in renders]
    means = [None if trajectory.means is None else trajectory.means.clone() for trajectory in renders]
    for piece in slices:
        run.check_stop()
        with run.autocast():
            found, centres = method.rescored(part.component, renders[piece.chunk].select(piece.rows))
        if not piece.counted:
            continue
        log_probs[piece.chunk][piece.rows] = found
        kept = means[piece.chunk]
        if kept is not None and centres is not None:
            kept[piece.rows] = centres
    return [
        replace(trajectory, log_probs=log_probs[chunk], means=means[chunk]) for chunk, trajectory in enumerate(renders)
    ]


def _old_densities(
    run: Learning,
    method: AWM | DGPO,
    part: Part,
    chunks: list[Scored],
    slices: list[Slice],
    draws: Callable[[int, Tensor], MatchingDraws],
) -> list[Tensor]:
    """Densities [rows, levels] of AWM or DGPO under the policy that drew, per chunk, of the rows of later updates:
    those of the first one have it at hand."""
    levels = len(_levels(run))
    olds = [chunk.rollout.renders.final.new_zeros(len(chunk.rollout.renders.final), levels) for chunk in chunks]
    for piece in slices:
        if piece.update == 0:
            continue
        run.check_stop()
        trajectory = chunks[piece.chunk].rollout.renders.select(piece.rows)
        with run.autocast():
            densities = method.densities(part.component, trajectory, draws(piece.chunk, piece.rows))
        if piece.counted:
            olds[piece.chunk][piece.rows] = densities
    return olds


def _old_decay(config: Config, step: int) -> float:
    decay = config.reward.grpo.dit.old_decay
    if isinstance(decay, float):
        return decay
    schedule: DecaySchedule = "ramp" if decay == "fast" else "late_ramp"
    return old_policy_decay(step, schedule)


# -- both --------------------------------------------------------------------------------------------------------------


def ar_slices(run: Learning, chunks: list[Scored]) -> list[Slice]:
    """The plans that the AR half is trained on, in the order of its updates."""
    return _slices(run, run.parts["ar"], chunks, run.settings.plans)


def _slices(run: Learning, part: Part, chunks: list[Scored], rows_per_prompt: int, together: int = 1) -> list[Slice]:
    """What a half is trained on, in order; row r of the step belongs to update r mod `updates_per_rollout`. Where
    `together` rows in a row are one, as DGPO's groups are, they count as one row there and are never parted.

    Every process has equally many, so that all poll and exchange gradients equally often: a piece without any score
    (or, with `skip_flat_groups`, spread) keeps one row, and counts as none; where batches may be short, a process with
    fewer pieces adds such ones.
    """
    name: PartName = "ar" if part.name == "ar" else "dit"
    updates = run.config.policy_for(name).updates_per_rollout
    slices = []
    for update in range(updates):
        for index, chunk in enumerate(chunks):
            # on the CPU: a choice of rows by what is in a tensor would wait for the device
            rows = torch.arange(len(chunk.rollout.prompts) * rows_per_prompt)
            rows = rows[(rows + chunk.first_prompt * rows_per_prompt) // together % updates == update]
            scored = chunk.learned_from(name)
            for piece in run.micro(rows, name):
                kept = piece[scored[piece]]
                if len(piece):
                    chosen = (kept if len(kept) else piece[:1]).to(run.world.device)
                    slices.append(Slice(update, index, chosen, len(kept)))
    return levelled(run.world, slices, updates) if run.config.data.buckets.enabled else slices


def levelled(world: World, slices: list[Slice], updates: int) -> list[Slice]:
    """`slices` with as many of each update as the process with the most has; what is added counts as none."""
    own = [sum(piece.update == update for piece in slices) for update in range(updates)]
    most = [max(counts) for counts in zip(*gather_objects(world, own), strict=True)]
    idle = replace(slices[0], rows=slices[0].rows[:1], counted=0)
    return slices + [
        replace(idle, update=update) for update in range(updates) for _ in range(most[update] - own[update])
    ]


def optimise(
    run: Learning,
    part: Part,
    chunks: list[Scored],
    rows_per_prompt: int,
    slices: list[Slice],
    terms: Terms,
    terms_per_slice: int,
) -> dict[str, float]:
    """The optimizer steps over `slices`, each of `terms_per_slice` terms.

    The loss of an update is the mean over those of its rows that have a score, by their weights, over chunks and
    processes: the others count neither in it nor in its KL, as if they had not been drawn. Each term's loss is a mean
    over its rows, scaled to its share of that (DDP averages, hence the factor). An update none of whose rows has a
    score is left out.
    """
    grpo = run.config.reward.grpo
    updates = run.config.policy_for("ar" if part.name == "ar" else "dit").updates_per_rollout
    collected: list[tuple[float, dict[str, Tensor]]] = []
    taken = Interval()
    for update in range(updates):
        own = [piece for piece in slices if piece.update == update]
        counted = sum(gather_objects(run.world, sum(piece.counted * piece.weight for piece in own)))
        if counted == 0:
            continue
        total = len(own) * terms_per_slice
        done = 0
        for piece in own:
            stream, mass = terms(piece), piece.counted * piece.weight
            for _ in range(terms_per_slice):
                done += 1
                run.check_stop()
                with part.accumulating(last=done == total):
                    with run.autocast():
                        term = next(stream)
                    if done == total:  # its backward pass waits for all processes: each must have come this far
                        run.check_stop()
                    part.backward(term.loss * (mass * run.world.world_size / counted))
                if piece.counted:
                    collected.append((mass, term.metrics | {"loss": term.loss.detach() * terms_per_slice}))
        taken.add(run.update(part))
    if part.average is not None:
        part.average.update(grpo.reference_decay)
    seen = sum(count for count, _ in collected)
    metrics = mean_over_processes(run.world, stack_means(collected), seen) | taken.figures()
    return {f"{part.name}/{name}": value for name, value in metrics.items()}
