"""Compares vLLM with transformers on a CPU. `make test-vllm` runs it, with the Python of `.venv-vllm`.

    .venv-vllm/bin/python -P tests/vllm_checks.py --dir runs/vllm
    .venv-vllm/bin/python -P tests/vllm_checks.py --dir runs/vllm --name qwen3

DIR is the output of `vllm_reference.py`. Each model has a process of its own, because an engine does not give its
memory back. The engine runs in float32, where greedy tokens must be equal: one request after another, all at once, and
again from the prefix cache. For some models, the OpenAI server runs too, in bfloat16, as in practice. The server of an
untrained model runs in float32, and its questions need not end in "?". Each check prints a line; a table of all models
comes last. Exit code 1: a check failed. Speed is not measured, and no GPU is used.
"""

import argparse
import base64
import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


# Set before vLLM is imported. By default, it binds threads to cores, reserves gigabytes for the cache, and runs the
# engine in two more processes, whose imports would take minutes for all models.
os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)

import openai
import transformers
import vllm
from PIL import Image
from vllm import LLM, SamplingParams


# The default block of 128 tokens is longer than the demo's prompts, so nothing would be cached.
BLOCK_SIZE = 32
NUM_QUESTIONS = 8
ENGINE = {"max_model_len": 512, "enforce_eager": True, "limit_mm_per_prompt": {"image": 2}, "block_size": BLOCK_SIZE}


class Report:
    """Prints a line for each check. `results` has the worst of all comparisons with transformers."""

    def __init__(self):
        self.results = {"passed": True, "equal": math.inf, "total": 0, "difference": 0.0, "prompts_equal": True}

    def add(self, passed: bool, name: str, detail: str) -> None:
        print(f"  {'ok  ' if passed else 'FAIL'}  {name:<44} {detail}", flush=True)
        self.results["passed"] &= passed

    def add_comparison(self, equal: int, total: int, difference: float, prompts_equal: bool) -> None:
        results = self.results
        results["equal"], results["total"] = min(results["equal"], equal), total
        results["difference"] = max(results["difference"], difference)
        results["prompts_equal"] &= prompts_equal


