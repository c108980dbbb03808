"""A judge of turns that a model made of images: another vision-language model behind an OpenAI-compatible server.

It sees the image, the question and the answer, and accepts them or not. What it is told is a file that can be copied
and edited (`sq-llava generate-data prompts self FOLDER`). What this module does not do: let it mend an answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sq_llava.data.images import chat_part
from sq_llava.llm_client.asking import Asked, ask_all
from sq_llava.llm_client.client import ChatClient, ChatRequest, Messages
from sq_llava.llm_client.replies import without_thoughts


ATTEMPTS = 3
WORDS = {"accept": True, "reject": False}


@dataclass(frozen=True)
class Exhibit:
    """What the judge sees of a turn."""

    image: Path
    question: str
    answer: str


def read_prompt(folder: Path) -> str:
    """
    What the judge is told, from `judge.txt`.

    Raises:
        ValueError: if the file is missing or empty.
    """
    path = folder / "judge.txt"
    text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if not text:
        raise ValueError(f"{path}: missing or empty. Start from a copy: sq-llava generate-data prompts self {folder}")
    return text


def judge_turns(client: ChatClient, prompt: str, exhibits: Mapping[str, Exhibit]) -> Asked:
    """
    Whether each turn is accepted, by its id; `None` if the judge's answer could not be read in `ATTEMPTS`. A client
    that only reads asks nothing.
    """

    def judge(exhibit: Exhibit) -> bool | None:
        messages = as_messages(prompt, exhibit)
        for attempt in range(ATTEMPTS):
            said = without_thoughts(client.complete(messages, attempt)).split(maxsplit=1)
            word = said[0].strip("\"'.,:;*#").lower() if said else ""
            if word in WORDS:
                return WORDS[word]
        return None

    return ask_all(client, exhibits, judge, "Judging")


def first_requests(client: ChatClient, prompt: str, exhibits: Mapping[str, Exhibit]) -> list[ChatRequest]:
    """What is asked about each turn at least, for an estimate."""
    return [client.request(as_messages(prompt, exhibit)) for exhibit in exhibits.values()]


def as_messages(prompt: str, exhibit: Exhibit) -> Messages:
    text = f"Question: {exhibit.question}\nAnswer: {exhibit.answer}"
    parts = [chat_part(exhibit.image), {"type": "text", "text": text}]
    return [{"role": "system", "content": prompt}, {"role": "user", "content": parts}]
