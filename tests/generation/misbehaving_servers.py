"""Runs of `sq-llava generate-data llava` with servers that misbehave as real ones do.

    python -m tests.generation.misbehaving_servers > table.md

Each server gets the same command twice: 12 rows, at most 0.5 to spend. The table says how many rows there are in the
end, how many requests each run sent, what the server charged, what the client counted, and what the command said.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from click.testing import Result
from typer.testing import CliRunner

from sq_llava.cli.generate_data import app
from sq_llava.llm_client import client
from tests.chat_server import KEY, Reply, chat_server, completion
from tests.processes import lines_of


NUM_ROWS, CAP = 12, 0.5
# An honest reply has 100 prompt tokens and 10 answer tokens: 0.0101.
INPUT_PRICE, OUTPUT_PRICE = 1.0, 1000.0
TEXT = "Question: What is it?\nAnswer: A boat.\n\nQuestion: What color is it?\nAnswer: It is red."
PARTS = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": TEXT}]
UNKNOWN_FIELD = {"detail": [{"loc": ["body", "max_completion_tokens"], "msg": "Extra inputs are not permitted"}]}

ReplyTo = Callable[[dict, int], Reply | str]


@dataclass(frozen=True)
class Server:
    """
    A server that misbehaves.

    Args:
        name (`str`): What it does.
        reply (`Callable`): (body of the request, how often the same body came before) -> reply.
        options (`tuple`): More options of the command, for both runs.
        again (`tuple`): More options of the second run.
    """

    name: str
    reply: ReplyTo
    options: tuple = ()
    again: tuple = ()


@dataclass(frozen=True)
class Session:
    """The outcome of both runs. `said` is what the first one printed about what is missing."""

    server: Server
    num_rows: int
    num_requests: tuple[int, int]
    charged: float
    counted: float
    exit_codes: tuple[int, int]
    said: str


def place_of(request: dict) -> int:
    """The number of the image that a request is about."""
    return int(request["messages"][-1]["content"].partition("number ")[2].partition(".")[0])


def error(status: int, message: str, code: object = None, **headers: str) -> Reply:
    body = json.dumps({"error": {"message": message, "code": code}})
    return Reply(body=body, status=status, headers=headers, billed=(0, 0))


def for_some(reply: Reply, *places: int, first: bool = False) -> ReplyTo:
    """A server that gives this reply for some images (all without `places`), perhaps only to the first request."""

    def answer(request: dict, number: int) -> Reply | str:
        return reply if (not places or place_of(request) in places) and not (first and number) else TEXT

    return answer


def refuses_field(request: dict, number: int) -> Reply | str:
    return Reply(body=json.dumps(UNKNOWN_FIELD), status=422) if "max_completion_tokens" in request else TEXT


def ignores_field(request: dict, number: int) -> Reply | str:
    if "max_tokens" in request:
        return TEXT
    return Reply(body=completion(TEXT, completion_tokens=140), seconds=0.05, billed=(100, 140))


def runs_out(request: dict, number: int) -> Reply | str:
    return error(402, "Insufficient credits") if place_of(request) > 0 else TEXT


def unusable_at_first(body: str) -> ReplyTo:
    """A server whose replies about images 3 and 7 cannot be used, unless another seed is sent."""
    return lambda request, number: (
        Reply(body=body) if place_of(request) in (3, 7) and not request.get("seed") else TEXT
    )


ANOTHER = ("--attempts", 2)
FIELD = ("--max-tokens-field", "max_tokens")
PAGE = Reply(body="<html>Please log in</html>", billed=(0, 0))
CUT = completion("Question: What is", finish_reason="length")
FILTERED = completion("", finish_reason="content_filter")
SERVERS = (
    Server("is honest", for_some(Reply(TEXT))),
    Server("ignores `max_completion_tokens`: 140 tokens instead of 20", ignores_field, ("--concurrency", 8)),
    Server("refuses `max_completion_tokens` (422)", refuses_field, again=FIELD),
    Server("refuses every request (400)", for_some(error(400, "Billing hard limit has been reached"))),
    Server("refuses all requests after the first row, because no money is left (402)", runs_out),
    Server("refuses 2 flagged images (403)", for_some(error(403, "Your input was flagged"), 3, 7)),
    Server("does not accept the key (401)", for_some(error(401, "Incorrect API key provided"))),
    Server("cuts 2 texts off (`length`)", unusable_at_first(CUT), again=ANOTHER),
    Server("cuts every text off (`length`)", for_some(Reply(body=CUT))),
    Server("filters 2 texts (`content_filter`)", unusable_at_first(FILTERED), again=ANOTHER),
    Server("gives 2 empty texts", unusable_at_first(completion(None)), again=ANOTHER),
    Server("gives 2 texts of a wrong form", unusable_at_first(completion("It is a boat.")), again=ANOTHER),
    Server("gives `completion_tokens: null`", for_some(Reply(body=completion(TEXT, completion_tokens=None)))),
    Server("counts reasoning only in `total_tokens`", for_some(
        Reply(
            body=completion(TEXT, usage={"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 120}),
            billed=(100, 20),
        )
    )),
    Server("gives its text as a list of parts", for_some(Reply(body=completion(PARTS)))),
    Server("leaves `<think>` in the text", for_some(Reply(f"<think>\nQuestion: none.\n</think>\n{TEXT}"))),
    Server("gives 2 errors in a reply with status 200", for_some(error(200, "Provider returned error", 400), 3, 7)),
    Server("is busy, in a reply with status 200", for_some(error(200, "Overloaded", 503), 3, 7, first=True)),
    Server("gives 2 errors with a bill", for_some(
        Reply(body=completion(None, choices=[], error={"message": "Provider died", "code": 502})), 3, 7
    )),
    Server("is busy (429, 500)", for_some(error(429, "Slow down", **{"Retry-After": "0"}), 3, 7, first=True)),
    Server("loses 2 answers", for_some(Reply(TEXT, cuts=True), 3, 7, first=True)),
    Server("sends 2 web pages with status 200", for_some(PAGE, 3, 7, first=True)),
    Server("sends nothing but web pages", for_some(PAGE)),
)  # fmt: skip


def run_command(*arguments) -> Result:
    # Not the whole `sq-llava`, which takes a tenth of a second to build.
    return CliRunner().invoke(app, list(map(str, arguments)))


def run_session(server: Server, folder: Path) -> Session:
    """Runs the command twice. The environment must have a key."""
    captions = folder / "scenes.jsonl"
    rows = [{"image": f"{number}.jpg", "captions": [f"Boat number {number}."]} for number in range(NUM_ROWS)]
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prices = ("--max-cost", CAP, "--input-price", INPUT_PRICE, "--output-price", OUTPUT_PRICE)
    with chat_server(server.reply) as running, patch.object(client, "LONGEST_BACKOFF", 0.01):
        options = (
            "--model",
            "writer",
            "--base-url",
            running.url,
            "--out",
            folder / "out",
            "--shares",
            "conversation=1",
        )
        limits = ("--max-tokens", 20, "--concurrency", 1)
        command = ("llava", captions, *options, *prices, *limits, *server.options)
        first = run_command(*command)
        num_first = len(running.requests)
        second = run_command(*command, *server.again)
    used = re.findall(r"All runs so far: .*, ([\d.]+) spent", second.stderr)
    charged = sum(tokens * price for tokens, price in zip(running.billed, (INPUT_PRICE, OUTPUT_PRICE))) / 1e6
    return Session(
        server,
        len(lines_of(folder / "out" / "data.jsonl")),
        (num_first, len(running.requests) - num_first),
        charged,
        float(used[-1]),
        (first.exit_code, second.exit_code),
        what_it_said(first.output),
    )


def what_it_said(output: str) -> str:
    """The lines about what is missing, without folders."""
    lines = [" ".join(line.split()) for line in output.splitlines()]
    said = [line for line in lines if re.match(r"\d+ (server|conversation): |.* (failed|are not done): ", line)]
    said = [re.sub(r": see \S+failures\S+ Run the same command again to retry them\.", "", line) for line in said]
    return " / ".join(said) or "-"


def sessions() -> Iterator[Session]:
    for server in SERVERS:
        with tempfile.TemporaryDirectory() as folder:
            yield run_session(server, Path(folder))


def to_markdown(outcomes: list[Session]) -> str:
    lines = [
        "| The server ... | Rows | Requests | Charged | Counted | The command said |",
        "|---|---|---|---|---|---|",
    ]
    for each in outcomes:
        again = f" with `{' '.join(map(str, each.server.again))}`" if each.server.again else ""
        requests = f"{each.num_requests[0]}, then {each.num_requests[1]}{again}"
        money = f"{each.charged:.3f} | {each.counted:.3f}"
        lines.append(f"| {each.server.name} | {each.num_rows} | {requests} | {money} | {each.said} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    os.environ["OPENAI_API_KEY"] = KEY
    print(to_markdown(list(sessions())), end="")
