"""Pairs as preference tuning reads them."""

from tests.mutants.catalogue import of

MUTATIONS = [
    *of(
        "engine/encoding/ahead.py",
        "preference/test_pair_encoding.py",
        ("image=view.digest, size=view.size,", "image=view.digest,", "cache keys without the size"),
        ('{"flipped": True} if view.flipped else {}', "{}", "a picture and its mirror image have one name"),
        ('encoder=self._fact("image")', "encoder=0", "image keys without the encoder"),
        ('"text", text=text, encoder=self._fact("text")', '"text", text=text', "text keys without the encoder"),
        ("[*new_views, *new_texts][rank::size]", "[*new_views][:1]", "only one image is encoded ahead"),
        ("slice(row, row + 1)", "slice(0, 1)", "all rows have the tensors of the first"),
    ),
    *of(
        "engine/encoding/batches.py",
        ("preference/test_pair_families.py", "trainers/test_sdxl_finetuning.py"),
        ("if blank or not gone else", "if blank or gone else", "kept prompts are dropped"),
        ("kept = ~torch.tensor(", "kept = torch.tensor(", "zeros where the prompt is kept"),
    ),
    *of(
        "trainers/supervised_terms.py",
        "trainers/test_sdxl_finetuning.py",
        ("self._draws(names)[1].tolist()", "[False] * len(names)", "no prompt is dropped"),
        ("batch.size, rows=len(names)", "(0, 0), rows=len(names)", "the UNet is told no size"),
        ("self.config.training.min_snr_gamma)", "None)", "training.min_snr_gamma has no effect"),
    ),
    *of(
        "engine/encoding/encoder.py",
        "preference/test_pair_encoding.py",
        ("if pictures else [unet.text_encoder, unet.text_encoder_2]", "", "a VAE that is in use sleeps"),
        ("for grid in grids], dim=1)", "for grid in grids[::-1]], dim=1)", "the preview's tokens come last"),
    ),
    *of(
        "preference/reference_log_probs.py",
        "preference/test_reference_log_probs.py",
        ("values.T.flatten()", "values.flatten()", "chosen and rejected are interleaved"),
        ("if digest not in self._values]", "if digest in self._values]", "known pairs are lacking"),
        ("(float(a), float(b)) for pair", "(float(b), float(a)) for pair", "a checkpoint swaps chosen and rejected"),
        ("self._values |= values", "self._values = values", "only the last process's numbers stay"),
    ),
    *of(
        "preference/encoded_pairs.py",
        (
            "preference/test_pair_encoding.py",
            "trainers/test_dpo_trainer.py::test_sft_learns_the_preferred_images_without_a_reference",
        ),
        (
            "[(pair.rejected, pair) for pair in pairs if self.rejected]",
            "[(pair.rejected, pair) for pair in pairs]",
            "SFT encodes rejected images",
        ),
        (
            "[(pair.preferred, pair) for pair in pairs] + [(pair.rejected",
            "[(pair.rejected, pair) for pair in pairs] + [(pair.preferred",
            "roles swapped",
        ),
        ("digest=view.digest", "digest=None", "a changed image is encoded under its old name"),
        (
            'self.rejected = config.dpo.loss == "dpo"',
            'self.rejected = config.dpo.loss != "dpo"',
            "SFT with rejected ones",
        ),
    ),
    *of(
        "preference/pair_families.py",
        ("preference/test_pair_encoding.py", "preference/test_pair_families.py"),
        ("text = SDXLText.cat([text, text])", "pass", "rejected images without a prompt"),
        ("tokens[:, -grid[0] * grid[1] :]", "tokens[:, : grid[0] * grid[1]]", "the DiT half sees the preview"),
        ("drop.repeat(copies)", "drop.repeat_interleave(copies)", "dropped rows are others'"),
        (
            "rows = torch.arange(len(pairs), device=device).repeat(copies)",
            "rows = torch.arange(len(pairs), device=device).repeat_interleave(copies)",
            "prompts of other pairs",
        ),
        ("prompts * copies", "[p for p in prompts for _ in range(copies)]", "quoted words of other pairs"),
        (
            'images["original_sizes"], images["crops"], self.size_of(pairs)',
            'self.size_of(pairs), images["crops"], images["original_sizes"]',
            "sizes swapped",
        ),
    ),
]
