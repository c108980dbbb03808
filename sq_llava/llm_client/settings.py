"""Settings of a chat server, and limits on its use. The fields are command options: this module imports nothing slow.

>>> ChatSettings("gpt-4o", max_cost=5, input_price=2.5, output_price=10)
"""

from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlsplit

from typer import Option

from sq_llava.json_text import parse_json


# Names of the request field for the maximum length of an answer. OpenAI's newer models accept only the first one,
# many other servers know only the second one.
MAX_TOKENS_FIELDS = ("max_completion_tokens", "max_tokens")
# Fields that the client sets itself, because the caps and the reading of replies depend on them.
OWN_FIELDS = ("model", "messages", "n", "stream", *MAX_TOKENS_FIELDS)
# Settings that every answer depends on. A run resumes only if they are equal.
SAMPLING = ("temperature", "max_tokens", "top_p", "extra_body")


@dataclass(frozen=True)
class ChatSettings:
    """
    Each further attempt at an answer has another seed, and a temperature that is higher by 0.5, up to 1. The caps
    `max_...` count all runs with the same journal. Requests that the server refused do not count.

    Args:
        retries (`int`): Maximum number of times that a request without an answer is sent again.
        option_prefix (`str`): Prefix of the option names in error messages.
    """

    model: Annotated[str, Option("-m", help="Name of the model on the server. The key is read from OPENAI_API_KEY.")]
    base_url: Annotated[
        str | None,
        Option(help="URL of the OpenAI-compatible server, ending in /v1. Default: OPENAI_BASE_URL, else OpenAI."),
    ] = None
    temperature: Annotated[float, Option(min=0, help="Sampling temperature. Some models accept only 1.")] = 0.0
    top_p: Annotated[
        float | None, Option(min=0, max=1, help="Nucleus sampling: share of the probability to sample from.")
    ] = None
    max_tokens: Annotated[int, Option(min=1, help="Maximum tokens of an answer, including reasoning.")] = 1024
    max_tokens_field: Annotated[
        str,
        Option(
            help="Request field for the maximum length: max_completion_tokens (OpenAI, vLLM), or max_tokens for "
            "servers that refuse or ignore it."
        ),
    ] = MAX_TOKENS_FIELDS[0]
    extra_body: Annotated[
        str | None,
        Option(
            metavar="JSON",
            help="JSON object with more fields of each request, such as '{\"top_k\": 20}'. null leaves a field out: "
            "'{\"temperature\": null}'.",
        ),
    ] = None
    attempts: Annotated[
        int, Option(min=1, help="Maximum number of answers to ask for until one has the right form.")
    ] = 1
    concurrency: Annotated[int, Option(min=1, help="Number of requests at the same time.")] = 8
    retries: int = 5
    timeout: Annotated[float, Option(min=1, help="Seconds to wait for an answer before a retry.")] = 120.0
    max_requests: Annotated[
        int | None, Option(min=0, help="Maximum number of requests. Earlier runs with the same --out count too.")
    ] = None
    max_total_tokens: Annotated[
        int | None, Option(min=0, help="Maximum number of tokens in prompts and answers. Earlier runs count too.")
    ] = None
    max_cost: Annotated[
        float | None,
        Option(min=0, help="Maximum cost, in the currency of the two prices below. Earlier runs count too."),
    ] = None
    input_price: Annotated[float | None, Option(min=0, help="Price of one million prompt tokens.")] = None
    output_price: Annotated[float | None, Option(min=0, help="Price of one million answer tokens.")] = None
    image_tokens: Annotated[
        int,
        Option(
            min=1, help="Number of tokens to count for an image. If the server counts more, limits can be exceeded."
        ),
    ] = 4096
    option_prefix: str = "--"

    def __post_init__(self):
        prefix = self.option_prefix
        prices = (self.input_price, self.output_price)
        if self.max_cost is not None and None in prices:
            raise ValueError(
                f"{prefix}max-cost needs {prefix}input-price and {prefix}output-price (per million tokens)."
            )
        if (self.input_price is None) != (self.output_price is None):
            raise ValueError(f"{prefix}input-price and {prefix}output-price: give both or neither.")
        if self.base_url is not None:
            url = urlsplit(self.base_url)
            if url.scheme not in ("http", "https") or url.username or url.password or url.query:
                raise ValueError(
                    f"{prefix}base-url: give http(s)://host/v1 without a user name, key or query. Export the key as "
                    "OPENAI_API_KEY."
                )

        if self.max_tokens_field not in MAX_TOKENS_FIELDS:
            choices = " or ".join(MAX_TOKENS_FIELDS)
            raise ValueError(f"{prefix}max-tokens-field is {self.max_tokens_field!r}: choose {choices}.")
        for name in OWN_FIELDS & self.extra_fields().keys():
            own = {"model": "model", **dict.fromkeys(MAX_TOKENS_FIELDS, "max-tokens")}.get(name)
            mend = f": use {prefix}{own}." if own else ", which this command sets itself. Leave it out."
            raise ValueError(f"{prefix}extra-body sets {name}{mend}")

    @property
    def other_field(self) -> str:
        """The hint for a server that refuses or ignores `max_tokens_field`."""
        other = next(name for name in MAX_TOKENS_FIELDS if name != self.max_tokens_field)
        return f"Try {self.option_prefix}max-tokens-field {other}."

    def extra_fields(self) -> dict[str, Any]:
        """
        The fields of `extra_body`.

        Raises:
            ValueError: If it is not a JSON object.
        """
        try:
            fields = parse_json(self.extra_body or "{}")
        except ValueError as error:
            raise ValueError(f"{self.option_prefix}extra-body {self.extra_body}: not JSON: {error}.") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{self.option_prefix}extra-body {self.extra_body}: give an object: {{...}}.")
        if not isinstance(fields.get("seed"), int | None):
            raise ValueError(f"{self.option_prefix}extra-body {self.extra_body}: seed must be a whole number or null.")
        return fields

    def price(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The cost of these tokens; 0 without prices."""
        if self.input_price is None or self.output_price is None:
            return 0.0
        return (prompt_tokens * self.input_price + completion_tokens * self.output_price) / 1e6
