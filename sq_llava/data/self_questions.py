"""Draws which turns of a conversation are self-questions, and names the kinds of tokens.

In this example turn 2 is drawn as a self-question. The text between stars is in the loss (paper, section 3.3):

    SYSTEM USER: <image>
    What animal is this? ASSISTANT:* A dog.</s>*[vusr]* What is it doing?</s>* ASSISTANT:* Running.</s>*

The first turn always belongs to the user. Each later user turn becomes a `[vusr]` turn with probability
`self_question_ratio` (the paper's 1 - delta). The draw is repeated in each epoch. Rows without an image and turns with
an image are never drawn.
"""

import hashlib


IGNORE_INDEX = -100
NOT_SPOKEN, ANSWER, QUESTION = 0, 1, 2


def is_self_question(ratio: float, seed: int, epoch: int, row_id: int, turn: int) -> bool:
    """
    Draws whether a turn becomes a self-question.

    The result depends on the arguments alone. So it is the same for any number of workers and processes and after a
    resume, and it differs between epochs.
    """
    digest = hashlib.blake2b(f"{seed}:{epoch}:{row_id}:{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < ratio * 2**64


def askable_turns(messages: list[dict]) -> dict[int, int]:
    """Returns the turns that may become self-questions: number among the user turns -> index of the message."""
    has_image = [any(part["type"] == "image" for part in message["content"]) for message in messages]
    user_turns = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if not any(has_image):
        return {}
    return {turn: index for turn, index in enumerate(user_turns) if turn > 0 and not has_image[index]}


def draw_self_questions(messages: list[dict], ratio: float, seed: int, epoch: int, row_id: int) -> list[dict]:
    """
    Flags user turns as self-questions. The chat template begins these with `[vusr]`.

    Args:
        messages (`list[dict]`): With `role` and `content`, a list of `{"type": "text" | "image", ...}` parts.
        ratio (`float`): Probability for each user turn after the first.
        seed, epoch, row_id (`int`): See [`is_self_question`].

    Returns:
        The messages; the drawn ones have `"self_question": True`. If no turn holds an image, none is drawn.
    """
    turns = askable_turns(messages)
    drawn = {turns[turn] for turn in turns if is_self_question(ratio, seed, epoch, row_id, turn)}
    return [{**m, "self_question": True} if index in drawn else m for index, m in enumerate(messages)]


def first_exchange(messages: list[dict]) -> int:
    """Returns the number of messages up to the first answer: 2, or 3 with a system message. A cut row keeps these."""
    return 2 + (messages[0]["role"] == "system")
