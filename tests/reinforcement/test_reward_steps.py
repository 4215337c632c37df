"""A reward step's own work between drawing and updating, on fabricated samples: what is scored with what, which
advantage and which update a row gets, and how much it counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glm_training.methods.ar_policy_gradient import ARPolicyGradient
from glm_training.methods.flow_policy_gradient import FlowPolicyGradient
from glm_training.methods.losses import MethodLoss
from glm_training.models.glm_image.ar_types import ARRollout
from glm_training.reinforcement.rollout import Rollout
from glm_training.rewards import RewardOptions, RewardResult
from glm_training.trainers.reward_trainer import RewardTrainer
from tests.methods.toys import prompt_of, trajectory_of
from tests.runs import PROMPTS, trainer_of

PLAIN = ["data.shuffle=false", "reward.grpo.gate=false", "reward.grpo.advantage_scale=none", "reward.grpo.kl_coef=0"]

Table = Callable[[int, int], float]
"""(number of the prompt, place in its group) -> reward."""


class Rewards:
    """Scores by prompt, target, source and picture together, so that a sample which has another one's is noticed.

    A picture's first channel holds the number of its prompt over 10, its second the place in the group over 100.
    """

    options, is_custom = RewardOptions(on_error="skip"), False

    def __init__(self, trainer: RewardTrainer, metrics: dict[str, Table]) -> None:
        whole = trainer.dataset.batch(list(range(len(PROMPTS))))
        self.targets, self.sources = whole.targets, whole.sources
        self.metrics = metrics

    def compute_rewards(self, batch) -> RewardResult:
        prompts = [round(float(value) * 10) for value in batch.images[:, 0, 0, 0]]
        places = [round(float(value) * 100) for value in batch.images[:, 1, 0, 0]]
        assert list(batch.prompts) == [PROMPTS[number] for number in prompts]
        for given, own in ((batch.targets, self.targets), (batch.sources, self.sources)):
            assert (given is None) == (own is None)
            if own is not None:
                assert torch.equal(given, own[prompts])
        samples = list(zip(prompts, places, strict=True))
        columns = {name: torch.tensor([table(*sample) for sample in samples]) for name, table in self.metrics.items()}
        return RewardResult(columns["structure"], columns, {})


@dataclass
class Seen:
    """Draws: the positions of each. Rows: (update, number of the row, its advantage). Gradients: of each update."""

    draws: list[list[int]] = field(default_factory=list)
    rows: dict[str, list[tuple[int, int, float]]] = field(default_factory=lambda: {"ar": [], "dit": []})
    gradients: dict[str, list[float]] = field(default_factory=lambda: {"ar": [], "dit": []})


class Recorder:
    """A method's loss on a slice: the mean of its rows' numbers, with a gradient of as much in one weight."""

    def __init__(self, name: str, seen: Seen, weight: Tensor, terms: int) -> None:
        self.name, self.seen, self.weight, self.terms = name, seen, weight, terms

    def terms_of(self, numbers: Tensor, advantages: Tensor):
        update = len(self.seen.gradients[self.name])
        found = zip(numbers.tolist(), advantages.tolist(), strict=True)
        self.seen.rows[self.name] += [(update, round(number), advantage) for number, advantage in found]
        for term in range(self.terms):
            share = (0.25, 0.75)[term] if self.terms == 2 else 1.0
            loss = numbers.mean() * self.weight.sum() * share
            yield MethodLoss(loss, len(numbers), {"number": numbers.mean()})


class Tokens(ARPolicyGradient):
    recorder: Recorder

    def losses(self, policy, rollout, advantages, reference_log_probs=None, *, on_policy=False, token_weights=None):
        yield from self.recorder.terms_of(rollout.tokens[:, 0].float(), advantages)


class Latents(FlowPolicyGradient):
    recorder: Recorder

    def losses(self, policies, trajectory, advantages, *, on_policy=False):
        yield from self.recorder.terms_of(trajectory.final[:, 0, 0, 0], advantages)


def step_of(
    folder: Path, metrics: dict[str, Table], *overrides: str, mode: str = "t2i"
) -> tuple[Seen, dict[str, float], RewardTrainer]:
    """One training step whose drawing and losses are played: plan n of position p is the number 100 p + n, and so is a
    render by its place in the group."""
    trainer = trainer_of(folder, *PLAIN, *overrides, mode=mode)
    assert isinstance(trainer, RewardTrainer)
    seen, group, plans = Seen(), trainer.settings.group, trainer.settings.plans

    def draw(batch, positions, *, on_step):
        seen.draws.append(list(positions))
        assert list(batch.prompts) == [PROMPTS[position % len(PROMPTS)] for position in positions]
        images = torch.zeros(len(positions) * group, 3, 8, 8)
        whose = torch.tensor([position % len(PROMPTS) for position in positions]).repeat_interleave(group)
        images[:, 0] = whose.view(-1, 1, 1) / 10
        images[:, 1] = torch.arange(group).repeat(len(positions)).view(-1, 1, 1) / 100
        numbers = torch.tensor([100 * position + n for position in positions for n in range(plans)])
        places = torch.tensor([100.0 * position + g for position in positions for g in range(group)])
        tokens = ARRollout(
            prompt_of(len(numbers)), numbers[:, None].repeat(1, 6), torch.zeros(len(numbers), 6), None, 1
        )
        renders = trajectory_of(
            places.view(-1, 1, 1, 1).repeat(1, 1, 1, 2), sde_indices=(0, 1), log_probs=torch.zeros(len(places), 2)
        )
        return Rollout(list(batch.prompts), list(positions), tokens, renders, images, batch.targets, batch.sources)

    trainer.draw = draw  # type: ignore[method-assign]
    trainer.calculator = Rewards(trainer, metrics)  # type: ignore[assignment]
    methods = {"ar": Tokens((0.2, 0.2), 0.0), "dit": Latents((0.2, 0.2), 0.0)}
    for name, part in trainer.parts.items():
        weight = next(iter(part.parameters.values()))
        weight.data.fill_(1 / weight.numel())
        object.__setattr__(methods[name], "recorder", Recorder(name, seen, weight, 2 if name == "dit" else 1))
        setattr(trainer, f"{name}_method", methods[name])

        def step(training_step, name=name, part=part, weight=weight):
            seen.gradients[name].append(weight.grad.flatten()[-1].item())
            part.optimizer.zero_grad()
            return {"grad_norm": 0.0, "learning_rate": 0.0}

        part.step = step  # type: ignore[method-assign]
    return seen, trainer.training_step(), trainer


def table(prompt: int, place: int) -> float:
    """Spread in every group, and no two samples alike."""
    return (prompt + 1) * 0.125 + (0.5, 0.0, 0.25, 1.0)[place % 4] * (1 + prompt) / 4


CHUNKED = ["training.batch_size=1", "training.gradient_accumulation_steps=2"]


@pytest.mark.parametrize("mode", ["t2i", "i2i"])
def test_every_row_has_the_advantage_of_its_own_picture(tmp_path, mode):
    """Two chunks of two prompts, 2 plans x 2 renders; rewards know prompt, target and source."""
    chunks = ["training.batch_size=2", "training.gradient_accumulation_steps=2"]
    seen, figures, _ = step_of(tmp_path, {"structure": table}, *chunks, mode=mode)
    assert seen.draws == [[0, 1], [2, 3]]
    plans, renders = {}, {}
    for prompt in range(4):
        rewards = [table(prompt, place) for place in range(4)]
        means = [(rewards[0] + rewards[1]) / 2, (rewards[2] + rewards[3]) / 2]
        plans |= {100 * prompt + n: means[n] - sum(means) / 2 for n in (0, 1)}
        renders |= {100 * prompt + g: rewards[g] - means[g // 2] for g in range(4)}
    for name, wanted in (("ar", plans), ("dit", renders)):
        found = {number: advantage for _, number, advantage in seen.rows[name]}
        assert len(seen.rows[name]) == len(wanted) and found == pytest.approx(wanted, abs=1e-6), name
    every = [table(prompt, place) for prompt in range(4) for place in range(4)]
    assert figures["reward/total"] == pytest.approx(sum(every) / 16)


def test_row_r_of_the_step_belongs_to_update_r_mod_their_number_over_chunks(tmp_path):
    """Three plans per chunk: the second chunk's first row is row 3 of the step."""
    updates = ["model.component=ar", "reward.grpo.num_samples=3", "reward.grpo.updates_per_rollout=2"]
    seen, _, _ = step_of(tmp_path, {"structure": table}, *CHUNKED, *updates)
    shares = {update: [number for at, number, _ in seen.rows["ar"] if at == update] for update in (0, 1)}
    assert shares == {0: [0, 2, 101], 1: [1, 100, 102]}
    assert seen.gradients["ar"] == pytest.approx([(0 + 2 + 101) / 3, (1 + 100 + 102) / 3])


