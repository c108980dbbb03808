"""Throughput of `sq-llava serve` with 1, 4 and 16 clients at a time.

    python -m benchmarks.serving            # needs runs/demo/model; writes benchmarks/results/serving.{json,md}

All numbers of clients use one server process, in rounds that take turns. The best round counts, because other work on
the machine only adds time. It can add much, so the ratios are those of the server's own CPU seconds. Each request has
its own picture. There are two kinds: short answers, and texts of 64 tokens (by the same model without an end-of-text
token). The benchmark checks that greedy answers do not depend on the other requests. Not measured: vLLM, which is the
choice for production.
"""

import base64
import io
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import openai
import psutil
from PIL import Image

from benchmarks import common
from sq_llava import load


CLIENTS = (1, 4, 16)
NEW_TOKENS = 64


def message_about(image: Image.Image, question: str, form: str) -> dict:
    """A user's message with an image as a data URL. `form` is PNG or JPEG."""
    stream = io.BytesIO()
    image.save(stream, form)
    url = f"data:image/{form.lower()};base64," + base64.b64encode(stream.getvalue()).decode()
    return {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}],
    }


def make_messages(number: int) -> list[dict]:
    """A question about `number` random pictures of 8 x 8 squares."""
    generator = np.random.default_rng(0)
    messages = []
    for _ in range(number):
        pixels = np.kron(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8), np.ones((28, 28, 1), dtype=np.uint8))
        messages.append(message_about(Image.fromarray(pixels), "what color is the shape?", "PNG"))
    return messages


def save_endless(model: str, folder: Path) -> None:
    """Saves the model without its end-of-text token: each of its texts then has the maximum length."""
    assistant = load(model, device="cpu")
    assistant.model.generation_config.eos_token_id = None
    assistant.model.save_pretrained(folder)
    assistant.processor.save_pretrained(folder)


def start_server(model: str) -> tuple[subprocess.Popen, str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "sq_llava", "serve", model, "--port", str(port), "--model-name", "model"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{url}/health").close()
            return process, f"{url}/v1"
        except OSError:
            time.sleep(0.5)
    process.terminate()
    raise TimeoutError(f"The server of {model} did not answer {url}/health within five minutes.")


def measure(url: str, messages: list[dict], num_clients: int) -> tuple[float, int, list[str]]:
    """Seconds until all messages are answered, the number of generated tokens, and the answers."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    ask = partial(client.chat.completions.create, model="model", temperature=0, max_tokens=NEW_TOKENS)
    with ThreadPoolExecutor(num_clients) as pool:
        began = time.perf_counter()
        replies = list(pool.map(lambda message: ask(messages=[message]), messages))
        seconds = time.perf_counter() - began
    texts = [reply.choices[0].message.content for reply in replies]
    return seconds, sum(reply.usage.completion_tokens for reply in replies), texts


def compare(model: str, messages: list[dict], rounds: int) -> dict:
    process, url = start_server(model)
    server = psutil.Process(process.pid)
    best, best_cpu, texts, tokens = {}, {}, {}, 0
    try:
        measure(url, messages[:4], 4)
        for _ in range(rounds):
            for num_clients in CLIENTS:
                before = sum(server.cpu_times()[:2])
                seconds, tokens, texts[num_clients] = measure(url, messages, num_clients)
                cpu_seconds = sum(server.cpu_times()[:2]) - before
                best[num_clients] = min(best.get(num_clients, seconds), seconds)
                best_cpu[num_clients] = min(best_cpu.get(num_clients, cpu_seconds), cpu_seconds)
    finally:
        process.terminate()
        process.wait()
    return {
        "requests": len(messages),
        "tokens": tokens,
        "seconds": best,
        "cpu_seconds": best_cpu,
        "equal_answers": all(found == texts[1] for found in texts.values()),
    }


def to_markdown(report: dict) -> str:
    header = ["texts", "clients", "requests/s", "tokens/s", "requests per CPU second", "relative to one client"]
    rows = []
    for kind, result in report["kinds"].items():
        requests, cpu_seconds = result["requests"], list(result["cpu_seconds"].values())
        for (clients, seconds), cpu in zip(result["seconds"].items(), cpu_seconds):
            rates = [f"{requests / seconds:.1f}", f"{result['tokens'] / seconds:.0f}", f"{requests / cpu:.1f}"]
            equal = "yes" if result["equal_answers"] else "**no**"
            rows.append([kind, clients, *rates, f"{cpu_seconds[0] / cpu:.2f}", equal])
    return common.text(
        "# `sq-llava serve`: the demo's model with 1, 4 and 16 clients, one picture in each request",
        "Short answers end by themselves; the other texts always have 64 tokens. The best round counts. CPU seconds "
        "are those of the server, and the ratios to one client are ratios of requests per CPU second. Answers are "
        "equal if they do not depend on the number of clients.",
        common.table([*header, "equal answers"], rows),
    )


def main() -> None:
    arguments = common.parse_arguments(
        __doc__, model=("runs/demo/model", "Folder of the model."), rounds=(2, "Number of rounds; the best counts.")
    )
    messages = make_messages(16 if arguments.quick else 32)
    rounds = 1 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        save_endless(arguments.model, Path(folder))
        kinds = {
            "short answers": compare(arguments.model, messages, rounds),
            f"{NEW_TOKENS} tokens": compare(folder, messages, rounds),
        }
    common.save("serving", {"kinds": kinds}, to_markdown, arguments)


if __name__ == "__main__":
    main()
