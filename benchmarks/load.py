"""Load test of a running `sq-llava serve`: requests, errors by kind, seconds per request, and the server's memory.

    sq-llava serve runs/demo/model --port 8000 &
    python -m benchmarks.load --model model --pid $! --seconds 600 --clients 16

Each client sends one request after another, each with a new picture: whole and streamed, greedy and sampled, short and
long, several texts at once, self-questions. One streamed request in 20 is aborted in the middle, and one request
in 20 is invalid. The load test does not check the answers, which the tests do, and does not measure speed (see
benchmarks/serving.py).
"""

import argparse
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import openai
import psutil
from PIL import Image, ImageDraw

from benchmarks.serving import message_about


@dataclass
class Seen:
    """The outcomes, seconds and tokens of all clients."""

    outcomes: Counter = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def picture(generator: random.Random) -> Image.Image:
    """A coloured ellipse on a coloured ground."""
    image = Image.new("RGB", (224, 224), tuple(generator.choices(range(256), k=3)))
    box = [generator.randint(low, high) for low, high in ((0, 100), (0, 100), (110, 224), (110, 224))]
    ImageDraw.Draw(image).ellipse(box, fill=tuple(generator.choices(range(256), k=3)))
    return image


def request(generator: random.Random, model: str) -> dict:
    question = generator.choice(["what color is the shape?", "what shape is it?", "describe it"])
    body = {
        "model": model,
        "messages": [message_about(picture(generator), question, "JPEG")],
        "max_tokens": generator.choice([1, 16, 64]),
        "temperature": generator.choice([0, 0, 1]),
        "n": generator.choice([1, 1, 1, 3]),
        "stream": generator.random() < 0.5,
        "extra_body": {"self_question": generator.random() < 0.2},
    }
    if generator.random() < 0.05:
        body.update(generator.choice([{"model": "other"}, {"temperature": 9}, {"messages": []}]))
    return body


def send(client: openai.OpenAI, body: dict, goes_away: bool) -> tuple[str, int]:
    """Sends a request. Returns its outcome and its number of tokens."""
    try:
        reply = client.chat.completions.create(**body)
        if not body["stream"]:
            return "200", reply.usage.completion_tokens
        pieces = 0
        for _ in reply:
            pieces += 1
            if goes_away and pieces > 2:
                reply.close()
                return "went away", pieces
        return "200 streamed", pieces
    except openai.APIStatusError as error:
        return f"{error.status_code} {error.code}", 0
    except openai.OpenAIError as error:
        return type(error).__name__, 0


def run_client(number: int, arguments: argparse.Namespace, end: float, seen: Seen) -> None:
    generator = random.Random(number)
    client = openai.OpenAI(base_url=arguments.url, api_key=arguments.api_key, max_retries=0, timeout=120)
    while time.monotonic() < end:
        body = request(generator, arguments.model)
        began = time.monotonic()
        outcome, tokens = send(client, body, generator.random() < 0.05)
        with seen.lock:
            seen.outcomes[outcome] += 1
            seen.tokens += tokens
            if outcome.startswith("200"):
                seen.seconds.append(time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="Address of the server's API: %(default)s.")
    parser.add_argument("--model", required=True, help="Name of the model, as the server lists it.")
    parser.add_argument("--pid", type=int, required=True, help="Process id of the server.")
    parser.add_argument("--api_key", default="none", help="API key of the server.")
    parser.add_argument("--clients", type=int, default=16, help="Number of clients: %(default)s.")
    parser.add_argument("--seconds", type=float, default=600, help="Length of the test: %(default)s.")
    arguments = parser.parse_args()

    server, seen = psutil.Process(arguments.pid), Seen()
    # The first requests load libraries and allocate buffers that stay. They are not counted.
    run_client(-1, arguments, time.monotonic() + 5, Seen())
    memory = [server.memory_info().rss]
    end = time.monotonic() + arguments.seconds
    threads = [
        threading.Thread(target=run_client, args=(number, arguments, end, seen)) for number in range(arguments.clients)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(min(arguments.seconds / 10, 30))
        memory.append(server.memory_info().rss)

    print(f"{sum(seen.outcomes.values())} requests of {arguments.clients} clients in {arguments.seconds:.0f} s")
    for outcome, number in seen.outcomes.most_common():
        print(f"  {outcome:40} {number}")
    seconds = sorted(seen.seconds)
    for share in (0.5, 0.95, 0.99):
        print(f"  {share:.0%} of the requests took at most {seconds[int(share * (len(seconds) - 1))]:.2f} s")
    print("resident memory of the server, MiB:", " ".join(f"{size / 2**20:.0f}" for size in memory))


if __name__ == "__main__":
    main()
