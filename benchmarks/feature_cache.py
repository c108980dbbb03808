"""Stage 1 without ViT-LoRA: a training step that reads its images' features from disk, beside one that makes them.

    python -m benchmarks.feature_cache            # writes benchmarks/results/feature_cache.{json,md}, under 2 minutes
    python -m benchmarks.feature_cache --quick    # small models, writes nothing

Random weights: a vision tower of the size of CLIP-B/16 (196 image tokens) and a Llama of 48 million numbers in its
layers; photos of 640 x 480 as JPEG. Both sides take the same rows, weights and steps, on the main thread, and must
have the same loss first. The files are warm: a disk that is slower than memory adds its time to the cached side (1.2
MB an image for CLIP-L-336 in bfloat16). What it does not measure: a GPU, and the 7B model, of which the tower's share
is computed instead.
"""

import io
import json
import tempfile
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from trl.trainer.utils import add_fused_lm_head

from benchmarks import common
from benchmarks.random_models import loss_of
from processing_sq_llava import SYSTEM_MESSAGE
from sq_llava.base import add_stage_adapter, load_base
from sq_llava.data import load_rows
from sq_llava.feature_building import build, size_of
from sq_llava.feature_cache import FeatureCache
from sq_llava.self_questioning import SelfQuestioningCollator
from sq_llava.settings import parse_settings


LARGE_VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
LARGE_TEXT = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 9}
SMALL_VISION = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3}
SMALL_TEXT = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 3}
SIDE, PATCH = 224, 16
CAPTION = "A brown dog runs over the wet grass of a park while two children watch it from a bench near the trees."
PROTOTYPES = 64
# Numbers in the layers that are run, and tokens of a row of stage 1: CLIP-L-336's 23 layers, Vicuna-7B's 32.
CLIP_L, VICUNA_7B = 23 * 12.6e6, 32 * 202.4e6
CLIP_L_TOKENS, CAPTION_TOKENS = 577, 40


def photo(seed: int) -> Image.Image:
    """Smooth random colours with some grain: a JPEG of about the size of a photo's."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 12, 16, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(480, 640), mode="bicubic")[0]
    pixels = (smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1) * 255
    return Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).numpy())


def write_parts(folder: Path, vision: dict, text: dict, num_images: int) -> None:
    """`clip`, `llama`, and `rows.json` with its images."""
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**vision, image_size=SIDE, patch_size=PATCH)).save_pretrained(folder / "clip")
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder / "clip")
    words = ByteLevelBPETokenizer()
    words.train_from_iterator([SYSTEM_MESSAGE, CAPTION], vocab_size=600, special_tokens=["<s>", "</s>", "<pad>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder / "llama")
    LlamaForCausalLM(LlamaConfig(**text, vocab_size=len(tokenizer))).save_pretrained(folder / "llama")
    rows = []
    for index in range(num_images):
        photo(index).save(folder / f"{index}.jpg", quality=90)
        turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": CAPTION}]
        rows.append({"id": str(index), "image": f"{index}.jpg", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))


def recipe_of(folder: Path):
    settings = {
        "stage": "align", "vision_lora_r": 0, "num_prototypes": PROTOTYPES, "dataset_path": folder / "rows.json",
        "vision_model_name_or_path": folder / "clip", "text_model_name_or_path": folder / "llama",
        "output_dir": folder / "run", "gradient_checkpointing": False, "bf16": False, "use_cpu": True,
    }  # fmt: skip
    return parse_settings([text for name, value in settings.items() for text in (f"--{name}", str(value))])


def step(model, collator: SelfQuestioningCollator, rows: list[dict], optimizer: torch.optim.Optimizer) -> float:
    batch = collator(rows)
    del batch["turn_kinds"], batch["row_ids"]
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def tower_share(vision: float, vision_tokens: int, text: float, text_tokens: int) -> float:
    """The frozen tower's forward pass of the operations of a step: the language model goes forward, and back once."""
    tower = 2 * vision * vision_tokens
    return tower / (tower + 4 * text * text_tokens)


