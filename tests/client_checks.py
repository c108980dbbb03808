"""Asks `sq-llava serve` with the clients that people use. `make test-clients` runs it in `.venv-clients`.

    .venv-clients/bin/python tests/client_checks.py --sq-llava .venv/bin/sq-llava --model runs/demo/model --image a.png

openai, langchain-openai and litellm each send a question about an image: whole, as a stream, and several at once. All
answers must be equal. Tools must be refused by name. Each check prints a line. Exit code 1: a check failed.
"""

import argparse
import base64
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path


os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # litellm downloads a table of prices otherwise

import litellm
import openai
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI


SETTINGS = {"temperature": 0, "max_tokens": 8}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
TIMES = 3


def is_up(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=1).status == 200
    except OSError:
        return False


@contextmanager
def server(command: str, model: str) -> Iterator[str]:
    """Yields the URL of a server that is up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([command, "serve", model, "--model-name", "model", "--port", str(port)])
    try:
        while not is_up(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None:
                raise SystemExit(f"The server exited with code {process.returncode}.")
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def texts_of(chunks) -> str:
    """The text of a stream in OpenAI's format."""
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def ask_by_openai(url: str, message: dict) -> list[str]:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)

    def complete(**options):
        return client.chat.completions.create(model="model", messages=[message], **SETTINGS, **options)

    with ThreadPoolExecutor(TIMES) as pool:
        replies = [complete(), *pool.map(lambda _: complete(), range(TIMES))]
    return [texts_of(complete(stream=True)), *(reply.choices[0].message.content for reply in replies)]


def ask_by_langchain(url: str, message: dict) -> list[str]:
    model = ChatOpenAI(model="model", base_url=url, api_key="none", max_retries=0, **SETTINGS)
    messages = [HumanMessage(content=message["content"])]
    replies = [model.invoke(messages), *model.batch([messages] * TIMES)]
    return ["".join(chunk.content for chunk in model.stream(messages)), *(reply.content for reply in replies)]


def ask_by_litellm(url: str, message: dict) -> list[str]:
    def complete(**options):
        return litellm.completion("openai/model", [message], api_base=url, api_key="none", **SETTINGS, **options)

    replies = [
        complete(),
        *litellm.batch_completion("openai/model", [[message]] * TIMES, api_base=url, api_key="none", **SETTINGS),
    ]
    return [texts_of(complete(stream=True)), *(reply.choices[0].message.content for reply in replies)]


CLIENTS = {"openai": ask_by_openai, "langchain-openai": ask_by_langchain, "litellm": ask_by_litellm}


def check_clients(url: str, message: dict) -> bool:
    expected = ask_by_openai(url, message)[0]
    all_passed = bool(expected)
    for name, ask in CLIENTS.items():
        texts = ask(url, message)
        passed = texts == [expected] * (2 + TIMES)
        print(f"  {'ok  ' if passed else 'FAIL'}  {name} {version(name)}: {texts}", flush=True)
        all_passed &= passed
    try:
        openai.OpenAI(base_url=url, api_key="none").chat.completions.create(
            model="model", messages=[message], tools=[TOOL]
        )
        refusal = "not refused"
    except openai.BadRequestError as error:
        refusal = error.body["message"]
    passed = "Tools are not supported" in refusal
    print(f"  {'ok  ' if passed else 'FAIL'}  tools: {refusal}", flush=True)
    return all_passed and passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sq-llava", default=".venv/bin/sq-llava", help="The command to start the server with.")
    parser.add_argument("--model", default="runs/demo/model")
    parser.add_argument("--image", type=Path, required=True, help="A PNG file.")
    args = parser.parse_args()
    encoded = base64.b64encode(args.image.read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
    message = {"role": "user", "content": [image, {"type": "text", "text": "what color is the shape?"}]}
    with server(args.sq_llava, args.model) as url:
        raise SystemExit(0 if check_clients(url, message) else 1)


if __name__ == "__main__":
    main()
