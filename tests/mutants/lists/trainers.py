"""The loop, and what a step of each trainer is."""

from tests.mutants.catalogue import of

MUTATIONS = [
    *of(
        "engine/saving.py",
        "trainers/test_best_checkpoint.py",
        ("        best.settle()\n", "", "a save may remove the best checkpoint that nothing names"),
    ),
    *of(
        "engine/saving.py",
        "trainers/test_failing_steps.py",
        ("directory.confirm(config)", "pass", "a run directory that is renamed meanwhile is left unsigned"),
    ),
    *of(
        "trainers/base_trainer.py",
        (
            "trainers/test_supervised_trainer.py",
            "trainers/test_base_trainer.py",
            "trainers/test_stopping.py",
            "trainers/test_sampling_of_steps.py",
        ),
        (
            "self.sampler.peek_positions(), self.sampler.peek_epochs()\n        indices = self.sampler.next()",
            "self.sampler.peek_positions(), [0] * self.sampler.batch_size\n        indices = self.sampler.next()",
            "flips are those of the first epoch",
        ),
        ("            self.sampler.load_state_dict(place)\n", "", "a dropped step's prompts are lost"),
        (
            "self.step % self.config.logging.save_interval == 0",
            "self.step % self.config.logging.log_interval == 0",
            "saved as often as logged",
        ),
        (
            "last or stop or self.step % self.config.logging.save_interval",
            "stop or self.step % self.config.logging.save_interval",
            "the last step is not saved",
        ),
        ('"step": self.step, "before"', '"step": self.step + 1, "before"', "a checkpoint of the step after"),
        (
            "part.state(with_optimizer=self.config.checkpoint.save_optimizer)",
            "part.state(with_optimizer=True)",
            "save_optimizer has no effect",
        ),
        ("        self.load_extra_state(state)\n", "", "a subclass's state is not restored"),
        ('        self.evaluations.load(trainer["before"])\n', "", "the first scores are not restored"),
    ),
    *of(
        "trainers/supervised_terms.py",
        ("trainers/test_supervised_trainer.py", "trainers/test_supervised_judging.py"),
        ("draws[:, 1] <", "draws[:, 0] <", "dropped rows are those of low noise"),
        ("draws[:, 1] < training", "draws[:, 1] > training", "most conditions are dropped"),
        ("training.timestep_density)", '"uniform")', "timestep_density has no effect"),
        (
            "TokenCrossEntropy(training.preview_loss_weight, training.large_loss_weight)",
            "TokenCrossEntropy(training.large_loss_weight, training.preview_loss_weight)",
            "weights of the grids swapped",
        ),
        ("tokens[:, -rows * columns :]", "tokens[:, : rows * columns]", "the DiT half sees preview tokens"),
        (
            '"supervised/noise", batch.names,',
            '"supervised/noise", [(0,)] * len(batch.names),',
            "one noise for all rows",
        ),
    ),
    *of(
        "engine/encoding/batches.py",
        ("trainers/test_encoding_of_steps.py", "trainers/test_supervised_judging.py"),
        ("encoding.shown(batch.source_views, rows)", "encoding.shown(batch.target_views, rows)", "targets are edited"),
        (
            "data.views(indices, targets=targets)",
            "data.views(indices)",
            "a reward encodes its targets",
        ),
    ),
    *of(
        "trainers/encoding_trainer.py",
        "trainers/test_encoding_of_steps.py",
        ("with self.encoding.awake() if draws", "with self.encoding.awake() if not draws", "sleepers draw"),
        ("self.config.uses_reward() or not", "not", "a reward has no targets to compare with"),
    ),
    *of(
        "trainers/supervised_trainer.py",
        (
            "trainers/test_supervised_trainer.py",
            "trainers/test_supervised_judging.py",
            "trainers/test_modes_of_steps.py",
            "trainers/test_reward_trainer.py::test_dropout_of_supervised_steps_comes_from_the_runs_seed",
            "parity/test_training_equivalences.py::test_four_chunks_of_one_prompt_equal_one_chunk_of_four_in_supervised_training",
        ),
        ("part.backward(term.loss / divisor)", "part.backward(term.loss)", "chunks add up"),
        ("        self.family.train()\n", "        self.family.eval()\n", "no dropout while training"),
        ("last=chunk == chunks - 1", "last=chunk == 0", "gradients are exchanged too early"),
        (
            "place = (trainer.step, trainer.world.rank, chunk)",
            "place = (0, trainer.world.rank, chunk)",
            "the same dropout at every step",
        ),
        ('f"supervised/dropout/{part}"', '"supervised/dropout"', "both halves drop alike"),
    ),
    *of(
        "trainers/reward_trainer.py",
        ("trainers/test_reward_trainer.py", "reinforcement/test_reward_steps.py", "reinforcement/test_old_policy.py"),
        (
            "[prompt for prompt in rollout.prompts for _ in range(self.settings.group)]",
            "[prompt for _ in range(self.settings.group) for prompt in rollout.prompts]",
            "prompts do not fit the pictures",
        ),
        (
            "None if rollout.targets is None else repeat(rollout.targets)",
            "None if rollout.targets is None else rollout.targets.repeat(self.settings.group, 1, 1, 1)",
            "targets do not fit the pictures",
        ),
        (
            "None if rollout.sources is None else repeat(rollout.sources)",
            "None if rollout.sources is None else rollout.sources.repeat(self.settings.group, 1, 1, 1)",
            "sources do not fit the pictures",
        ),
        (
            'self.parts["dit"].as_old() if "dit" in self.parts',
            'nullcontext() if "dit" in self.parts',
            "rollouts are drawn by the trained policy",
        ),
        (
            "item.rollout.positions[0] - start",
            "0",
            "all chunks begin at the step's first prompt",
        ),
        (
            "(self.step + 1) % self.config.training.reward_frequency",
            "self.step % self.config.training.reward_frequency",
            "reward steps at the wrong place",
        ),
        ("        self.family.eval()\n", "", "rollouts are drawn in training mode"),
        (
            "self.monitors.after_step(self.step + 1, metrics)",
            "self.monitors.after_step(self.step, metrics)",
            "monitors name the step before",
        ),
    ),
    *of(
        "trainers/dpo_trainer.py",
        (
            "trainers/test_dpo_steps.py",
            "trainers/test_modes_of_steps.py",
            "trainers/test_dpo_trainer.py",
            "parity/test_preference_equivalences.py",
        ),
        (
            "draws[:, 1] < self.config.dpo.prompt_dropout",
            "draws[:, 0] < self.config.dpo.prompt_dropout",
            "prompts are dropped at low noise",
        ),
        ("levels = self._levels(draws[:, 0], ", "levels = self._levels(draws[:, 1], ", "levels drawn with the dropout"),
        (
            "if part.reference is None else part.as_reference(), self.autocast()",
            "if True else part.as_reference(), self.autocast()",
            "new pairs are compared with what was learnt",
        ),
        (
            "SequencePreference(dpo.ar_beta)",
            "SequencePreference(dpo.beta)",
            "the AR half learns with the DiT half's beta",
        ),
        (
            "DiffusionPreference(denoiser, dpo.beta, dpo.min_snr_gamma)",
            "DiffusionPreference(denoiser, dpo.beta)",
            "min_snr_gamma has no effect",
        ),
        (
            "TokenCrossEntropy(training.preview_loss_weight, training.large_loss_weight)",
            "TokenCrossEntropy(training.large_loss_weight, training.preview_loss_weight)",
            "weights of the grids swapped",
        ),
        ("part.backward(term.loss / divisor)", "part.backward(term.loss)", "chunks add up"),
        ("(level + uniform(seed,", "(uniform(seed,", "held-out pairs are judged at low noise alone"),
        (
            "for key, values in each.items()}, counts=counts)",
            "for key, values in each.items()}, counts=True)",
            "repeated pairs count",
        ),
        (
            "[(pair.index, level) for pair in batch.pairs]",
            "[(0, level) for pair in batch.pairs]",
            "held-out pairs share their noise",
        ),
        ("        self.family.eval()\n", "", "held-out pairs are judged in training mode"),
        ("view(2, -1).T.tolist()", "view(-1, 2).tolist()", "references of other images"),
        ('if name != "ar" or has_lora', 'if name == "ar" and has_lora', "what denoises has no reference"),
        ("if self.step > 0 and part.reference is None:", "if False:", "new pairs are compared with trained weights"),
        ("self.references.load(state[STATE])", "pass", "the reference table is not restored"),
        (".select((u * TURBO_LEVELS).long())", ".select((u * TURBO_LEVELS).long() * 0)", "turbo trains one level"),
        (
            "        self.family.train()\n        with self.phase",
            "        with self.phase",
            "training in evaluation mode",
        ),
    ),
    *of(
        "trainers/dmdr_trainer.py",
        ("trainers/test_dmdr_steps.py", "trainers/test_dmdr_trainer.py"),
        ("(renoised[:, 1], levels[:, 1])", "(renoised[:, 1], levels[:, 0])", "both networks learn at one level"),
        ("(renoised[:, 1], levels[:, 1])", "(renoised[:, 0], levels[:, 1])", "both networks have one noise"),
        (
            "scaled = adapters_scaled(self.teacher, self.config.dmdr.fake_scale)",
            "scaled = adapters_scaled(self.teacher, 1.0)",
            "the fake score learns at full strength",
        ),
        (
            "due = (self.step + 1) % dmdr.update_ratio == 0",
            "due = self.step % dmdr.update_ratio == 0",
            "the generator is updated too early",
        ),
        (
            "self.generator.backward(term.loss / chunks)",
            "self.generator.backward(term.loss)",
            "the generator's chunks add up",
        ),
        (
            "self.guidance.backward(term.loss / chunks)",
            "self.guidance.backward(term.loss)",
            "the guidance network's chunks add up",
        ),
        (
            "real_scale=self.dynamics.real_scale(self.step)",
            "real_scale=self.dynamics.real_scale(0)",
            "DynaDG stands still",
        ),
        (
            "u=self.dynamics.levels(level, self.step),\n            real_scale",
            "u=self.dynamics.levels(level, 0),\n            real_scale",
            "DynaRS stands still",
        ),
        ("MethodLoss(term.loss + loss,", "MethodLoss(term.loss,", "rewards have no effect"),
        ("self.step >= cold_start", "self.step > cold_start", "rewards come a step late"),
        ("position // len(self.dataset) for", "0 for", "the same plan in every epoch"),
        (
            "first(dmdr.guidance_learning_rate, settings.learning_rate)",
            "settings.learning_rate",
            "guidance_learning_rate has no effect",
        ),
        (
            "steps if dmdr.dynamic_guidance else None",
            "steps if dmdr.dynamic_renoise else None",
            "dynamic_guidance has no effect",
        ),
        ("self.step + 1, figures)", "self.step, figures)", "losses are logged a step early"),
        (
            "config.dmdr.fake_scale, config.dmdr.real_guidance_scale",
            "config.dmdr.real_guidance_scale, config.dmdr.fake_scale",
            "scales swapped",
        ),
    ),
    *of(
        "trainers/dmdr_outputs.py",
        "trainers/test_dmdr_trainer.py::test_the_documented_tree_lies_over_the_run",
        (
            'exports = {"lora_gui": GUIDANCE_EXPORT, "lora_gen": f"lora_{part}"}',
            'exports = {"lora_gen": GUIDANCE_EXPORT, "lora_gui": f"lora_{part}"}',
            "adapters of the other network",
        ),
    ),
    *of(
        "trainers/run.py",
        ("trainers/test_run.py",),
        ('if config.training.method == "dmdr":', 'if config.training.method == "dpo":', "distillation is finetuning"),
        ("if config.uses_reward():", "if not config.uses_reward():", "rewards and targets swapped"),
        (
            "enabled = config.distributed.enabled is not False",
            "enabled = True",
            "distributed.enabled: false has no effect",
        ),
    ),
    *of(
        "trainers/opd_trainer.py",
        "trainers/test_opd_trainer.py",
        ("decode=False", "decode=True", "images are decoded that nobody looks at"),
        ("for prompt in chunk.prompts for _", "for prompt in chunk.prompts[::-1] for _", "teachers of other prompts"),
    ),
]
