"""Greedy generation beside transformers' LlavaForConditionalGeneration: the same sizes, weights, prompt and answer.

    python -m benchmarks.generate            # about a minute; writes benchmarks/results/generate.{json,md}
    python -m benchmarks.generate --quick    # small, writes nothing

Both have the same modules for vision tower and language model: the widths of CLIP-B and of SmolLM2-135M with fewer
layers, random. An image of 256 tokens, 32 tokens of text, then 64 greedy ones. `none` is LLaVA by its architecture and
gives its tokens; `paper` has the extractor in between. What is not measured: preprocessing, real weights.
"""

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from benchmarks import common
from configuration_sq_llava import SQLlavaConfig
from modeling_sq_llava import SQLlavaForConditionalGeneration


IMAGE_TOKENS, TEXT_TOKENS = 256, 32
IMAGE_ID, VUSR_ID = 49_150, 49_151


def configs(vision_layers: int, text_layers: int) -> dict:
    vision = {"model_type": "clip_vision_model", "hidden_size": 768, "intermediate_size": 3072, "patch_size": 14}
    vision |= {"image_size": 224, "num_attention_heads": 12, "num_hidden_layers": vision_layers}
    text = {"model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536}
    text |= {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": text_layers}
    return {"vision_config": vision, "text_config": text}


def make_llava(parts: dict) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(**parts, image_token_index=IMAGE_ID))
    return without_end(model)


def make_sq_llava(parts: dict, variant: str, llava: LlavaForConditionalGeneration) -> SQLlavaForConditionalGeneration:
    """With the weights of `llava`: its own modules."""
    config = SQLlavaConfig(**parts, prototype_variant=variant, image_token_id=IMAGE_ID, vusr_token_id=VUSR_ID)
    model = SQLlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model = llava.model.vision_tower, llava.model.language_model
    model.model.multi_modal_projector.load_state_dict(llava.model.multi_modal_projector.state_dict())
    model.lm_head = llava.lm_head
    return without_end(model)


def without_end(model):
    model.generation_config.eos_token_id = None  # each answer has all its tokens
    model.generation_config.pad_token_id = 0
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def make_inputs(device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, IMAGE_ID, (1, TEXT_TOKENS), generator=generator)
    ids = torch.cat([words[:, :4], torch.full((1, IMAGE_TOKENS), IMAGE_ID), words[:, 4:]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["pixel_values"] = torch.randn(1, 3, 224, 224, generator=generator)
    return {name: value.to(device) for name, value in inputs.items()}


def to_markdown(report: dict) -> str:
    lines = [
        "# Greedy generation beside transformers' LLaVA",
        "",
        f"{IMAGE_TOKENS} image tokens, {TEXT_TOKENS} of text, {report['new_tokens']} generated; tokens a second count "
        "the whole call. Goal: at most 1.02 times LLaVA's time. Median (lowest to highest) of "
        f"{report['rounds']} rounds.",
        "",
        "| model | tokens/s | time beside LLaVA's |",
        "|---|--:|--:|",
        f"| LlavaForConditionalGeneration | {common.with_spread(report['tokens_per_second']['llava'])} | 1 |",
    ]
    for variant, times in report["time_of_llava"].items():
        speed = common.with_spread(report["tokens_per_second"][variant])
        lines.append(f"| SQ-LLaVA, prototype_variant {variant} | {speed} | {common.with_spread(times)} |")
    lines += ["", f"The tokens of `none` are those of LLaVA: {'yes' if report['equal_tokens'] else 'NO'}."]
    return "\n".join(lines)


@torch.inference_mode()
def main() -> None:
    arguments = common.parse_arguments(__doc__)
    new_tokens, rounds = (12, 2) if arguments.quick else (64, 5)
    parts = configs(2, 2) if arguments.quick else configs(vision_layers=6, text_layers=12)
    llava = make_llava(parts)
    models = {"llava": llava} | {variant: make_sq_llava(parts, variant, llava) for variant in ("none", "paper")}
    inputs = make_inputs(llava.device)

    def runner(model):
        return lambda: model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)

    runners = {name: runner(model) for name, model in models.items()}
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
    common.save("generate", report, to_markdown(report), arguments)


if __name__ == "__main__":
    main()
