"""What a chat server said: the text of an answer, what it counts as, and when to come again.

    read_completion(response.text, most_tokens=(100, 1024))["answer"]

What this module does not do: say what the status of a response means.
"""

import json
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any


LONGEST_WAIT = 120.0  # seconds, whatever the server says


def read_completion(body: str, most_tokens: tuple[int, int]) -> dict[str, Any]:
    """
    Text, model and tokens of a chat completion; `most_tokens` where the server does not count them.

    Raises:
        ValueError: if the body has another form, or no text in it.
    """
    try:
        completion = json.loads(body)
        answer = completion["choices"][0]["message"]["content"]
        usage = completion.get("usage") or dict(zip(("prompt_tokens", "completion_tokens"), most_tokens))
        line = {
            "answer": mend(answer) if isinstance(answer, str) else "",
            "model": mend(str(completion["model"])),
            "date": datetime.now(UTC).date().isoformat(),
            "prompt_tokens": int(usage["prompt_tokens"]),
            "completion_tokens": int(usage["completion_tokens"]),
        }
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"the server's answer is no chat completion ({error!r}): {body[:200]!r}") from error
    if not line["answer"].strip():
        raise ValueError(f"the server's answer holds no text: {body[:200]!r}")
    return line


def without_thoughts(text: str) -> str:
    """An answer without what a reasoning model thinks before it, which some servers leave in."""
    return text.rpartition("</think>")[2].strip()


def mend(text: str) -> str:
    """Half of a surrogate pair, which JSON can hold and no UTF-8, becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def retry_after(header: str | None) -> float | None:
    """Seconds, of a number or a date; `None` where there is neither."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except ValueError:
            return None
        # HTTP's dates are in GMT, so one without a zone is, too.
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return min(max(0.0, seconds), LONGEST_WAIT)  # in this order "nan" is 0
