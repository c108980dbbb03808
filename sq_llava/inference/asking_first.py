"""The model asks itself about an image before it answers, and answers with its own questions in view.

    user: <image> DESCRIBE     assistant: a description        unless there is an answer, and no new image
    vusr: What is behind it?   assistant: A tree.              `self_questions` times
    user: the user's question  assistant: the answer

The image goes through the model once. Questions are sampled, and answers are greedy. With `votes`, the model does this
several times behind one description, and its most frequent answer counts (Wang et al., 2022,
https://arxiv.org/abs/2203.11171).
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from modeling_sq_llava import SQLlavaForConditionalGeneration
from processing_sq_llava import SQLlavaProcessor
from sq_llava.data.messages import images_of
from sq_llava.inference.dialogues import DESCRIBE, Dialogues
from sq_llava.inference.prompts import context_length, token_ids
from sq_llava.inference.settings import AskSettings, SelfQuestioning


# Most tokens that a chat template writes around a turn.
TEMPLATE_TOKENS = 24


@dataclass(frozen=True)
class Considered:
    """
    An answer, and what the model asked before it.

    Args:
        answer (`str`): The answer.
        asked (`list[list[dict[str, str]]]`): For each vote, pairs of a `question` and its `answer`.
    """

    answer: str
    asked: list[list[dict[str, str]]]


def answer_after_asking(
    model: SQLlavaForConditionalGeneration,
    processor: SQLlavaProcessor,
    conversations: list[list[dict]],
    settings: SelfQuestioning,
    max_new_tokens: int,
    seeds: list[int] | None = None,
) -> list[Considered]:
    """
    Args:
        conversations (`list[list[dict]]`): Messages that end with a user turn, with the images in place.
        settings ([`SelfQuestioning`]): Number of questions and votes.
        max_new_tokens (`int`): Maximum length of an answer to the user, in tokens. It is shorter if the model's
            context ends.
        seeds (`list[int]`, *optional*): One random seed for each conversation. With it, the questions do not depend on
            the rest of the batch.

    Raises:
        ValueError: if a conversation has no image, does not end with a user turn, or fills the model's context.
    """
    for conversation in conversations:
        if not images_of(conversation):
            raise ValueError("self_questions needs an image: the model asks about images.")
        if conversation[-1]["role"] != "user":
            raise ValueError("self_questions needs messages that end with a user turn.")
    found: list[Considered | None] = [None] * len(conversations)
    # Conversations that need a description come in one batch, the others in another one.
    for describe in (True, False):
        places = [place for place, messages in enumerate(conversations) if _needs_description(messages) == describe]
        if places:
            own_seeds = None if seeds is None else [seeds[place] for place in places]
            batch = [conversations[place] for place in places]
            results = _consider(model, processor, batch, describe, settings, max_new_tokens, own_seeds)
            for place, result in zip(places, results, strict=True):
                found[place] = result
    return found


def _needs_description(messages: list[dict]) -> bool:
    """Whether there is no answer yet, or the last turn has an image, which no answer is about."""
    return bool(images_of(messages[-1:])) or all(message["role"] != "assistant" for message in messages)


@dataclass(frozen=True)
class OwnTurns:
    """
    How long the model's own turns may be, so that the later ones and the answer to the user fit into its context too.

    Args:
        context (`int`): Maximum number of tokens in the model's context.
        last_tokens (`int`): Tokens of the user's last turn, which comes after the model's own turns.
        answer_tokens (`int`): Tokens to keep for the answer. At most a quarter of what is left is kept.
        most (`int`): Maximum length of a turn, in tokens.
    """

    context: int
    last_tokens: int
    answer_tokens: int
    most: int = SelfQuestioning.own_tokens

    def length(self, known: int, turns_left: int, ask: bool = False) -> int:
        """
        Maximum length of the next turn, in tokens: at least 1.

        Args:
            known (`int`): Tokens of the conversation so far.
            turns_left (`int`): Number of turns that the model still writes before its answer, this one included.
            ask (`bool`): The next turn is a question.
        """
        room = max(0, self.context - known - self.last_tokens)
        # One turn more than there are, because text that is read again can have more tokens.
        share = (room - min(self.answer_tokens, room // 4)) // (turns_left + 1) - TEMPLATE_TOKENS
        return max(1, min(self.longest(ask), share))

    def longest(self, ask: bool) -> int:
        """Maximum length of a turn where there is room enough."""
        return min(self.most, AskSettings.max_new_tokens) if ask else self.most


class _TooLong(Exception):
    """A text of a batch was cut because the longest conversation left too little room."""


def _consider(model, processor, conversations, describe: bool, settings, max_new_tokens, seeds) -> list[Considered]:
    try:
        return _consider_together(model, processor, conversations, describe, settings, max_new_tokens, seeds)
    except _TooLong:
        # One by one, only the texts of a long conversation are cut short.
        own_seeds = [None] * len(conversations) if seeds is None else [[seed] for seed in seeds]
        return [
            _consider_together(model, processor, [messages], describe, settings, max_new_tokens, seed)[0]
            for messages, seed in zip(conversations, own_seeds, strict=True)
        ]


def _consider_together(model, processor, conversations, describe, settings, max_new_tokens, seeds):
    votes, turns_left = settings.votes, 2 * settings.self_questions + describe
    starts, lasts = zip(*map(split_last_turn, conversations))
    context = context_length(model)
    last_tokens = max(map(len, token_ids(processor, [[last] for last in lasts])))
    own_turns = OwnTurns(context, last_tokens, max_new_tokens, settings.own_tokens)
    dialogues = Dialogues(model, processor, list(starts))
    asking = AskSettings()

    def known_tokens() -> int:
        return max(map(len, token_ids(processor, dialogues.messages)))

    def add_turn(ask: bool) -> None:
        length = own_turns.length(known_tokens(), turns_left, ask)
        if ask:
            dialogues.ask_next(asking.temperature, asking.top_k, asking.top_p, length)
        else:
            dialogues.answer(length)
        check(length, own_turns.longest(ask))

    def check(length: int, wanted: int) -> None:
        if len(conversations) > 1 and length < wanted and dialogues.reached_limit:
            raise _TooLong

    if describe:
        add_turn(ask=False)
        turns_left -= 1
    dialogues = dialogues.repeated(votes, seeds)
    begins = [len(messages) for messages in dialogues.messages]
    while turns_left:
        add_turn(ask=turns_left % 2 == 0)
        turns_left -= 1
    for number, messages in enumerate(dialogues.messages):
        messages.append(lasts[number // votes])
    length = max(1, min(max_new_tokens, context - known_tokens()))
    answers = dialogues.answer(length)
    check(length, max_new_tokens)
    pairs = []
    for begin, messages in zip(begins, dialogues.messages):
        own = messages[begin:-2]
        pairs.append([{"question": one["content"], "answer": two["content"]} for one, two in zip(own[::2], own[1::2])])
    return [
        # Of answers that are equally frequent, the first one counts.
        Considered(Counter(answers[begin : begin + votes]).most_common(1)[0][0], pairs[begin : begin + votes])
        for begin in range(0, len(answers), votes)
    ]


def split_last_turn(messages: list[dict]) -> tuple[list[dict], dict]:
    """
    Returns what comes before the model's own questions, and the user's last turn. Images of the last turn move into
    one that asks for a description, so that the model sees them before it asks.
    """
    *head, last = messages
    if not _needs_description(messages):
        return head, last
    images = [part for part in last["content"] if part["type"] == "image"]
    texts = [part for part in last["content"] if part["type"] != "image"]
    first = {"role": "user", "content": [*images, {"type": "text", "text": DESCRIBE}]}
    return [*head, first], {**last, "content": texts}


@dataclass(frozen=True)
class AsksFirst:
    """
    A model that asks itself before each answer, with the methods that an evaluation needs. Prompts without an image
    are answered at once.

    Args:
        assistant ([`Assistant`]): The model.
        settings ([`SelfQuestioning`]): Number of questions and votes.
        seed (`int`): Random seed of the questions about each image.
    """

    assistant: Any
    settings: SelfQuestioning
    seed: int = 0

    def render(self, messages: list[dict]) -> str:
        return self.assistant.render(messages)

    def answer_batch(self, requests: list[tuple], max_new_tokens: int) -> list[str]:
        if not requests[0][0]:  # the requests of a batch have the same number of images
            return self.assistant.answer_batch(requests, max_new_tokens)
        found = self.assistant.consider_batch(requests, self.settings, max_new_tokens, [self.seed] * len(requests))
        return [each.answer for each in found]