@pytest.mark.parametrize("micro", ["null", "2"])
@pytest.mark.parametrize("updates", [1, 3])
def test_an_update_follows_the_mean_over_its_rows(tmp_path, updates, micro):
    """Whatever the number of updates, chunks and slices, and however many terms a slice has."""
    keys = [f"reward.grpo.updates_per_rollout={updates}", f"rollout.micro_batch_size={micro}"]
    seen, figures, _ = step_of(tmp_path, {"structure": table}, *CHUNKED, "reward.grpo.num_samples=6", *keys)
    for name, rows in (("ar", 3), ("dit", 6)):
        numbers = [100 * prompt + place for prompt in (0, 1) for place in range(rows)]
        means = [sum(numbers[update::updates]) / len(numbers[update::updates]) for update in range(updates)]
        assert seen.gradients[name] == pytest.approx(means, rel=1e-5), name
        assert figures[f"{name}/number"] == pytest.approx(sum(numbers) / len(numbers), rel=1e-5)
    assert figures["ar/loss"] == pytest.approx(figures["ar/number"], rel=1e-5)
    assert figures["dit/loss"] == pytest.approx(figures["dit/number"], rel=1e-5), "of all terms, not of one"


def test_plans_are_replayed_a_few_at_a_time_on_the_cpu_unless_told_how_many(tmp_path):
    learning = trainer_of(tmp_path).learning()
    rows = torch.arange(20)
    assert [len(piece) for piece in learning.micro(rows, "ar")] == [8, 8, 4]
    assert [len(piece) for piece in learning.micro(rows, "dit")] == [20]
    told = replace(learning, settings=replace(learning.settings, micro_batch_size=15))
    assert [len(piece) for half in ("ar", "dit") for piece in told.micro(rows, half)] == [15, 5, 15, 5]