def with_images(messages: list[dict], as_part) -> list[dict]:
    """Replaces each image part that has a path by `as_part(path)`."""
    return [
        {**message, "content": [as_part(part["path"]) if "path" in part else part for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def as_pil(path: str) -> dict:
    return {"type": "image_pil", "image_pil": Image.open(path).convert("RGB")}


def as_data_url(path: str) -> dict:
    encoded = base64.b64encode(Path(path).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}


def chat(llm: LLM, requests: list[dict], together: bool, **sampling) -> list:
    """vLLM's outputs. A batch has one setting of `ask`, so requests with `ask` are a batch of their own."""
    outputs = {}
    batches = [[number] for number in range(len(requests))]
    if together:
        batches = [[n for n, request in enumerate(requests) if request["ask"] is ask] for ask in (False, True)]
    for batch in batches:
        results = llm.chat(
            [with_images(requests[number]["messages"], as_pil) for number in batch],
            SamplingParams(**sampling),
            use_tqdm=False,
            chat_template_kwargs={"ask": requests[batch[0]]["ask"]},
        )
        outputs |= dict(zip(batch, results, strict=True))
    return [outputs[number] for number in range(len(requests))]


def cached_tokens(llm: LLM) -> tuple[int, int]:
    """Prompt tokens found in the prefix cache, and all that were looked up, since the engine started."""
    counters = {metric.name: metric.value for metric in llm.get_metrics() if "prefix_cache" in metric.name}
    return counters["vllm:prefix_cache_hits"], counters["vllm:prefix_cache_queries"]


def compare(report: Report, name: str, requests: list[dict], outputs: list, seconds: float) -> None:
    """Checks that prompts and greedy tokens equal those of transformers, and log-probabilities are close."""
    equal, total, difference = 0, 0, 0.0
    prompts_equal = all(list(out.prompt_token_ids) == req["prompt_ids"] for req, out in zip(requests, outputs))
    for request, output in zip(requests, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        pairs = list(zip(request["token_ids"], tokens, strict=True))
        equal += sum(expected == token for expected, token in pairs)
        total += len(pairs)
        for log_prob, found, token in zip(request["log_probs"], output.outputs[0].logprobs, tokens):
            difference = max(difference, abs(log_prob - found[token].logprob))
    report.add_comparison(equal, total, difference, prompts_equal)
    report.add(
        prompts_equal and equal == total and difference < 1e-3,
        name,
        f"{equal} of {total} tokens equal, log-probabilities to {difference:.0e}; prompts "
        f"{'equal' if prompts_equal else 'DIFFER'}; {seconds:.1f} s",
    )


def logit_bias(document: dict) -> dict[int, float]:
    """Does what `suppress_tokens` does in transformers; vLLM does not read it."""
    return dict.fromkeys(document["suppressed"], -100.0)


def check_engine(report: Report, model: str, document: dict) -> None:
    requests, trained = document["requests"], document["is_trained"]
    start = time.monotonic()
    llm = LLM(
        model=model,
        trust_remote_code=True,
        model_impl="transformers",
        dtype="float32",
        disable_log_stats=False,
        **ENGINE,
    )
    print(f"engine in float32, greedy, past the end token; loaded in {time.monotonic() - start:.0f} s", flush=True)
    greedy = {"temperature": 0.0, "max_tokens": len(requests[0]["token_ids"]), "ignore_eos": True, "logprobs": 0}
    greedy["logit_bias"] = logit_bias(document)
    for name, together in (("one request after another", False), ("all together", True)):
        llm.reset_prefix_cache()
        start = time.monotonic()
        outputs = chat(llm, requests, together, **greedy)
        compare(report, name, requests, outputs, time.monotonic() - start)

    hits, queries = cached_tokens(llm)
    start = time.monotonic()
    outputs = chat(llm, requests, together=True, **greedy)
    compare(report, "again, from the prefix cache", requests, outputs, time.monotonic() - start)
    found, asked = (now - before for now, before in zip(cached_tokens(llm), (hits, queries)))
    # The last token is always computed, and only whole blocks are cached.
    expected = sum((len(request["prompt_ids"]) - 1) // BLOCK_SIZE * BLOCK_SIZE for request in requests)
    report.add(found == expected, "cached prompt tokens", f"{found} of {asked}; in whole blocks: {expected}")

    llm.reset_prefix_cache()
    hits, queries = cached_tokens(llm)
    asking = next(request for request in requests if request["ask"])
    settings = {"temperature": 1.2, "top_k": 300, "top_p": 0.95, "max_tokens": 24, "seed": 0}
    questions = [each.text.strip() for each in chat(llm, [asking], False, n=NUM_QUESTIONS, **settings)[0].outputs]
    found, asked = (now - before for now, before in zip(cached_tokens(llm), (hits, queries)))
    expected = (NUM_QUESTIONS - 1) * ((len(asking["prompt_ids"]) - 1) // BLOCK_SIZE * BLOCK_SIZE)
    name = f"{NUM_QUESTIONS} questions from one prompt"
    report.add(found == expected, f"{name}: cache", f"{found} of {asked} prompt tokens")
    are_questions = sum(question.endswith("?") for question in questions)
    report.add(
        are_questions >= (NUM_QUESTIONS - 1) * trained and len(set(questions)) > 1,
        name,
        f"{are_questions} end in '?', {len(set(questions))} are different: {questions[0]!r}, {questions[1]!r}, ...",
    )


def start_server(model: str, dtype: str, log) -> tuple[subprocess.Popen, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--served-model-name", "sq-llava", "--trust-remote-code", "--model-impl", "transformers"]
    command += ["--dtype", dtype, "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    for name in ("max_model_len", "block_size", "limit_mm_per_prompt"):
        command += [f"--{name.replace('_', '-')}", json.dumps(ENGINE[name])]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        if server.poll() is not None:
            raise ValueError(f"The server exited with code {server.returncode}: see {log.name}.")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1)
            return server, url
        except OSError:
            time.sleep(1)
    server.terminate()
    raise ValueError(f"The server did not answer within ten minutes: see {log.name}.")


def check_server(report: Report, model: str, document: dict, log_file: Path) -> None:
    start = time.monotonic()
    dtype = "bfloat16" if document["is_trained"] else "float32"  # without training, rounding decides between words
    with log_file.open("w") as log:
        server, url = start_server(model, dtype, log)
        print(f"OpenAI server in {dtype}; up in {time.monotonic() - start:.0f} s", flush=True)
        try:
            check_requests(report, openai.OpenAI(base_url=f"{url}/v1", api_key="none"), document)
        finally:
            server.terminate()
            server.wait(60)


def check_requests(report: Report, client: openai.OpenAI, document: dict) -> None:
    requests, trained = document["requests"], document["is_trained"]

    def complete(request: dict, extensions: dict | None = None, **settings) -> list[str]:
        response = client.chat.completions.create(
            model="sq-llava",
            messages=with_images(request["messages"], as_data_url),
            max_tokens=24,
            logit_bias=logit_bias(document),
            extra_body={"chat_template_kwargs": {"ask": request["ask"]}, **(extensions or {})},
            **settings,
        )
        return [choice.message.content for choice in response.choices]

    answering = [request for request in requests if not request["ask"]]
    start = time.monotonic()
    texts = [complete(request, temperature=0.0)[0] for request in answering]
    # An untrained model may end within a character, which transformers decodes as U+FFFD, and vLLM leaves out.
    equal = sum(
        text.strip().rstrip("\ufffd") == request["text"].rstrip("\ufffd") for text, request in zip(texts, answering)
    )
    report.add(
        equal == len(answering),
        "answers to images as data: URLs, and to none",
        f"{equal} of {len(answering)} equal; {time.monotonic() - start:.1f} s",
    )
    # Two differences from our server, which docs/serving.md names.
    begin = sum(text.startswith(" ") for text in texts)
    report.add(begin > 0 or not trained, "replies that begin with a space", f"{begin} of {len(texts)}")
    text = complete(answering[0], {"self_question": True}, temperature=0.0)[0]
    report.add(text == texts[0], "self_question is ignored", f"{text!r}")
    asking = next(request for request in requests if request["ask"])
    questions = [text.strip() for text in complete(asking, n=NUM_QUESTIONS, temperature=1.2, top_p=0.95, seed=0)]
    are_questions = sum(question.endswith("?") for question in questions)
    report.add(
        are_questions >= (NUM_QUESTIONS - 1) * trained,
        'self-questions by {"ask": true}',
        f"{are_questions} of {NUM_QUESTIONS} end in '?': {questions[0]!r}, ...",
    )


def check_model(folder: Path) -> bool:
    """Runs all checks of one model, and writes `folder/results.json`."""
    document = json.loads((folder / "requests.json").read_text())
    print(f"vLLM {vllm.__version__} with transformers {transformers.__version__}: {document['description']}")
    print(f"{len(document['requests'])} requests, tokens as of transformers {document['transformers']}", flush=True)
    report = Report()
    try:
        check_engine(report, str(folder / "model"), document)
        if document["is_served"]:
            check_server(report, str(folder / "model"), document, folder / "server.log")
    finally:
        if report.results["total"]:
            (folder / "results.json").write_text(json.dumps(report.results) + "\n")
    return report.results["passed"]


def check_all(folder: Path) -> bool:
    """Checks each model in a process of its own, and prints a table."""
    rows = []
    for name in json.loads((folder / "names.json").read_text()):
        print(f"\n{name}", flush=True)
        file = folder / name / "results.json"
        file.unlink(missing_ok=True)
        code = subprocess.run([sys.executable, "-P", __file__, "--dir", str(folder), "--name", name]).returncode
        rows.append((name, code == 0, json.loads(file.read_text()) if file.exists() else None))
    print(f"\n{'':6}{'model':<14}{'tokens equal':<16}{'log-probabilities to':<22}prompts")
    for name, passed, results in rows:
        cells = "gave no result: see above"
        if results:
            tokens = f"{results['equal']} of {results['total']}"
            prompts = "equal" if results["prompts_equal"] else "DIFFER"
            cells = f"{tokens:<16}{results['difference']:<22.0e}{prompts}"
        print(f"{'ok' if passed else 'FAIL':<6}{name:<14}{cells}")
    return all(passed for _, passed, _ in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/vllm"))
    parser.add_argument("--name", help="Check only this model, in this process.")
    args = parser.parse_args()
    passed = check_model(args.dir / args.name) if args.name else check_all(args.dir)
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()
