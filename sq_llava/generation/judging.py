"""A judge of self-generated turns: another vision-language model on an OpenAI-compatible server.

The judge sees the image, the question and the answer, and accepts or rejects them. Its prompt is a file that can be
copied and edited (`sq-llava generate-data prompts self NEW_FOLDER`).

The judge cannot correct an answer.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sq_llava.data.images import chat_part
from sq_llava.generation.prompt_files import read_prompt_file
from sq_llava.llm_client.asking import Asked, ask_all
from sq_llava.llm_client.client import ChatClient, ChatRequest, Messages, UnusableAnswer


# The first word of an answer, perhaps after a label and between marks: "**Verdict:** Accept".
_VERDICT = re.compile(r"\W*(?:(?:final\s+)?(?:verdict|decision|judge?ment|answer)\W+)?(accept|reject)(?:ed)?\b", re.I)


@dataclass(frozen=True)
class Exhibit:
    """The parts of a turn that the judge sees."""

    image: Path
    question: str
    answer: str


def read_prompt(folder: Path) -> str:
    """
    The judge's prompt, from `judge.txt`.

    Raises:
        ValueError: If the file is missing or empty.
    """
    return read_prompt_file(folder / "judge.txt", "self").strip()


def judge_turns(client: ChatClient, prompt: str, exhibits: Mapping[str, Exhibit]) -> Asked:
    """
    Asks the judge about each turn. A client with `reads_only` uses only earlier answers.

    Args:
        client (`ChatClient`): The judge's server.
        prompt (`str`): System message of the judge.
        exhibits (`Mapping`): The turns by their ids.

    Returns:
        The results are `True` for an accepted turn, `False` for a rejected turn, and `None` if no
        answer could be read in all attempts.
    """

    def judge(exhibit: Exhibit) -> bool | None:
        try:
            for text in client.answers(as_messages(prompt, exhibit)):
                if found := _VERDICT.match(text):
                    return found[1].lower() == "accept"
        except UnusableAnswer:
            pass  # cut off, empty or filtered in all attempts
        return None

    return ask_all(client, exhibits, judge, "Judging")


def first_requests(client: ChatClient, prompt: str, exhibits: Mapping[str, Exhibit]) -> list[ChatRequest]:
    """The first request of each turn, for an estimate."""
    return [client.request(as_messages(prompt, exhibit)) for exhibit in exhibits.values()]


def as_messages(prompt: str, exhibit: Exhibit) -> Messages:
    text = f"Question: {exhibit.question}\nAnswer: {exhibit.answer}"
    parts = [chat_part(exhibit.image), {"type": "text", "text": text}]
    return [{"role": "system", "content": prompt}, {"role": "user", "content": parts}]
