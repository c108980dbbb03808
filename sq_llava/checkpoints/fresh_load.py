"""Loads a checkpoint in a separate process by the checkpoint's own code, as on a machine without this library.

    python -P fresh_load.py '{"model": "org/name", "revision": "0123...", "output": "logits", ...}'

`sq_llava/checkpoints/push.py` runs it before and after an upload, and compares the results. It writes the logits of
one prompt with a picture, and one generated token, to `output`. With `base`, `model` is an adapter for this base.
"""

import json
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor


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
) -> None:
    sys.meta_path.insert(0, SourcesOutOfReach())
    loaded, processor = load(model, revision, base, base_revision)
    content = [{"type": "image", "path": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        logits = loaded(**inputs).logits.float()
        generated = loaded.generate(**inputs, do_sample=False, max_new_tokens=1)
    if not logits.isfinite().all():
        raise ValueError(f"The logits of {model} are not finite numbers.")
    save_file({"logits": logits, "generated": generated}, output)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