# -- what a half is rewarded for ---------------------------------------------------------------------------------------


def with_own_metric(folder: Path, *, gdpo: bool = False) -> tuple[list[str], str]:
    """Keys that add a metric of the user's to `structure`, and its name; without `gdpo` each half has one of them."""
    (folder / "own.py").write_text(
        "from glm_training.rewards import RewardCalculator\n\n\n"
        "class Own(RewardCalculator):\n"
        "    def compute_reward(self, generated_image, target_image, prompt):\n"
        "        return 0.0\n",
        encoding="utf-8",
    )
    own = f"{folder}/own.py:Own"
    if gdpo:
        return ["reward.combine=gdpo", f"reward.metrics={{structure: 1.0, '{own}': 3.0}}"], own
    shares = ["reward.ar.weights={structure: 1.0}", f"reward.dit.weights={{'{own}': 1.0}}"]
    return [f"reward.metrics={{structure: 1.0, '{own}': 1.0}}", *shares], own


def flat_in(*prompts: int) -> Table:
    return lambda prompt, place: 0.5 if prompt in prompts else table(prompt, place)


def test_groups_are_drawn_again_only_where_no_half_can_learn_from_them(tmp_path):
    """Of four prompts in two chunks the second is flat for both halves and gives way to the fifth of the run's
    sequence; the first is flat for the AR half alone and the third for the DiT half alone."""
    keys, own = with_own_metric(tmp_path)
    chunks = ["training.batch_size=2", "training.gradient_accumulation_steps=2", "reward.grpo.max_resamples=3"]
    metrics = {"structure": flat_in(0, 1), own: flat_in(1, 2)}
    seen, figures, _ = step_of(tmp_path, metrics, *keys, *chunks)
    assert seen.draws == [[0, 1], [2, 3], [4]]
    assert figures["reward/resampled_groups"] == 1
    numbers = [number for _, number, _ in seen.rows["dit"]]
    assert numbers == [100 * position + place for position in (0, 4, 2, 3) for place in range(4)]
    every = [flat_in(0, 1)(prompt, place) for prompt in range(4) for place in range(4)]
    assert figures["reward/total_before_resampling"] == pytest.approx(sum(every) / 16)
    assert figures["reward/zero_spread_groups"] == 2, "by the total, which is structure here: of prompt 0, drawn twice"


