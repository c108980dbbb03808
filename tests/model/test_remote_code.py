"""Uses checkpoints that hold their own code, in a fresh process in another folder, without the source tree.

One process runs all checks of `remote_code_checks.py`, because its imports take seconds. Each check is a test here.
"""

import json
import os
import subprocess

import pytest
import torch
from transformers import LlavaImageProcessorPil

from tests import ROOT
from tests.pictures import pictures, turned
from tests.remote_code_checks import CHECKS
from tests.tiny import llama_tokenizer, picture, tiny_model_for, tiny_processor
from tests.warm_python import warm_python


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The traceback of each check; "" if it passed."""
    folder = tmp_path_factory.mktemp("remote_code")
    write_checkpoints(folder)
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    environment |= {"HF_HOME": str(folder / "hf_home"), "HF_MODULES_CACHE": str(folder / "hf_modules")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    away = folder / "away"
    away.mkdir()
    command = [warm_python(), "-P", str(ROOT / "tests" / "remote_code_checks.py"), str(folder)]
    process = subprocess.run(
        command, cwd=away, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    return json.loads((folder / "results.json").read_text())


def write_checkpoints(folder):
    """Writes three checkpoints and `expected.pt`: the results of the model and the processor of the source tree."""
    processor = tiny_processor(llama_tokenizer(legacy=True))
    model = tiny_model_for(processor)
    images = [picture(0), picture(1, width=30, height=50)]
    question = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": question}]
    text_only = [{"role": "user", "content": [{"type": "text", "text": "What is a dog?"}]}]

    def prompt(messages):
        settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return processor.apply_chat_template(messages, **settings)

    def answer(inputs):
        sequence = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        texts = [processor.decode(ids[0], skip_special_tokens=True) for ids in (sequence, inputs["input_ids"])]
        return sequence, texts[0].removeprefix(texts[1])

    expected = {"messages": messages, "images": images, "text_only": text_only, "inputs": dict(prompt(messages))}
    expected["prompt"] = processor.apply_chat_template(messages, add_generation_prompt=True)
    expected["chat_template"] = processor.chat_template
    expected["token_ids"] = processor.tokenizer("a dog<image>\n[vusr] b").input_ids
    expected["generated"], expected["answer"] = answer(prompt(messages))
    _, expected["text_only_answer"] = answer(prompt(text_only))
    with torch.no_grad():
        expected["logits"] = model(**prompt(messages)).logits
    stock = LlavaImageProcessorPil.from_dict(processor.image_processor.to_dict())
    expected["pictures"] = [
        {
            "row": picture.row,
            "file": picture.file,
            "image": None if picture.file else picture.image,
            "pixels": picture.rgb and stock(picture.rgb, return_tensors="pt")["pixel_values"],
        }
        for picture in [*pictures(), *turned()]
        if picture.row != "P, palette with transparency"  # Pillow does not pickle all of it
    ]
    expected["sums"] = {}
    for name in ("float32", "sharded", "bfloat16"):  # bfloat16 last: it changes the model in place
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        model.to(dtype).save_pretrained(folder / name, max_shard_size="200KB" if name == "sharded" else "50GB")
        processor.save_pretrained(folder / name)
        expected["sums"][name] = model.model.prototype_extractor.prototypes.sum().item()
    torch.save(expected, folder / "expected.pt")


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_in_a_fresh_process_away_from_the_sources(check, results):
    assert not results[check], results[check]
