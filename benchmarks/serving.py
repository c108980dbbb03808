"""Throughput of `sq-llava serve` with 1, 4 and 16 clients at a time, beside the same requests one after another.

    python -m benchmarks.serving            # of runs/demo/model; writes benchmarks/results/serving.{json,md}
    python -m benchmarks.serving --quick

One server process, in which everything is measured, in rounds that take turns; the best round counts, as other work on
the machine only adds time. As it can add much, the server's own CPU seconds stand beside, and the ratio is of them.
Each request has its own picture. Two kinds: the answer as short as it is, and a text of 64 tokens (of the same model
without an end of its texts). Answers are compared too: greedy ones must not depend on who else asks. What this does
not do: compare with vLLM, whose place is production.
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
from pathlib import Path

import numpy as np
import openai
import psutil
from PIL import Image

from benchmarks import common
from sq_llava import load


CLIENTS = (1, 4, 16)
NEW_TOKENS = 64


def pictures(number: int) -> list[str]:
    generator = np.random.default_rng(0)
    urls = []
    for _ in range(number):
        pixels = np.kron(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8), np.ones((28, 28, 1), dtype=np.uint8))
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        urls.append("data:image/png;base64," + base64.b64encode(stream.getvalue()).decode())
    return urls


def save_endless(model: str, folder: Path) -> None:
    """The same model without an end of its texts: each has as many tokens as it may."""
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
    raise TimeoutError(f"The server of {model} does not answer.")


def measure(url: str, images: list[str], num_clients: int) -> tuple[float, int, list[str]]:
    """Seconds for all images, tokens generated, and the texts."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)

    def ask(image: str):
        content = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": "what color is the shape?"},
        ]
        messages = [{"role": "user", "content": content}]
        return client.chat.completions.create(model="model", messages=messages, temperature=0, max_tokens=NEW_TOKENS)

    with ThreadPoolExecutor(num_clients) as pool:
        began = time.perf_counter()
        replies = list(pool.map(ask, images))
        seconds = time.perf_counter() - began
    texts = [reply.choices[0].message.content for reply in replies]
    return seconds, sum(reply.usage.completion_tokens for reply in replies), texts


def compare(model: str, images: list[str], rounds: int) -> dict:
    process, url = start_server(model)
    server = psutil.Process(process.pid)
    best, best_cpu, texts, tokens = {}, {}, {}, 0
    try:
        measure(url, images[:4], 4)
        for _ in range(rounds):
            for num_clients in CLIENTS:
                before = sum(server.cpu_times()[:2])
                seconds, tokens, texts[num_clients] = measure(url, images, num_clients)
                cpu_seconds = sum(server.cpu_times()[:2]) - before
                best[num_clients] = min(best.get(num_clients, seconds), seconds)
                best_cpu[num_clients] = min(best_cpu.get(num_clients, cpu_seconds), cpu_seconds)
    finally:
        process.terminate()
        process.wait()
    return {
        "requests": len(images),
        "tokens": tokens,
        "seconds": best,
        "cpu_seconds": best_cpu,
        "equal_answers": all(found == texts[1] for found in texts.values()),
    }


def table(kinds: dict) -> str:
    columns = (
        "texts",
        "clients",
        "requests/s",
        "tokens/s",
        "requests per CPU second",
        "to one client",
        "equal answers",
    )
    rows = [columns, ["---"] * len(columns)]
    for kind, result in kinds.items():
        for num_clients, seconds in result["seconds"].items():
            cpu_seconds = result["cpu_seconds"][num_clients]
            rows.append(
                (
                    kind,
                    num_clients,
                    f"{result['requests'] / seconds:.1f}",
                    f"{result['tokens'] / seconds:.0f}",
                    f"{result['requests'] / cpu_seconds:.1f}",
                    f"{next(iter(result['cpu_seconds'].values())) / cpu_seconds:.2f}",
                    "yes" if result["equal_answers"] else "**no**",
                )
            )
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def main() -> None:
    arguments = common.parse_arguments(__doc__, model="runs/demo/model", rounds=2)
    images = pictures(16 if arguments.quick else 32)
    rounds = 1 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        save_endless(arguments.model, Path(folder))
        kinds = {
            "short answers": compare(arguments.model, images, rounds),
            f"{NEW_TOKENS} tokens": compare(folder, images, rounds),
        }
    title = "# `sq-llava serve`: the demo's model under 1, 4 and 16 clients, one picture in each request"
    common.save("serving", {"kinds": kinds}, f"{title}\n\n{table(kinds)}", arguments)


if __name__ == "__main__":
    main()
