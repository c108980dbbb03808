"""Which turns of a conversation the model asks itself, and which tokens are in the loss.

Turn 2 is drawn as a self-question; the loss is between the stars (paper, section 3.3):

    SYSTEM USER: <image>
    What animal is this? ASSISTANT:* A dog.</s>*[vusr]* What is it doing?</s>* ASSISTANT:* Running.</s>*

The first turn always belongs to the user. Each later one becomes a `[vusr]` turn with probability
`self_question_ratio` (the paper's 1 - delta), drawn anew in each epoch; only samples with an image take part.
"""

import hashlib


IGNORE_INDEX = -100
NOT_SPOKEN, ANSWER, QUESTION = 0, 1, 2


def is_self_question(ratio: float, seed: int, epoch: int, row_id: int, turn: int) -> bool:
    """
    Draws whether a turn is asked by the model. A function of its arguments alone, so the draw is the same for any
    number of workers and processes and after a resume, and anew in each epoch.
    """
    digest = hashlib.blake2b(f"{seed}:{epoch}:{row_id}:{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < ratio * 2**64


def draw_self_questions(messages: list[dict], ratio: float, seed: int, epoch: int, row_id: int) -> list[dict]:
    """
    Flags user turns as self-questions; the chat template renders these with the vusr marker.

    Args:
        messages (`list[dict]`): `role` and `content`, the content a list of `{"type": "text" | "image", ...}` parts.
        ratio (`float`): Probability for each user turn after the first.

    Returns:
        The messages, those drawn with `"self_question": True`. All as they were if no turn holds an image.
    """
    if not any(_has_image(message) for message in messages):
        return messages
    user_turns = [index for index, message in enumerate(messages) if message["role"] == "user"]
    drawn = {
        index
        for turn, index in enumerate(user_turns[1:], start=1)
        if not _has_image(messages[index]) and is_self_question(ratio, seed, epoch, row_id, turn)
    }
    return [{**m, "self_question": True} if index in drawn else m for index, m in enumerate(messages)]


def first_exchange(messages: list[dict]) -> int:
    """How many messages a row that is too long keeps at least: its first question and answer, and a system turn."""
    return 2 + (messages[0]["role"] == "system")


def _has_image(message: dict) -> bool:
    return any(part["type"] == "image" for part in message["content"])
