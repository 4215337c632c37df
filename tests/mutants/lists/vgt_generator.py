"""VGT's generator: what it reads, what it draws, and its loss."""

from tests.mutants.catalogue import of

SEQUENCE = ("models/vgt/test_sequence.py", "models/vgt/test_generator.py", "models/vgt/test_sampling.py")
SAMPLING = ("models/vgt/test_sampling.py",)

MUTATIONS = [
    *of(
        "algorithms/flow_tokens.py",
        ("algorithms/test_flow_tokens.py",),
        ("return 1 - shift * level", "return shift * level", "t = 1 is noise"),
        ("(1 + (shift - 1) * level)", "(1 + shift * level)", "the shift is not the published one"),
        ("clean - noise\n", "noise - clean\n", "the velocity leads to the noise"),
        (
            "return 1 + (guidance - 1) * (groups - group)",
            "return 1 + (guidance - 1) * (groups - group - 1)",
            "guidance fades a group early",
        ),
        ("(time * velocity - state) / (1 - time)", "(velocity - state) / (1 - time)", "the score lacks t"),
        ("(2 * (1 - time) * step) ** 0.5", "((1 - time) * step) ** 0.5", "the steps add too little noise"),
        ("LAST_TIME / (steps - 1)", "LAST_TIME / steps", "the stochastic steps stop short of .96"),
        ("return state + (1 - LAST_TIME) * velocity(state, LAST_TIME).float()", "return state", "no last step"),
        ("eps=NORM_EPS", "eps=0.0", "flat channels are divided by zero"),
    ),
    *of(
        "models/vgt/sequence.py",
        SEQUENCE,
        ("mask = [[False] * (longest", "mask = [[True] * (longest", "padding is read"),
        (".cumsum(1).sub(1).clamp(min=0)", ".cumsum(1)", "positions begin at 1"),
        ("& real[:, None, None, :] | own", "& real[:, None, None, :]", "padding looks at nothing"),
        ("square[read:, cached + read :] = own[read:, cached + read :]", "pass", "queries of a group see each other"),
        ("order.argsort(dim=1))", "order)", "tokens come back in another order"),
        (
            "[size + 1] * larger + [size] * (groups - larger)",
            "[size] * (groups - larger) + [size + 1] * larger",
            "the last groups are the larger ones",
        ),
        ("torch.stack([queries, latents]", "torch.stack([latents, queries]", "latents before their queries"),
    ),
    *of(
        "models/vgt/prompt_text.py",
        ("models/vgt/test_sequence.py",),
        ("[: self._room] + self._after", "+ self._after", "long captions are not cut"),
        ("split_special_tokens=True", "split_special_tokens=False", "captions can spell the marks"),
        ("if prompt.strip() else", "if prompt else", "a blank caption is conditional"),
    ),
    *of(
        "models/vgt/flow_head.py",
        ("models/vgt/test_flow_head.py",),
        ("[angles.cos(), angles.sin()]", "[angles.sin(), angles.cos()]", "sines before cosines"),
        ("self.norm(hidden) * (1 + scale)", "self.norm(hidden) * scale", "a block's scale is not around 1"),
        ("max(1, len(self.blocks) // 2)", "len(self.blocks)", "REPA's features are the last ones"),
        ("for layer in zero:", "for layer in zero[:1]:", "modulations do not start at zero"),
    ),
    *of(
        "models/vgt/generator.py",
        ("models/vgt/test_generator.py",),
        ("hidden[:, text::2]", "hidden[:, text + 1 :: 2]", "a condition has read its own latent"),
        ("            part.requires_grad_(False)", "            pass", "tied embeddings are trained"),
        ("(self.config.query_grid - side) // 2", "0", "grids begin in the corner"),
        ("flatten(2).transpose(1, 2) + places, places", "flatten(2).transpose(1, 2), places", "queries have no place"),
        ("if latent_channels != self.latent_channels:", "if False:", "another autoencoder's latents pass"),
        (".to(embeddings.dtype) + embeddings", ".to(embeddings.dtype)", "latents have no place"),
    ),
    *of(
        "models/vgt/sampling.py",
        SAMPLING,
        ("self._cache.crop(1 - group)", "self._cache.crop(0)", "stale queries stay in the cache"),
        ("2 * start :: 2]", "2 * start :]", "queries of a group stand side by side"),
        ("embedded)[:, 1:]", "embedded)", "a group's first query is read twice"),
        ("return without + weight", "return with_text + weight", "guidance 1 too strong"),
        ("drawn = channel_norm(drawn, dim=-1)", "pass", "sampled latents are not normed"),
        ("if generator.config.latent_norm:", "if True:", "latents are normed whatever the autoencoder"),
        ("with without_dropout(generator):", "if True:", "dropout acts while drawing"),
        ("raster(torch.cat(tokens, dim=1), order)", "torch.cat(tokens, dim=1)", "latents stay in the order of writing"),
    ),
    *of(
        "methods/token_flow.py",
        ("methods/test_token_flow.py",),
        ("return -F.cosine", "return F.cosine", "features are driven away from the teacher's"),
        ("teacher.detach()", "teacher", "the teacher gets a gradient"),
        ("self.repa_weight * alignment", "alignment", "REPA has no weight"),
        ("token_times(draws, self.time_shift)", "token_times(draws)", "the shift is not obeyed"),
    ),
]