def measure(folder: Path, num_images: int, batch_size: int, rounds: int) -> dict:
    recipe, features = recipe_of(folder), folder / "features"
    console = Console(file=io.StringIO())
    make = partial(build, recipe, features, None, 16, "", console)
    building, again = common.seconds_of(make), common.seconds_of(make)
    model, processor, _ = load_base(*recipe, None)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    model = add_stage_adapter(model, recipe[0], recipe[2]).train()
    rows = load_rows(recipe[0].datasets, 0, processor.image_seq_length)
    rows = [rows[index] for index in range(batch_size)]
    cache = FeatureCache(features, "")
    collators = {
        "images": SelfQuestioningCollator(processor, plain=True),
        "cached": SelfQuestioningCollator(processor, plain=True, feature_cache=cache),
    }
    # A step so small that it changes nothing: both sides keep the same weights.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-12)
    losses = {side: step(model, collator, rows, optimizer) for side, collator in collators.items()}
    assert abs(losses["images"] - losses["cached"]) < 1e-5, losses
    steps = {side: partial(step, model, collator, rows, optimizer) for side, collator in collators.items()}
    batches = {f"{side}, batch only": partial(collator, rows) for side, collator in collators.items()}
    times = common.interleave(steps | batches, rounds)
    text, vision = model.get_base_model().model.language_model.layers, model.get_base_model().model.vision_tower
    run = vision.encoder.layers[: model.config.num_vision_layers_used]
    text_size, vision_size = (sum(p.numel() for p in layers.parameters()) for layers in (text, run))
    tokens = model.config.image_seq_length
    return {
        "images": num_images,
        "rows_in_a_step": batch_size,
        "bytes_of_an_image": cache.features(rows[0]["images"][0]).nbytes,
        "building_seconds": building,
        "building_again_seconds": again,
        "built_images_per_second": num_images / (building - again),
        "losses": losses,
        "times": times,
        "step_times_faster": common.ratio(times, "images", "cached"),
        "batch_times_faster": common.ratio(times, "images, batch only", "cached, batch only"),
        "tower_share_computed": tower_share(vision_size, tokens + 1, text_size, tokens + CAPTION_TOKENS),
        "tower_share_computed_7b": tower_share(CLIP_L, CLIP_L_TOKENS, VICUNA_7B, CLIP_L_TOKENS - 1 + CAPTION_TOKENS),
    }


def to_markdown(report: dict) -> str:
    times, rows = report["times"], report["rows_in_a_step"]
    lines = [
        "# Features of a frozen vision tower from disk",
        "",
        f"Seconds of {rows} rows, median (lowest to highest), and by how much the cached side is faster.",
        "",
        "| | decoded and encoded | from the cache | times faster |",
        "|---|---|---|---|",
    ]
    for name, suffix, faster in (
        ("whole step of stage 1", "", "step_times_faster"),
        ("its batch alone: images or features, tokens, labels", ", batch only", "batch_times_faster"),
    ):
        one, other = (common.with_spread(common.summary(times[side + suffix])) for side in ("images", "cached"))
        lines.append(f"| {name} | {one} | {other} | {common.with_spread(report[faster])} |")
    lines += [
        "",
        f"Building: {report['built_images_per_second']:.1f} images a second ({report['images']} images, "
        f"{size_of(report['bytes_of_an_image'])} each, {report['building_seconds']:.1f} s in all; the same again, "
        f"with nothing to do, {report['building_again_seconds']:.1f} s).",
        "",
        f"Of the operations of a step the tower has {report['tower_share_computed']:.0%} here, computed from the "
        f"sizes: with CLIP-L-336 and a 7B language model it would be {report['tower_share_computed_7b']:.1%}. There "
        "the cache saves the decoding, and little of the step.",
    ]
    return "\n".join(lines)


def main():
    arguments = common.parse_arguments(__doc__)
    vision, text = (SMALL_VISION, SMALL_TEXT) if arguments.quick else (LARGE_VISION, LARGE_TEXT)
    num_images, batch_size, rounds = (12, 2, 2) if arguments.quick else (32, 2, 5)
    with tempfile.TemporaryDirectory() as folder:
        write_parts(Path(folder), vision, text, num_images)
        report = measure(Path(folder), num_images, batch_size, rounds)
    common.save("feature_cache", report, to_markdown(report), arguments)


if __name__ == "__main__":
    main()
