"""Greedy generation compared with transformers' LlavaForConditionalGeneration of the same sizes and weights.

    python -m benchmarks.generate            # about a minute; writes benchmarks/results/generate.{json,md}

Both models share one vision tower and one language model: random weights, with the widths of CLIP-B and SmolLM2-135M
and fewer layers. The prompt has an image of 256 tokens and 32 tokens of text; 64 tokens are generated. The variant
`none` has LLaVA's architecture and must generate LLaVA's tokens; `paper` adds the prototype extractor. Not measured:
preprocessing, real weights.
"""

from functools import partial

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from benchmarks import common
from benchmarks.random_models import clip_sizes, llama_sizes
from configuration_sq_llava import SQLlavaConfig
from modeling_sq_llava import SQLlavaForConditionalGeneration


IMAGE_TOKENS, TEXT_TOKENS = 256, 32
IMAGE_ID, VUSR_ID = 49_150, 49_151
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sizes_of(vision_layers: int, text_layers: int) -> dict:
    vision = clip_sizes(768, vision_layers, heads=12, side=224)
    text = llama_sizes(576, inner=1536, layers=text_layers, heads=9, vocabulary=49_152, kv_heads=3)
    return {"vision_config": vision, "text_config": text}


def make_llava(parts: dict) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    return without_end(LlavaForConditionalGeneration(LlavaConfig(**parts, image_token_index=IMAGE_ID)).to(DEVICE))


def make_sq_llava(parts: dict, variant: str, llava: LlavaForConditionalGeneration) -> SQLlavaForConditionalGeneration:
    """An SQ-LLaVA that shares the modules of `llava`."""
    config = SQLlavaConfig(**parts, prototype_variant=variant, image_token_id=IMAGE_ID, vusr_token_id=VUSR_ID)
    model = SQLlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model = llava.model.vision_tower, llava.model.language_model
    model.model.multi_modal_projector.load_state_dict(llava.model.multi_modal_projector.state_dict())
    model.lm_head = llava.lm_head
    return without_end(model.to(DEVICE))


def without_end(model, pad_token_id: int = 0):
    """The model without an end-of-text token: each answer then has the maximum length."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = pad_token_id
    return model.eval()


def make_inputs(device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, IMAGE_ID, (1, TEXT_TOKENS), generator=generator)
    ids = torch.cat([words[:, :4], torch.full((1, IMAGE_TOKENS), IMAGE_ID), words[:, 4:]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["pixel_values"] = torch.randn(1, 3, 224, 224, generator=generator)
    return {name: value.to(device) for name, value in inputs.items()}


def to_markdown(report: dict) -> str:
    speed = {name: common.with_spread(values) for name, values in report["tokens_per_second"].items()}
    rows = [["LlavaForConditionalGeneration", speed["llava"], 1]]
    for variant, times in report["time_of_llava"].items():
        rows.append([f"SQ-LLaVA, prototype_variant {variant}", speed[variant], common.with_spread(times)])
    return common.text(
        "# Greedy generation compared with transformers' LLaVA",
        f"The prompt has {IMAGE_TOKENS} image tokens and {TEXT_TOKENS} tokens of text; {report['new_tokens']} tokens "
        "are generated. Tokens per second are measured over the whole call. The goal is at most 1.02 times LLaVA's "
        f"time. Median (lowest to highest) of {report['rounds']} rounds.",
        common.table(["model", "tokens/s", "time relative to LLaVA"], rows),
        "`none` has LLaVA's architecture. Does it generate the same tokens? "
        f"{'Yes' if report['equal_tokens'] else 'NO'}.",
    )


@torch.inference_mode()
def main() -> None:
    arguments = common.parse_arguments(__doc__)
    new_tokens, rounds = (12, 2) if arguments.quick else (64, 5)
    parts = sizes_of(2, 2) if arguments.quick else sizes_of(vision_layers=6, text_layers=12)
    llava = make_llava(parts)
    models = {"llava": llava} | {variant: make_sq_llava(parts, variant, llava) for variant in ("none", "paper")}
    settings = make_inputs(llava.device) | {"do_sample": False, "max_new_tokens": new_tokens}
    runners = {name: partial(model.generate, **settings) for name, model in models.items()}
    times = common.interleave(runners, rounds)
    report = {
        "new_tokens": new_tokens,
        "rounds": rounds,
        "times": times,
        "tokens_per_second": {
            name: common.summary([new_tokens / seconds for seconds in each]) for name, each in times.items()
        },
        "time_of_llava": {name: common.ratio(times, name, "llava") for name in ("none", "paper")},
        "equal_tokens": torch.equal(runners["llava"](), runners["none"]()),
    }
    common.save("generate", report, to_markdown, arguments)


if __name__ == "__main__":
    main()
