"""Generates the results of transformers that `vllm_checks.py` compares vLLM with. `make test-vllm` runs it.

    python -m tests.vllm_reference --model runs/demo/model --output-dir runs/vllm
    python -m tests.vllm_reference --name qwen3 --output-dir runs/vllm

The first writes a folder `demo` for the model, and one for each of `vllm_configurations.py`; the second only one of
them. A folder has a checkpoint, `model`, with the code and the chat template of this checkout, and `requests.json`:
conversations about images, with the token ids of each prompt and the greedy tokens of the model in float32, one
conversation at a time. The demo's model sees images of easy-VQA's test set, the others see pictures of random pixels.
The end-of-sequence token stops no model: all outputs have the same length, and the tokens after it are compared too.
"""

import argparse
import json
import shutil
from functools import partial
from pathlib import Path

import torch
import transformers

from demo.data import image_root
from sq_llava import Assistant, load
from tests.tiny import picture
from tests.vllm_configurations import CONFIGURATIONS, Configuration


NUM_TOKENS = 24
QUESTIONS = [
    "what color is the shape?",
    "what shape is in the image?",
    "is there a circle?",
    "what is the blue shape?",
    "is there not a red shape?",
    "does the image contain a triangle?",
]
NUM_IMAGES = len(QUESTIONS) + 1


def user_turn(text: str, *images: str) -> dict:
    parts = [{"type": "image", "path": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def conversations(images: list[str]) -> list[dict]:
    """Requests about `NUM_IMAGES` images: messages with their paths, and whether the model asks next."""
    first = [user_turn(QUESTIONS[0], images[-1]), {"role": "assistant", "content": "red"}]
    asked = {"role": "vusr", "content": QUESTIONS[1]}
    return [
        *[{"messages": [user_turn(question, image)], "ask": False} for question, image in zip(QUESTIONS, images)],
        {"messages": [user_turn(QUESTIONS[0], images[0], images[1])], "ask": False},
        {"messages": [user_turn(QUESTIONS[0])], "ask": False},
        {"messages": first, "ask": True},
        {"messages": [*first, asked], "ask": False},
    ]


def save_pictures(folder: Path) -> list[str]:
    """Writes pictures of random pixels. Most are not square, so that padding differs from cropping."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(NUM_IMAGES)]
    for number, path in enumerate(paths):
        picture(number, 40 + 8 * number, 64).save(path)
    return [str(path) for path in paths]


@torch.inference_mode()
def generate(assistant, request: dict) -> dict:
    """The request with its prompt ids, the generated tokens, their log-probabilities and their text."""
    inputs = assistant.processor.apply_chat_template(
        request["messages"],
        add_generation_prompt=True,
        ask=request["ask"],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = assistant.model.generate(
        **inputs, do_sample=False, max_new_tokens=NUM_TOKENS, return_dict_in_generate=True, output_logits=True
    )
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
    log_probs = torch.stack(output.logits)[:, 0].log_softmax(dim=-1)
    end = [*tokens.tolist(), assistant.processor.tokenizer.eos_token_id].index(
        assistant.processor.tokenizer.eos_token_id
    )
    return {
        **request,
        "prompt_ids": inputs["input_ids"][0].tolist(),
        "token_ids": tokens.tolist(),
        "log_probs": log_probs[torch.arange(len(tokens)), tokens].tolist(),
        "text": assistant.processor.decode(tokens[:end], skip_special_tokens=True).strip(),
    }


def require_sight(assistant: Assistant, images: list[str]) -> None:
    """Requires that the image matters: equal tokens would show nothing if every image gave the same ones."""
    one, other = (
        generate(assistant, {"messages": [user_turn(QUESTIONS[0], image)], "ask": False}) for image in images[:2]
    )
    difference = max(abs(a - b) for a, b in zip(one["log_probs"], other["log_probs"]))
    if difference < 0.1:
        raise ValueError(f"Another image changes the log-probabilities by only {difference:.0e}: nothing is compared.")


def write_requests(folder: Path, images: list[str], **about) -> None:
    """Writes `folder/requests.json` for the checkpoint `folder/model`; `about` has more fields."""
    assistant = load(str(folder / "model"), device="cpu", dtype="float32")
    generation_config = assistant.model.generation_config
    generation_config.eos_token_id = None
    # The last rows of a vocabulary have no token. vLLM fails if it returns the log-probability of such an id.
    vocabulary = range(assistant.model.config.text_config.vocab_size)
    generation_config.suppress_tokens += vocabulary[len(assistant.processor.tokenizer) :]
    require_sight(assistant, images)
    document = {
        "transformers": transformers.__version__,
        "suppressed": generation_config.suppress_tokens,
        **about,
        "requests": [generate(assistant, request) for request in conversations(images)],
    }
    (folder / "requests.json").write_text(json.dumps(document, indent=2) + "\n")


def write_demo(model: str, folder: Path) -> None:
    assistant = load(model, device="cpu", dtype="float32")
    assistant.model.save_pretrained(folder / "model")
    assistant.processor.save_pretrained(folder / "model")
    images = [str(image_root() / "test" / "images" / f"{number}.png") for number in range(NUM_IMAGES)]
    write_requests(folder, images, description="the demo's model, trained", is_trained=True, is_served=True)


def write_configuration(configuration: Configuration, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    configuration.save(folder / "model")
    about = {"description": configuration.description, "is_served": configuration.is_served}
    write_requests(folder, save_pictures(folder / "images"), is_trained=False, **about)


def main() -> None:
    writers = {"demo": None} | {each.name: partial(write_configuration, each) for each in CONFIGURATIONS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/model")
    parser.add_argument("--name", help="Write only this folder.", choices=list(writers))
    parser.add_argument("--output-dir", type=Path, default=Path("runs/vllm"))
    args = parser.parse_args()
    writers["demo"] = partial(write_demo, args.model)
    names = [args.name] if args.name else list(writers)
    for name in names:
        writers[name](args.output_dir / name)
    (args.output_dir / "names.json").write_text(json.dumps(names) + "\n")


if __name__ == "__main__":
    main()
