"""Several conversations in one batch: the model answers and asks, turn after turn, and reads each token once.

    >>> dialogues = Dialogues.start(model, processor, ["photo.jpg"], None, max_new_tokens=300)
    >>> dialogues.ask(num_questions=5, temperature=1.2, top_k=300, top_p=0.95, max_new_tokens=64)

Questions are sampled. Answers are always greedy.
"""

from itertools import chain

import torch
from PIL import Image
from transformers import LogitsProcessorList
from transformers.generation import BaseStreamer

from modeling_sq_llava import CACHE_NAME, SQLlavaForConditionalGeneration
from processing_sq_llava import SQLlavaProcessor
from sq_llava.data.messages import images_of, place_images_of_all
from sq_llava.inference.prefix_cache import PrefixCache, allows_gaps
from sq_llava.inference.prompts import decode, pixel_inputs, room_in_context, token_ids
from sq_llava.inference.sampling import SeededDraw


# As in the authors' code, the model first describes the image: in training, it never asks the first question of a
# conversation.
DESCRIBE = "Can you describe the image in detail?"


class Dialogues:
    """
    Several conversations in one batch, and the key-value cache for them. No token is computed twice.

    Args:
        model, processor: An SQ-LLaVA and its processor.
        messages (`list[list[dict]]`): The messages of each conversation, with the images in place. `answer` appends
            to them.
        seeds (`list[int]`, *optional*): One random seed for the questions of each conversation.
    """

    def __init__(
        self,
        model: SQLlavaForConditionalGeneration,
        processor: SQLlavaProcessor,
        messages: list[list[dict]],
        seeds: list[int] | None = None,
    ):
        self.model = model
        self.processor = processor
        self.messages = messages
        self.cache = PrefixCache(model, len(messages))
        self.reached_limit = False  # whether a text of the last call has as many tokens as were allowed
        self.seed(seeds)

    @classmethod
    def start(
        cls,
        model: SQLlavaForConditionalGeneration,
        processor: SQLlavaProcessor,
        images: list,
        histories: list[list[dict]] | None,
        max_new_tokens: int,
        seeds: list[int] | None = None,
    ) -> "Dialogues":
        """
        Conversations that end with an answer, so that the model can ask next.

        Args:
            images: One entry for each conversation: a path, a PIL image, or a list of them.
            histories (`list[list[dict]]`, *optional*): One history for each entry of `images`. Default: the model
                describes each image.
            max_new_tokens (`int`): Maximum length of a description, in tokens.
            seeds (`list[int]`, *optional*): One random seed for each entry of `images`.

        Raises:
            ValueError: if a history does not end with an answer, or the number of seeds is wrong.
        """
        if seeds is not None and len(seeds) != len(images):
            raise ValueError(f"There are {len(seeds)} seeds for {len(images)} conversations: give one seed for each.")
        for history in histories or []:
            role = history[-1]["role"] if history else None
            if role != "assistant":
                raise ValueError(f"The history ends with the role {role!r}. It must end with an answer (assistant).")
        if histories:
            return cls(model, processor, place_images_of_all(list(zip(images, histories, strict=True))), seeds)
        dialogues = cls(model, processor, place_images_of_all([(image, DESCRIBE) for image in images]), seeds)
        dialogues.answer(max_new_tokens)
        return dialogues

    def seed(self, seeds: list[int] | None) -> None:
        """Restarts the random generators of the conversations. Without seeds, the default generator is used."""
        self.generators = [None]
        if seeds is not None:
            self.generators = [torch.Generator(self.model.device).manual_seed(seed) for seed in seeds]

    def repeated(self, times: int, seeds: list[int] | None = None) -> "Dialogues":
        """
        New conversations: each of these `times` times, one after another. Nothing is computed again.

        Args:
            seeds (`list[int]`, *optional*): One random seed for each conversation of this batch. The copies of a
                conversation get different seeds.
        """
        rows = [row for row in range(len(self.messages)) for _ in range(times)]
        messages = [list(self.messages[row]) for row in rows]
        if seeds is not None:
            seeds = [times * seeds[row] + number % times for number, row in enumerate(rows)]
        copies = Dialogues(self.model, self.processor, messages, seeds)
        if not self.cache.is_empty:
            copies.cache = self.cache.select(rows)
        return copies

    @property
    def images(self) -> list[list[Image.Image]]:
        """The images of each conversation."""
        return [images_of(conversation) for conversation in self.messages]

    @torch.inference_mode()
    def answer(self, max_new_tokens: int, streamer: BaseStreamer | None = None) -> list[str]:
        """
        Answers the last turn of each conversation greedily. Appends the answers to `messages` and returns them.

        Args:
            max_new_tokens (`int`): Maximum length of an answer, in tokens.
            streamer (`BaseStreamer`, *optional*): Gets the tokens as they are generated. For a single conversation.
        """
        prompts, max_new_tokens = self._prompts(ask=False, max_new_tokens=max_new_tokens)
        images = self._unseen_pixels()
        inputs = self.cache.continue_with(prompts)
        output = self.model.generate(
            **inputs,
            **images,
            **{CACHE_NAME: self.cache.states},
            do_sample=False,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
        )
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        self.reached_limit = new_tokens.shape[1] == max_new_tokens
        # The cache holds all tokens but the last one, which the model has not read. Tokens after the end of a shorter
        # answer are in no prompt, so the next turn drops them.
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(new_tokens)], dim=1)
        self.cache.remember(output[:, :-1], mask[:, :-1])
        texts = decode(self.processor, new_tokens)
        for conversation, text in zip(self.messages, texts):
            conversation.append({"role": "assistant", "content": text})
        return texts

    @torch.inference_mode()
    def ask(
        self, num_questions: int, temperature: float, top_k: int, top_p: float, max_new_tokens: int
    ) -> list[list[str]]:
        """Samples questions for each conversation. The conversations do not change."""
        prompts, max_new_tokens = self._prompts(ask=True, max_new_tokens=max_new_tokens)
        inputs = self.cache.read(prompts, self._unseen_pixels())
        rows = [row for row in range(len(prompts)) for _ in range(num_questions)]
        images = {}
        if self.cache.states is None:  # nothing can be cached: each row reads its images again
            images = pixel_inputs(self.model, self.processor, [image for row in rows for image in self.images[row]])
        draw = SeededDraw(temperature, top_k, top_p, self.generators)
        output = self.model.generate(
            input_ids=inputs["input_ids"][rows],
            attention_mask=inputs["attention_mask"][rows],
            **images,
            **{CACHE_NAME: self.cache.select(rows).states},
            do_sample=False,
            logits_processor=LogitsProcessorList([draw]),
            max_new_tokens=max_new_tokens,
        )
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        self.reached_limit = new_tokens.shape[1] == max_new_tokens
        texts = decode(self.processor, new_tokens)
        return [texts[start : start + num_questions] for start in range(0, len(texts), num_questions)]

    def ask_next(self, temperature: float, top_k: int, top_p: float, max_new_tokens: int) -> list[str]:
        """Samples one question for each conversation. Appends the questions to `messages` and returns them."""
        questions = [question for [question] in self.ask(1, temperature, top_k, top_p, max_new_tokens)]
        for conversation, question in zip(self.messages, questions):
            conversation.append({"role": "vusr", "content": question})
        return questions

    def _prompts(self, ask: bool, max_new_tokens: int) -> tuple[list[list[int]], int]:
        """The token ids of each prompt, and how many tokens there is room for (at most `max_new_tokens`)."""
        prompts = token_ids(self.processor, self.messages, ask)
        max_new_tokens = room_in_context(self.model, [len(prompt) for prompt in prompts], max_new_tokens)
        length = self.cache.tokens.shape[1] + max(map(len, prompts)) + max_new_tokens
        if len(prompts) > 1 and not allows_gaps(self.model, length):
            self.cache = PrefixCache(self.model, len(prompts))
        return prompts, max_new_tokens

    def _unseen_pixels(self) -> dict[str, torch.Tensor]:
        """The pixels of all images, if the cache does not hold them yet."""
        images = chain.from_iterable(self.images) if self.cache.is_empty else []
        return pixel_inputs(self.model, self.processor, list(images))
