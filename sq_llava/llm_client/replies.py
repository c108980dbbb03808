"""Reads the responses of a chat server: text, number of tokens, and why a text is not to be used.

    read_completion(response.text, "gpt-4o", most_tokens=(100, 1024))["answer"]

A reply that the server counts is paid, whatever is in it. So it is always read into a line for the journal. `fault` in
this line says why its text cannot be used. Forms that servers are known for are read: a text in parts, numbers of
tokens that are missing or null, an error with the status 200.

What a status code means for the run is decided in `client.py`.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from sq_llava.json_text import parse_json


LONGEST_WAIT = 120.0  # seconds, even if the server asks for more
# Far more than any answer with its reasoning. A longer one would take long to search, and would fill the journal.
MOST_CHARACTERS = 1_000_000
BYTES_PER_TOKEN = 4  # English text, about

# Faults of paid replies. Data cards count them, so they do not depend on the text.
CUT_OFF = "the answer was cut off at the token limit"
FILTERED = "the server's content filter stopped the answer"
REFUSED = "the model refused to answer"
BROKEN = "the server reported an error with the answer"
EMPTY = "the answer has no text"
TOO_LONG = f"the answer has more than {MOST_CHARACTERS:,} characters"

# Values of `finish_reason`, in lower case: OpenAI's, then those of other servers.
FINISHES = {
    "length": CUT_OFF, "max_tokens": CUT_OFF, "model_length": CUT_OFF, "max_output_tokens": CUT_OFF,
    "content_filter": FILTERED, "safety": FILTERED, "recitation": FILTERED, "prohibited_content": FILTERED,
    "blocklist": FILTERED, "refusal": REFUSED, "error": BROKEN,
}  # fmt: skip

# Marks around reasoning that a server left in the text: of DeepSeek and Qwen, others, Magistral, Kimi, gpt-oss.
_THOUGHTS_BEGIN = re.compile(
    r"\s*(?:<(?:think|thinking|thought|reasoning)>|\[THINK\]|◁think▷|<\|channel\|>analysis<\|message\|>)", re.I
)
_THOUGHTS_END = re.compile(
    r"</(?:think|thinking|thought|reasoning)>|\[/THINK\]|◁/think▷|<\|channel\|>final<\|message\|>", re.I
)


class ErrorReply(Exception):
    """
    The server reports an error for which nothing was paid, in a body with the status 200.

    Args:
        status (`int`): The HTTP status that the error stands for.
        code (`str`, *optional*): The server's name of the error.
    """

    def __init__(self, message: str, status: int, code: str | None):
        super().__init__(message)
        self.status = status
        self.code = code


def read_completion(body: str, model: str, most_tokens: tuple[int, int]) -> dict[str, Any]:
    """
    Reads a chat completion.

    Args:
        body (`str`): Body of the response.
        model (`str`): Name of the model to assume if the server reports none.
        most_tokens (`tuple[int, int]`): Numbers of prompt and answer tokens to assume if the server reports none.

    Returns:
        `answer`, `model`, `date`, `prompt_tokens` and `completion_tokens`, as the journal keeps them. An answer that
        cannot be used also has `fault`, and `detail` if the server says more about it.

    Raises:
        ErrorReply: If the body is an error, and no tokens are counted.
        ValueError: If the body is not a chat completion.
    """
    try:
        completion = parse_json(body)
        error, usage = completion.get("error"), completion.get("usage")
        if error and not usage and not completion.get("choices"):
            raise _error_reply(error)
        [choice, *_] = completion.get("choices") or ([{}] if error else [])
        message = choice.get("message") or {}
        answer = mend(_text_of(message.get("content")))
        error = error or choice.get("error")
        refusal = message.get("refusal")
        fault = BROKEN if error else FINISHES.get(str(choice.get("finish_reason")).lower())
        fault = fault or (REFUSED if refusal and not answer.strip() else None)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the server's answer is not a chat completion ({error!r}): {body[:200]!r}") from error
    if len(answer) > MOST_CHARACTERS:
        answer, fault = "", TOO_LONG
    fault = fault or (None if answer.strip() else EMPTY)
    prompt_tokens, completion_tokens = _count(usage, answer, most_tokens)
    detail = mend(_message_of(error) if error else str(refusal or ""))[:500]
    return {
        "answer": answer,
        **({"fault": fault} if fault else {}),
        **({"detail": detail} if fault and detail else {}),
        "model": mend(str(completion.get("model") or model)),
        "date": datetime.now(UTC).date().isoformat(),
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
    }


def _text_of(content: Any) -> str:
    """The text of a message. Of a list of parts, these are the parts of text, not those of reasoning."""
    if isinstance(content, list):
        parts = [part if isinstance(part, Mapping) else {"text": part} for part in content]
        texts = [part.get("text") for part in parts if part.get("type", "text") in ("text", "output_text")]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _count(usage: Any, answer: str, most_tokens: tuple[int, int]) -> tuple[int, int]:
    """
    Numbers of prompt and answer tokens as the server says. Some servers count reasoning only in `total_tokens`.

    A missing number is replaced by the maximum, or by an estimate from the text that came, if this is more.
    """
    numbers = usage if isinstance(usage, Mapping) else {}
    prompt, total = _number(numbers.get("prompt_tokens"), 1), _number(numbers.get("total_tokens"), 1)
    completion = _number(numbers.get("completion_tokens"), 1 if answer else 0)
    if None not in (prompt, total) and total > prompt:
        completion = max(completion or 0, total - prompt)
    if completion is None:
        completion = max(most_tokens[1], len(answer.encode()) // BYTES_PER_TOKEN)
    return most_tokens[0] if prompt is None else prompt, completion


def _number(value: Any, least: int) -> int | None:
    """A number of tokens. `None` if it is missing or impossible."""
    try:
        return int(value) if int(value) >= least else None
    except (TypeError, ValueError, OverflowError):
        return None


def _error_reply(error: Any) -> ErrorReply:
    code = error.get("code") if isinstance(error, Mapping) else None
    number = _number(code, least=400)
    status = number if number is not None and number < 600 else 400
    return ErrorReply(_message_of(error), status, code if isinstance(code, str) else None)


def _message_of(error: Any) -> str:
    return str(error.get("message") or dict(error)) if isinstance(error, Mapping) else str(error)


def without_thoughts(text: str) -> str:
    """The answer without the reasoning before it, which some servers leave in. Unfinished reasoning is no answer."""
    ends = [found.end() for found in _THOUGHTS_END.finditer(text)]
    rest = text[ends[-1] :] if ends else text
    return "" if _THOUGHTS_BEGIN.match(rest) else rest.strip()


def mend(text: str) -> str:
    """Replaces each lone surrogate by U+FFFD: JSON can contain one, UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def retry_after(header: str | None) -> float | None:
    """Seconds to wait according to a `Retry-After` header (a number or a date). `None` if it is neither."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except ValueError:
            return None
        # HTTP dates are in GMT, with or without a time zone.
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return min(max(0.0, seconds), LONGEST_WAIT)  # in this order, "nan" gives 0
