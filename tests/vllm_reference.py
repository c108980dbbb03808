"""Generates the results of transformers that `vllm_checks.py` compares vLLM with. `make test-vllm` runs it.

    python -m tests.vllm_reference --model runs/demo/model --output-dir runs/vllm
    python -m tests.vllm_reference --chatml --output-dir runs/vllm/chatml

Each writes OUTPUT_DIR/model, a checkpoint with the code and the chat template of this checkout, and
OUTPUT_DIR/requests.json: conversations about images of easy-VQA's test set, with the token ids of each prompt and the
greedy tokens of the model in float32, one conversation at a time. With --chatml, the model is a new one on a small
Qwen3, untrained, and its prompts are in ChatML. The end-of-sequence token stops no model: all outputs have the same
length, and the tokens after it are compared too.
"""

import argparse
import json
from pathlib import Path

import torch
import transformers

from demo.data import image_root
from sq_llava import compose, load
from tests.chat_tokenizers import save_qwen3
from tests.tiny import save_towers


NUM_TOKENS = 24
QUESTIONS = [
    "what color is the shape?",
    "what shape is in the image?",
    "is there a circle?",
    "what is the blue shape?",
    "is there not a red shape?",
    "does the image contain a triangle?",
]


def conversations() -> list[dict]:
    """Requests: messages with image paths, and whether the model asks next."""

    def turn(text: str, *images: str) -> dict:
        parts = [{"type": "image", "path": image} for image in images]
        return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}

    images = [str(image_root() / "test" / "images" / f"{number}.png") for number in range(len(QUESTIONS) + 1)]
    first = [turn(QUESTIONS[0], images[-1]), {"role": "assistant", "content": "red"}]
    asked = {"role": "vusr", "content": QUESTIONS[1]}
    return [
        *[{"messages": [turn(question, image)], "ask": False} for question, image in zip(QUESTIONS, images)],
        {"messages": [turn(QUESTIONS[0], images[0], images[1])], "ask": False},
        {"messages": [turn(QUESTIONS[0])], "ask": False},
        {"messages": first, "ask": True},
        {"messages": [*first, asked], "ask": False},
    ]


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


def untrained_chatml_model(folder: Path) -> str:
    """Writes a composed model to `folder/composed`. vLLM's attention needs heads of at least 32 channels."""
    save_towers(folder)
    save_qwen3(folder / "qwen3", head_dim=32)
    model, processor = compose(str(folder / "clip"), str(folder / "qwen3"), num_prototypes=5)
    assert processor.chat_template.count("<|im_start|>") and processor.thought
    model.save_pretrained(folder / "composed")
    processor.save_pretrained(folder / "composed")
    return str(folder / "composed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/model")
    parser.add_argument("--chatml", action="store_true", help="Use an untrained model with ChatML instead.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/vllm"))
    args = parser.parse_args()
    model = untrained_chatml_model(args.output_dir) if args.chatml else args.model
    assistant = load(model, device="cpu", dtype="float32")
    assistant.model.save_pretrained(args.output_dir / "model")
    assistant.processor.save_pretrained(args.output_dir / "model")
    assistant.model.generation_config.eos_token_id = None
    requests = [generate(assistant, request) for request in conversations()]
    document = {"transformers": transformers.__version__, "trained": not args.chatml, "requests": requests}
    (args.output_dir / "requests.json").write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
