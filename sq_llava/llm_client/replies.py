"""Reads the responses of a chat server: text, number of tokens, and when to retry.

    read_completion(response.text, most_tokens=(100, 1024))["answer"]

The status code of a response is interpreted in `client.py`.
"""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from sq_llava.json_text import parse_json


LONGEST_WAIT = 120.0  # seconds, even if the server asks for more
# Far more than any answer with its reasoning. A longer one would take long to search, and would fill the journal.
MOST_CHARACTERS = 1_000_000


def read_completion(body: str, most_tokens: tuple[int, int]) -> dict[str, Any]:
    """
    Reads a chat completion.

    Args:
        body (`str`): Body of the response.
        most_tokens (`tuple[int, int]`): Numbers of prompt and answer tokens to assume if the server reports none.

    Returns:
        `answer`, `model`, `date`, `prompt_tokens` and `completion_tokens`, as the journal keeps them.

    Raises:
        ValueError: If the body is not a chat completion, has no text or is far too long.
    """
    if len(body) > MOST_CHARACTERS:
        raise ValueError(f"the server's answer has {len(body):,} characters, more than {MOST_CHARACTERS:,}")
    try:
        completion = parse_json(body)
        answer = completion["choices"][0]["message"]["content"]
        usage = completion.get("usage") or dict(zip(("prompt_tokens", "completion_tokens"), most_tokens))
        line = {
            "answer": mend(answer) if isinstance(answer, str) else "",
            "model": mend(str(completion["model"])),
            "date": datetime.now(UTC).date().isoformat(),
            "prompt_tokens": int(usage["prompt_tokens"]),
            "completion_tokens": int(usage["completion_tokens"]),
        }
        if min(line["prompt_tokens"], line["completion_tokens"]) < 0:
            raise ValueError("a negative number of tokens")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"the server's answer is not a chat completion ({error!r}): {body[:200]!r}") from error
    if not line["answer"].strip():
        raise ValueError(f"the server's answer has no text: {body[:200]!r}")
    return line


def without_thoughts(text: str) -> str:
    """The answer without the reasoning before `</think>`, which some servers do not remove."""
    return text.rpartition("</think>")[2].strip()


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
