"""GLM-Image."""

from tests.mutants.catalogue import of

AR = ("models/test_ar_rollout.py", "models/test_ar_sampling.py", "parity/test_ar_replay.py")

MUTATIONS = [
    *of(
        "models/glm_image/ar.py",
        AR,
        (
            "prompt.decode_position_ids[:, :, :-1]], dim=2)",
            "prompt.decode_position_ids[:, :, 1:]], dim=2)",
            "tokens are read one position late",
        ),
        ("[..., : self.num_codes]", "[..., :]", "log-probs over the whole vocabulary"),
        (
            "prompt.input_ids.shape[1] - 1 :]",
            "prompt.input_ids.shape[1] :]",
            "each token is scored by the state after it",
        ),
        ("if prompt.padded else None", "if False else None", "padding is attended to in a replay"),
        (
            "temperature=temperature, support=support)\n        if not entropy",
            "temperature=1.0, support=support)\n        if not entropy",
            "a replay ignores the temperature",
        ),
        (
            "drawn_for = prompt.repeat_interleave(group_size)",
            "drawn_for = prompt.select(torch.arange(len(prompt)).repeat(group_size))",
            "plans belong to other prompts",
        ),
    ),
    *of(
        "models/glm_image/ar.py",
        ("models/test_ar_vq.py",),
        (
            "for grid in prompt.grids], dim=1)",
            "for grid in prompt.grids[::-1]], dim=1)",
            "targets with the large grid first",
        ),
    ),
    *of(
        "models/glm_image/decode.py",
        AR,
        ("position = length + step - 1", "position = length + step", "the cache has a hole"),
        (
            "hidden[:, -1].repeat_interleave(group_size, dim=0)",
            "hidden[:, -1].repeat(group_size, 1)",
            "samples of other prompts",
        ),
        (
            "torch.cat([-first, second], dim=-1)",
            "torch.cat([first, -second], dim=-1)",
            "rotary angles turn the other way",
        ),
        ("masked_fill(~visible, -torch.inf)", "masked_fill(visible, -torch.inf)", "only the padding is seen"),
        (", without_dropout(model):", ":", "dropout while drawing"),
    ),
    *of(
        "models/glm_image/token_sampling.py",
        ("models/test_ar_sampling.py", "models/test_ar_rollout.py", "parity/test_ar_replay.py"),
        (
            "more_probable = descending.cumsum(-1) - descending",
            "more_probable = descending.cumsum(-1)",
            "the nucleus lacks its last code",
        ),
        (
            "log_probs.gather(-1, token) - total.log().float()",
            "log_probs.gather(-1, token)",
            "log-probs are not those of the nucleus",
        ),
        ("logits.float() / temperature", "logits.float() * temperature", "the temperature acts upside down"),
        ("right=True)", "right=False)", "a uniform of 0 draws a code of probability 0"),
        ("self.uniforms[len(self._tokens)] * total", "self.uniforms[0] * total", "every token with the first number"),
        ("log_probs.argmax(-1", "log_probs.argmin(-1", "greedy takes the least likely"),
        ("return -(inside *", "return (inside *", "entropies are negative"),
    ),
    *of(
        "models/glm_image/positions.py",
        ("models/test_ar_positions.py",),
        ("offset += max(rows, columns)", "offset += rows * columns", "the large grid begins too late"),
        ("cell.remainder(columns)\n        parts", "cell.remainder(rows)\n        parts", "columns of another grid"),
        ("math.sqrt(1 / (rows / columns))", "math.sqrt(rows / columns)", "previews are square"),
        (
            "return _on_padding(positions, valid), length - saved",
            "return _on_padding(positions, valid), length",
            "writing begins too late after a source",
        ),
        (
            'cell.div(columns, rounding_mode="floor")\n    column',
            'cell.div(rows, rounding_mode="floor")\n    column',
            "rows of another source grid",
        ),
    ),
    *of(
        "models/glm_image/conditioning.py",
        ("models/test_conditioning.py", "models/test_dit.py", "models/test_dit_glyph.py"),
        (
            "torch.arange(prompts, device=device).repeat_interleave(plans)",
            "torch.arange(prompts, device=device).repeat(plans)",
            "glyphs of other prompts",
        ),
        (
            "torch.where(drop[:, None, None], nothing, glyph)",
            "torch.where(drop[:, None, None], glyph, nothing)",
            "kept rows lose their glyphs",
        ),
        ("drop if condition.dropped is None else drop | condition.dropped", "drop", "rows dropped before come back"),
        ("height=grid[0] * TOKEN_PIXELS", "height=grid[1] * TOKEN_PIXELS", "height and width swapped"),
    ),
    *of(
        "models/glm_image/attention.py",
        ("models/test_dit.py", "parity/test_stock_pipeline.py"),
        (
            "return joint[:, text_tokens:], joint[:, :text_tokens]",
            "return joint[:, :-text_tokens], joint[:, -text_tokens:]",
            "text and image states swapped",
        ),
        (
            "reference_key[self._rows], reference_value[self._rows]",
            "reference_key[: len(self._rows)], reference_value[: len(self._rows)]",
            "rows read other sources",
        ),
        (
            "torch.cat([-second, first], dim=-1)",
            "torch.cat([second, -first], dim=-1)",
            "image angles turn the other way",
        ),
    ),
    *of(
        "models/glm_image/dit.py",
        ("models/test_dit.py", "models/test_dit_sampling.py"),
        (
            "unconditional + guidance_scale * (conditional - unconditional)",
            "conditional + guidance_scale * (conditional - unconditional)",
            "guidance is one too strong",
        ),
        ("empty, ~nothing, None, None)", "empty, nothing, None, None)", "the unconditional branch sees the tokens"),
        (
            "empty, ~nothing, None, None)",
            "condition.glyph, ~nothing, mask, None)",
            "the unconditional branch sees the words",
        ),
        ("dropped[:, None].expand_as(tokens)", "(~dropped)[:, None].expand_as(tokens)", "kept tokens are dropped"),
        (
            "(~dropped)[:, None].expand(-1, reference.tokens)",
            "dropped[:, None].expand(-1, reference.tokens)",
            "dropped rows see the source",
        ),
        (
            "        self.vae.eval()\n        self.text_encoder.eval()\n        return self",
            "        return self",
            "the text encoder drops while training",
        ),
        (
            "            self.transformer.train(training)",
            "            self.transformer.train(False)",
            "training mode is lost after a draw",
        ),
        ("self.transformer.eval()  # LoRA dropout off", "pass", "dropout while drawing"),
        (
            "timestep=torch.zeros(count, dtype=torch.int64",
            "timestep=torch.ones(count, dtype=torch.int64",
            "sources are read at a noise level",
        ),
        (
            "noise = noise.repeat_interleave(branches, dim=0)",
            "noise = noise.repeat(branches, 1, 1, 1)",
            "branches of other plans",
        ),
        ("condition.select(rows * branches)", "condition.select(rows)", "a branch starts under another plan"),
        (
            "self(latents, times, condition, guidance_scale=guidance_scale,",
            "self(latents, times, condition,",
            "sampling without guidance",
        ),
        (").for_rows(source.rows)", ").for_rows(source.rows * 0)", "all rows read the first source"),
    ),
    *of(
        "models/glm_image/sampling.py",
        ("models/test_dit_types.py",),
        ("% TOKENS_PER_HOOK == 1", "% TOKENS_PER_HOOK == 0", "the hook of tokens comes late"),
    ),
    *of(
        "models/glm_image/dit_types.py",
        ("models/test_dit_types.py", "models/test_conditioning.py"),
        ("self.means[:, self.sde_indices.index(step)]", "self.means[:, 0]", "the mean of another step"),
        ("log_probs=self.log_probs[rows]", "log_probs=self.log_probs", "log-probs of other rows"),
        ("self.sigmas[self.sigmas < 1][0]", "self.sigmas[self.sigmas < 1][-1]", "a later level stands in for 1"),
        ("int(mask.sum(dim=1).max())", "int(mask.sum(dim=1).min())", "glyphs are cut to the shortest"),
    ),
    *of(
        "models/glm_image/sampling.py",
        ("models/test_dit_sampling.py",),
        (
            "schedule.sigmas[step + 1],\n            kernel",
            "schedule.sigmas[step],\n            kernel",
            "steps go nowhere",
        ),
        ("step_noise[len(log_probs)]", "step_noise[0]", "the same noise at every step"),
        ("eta=settings.eta,\n            sigma_max", "eta=0.7,\n            sigma_max", "eta has no effect"),
        (
            "schedule.timesteps[step]),\n            schedule",
            "schedule.timesteps[0]),\n            schedule",
            "always the first timestep",
        ),
        ("for offset in (0, 1)}", "for offset in (0,)}", "the end of an SDE step is not kept"),
        ("for step in range(stop):", "for step in range(stop - 1):", "a branch begins a step early"),
        (
            "kernel=settings.kernel if stochastic else",
            "kernel=settings.kernel if not stochastic else",
            "noise outside the window",
        ),
    ),
    *of(
        "models/glm_image/glyph.py",
        "models/test_dit_glyph.py",
        ("if len(rows) % 2 == 0:", "if len(rows) % 2 == 1:", "pads before odd numbers of spans"),
        ("self.clear()\n            self._valid_for", "self._valid_for", "embeddings of another encoder stay"),
        ("attention_mask=mask)", "attention_mask=torch.ones_like(mask))", "padding of other words is attended to"),
        ('return spans or ("",)', "return spans", "no quoted words is nothing at all"),
        ("self._entries.popitem(last=False)", "self._entries.popitem(last=True)", "the newest words are forgotten"),
    ),
    *of(
        "models/glm_image/latents.py",
        ("models/test_dit.py", "parity/test_stock_pipeline.py"),
        ("(torch.cat(parts) - mean) / std", "torch.cat(parts)", "latents are not normalised"),
        ("latents.float() * std + mean", "latents.float() * std", "latents decode without their mean"),
        ("images * 2 - 1", "images", "images are encoded in [0, 1]"),
        (".latent_dist.mode()", ".latent_dist.sample()", "images are encoded at random"),
        (
            "repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)",
            "repeat(1, 2, 2)",
            "tokens are tiled, not enlarged",
        ),
        ("(images / 2 + 0.5).clamp(0, 1)", "images.clamp(0, 1)", "pictures are decoded in [-1, 1]"),
    ),
    *of(
        "models/glm_image/schedule.py",
        ("models/test_dit_sampling.py", "parity/test_stock_pipeline.py"),
        ('** 0.5 * config["max_shift"]', '* config["max_shift"]', "the shift grows with the area"),
        ("timesteps=private.timesteps - 1", "timesteps=private.timesteps", "timesteps are one too high"),
        ("linspace(train_steps, 1.0, steps + 1)", "linspace(train_steps, 1.0, steps)", "other timesteps"),
    ),
    *of(
        "models/glm_image/family.py",
        ("models/test_family.py", "models/test_denoising.py"),
        (
            "return Levels(timestep, 1 - sigma, sigma)",
            "return Levels(timestep, sigma, 1 - sigma)",
            "signal and spread swapped",
        ),
        ("(p, 0 if share_render_noise else n, m)", "(p, 0, m)", "plans share their noise"),
        ("plans=samples,", "renders=samples,", "samples are renders of one plan"),
        ("temperature=sampling.temperature", "temperature=1.0", "evaluations ignore the temperature"),
        ("guidance_scale=sampling.guidance_scale", "guidance_scale=1.5", "evaluations ignore the guidance"),
        ("prompt_ids=prompt_ids,\n            micro", "micro", "held-out noise by place in the batch"),
    ),
    *of(
        "models/glm_image/joining.py",
        "models/test_joining.py",
        ("second.source.rows + len(first.source.latents)", "second.source.rows", "sources of the first rollout"),
        (
            "padded(prompt, prompt.position_ids, 1)",
            "padded(prompt, prompt.position_ids, 0)",
            "positions on the padding",
        ),
        ("(length - prompt.input_ids.shape[1], 0)", "(0, length - prompt.input_ids.shape[1])", "padding on the right"),
    ),
    *of(
        "models/glm_image/vq.py",
        "models/test_ar_vq.py",
        (".mul(255).round()", ".mul(255)", "images are cut to 8 bits, not rounded"),
        ("hidden + _position_embedding(visual, grid, hidden)", "hidden", "patches have no place"),
        ("cell.remainder(columns),\n    )", "cell.remainder(rows),\n    )", "columns of another grid"),
        ("with torch.autocast(device.type, enabled=False):", "if True:", "tokens depend on autocast"),
    ),
]
