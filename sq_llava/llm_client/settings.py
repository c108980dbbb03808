"""Which chat server is asked, and how much. The fields are options of the commands, so nothing large is imported here.

>>> ChatSettings("gpt-4o", max_cost=5, input_price=2.5, output_price=10)
"""

from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

from typer import Option


@dataclass(frozen=True)
class ChatSettings:
    """
    Each further attempt at an answer is 0.5 warmer than `temperature`, up to 1. The caps `max_...` hold for all runs
    with the same journal, and do not count what the server refused.

    Args:
        retries (`int`): How often a request is sent again that the server did not answer.
        option_prefix (`str`): What the options are called by, in errors.
    """

    model: Annotated[str, Option("-m", help="Name of the model on the server. The key is read from OPENAI_API_KEY.")]
    base_url: Annotated[
        str | None,
        Option(help="URL of the OpenAI-compatible server, up to /v1. Default: OPENAI_BASE_URL, else OpenAI's."),
    ] = None
    temperature: Annotated[float, Option(min=0, help="Sampling temperature; 1 for models that take no other.")] = 0.0
    max_tokens: Annotated[int, Option(min=1, help="Maximum length of an answer in tokens, thoughts included.")] = 1024
    concurrency: Annotated[int, Option(min=1, help="Number of requests at a time.")] = 8
    retries: int = 5
    timeout: Annotated[float, Option(min=1, help="Seconds for one answer; then the request is sent again.")] = 120.0
    max_requests: Annotated[
        int | None, Option(min=0, help="Maximum number of requests, those of earlier runs into --out included.")
    ] = None
    max_total_tokens: Annotated[
        int | None, Option(min=0, help="Maximum number of tokens of prompts and answers, earlier runs included.")
    ] = None
    max_cost: Annotated[
        float | None, Option(min=0, help="Maximum cost in the unit of the prices, earlier runs included.")
    ] = None
    input_price: Annotated[float | None, Option(min=0, help="Price of a million tokens of prompts.")] = None
    output_price: Annotated[float | None, Option(min=0, help="Price of a million tokens of answers.")] = None
    image_tokens: Annotated[
        int, Option(min=1, help="Tokens that an image counts as; if the server counts more, caps can be exceeded.")
    ] = 4096
    option_prefix: str = "--"

    def __post_init__(self):
        prefix = self.option_prefix
        prices = (self.input_price, self.output_price)
        if self.max_cost is not None and None in prices:
            raise ValueError(f"{prefix}max-cost needs {prefix}input-price and {prefix}output-price (per million).")
        if (self.input_price is None) != (self.output_price is None):
            raise ValueError(f"{prefix}input-price and {prefix}output-price (per million) belong together.")
        if self.base_url is not None:
            url = urlsplit(self.base_url)
            if url.scheme not in ("http", "https") or url.username or url.password or url.query:
                raise ValueError(
                    f"{prefix}base-url: give http(s)://host/v1, without a name, a key or a query in it; "
                    "the key comes from OPENAI_API_KEY."
                )

    def price(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Without prices, 0."""
        if self.input_price is None or self.output_price is None:
            return 0.0
        return (prompt_tokens * self.input_price + completion_tokens * self.output_price) / 1e6
