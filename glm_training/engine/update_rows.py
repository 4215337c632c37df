"""Whether what a process draws at once divides into the updates that are taken on it."""

from __future__ import annotations

from glm_training.config import Config
from glm_training.utils.words import counted


def update_problems(config: Config, processes: int) -> list[str]:
    """Why `updates_per_rollout` of a run with reward steps does not go with so many processes, a line for each half;
    nothing for other runs.

    Among several, gradients are exchanged at each update, so that each batch of each process must have rows of all of
    them; one process may count its accumulation.
    """
    if not config.uses_reward():
        return []
    group, prompts = config.group(), config.training.batch_size
    if processes == 1:
        prompts *= config.training.gradient_accumulation_steps
    rows = {"ar": ("ar sample", group.plans), "dit": ("dit sample", group.plans * group.renders)}
    if config.reward.grpo.dit.method == "dgpo":  # the renders of a plan stay together
        rows["dit"] = ("dit group", group.plans)
    problems = []
    for part in config.parts():
        count = config.policy_for(part).updates_per_rollout
        what, each = rows[part]
        if prompts * each % count:
            problems.append(
                f"reward.grpo updates_per_rollout {count} does not divide the {counted(prompts * each, what)} that a "
                f"process draws at once (batch_size x {what.split()[1]}s per prompt; one process may count its "
                "accumulation)"
            )
    return problems
