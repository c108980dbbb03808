"""A judge: a language model on an OpenAI-compatible server that grades answers.

    export OPENAI_API_KEY=...
    sq-llava evaluate --model M --tasks llava_bench,mmvet --data DIR --judge-model gpt-4o \
        --judge-max-cost 5 --judge-input-price 2.5 --judge-output-price 10

Every answer of the judge is kept in `OUT/judge.jsonl` (`sq_llava/llm_client/client.py`), so an interrupted run does
not pay twice when it is repeated. If an answer cannot be parsed, the judge is asked again, up to `attempts` times.
Examples without a grade are listed and counted, and metrics that need the grade leave them out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sq_llava.evaluation.settings import JudgeSettings
from sq_llava.llm_client.client import ChatClient, ChatFailure, Messages


@dataclass(frozen=True)
class Verdict:
    """The judge's answer `text` and the `value` parsed from it, or `None` with the `error` that prevented one."""

    value: Any
    text: str
    error: str | None = None


class Judge:
    """
    Asks the judge and parses its grades.

    Args:
        settings (`JudgeSettings`): Model, server and limits.
        journals (`Sequence[Path]`): Files of the answers received so far. New answers go into the first one.

    Raises:
        ValueError: If `OPENAI_API_KEY` is not set.
    """

    def __init__(self, settings: JudgeSettings, journals: Sequence[Path]):
        self.settings = settings
        # Different servers may use the same model name. Their grades must not be mixed.
        self._client = ChatClient(settings, journals[0], server_matters=True, other_journals=journals[1:])

    def complete_all(
        self, conversations: Mapping[str, Messages], parse: Callable[[str], Any], description: str
    ) -> dict[str, Verdict]:
        """
        Asks for a verdict on each conversation.

        Args:
            conversations (`Mapping[str, Messages]`): Id -> messages to the judge.
            parse (`Callable`): Judge's answer -> value. Raises a `ValueError` if the answer cannot be parsed.
            description (`str`): Label of the progress bar.

        Returns:
            Id -> verdict.

        Raises:
            ChatStopped: If a limit is reached or the server refuses. Requests in progress are completed first, and
                their answers are kept.
        """
        return dict(self._client.work_on(conversations, lambda each: self._verdict(each, parse), description))

    def report(self) -> dict[str, Any]:
        """The judge's name; dates, tokens and cost of its answers since the last report; and what all runs used."""
        return self._client.report()

    def _verdict(self, messages: Messages, parse: Callable[[str], Any]) -> Verdict:
        text = reason = ""
        try:
            for text in self._client.answers(messages):
                try:
                    return Verdict(parse(text), text)
                except ValueError as error:
                    reason = str(error)
        except ChatFailure as error:
            return Verdict(None, text, str(error))
        return Verdict(None, text, f"no answer could be parsed in {self.settings.attempts} attempts: {reason}")