def test_flat_groups_are_drawn_again_as_often_as_allowed(tmp_path):
    """Everything but prompt 3 is flat: positions 0, 1, 2 give way to 4, 5, 6, and these to 7, 8, 9."""
    chunks = ["training.batch_size=2", "training.gradient_accumulation_steps=2", "reward.grpo.max_resamples=2"]
    seen, figures, trainer = step_of(tmp_path, {"structure": flat_in(0, 1, 2)}, *chunks)
    assert seen.draws == [[0, 1], [2, 3], [4, 5], [6], [7, 8], [9]]
    assert figures["reward/resampled_groups"] == 6 and trainer.sampler.position == 10
    assert [number // 100 for _, number, _ in seen.rows["dit"][::4]] == [7, 8, 9, 3]


def test_samples_drawn_again_take_the_places_of_those_that_give_way(tmp_path):
    """Prompts 1 and 2 lie in two chunks and are drawn again at once; of four updates each row keeps its own."""
    keys = ["training.batch_size=2", "training.gradient_accumulation_steps=2", "reward.grpo.max_resamples=1"]
    keys += ["model.component=dit", "reward.grpo.num_samples=3", "reward.grpo.updates_per_rollout=4"]
    seen, _, _ = step_of(tmp_path, {"structure": flat_in(1, 2)}, *keys)
    assert seen.draws == [[0, 1], [2, 3], [4, 5]]
    order = [100 * position + place for position in (0, 4, 5, 3) for place in range(3)]
    rows = [[(update, number) for row, number in enumerate(order) if row % 4 == update] for update in range(4)]
    assert [(update, number) for update, number, _ in seen.rows["dit"]] == sum(rows, [])


def test_gdpo_normalises_each_metric_before_its_weight(tmp_path):
    """Two plans of one render each: a normalised pair is +-1/sqrt 2, whatever its spread."""
    keys, own = with_own_metric(tmp_path, gdpo=True)
    signs = [[1, -1], [1, 1], [-1, 1], [-1, -1]]  # which of the two plans is better, by metric

    def metric(column: int, spread: float) -> Table:
        return lambda prompt, place: 0.5 + spread * signs[prompt][column] * (1 if place == 0 else -1)

    group = ["reward.grpo.num_samples=2", "model.component=ar", "training.batch_size=4"]
    seen, _, _ = step_of(tmp_path, {"structure": metric(0, 0.4), own: metric(1, 0.01)}, *keys, *group)
    sums = [(first + 3 * second) / 2**0.5 * side for first, second in signs for side in (1, -1)]
    spread = (sum(value**2 for value in sums) / 7) ** 0.5
    # 1e-4 is added to every standard deviation: of the smaller metric, 0.01 sqrt 2, that is 0.7 %
    assert [advantage for _, _, advantage in seen.rows["ar"]] == pytest.approx([s / spread for s in sums], rel=0.02)


def test_rewards_of_one_half_leave_the_others_advantages(tmp_path):
    keys, own = with_own_metric(tmp_path)
    other = lambda prompt, place: table(prompt, 3 - place)  # noqa: E731
    seen, figures, _ = step_of(tmp_path, {"structure": table, own: other}, *keys, "training.batch_size=1")
    rewards, theirs = [table(0, place) for place in range(4)], [other(0, place) for place in range(4)]
    plans = [(rewards[0] + rewards[1]) / 2 - sum(rewards) / 4, (rewards[2] + rewards[3]) / 2 - sum(rewards) / 4]
    assert [advantage for _, _, advantage in seen.rows["ar"]] == pytest.approx(plans)
    renders = [theirs[place] - (theirs[place // 2 * 2] + theirs[place // 2 * 2 + 1]) / 2 for place in range(4)]
    assert [advantage for _, _, advantage in seen.rows["dit"]] == pytest.approx(renders, abs=1e-6)
    assert figures["reward/ar_total"] == pytest.approx(sum(rewards) / 4)
    assert figures["reward/dit_total"] == pytest.approx(sum(theirs) / 4)
