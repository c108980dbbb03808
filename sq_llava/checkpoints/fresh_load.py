"""Loads a checkpoint in a separate process by the checkpoint's own code, as on a machine without this library.

    python -P fresh_load.py '{"model": "org/name", "revision": "0123...", "output": "logits", ...}'

`sq_llava/checkpoints/push.py` runs it before and after an upload, and compares the results. It writes the logits of
one prompt with a picture, and one generated token, to `output`. With `base`, `model` is an adapter for this base. With
`samples`, it also lets the model answer and ask, for the model card, and writes the texts to this file.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor


# As in the examples of the card.
SAMPLING = {"do_sample": True, "temperature": 1.2, "top_k": 300, "top_p": 0.95}
MAX_NEW_TOKENS = 64
NUM_QUESTIONS = 2
# Questions are drawn until there are enough different ones, at most so many times.
MAX_DRAWS = 4
SOURCES = {
    "configuration_sq_llava",
    "image_processing_sq_llava",
    "modeling_sq_llava",
    "processing_sq_llava",
    "sq_llava",
}


class SourcesOutOfReach:
    """An import hook that hides this library: code that is missing in the folder must not be found elsewhere."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in SOURCES:
            raise ModuleNotFoundError(f"{name} is hidden in this process", name=name)


def load(model: str, revision: str | None, base: str | None, base_revision: str | None):
    """Loads the model, with its adapter if there is one, and the processor."""
    whole, whole_revision = (model, revision) if base is None else (base, base_revision)
    loaded, report = AutoModel.from_pretrained(
        whole, revision=whole_revision, trust_remote_code=True, dtype="auto", output_loading_info=True
    )
    # transformers only warns about these and uses random weights.
    faults = {kind: sorted(report[kind])[:3] for kind in ("missing_keys", "mismatched_keys") if report[kind]}
    if faults:
        raise ValueError(f"The weights of {whole} do not match its code: {faults}")
    if base is not None:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, model, revision=revision)
    return loaded.eval(), AutoProcessor.from_pretrained(model, revision=revision, trust_remote_code=True)


def main(
    model: str,
    output: str,
    image: str,
    question: str,
    revision: str | None = None,
    base: str | None = None,
    base_revision: str | None = None,
    samples: str | None = None,
) -> None:
    sys.meta_path.insert(0, SourcesOutOfReach())
    loaded, processor = load(model, revision, base, base_revision)
    content = [{"type": "image", "path": image}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    inputs = prompt(processor, messages)
    with torch.inference_mode():
        logits = loaded(**inputs).logits.float()
        generated = loaded.generate(**inputs, do_sample=False, max_new_tokens=1)
    if not logits.isfinite().all():
        raise ValueError(f"The logits of {model} are not finite numbers.")
    save_file({"logits": logits, "generated": generated}, output)
    if samples is not None:
        Path(samples).write_text(json.dumps(draw_samples(loaded, processor, messages)))


def prompt(processor, messages: list[dict], ask: bool = False):
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, ask=ask, tokenize=True, return_dict=True, return_tensors="pt"
    )


def draw_samples(model, processor, messages: list[dict]) -> dict:
    """
    Lets the model answer, and then ask.

    Returns:
        `answer`, the greedy answer, and `questions`, up to `NUM_QUESTIONS` different ones.
    """

    @torch.inference_mode()
    def text(inputs, **settings) -> str:
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **settings)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    answer = text(prompt(processor, messages), do_sample=False)
    asking = prompt(processor, [*messages, {"role": "assistant", "content": answer}], ask=True)
    torch.manual_seed(0)
    questions: list[str] = []
    for _ in range(MAX_DRAWS):
        question = text(asking, **SAMPLING)
        if question and question not in questions:
            questions.append(question)
        if len(questions) == NUM_QUESTIONS:
            break
    return {"answer": answer, "questions": questions}


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
