"""A batch whose rows have their own settings and can join or leave between two tokens (continuous batching).

The continuous batching of `transformers` (5.23) takes only token ids and no images. `generate` has one setting for all
rows, and returns when the last row is done. Here, new prompts are padded on the left and run in one pass. Their keys
and values are added to those of the running rows, padded on the left to one length. A finished row leaves, and columns
that are padding in all remaining rows are cut off. A greedy row gets the same tokens as alone.
"""

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F
from transformers import (
    Cache,
    DynamicCache,
    DynamicLayer,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from modeling_sq_llava import CACHE_NAME, SQLlavaForConditionalGeneration, SQLlavaSuppressTokens
from sq_llava.inference.prefix_cache import pad_left


# Below this, the most likely token has almost all the probability, and scores divided by it could overflow.
MIN_TEMPERATURE = 0.01

# Settings of `generate` that the batch does not support.
UNSUPPORTED_SETTINGS = (
    "bad_words_ids", "encoder_repetition_penalty", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "min_length", "min_new_tokens", "no_repeat_ngram_size", "repetition_penalty",
    "sequence_bias", "begin_suppress_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of a row, and the conditions that end it. A temperature below 0.01 means greedy decoding."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


class RowText:
    """
    Decodes tokens one by one into text that no longer changes.

    Each piece is decoded together with the piece before it, because a token's text can depend on the token before. The
    result equals that of decoding all tokens at once, except for bytes that are not valid UTF-8.

    Args:
        stop (`tuple[str, ...]`): Strings that end the text. They are not part of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...]):
        self.tokenizer = tokenizer
        self.stop = stop
        self.ids: list[int] = []
        self.begin = self.end = 0  # token range of the piece that was decoded last
        self.text = ""
        self.num_taken = 0
        self.is_stopped = False

    def push(self, token_id: int, is_last: bool) -> None:
        self.ids.append(token_id)
        before, now = self._decode(self.ids[self.begin : self.end]), self._decode(self.ids[self.begin :])
        # A character made of several tokens is complete only with the last of them.
        if now.endswith("\N{REPLACEMENT CHARACTER}") and not is_last:
            return
        searched_from = max(0, len(self.text) - max(map(len, self.stop), default=0))
        piece = now[len(before) :]
        self.text += piece
        # A token without text (e.g. a special token) gives the next one no context: decode both with the piece before.
        if piece:
            self.begin = self.end
        self.end = len(self.ids)
        found = [place for stop in self.stop if (place := self.text.find(stop, searched_from)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.is_stopped = True

    def take(self, is_last: bool) -> str:
        """The new text that can no longer change. All pieces together are the whole text, stripped."""
        certain = len(self.text.rstrip())
        if not is_last:
            for stop in self.stop:
                begins = (size for size in range(min(len(stop), len(self.text)), 0, -1))
                size = next((size for size in begins if self.text.endswith(stop[:size])), 0)
                certain = min(certain, len(self.text[: len(self.text) - size].rstrip()))
        begin = max(self.num_taken, len(self.text) - len(self.text.lstrip()))
        if certain <= begin:
            return ""
        self.num_taken = certain
        return self.text[begin:certain]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


@dataclass(eq=False)
class Row:
    """One text that is being generated. A greedy row has no generator and no processors."""

    sampling: Sampling
    text: RowText
    generator: torch.Generator | None
    processors: LogitsProcessorList
    num_tokens: int = 0
    finish_reason: str | None = None

    @classmethod
    def begin(cls, sampling: Sampling, index: int, tokenizer: PreTrainedTokenizerFast, device: torch.device) -> "Row":
        """
        Args:
            index (`int`): Number of the row within its request. It is added to the seed of the request.
        """
        text = RowText(tokenizer, sampling.stop)
        if sampling.temperature < MIN_TEMPERATURE:
            return cls(sampling, text, None, LogitsProcessorList())
        generator = torch.Generator(device=device)
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed((sampling.seed + index) % 2**63)
        processors = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
        if sampling.top_k is not None:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        return cls(sampling, text, generator, processors)

    def push(self, token_id: int, is_end: bool) -> None:
        self.num_tokens += 1
        is_last = is_end or self.num_tokens == self.sampling.max_new_tokens
        self.text.push(token_id, is_last)
        if is_end or self.text.is_stopped:
            self.finish_reason = "stop"
        elif is_last:
            self.finish_reason = "length"


@dataclass
class Prompt:
    """An encoded conversation: token ids without padding, and pixels `(num_images, channels, height, width)`."""

    input_ids: list[int]
    pixel_values: torch.Tensor | None = None


@dataclass
class Batch:
    """
    The rows that are being generated (B rows, L columns in the cache).

    Args:
        mask (`torch.Tensor` of shape `(B, L)`): 1 for the row's own tokens in `cache`, 0 for padding.
        logits (`torch.Tensor` of shape `(B, vocab_size)`): Scores for the next token of each row, float32.

    Raises:
        ValueError: if generation_config.json has an unsupported setting.
    """

    model: SQLlavaForConditionalGeneration
    rows: list[Row] = field(default_factory=list)
    cache: Cache | None = None
    mask: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    def __post_init__(self):
        settings = self.model.generation_config
        check_settings(settings)
        end = settings.eos_token_id
        self.end_ids = {end} if isinstance(end, int) else set(end or ())
        suppressed = settings.suppress_tokens
        self.suppress = SQLlavaSuppressTokens(suppressed) if suppressed else None

    @torch.inference_mode()
    def join(self, prompts: list[Prompt], rows: list[list[Row]]) -> None:
        """Runs the prompts in one pass, and adds the rows of each prompt. After an error, the batch is as before."""
        if not prompts:
            return
        # Padding is masked, but must not be an image placeholder. No prompt ends with one, so pad with its last token.
        input_ids, mask = pad_left([prompt.input_ids for prompt in prompts], prompts[0].input_ids[-1])
        mask = mask.to(self.model.device)
        pixel_values = [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]
        outputs = self.model(
            input_ids=input_ids.to(self.model.device),
            pixel_values=torch.cat(pixel_values).to(self.model.device) if pixel_values else None,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0),
            cache=DynamicCache(),
            use_cache=True,
            logits_to_keep=1,
        )
        each = torch.tensor([index for index, own in enumerate(rows) for _ in own], device=self.model.device)
        cache = outputs[CACHE_NAME]
        _check_cache(cache)
        cache.batch_select_indices(each)
        mask, logits = mask[each], outputs.logits[each, -1].float()
        if self.rows:
            logits = torch.cat([self.logits, logits])
            cache, mask = _join_caches(self.cache, self.mask, cache, mask)
        self.cache, self.mask, self.logits = cache, mask, logits
        self.rows = self.rows + [row for own in rows for row in own]

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Generates one token for each row. Finished rows leave the batch. Returns all rows that got a token."""
        rows, tokens = self.rows, self._choose()
        for row, token in zip(rows, tokens):
            row.push(token, token in self.end_ids)
        staying = [index for index, row in enumerate(rows) if row.finish_reason is None]
        self.keep(staying)
        if staying:
            self._advance([tokens[index] for index in staying])
        return rows

    @torch.inference_mode()
    def keep(self, indices: list[int]) -> None:
        """Keeps the rows with these indices, and removes the others."""
        if len(indices) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in indices]
        if not indices:
            self.cache = self.mask = self.logits = None
            return
        kept = torch.tensor(indices, device=self.model.device)
        self.cache.batch_select_indices(kept)
        self.mask, self.logits = self.mask[kept], self.logits[kept]
        spare = int(self.mask.any(dim=0).int().argmax())
        if spare:
            self.mask = self.mask[:, spare:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, spare:], layer.values[:, :, spare:]

    def _choose(self) -> list[int]:
        logits = self.logits
        if self.suppress is not None:
            logits = self.suppress(None, logits)
        tokens = logits.argmax(dim=-1)
        for index, row in enumerate(self.rows):
            if row.generator is not None:
                probabilities = row.processors(None, logits[index : index + 1]).softmax(dim=-1)
                tokens[index] = torch.multinomial(probabilities, 1, generator=row.generator)[0, 0]
        return tokens.tolist()

    def _advance(self, tokens: list[int]) -> None:
        position_ids = self.mask.sum(dim=1, keepdim=True)
        self.mask = F.pad(self.mask, (0, 1), value=1)
        outputs = self.model(
            input_ids=torch.tensor(tokens, device=self.model.device).unsqueeze(1),
            attention_mask=self.mask,
            position_ids=position_ids,
            cache=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = outputs.logits[:, -1].float()


def _check_cache(cache: Cache) -> None:
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        raise ValueError(
            f"This language model caches {', '.join(kinds)}, but the server can batch only plain keys and values. Use "
            "vLLM, or `sq-llava answer`."
        )


def _join_caches(
    first: Cache, first_mask: torch.Tensor, second: Cache, second_mask: torch.Tensor
) -> tuple[Cache, torch.Tensor]:
    """Joins the second cache to the first, layer by layer: a copy of the whole would take more memory."""
    num_rows, width = first_mask.shape
    length = max(width, second_mask.shape[1])
    before = (length - width, length - second_mask.shape[1])
    mask = torch.cat([F.pad(mask, (spare, 0)) for mask, spare in zip((first_mask, second_mask), before)])
    try:
        for layer, other in zip(first.layers, second.layers):
            for name in ("keys", "values"):
                states = (getattr(layer, name), getattr(other, name))
                padded = [F.pad(state, (0, 0, spare, 0)) for state, spare in zip(states, before)]
                setattr(layer, name, torch.cat(padded))
    except Exception:  # e.g. out of memory: the layers that were joined become what they were
        for layer in first.layers:
            layer.keys, layer.values = layer.keys[:num_rows, :, -width:], layer.values[:num_rows, :, -width:]
        raise
    return first, mask


def check_settings(settings: GenerationConfig) -> None:
    """
    Raises:
        ValueError: if generation_config.json has a setting that changes the output and is not supported here.
    """
    for name in UNSUPPORTED_SETTINGS:
        value = getattr(settings, name, None)
        if value not in (None, 0, 1.0, []):
            raise ValueError(
                f"generation_config.json: {name} is {value!r}, which the server does not support. Remove it, or use "
                "vLLM."
            )
