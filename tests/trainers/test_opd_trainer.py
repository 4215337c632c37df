"""On-policy distillation through the trainer: who teaches which prompt, with which weights, and what is refused."""

from __future__ import annotations

import pytest
import torch

from glm_training.config.errors import ConfigError
from glm_training.engine.errors import SettingsError
from glm_training.engine.families import build_family
from glm_training.models.adapters import ModelLoadError
from glm_training.trainers.run import prepare
from glm_training.utils.distributed import World, init_world
from tests.opd_runs import NAMED, OPD, OWN, opd, write_experts
from tests.runs import PROMPTS, config_of, trainer_of, weights_of


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    write_experts(folder)
    return folder


@pytest.fixture(scope="module", params=["whole", "adapters"])
def student(request, experts):
    lora = ["lora.enabled=true", "lora.rank=2"] if request.param == "adapters" else []
    return trainer_of(experts, *opd(experts, *lora, "training.batch_size=4", "training.learning_rate=0.2"))


def expert(experts, name: str):
    """The expert loaded as a model of its own: what its teacher must compute."""
    key = f"model.adapters=[{experts / 'first'}]" if name == "first" else f"model.name={experts / 'second'}"
    return build_family(config_of(experts, key), World())


def outputs(family) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of fixed tokens, and a velocity, of the two halves."""
    prompt = family.ar.encode_prompts(["a dog"], 64, 64)
    condition = family.dit.condition(["a dog"], torch.zeros(1, 4, dtype=torch.long), (2, 2))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        log_probs = family.ar(prompt, (torch.arange(prompt.T) % family.ar.num_codes)[None])
        return log_probs, family.dit(latents, torch.tensor([500.0]), condition)


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_teacher_computes_what_the_expert_does_wherever_the_student_is(experts, student, name):
    family, before = student.family, weights_of(student)
    with torch.no_grad():
        for part in student.parts.values():
            for value in part.parameters.values():
                value.add_(0.03)
    moved = outputs(family)
    with student.teachers[name]["ar"](), student.teachers[name]["dit"]():
        taught = outputs(family)
    for left, right in zip(outputs(family), moved, strict=True):
        assert torch.equal(left, right), "the student's weights came back"
    for found, wanted, other in zip(taught, outputs(expert(experts, name)), moved, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        assert (found - other).abs().max() > 1e-3
    with torch.no_grad():
        for half, values in before.items():
            for key, value in values.items():
                student.parts[half].parameters[key].copy_(value)


def test_a_step_asks_the_teacher_of_each_prompt_and_the_first_loss_is_its_kl(experts, student, monkeypatch):
    seen, draw = [], student.draw
    monkeypatch.setattr(student, "draw", lambda: seen.append(draw()) or seen[-1])
    figures = student.training_step()
    (rollout,) = seen
    assert not len(rollout.images) and len(rollout.plans) == 4
    for half in ("ar", "dit"):
        mean = (3 * figures[f"{half}/kl_first"] + figures[f"{half}/kl_second"]) / 4
        assert figures[f"{half}/loss"] == pytest.approx(mean, rel=1e-4)
    assert min(figures[f"{half}/kl_{name}"] for half in ("ar", "dit") for name in ("first", "second")) > 1e-7
    start = build_family(config_of(experts), World())
    options = {"temperature": rollout.plans.temperature, "support": rollout.plans.support}
    for name in ("first", "second"):
        rows = torch.tensor([r for r, prompt in enumerate(rollout.prompts) if prompt in OWN[name]])
        plans = rollout.plans.select(rows)
        options["support"] = plans.support
        log_p, log_q = (
            each.ar.distributions(plans.prompt, plans.tokens, **options) for each in (start, expert(experts, name))
        )
        kl = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0).sum(-1).mean()
        assert figures[f"ar/kl_{name}"] == pytest.approx(kl.item(), rel=1e-3)


def test_the_student_comes_nearer(experts):
    """At the same random numbers, step after step."""
    rates = ["training.ar_learning_rate=0.05", "training.dit_learning_rate=0.5", "rollout.top_p=1"]
    trainer = trainer_of(experts, *opd(experts, "training.batch_size=4", *rates))
    start, figures = trainer.sampler.state_dict(), []
    for _ in range(4):
        trainer.sampler.load_state_dict(start)
        figures.append(trainer.training_step())
    for key in ("ar/kl", "dit/kl"):
        assert figures[-1][key] < 0.9 * figures[0][key]


def test_edits_are_distilled_too(experts):
    figures = trainer_of(experts, *opd(experts, "training.batch_size=4"), mode="i2i").training_step()
    assert min(figures[f"{half}/kl_{name}"] for half in ("ar", "dit") for name in ("first", "second")) > 1e-7


@pytest.mark.parametrize("half", ["ar", "dit"])
def test_one_half_alone_learns_from_its_teachers(experts, half):
    """The other is frozen, and no adapter of it is asked for."""
    lora = f"opd.teachers.first.adapters={experts / 'first' / f'lora_{half}'}"
    trainer = trainer_of(experts, *opd(experts, f"model.component={half}", "training.batch_size=4"), lora)
    figures = trainer.training_step()
    assert {name.split("/")[0] for name in figures if "/kl" in name} == {half} == set(trainer.parts)
    assert figures[f"{half}/kl_first"] > 1e-7


def test_prompts_without_a_teacher_or_with_two_are_told_before_anything_is_loaded(experts, tmp_path):
    (tmp_path / "few.txt").write_text(PROMPTS[0] + "\n", encoding="utf-8")
    (tmp_path / "all.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    named = [key.replace("FOLDER", str(experts)) for key in NAMED]

    def told(first: str, second: str) -> str:
        files = [f"opd.teachers.{name}.prompts_file={file}" for name, file in (("first", first), ("second", second))]
        with pytest.raises(SettingsError) as error:
            prepare(config_of(experts, *named, *files), init_world(True, None))
        return str(error.value)

    few, every = tmp_path / "few.txt", tmp_path / "all.txt"
    assert f"in no teacher's prompts_file: 2, the first is {PROMPTS[1]!r}" in told(few, experts / "second.txt")
    assert f"of several teachers: 1, the first, {PROMPTS[0]!r}, in those of first and second" in told(few, every)
    assert "there is no such file" in told(tmp_path / "none.txt", every)


def test_places_without_the_weights_of_a_teacher_are_told(experts, tmp_path):
    files = [key.replace("FOLDER", str(experts)) for key in OPD if "prompts_file" in key or "method" in key]

    def told(*keys: str) -> str:
        with pytest.raises((SettingsError, ModelLoadError)) as error:
            prepare(config_of(experts, *files, *keys), init_world(True, None))
        return str(error.value)

    whole = f"opd.teachers.second.model={experts / 'second'}"
    message = told(f"opd.teachers.first.adapters={experts / 'first' / 'lora_dit'}", whole)
    assert "has no adapter of the ar, which learns from it" in message
    assert "there are no adapters in" in told(f"opd.teachers.first.adapters={tmp_path}", whole)
    message = told(f"opd.teachers.first.adapters={tmp_path}", f"opd.teachers.second.model={tmp_path}")
    assert message.count("there are no adapters in") == 1 and "is no model: name a checkpoint" in message
    message = told(
        f"opd.teachers.first.adapters={experts / 'first'}", f"opd.teachers.second.model={experts / 'second' / 'vae'}"
    )
    assert "opd.teachers.second.model" in message and "is one part of a pipeline" in message


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["training.method=opd"], "`opd` learns from teachers, and there is none"),
        (["opd.teachers.a.prompts_file=p", "opd.teachers.a.model=m"], "teachers are for `opd`"),
        (["training.method=opd", "opd.teachers.a.prompts_file=p"], "and neither is given"),
        (
            ["training.method=opd", "opd.teachers.a={prompts_file: p, model: m, adapters: a}"],
            "and both are given",
        ),
        (
            ["training.method=opd", "opd.teachers.a={prompts_file: p, adapters: a}", "model.adapters=[b]"],
            "without the adapters that are merged into the student",
        ),
        (
            ["training.method=opd", "opd.teachers.a={prompts_file: p, model: m}", "rollout.sde_kernel=ode"],
            "compares noisy denoising steps, and `ode` has none",
        ),
        (
            ["training.method=opd", "opd.teachers.a={prompts_file: p, model: m}", "model.ar.do_sample=false"],
            "nothing is drawn",
        ),
        (
            ["training.method=opd", "opd.teachers.a={prompts_file: p, model: m}", "lora={enabled: true, dropout: 0.1}"],
            "differ from its teacher by chance",
        ),
        (
            ["training.method=opd", "opd.teachers.a={prompts_file: p, model: m}", "reward.grpo.num_samples=5"],
            "num_samples 5 does not split as `rollout` says",
        ),
        (["training.method=opd", "opd.teachers={'a b': {prompts_file: p, model: m}}"], "letters, digits"),
        (["training.method=opd", "opd.teachers.a={prompts_file: p, model: m}", "model.family=sdxl"], "not `sdxl`"),
    ],
)
def test_what_does_not_go_together_is_an_error_of_the_configuration(tmp_path, keys, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        config_of(tmp_path, *keys)
