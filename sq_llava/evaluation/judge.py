"""A judge: a language model behind an OpenAI-compatible server that grades answers.

    export OPENAI_API_KEY=...
    sq-llava evaluate --model M --tasks llava_bench,mmvet --data DIR --judge-model gpt-4o \
        --judge-max-cost 5 --judge-input-price 2.5 --judge-output-price 10

Every answer of the judge is kept in `OUT/judge.jsonl` (`sq_llava/llm_client/client.py`), so a run that was killed does
not pay twice. The judge is asked again for an answer that cannot be read, up to `attempts` times. Examples without a
grade are listed and counted, and enter no mean.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sq_llava.evaluation.settings import JudgeSettings
from sq_llava.llm_client.client import ChatClient, ChatFailure, Messages, UnusableAnswer


@dataclass(frozen=True)
class Verdict:
    """The `value` that was read out of the judge's answer `text`, or `None` and the `error` why there is none."""

    value: Any
    text: str
    error: str | None = None


class Judge:
    """
    Args:
        settings (`JudgeSettings`): Whom to ask, and how much.
        folder (`Path`): For `judge.jsonl`, the answers that were paid for.

    Raises:
        ValueError: if `OPENAI_API_KEY` is not set.
    """

    def __init__(self, settings: JudgeSettings, folder: Path):
        self.settings = settings
        # Figures are compared by their judge, and several servers may name their models alike.
        self._client = ChatClient(settings, folder / "judge.jsonl", server_matters=True)

    def complete_all(
        self, conversations: Mapping[str, Messages], parse: Callable[[str], Any], description: str
    ) -> dict[str, Verdict]:
        """
        A verdict for each conversation, by its id.

        Args:
            parse (`Callable`): The judge's answer -> its value; raises a `ValueError` if it cannot be read.

        Raises:
            ChatStopped: once the requests under way have been answered and kept.
        """
        return dict(self._client.work_on(conversations, lambda each: self._verdict(each, parse), description))

    def report(self) -> dict[str, Any]:
        """Who judged and when, for a result; of what was asked since the last report."""
        return self._client.report()

    def _verdict(self, messages: Messages, parse: Callable[[str], Any]) -> Verdict:
        text, reason = "", ""
        for attempt in range(self.settings.attempts):
            try:
                text = self._client.complete(messages, attempt)
                return Verdict(parse(text), text)
            except (UnusableAnswer, ValueError) as error:
                reason = str(error)
            except ChatFailure as error:
                return Verdict(None, text, str(error))
        return Verdict(None, text, f"not readable in {self.settings.attempts} attempts: {reason}")
