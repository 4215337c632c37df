"""Which prompts GLM-Image can take: the AR half reads them whole or not at all, the glyph encoder cuts long quotes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import AutoConfig, AutoTokenizer, GlmImageConfig, PreTrainedTokenizerBase

from glm_training.models.glm_image.full_width import FULL_WIDTH, SHAPE, full_width_configuration
from glm_training.models.glm_image.glyph import MAX_GLYPH_TOKENS, MAX_SPAN_TOKENS, glyph_texts, glyph_token_bound
from glm_training.models.glm_image.positions import Mode, generation_grids, image_grid
from glm_training.models.glm_image.tiny import TINY_FOLDER, tiny_ar_config, tiny_ar_tokenizer
from glm_training.models.loading import load_errors_explained, parts_at_hand
from glm_training.models.prompt_reading import SHORTEN, PromptReading, excerpt, token_ids, too_long

TEMPLATE_TOKENS = 32
"""What the chat template writes around a prompt, at most: the sizes of two grids and the marks of images."""


@dataclass(frozen=True)
class PromptReader:
    """`tokenizer`: of the AR half, whose `config` (`GlmImageConfig`) says how long the context is and which ids mark
    images."""

    tokenizer: PreTrainedTokenizerBase
    config: Any

    parts: ClassVar[tuple[str, ...]] = ("processor", "vision_language_encoder")
    """Folders of a pipeline that it is made from."""

    @classmethod
    def load(cls, name: str, revision: str | None = None) -> PromptReader | None:
        """Of "tiny", "tiny-random", "full-width", a pipeline folder or a hub id in the local cache; None where its
        files are not here. Raises ModelLoadError for files that cannot be read."""
        if name == "tiny-random":
            tokenizer = tiny_ar_tokenizer()
            return PromptReader(tokenizer, tiny_ar_config(tokenizer))
        if name == FULL_WIDTH:
            config = GlmImageConfig.from_dict(full_width_configuration("vision_language_encoder"))
            return PromptReader(tiny_ar_tokenizer(SHAPE), config)
        folder = TINY_FOLDER if name == "tiny" else parts_at_hand(name, cls.parts, revision)
        if folder is None or not folder.is_dir():
            return None
        with load_errors_explained(f"the tokenizer in {folder}"):
            return PromptReader(
                AutoTokenizer.from_pretrained(str(folder / "processor"), trust_remote_code=False),
                AutoConfig.from_pretrained(str(folder / "vision_language_encoder"), trust_remote_code=False),
            )

    def read(self, prompts: Sequence[str], height: int, width: int, mode: Mode) -> list[PromptReading]:
        """One reading per prompt, for images of `height` x `width` px; ValueError for sizes that no image has."""
        room = self._room(height, width, mode)
        if room < 1:
            reason = f"an image of {height} x {width} px fills the AR half's context and leaves no room for a prompt"
            return [PromptReading((reason, "Take a smaller image size")) for _ in prompts]
        rows = token_ids(prompts, self.tokenizer, marks=False)
        return [too_long(prompt) or self._read(prompt, ids, room) for prompt, ids in zip(prompts, rows, strict=True)]

    def _room(self, height: int, width: int, mode: Mode) -> int:
        """Tokens of the context that images and template leave to a prompt."""
        grids = generation_grids(height, width, mode)
        if mode == "i2i":
            grids = (*grids, image_grid(height, width))  # the source
        images = sum(rows * columns for rows, columns in grids)
        context: int = self.config.text_config.max_position_embeddings
        return context - images - TEMPLATE_TOKENS

    def _read(self, prompt: str, ids: list[int], room: int) -> PromptReading:
        reserved = {self.config.image_start_token_id, self.config.image_end_token_id, self.config.image_token_id}
        for name in self.tokenizer.convert_ids_to_tokens(sorted(reserved.intersection(ids))):
            return PromptReading((f"the prompt contains the reserved token {name}", "Take it out"))
        if len(ids) > room:
            reason = f"the prompt has {len(ids)} tokens, and the AR half has room for {room} beside those of the image"
            return PromptReading((reason, SHORTEN))
        spans = glyph_texts(prompt)
        if glyph_token_bound(spans) > MAX_GLYPH_TOKENS:
            reason = f"{len(spans)} quoted texts come to over {MAX_GLYPH_TOKENS} bytes, the most that can be drawn"
            return PromptReading((reason, "Quote less"))
        for span in spans:
            read = span.encode("utf-8")[: MAX_SPAN_TOKENS - 1]
            if len(span.encode("utf-8")) > len(read):
                told = f"a quoted text of {len(span.encode('utf-8'))} bytes, of which {len(read)} are drawn, up to "
                return PromptReading(cut=told + repr(excerpt(read.decode("utf-8", "ignore"))))
        return PromptReading()
