"""Trains a tiny BLIP-2 on the captions of the demo: the towers of MiniGPT-4. It takes less than a minute.

    make demo
    python -m demo.blip2                                                   writes runs/demo/blip2
    python -m train_sft --config recipes/tiny/minigpt4-7b/stage1.yaml

It takes the place of `Salesforce/blip2-flan-t5-xxl`: a vision tower and a Q-Former, without a language model.
`benchmarks/three_systems.py` trains it for longer.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Blip2Config, Blip2VisionModelWithProjection, BlipImageProcessor, set_seed

from demo.base_models import (
    CAPTIONS,
    IMAGE_SIZE,
    PATCH_SIZE,
    caption_numbers,
    contrastive_loss,
    draw_images,
    load_images,
    train,
)
from demo.data import caption_rows, read_questions
from sq_llava.console import errors_in_one_line
from sq_llava.output import output_lock


def build_blip2() -> Blip2VisionModelWithProjection:
    """A vision tower with the size of `build_clip`'s, and a Q-Former with 32 queries."""
    towers = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "initializer_range": 0.02}
    config = Blip2Config(
        vision_config={**towers, "num_hidden_layers": 3, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
        qformer_config={
            **towers, "num_hidden_layers": 2, "encoder_hidden_size": 64, "cross_attention_frequency": 1,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
        image_text_hidden_size=64,
    )  # fmt: skip
    model = Blip2VisionModelWithProjection(config)
    nn.init.normal_(model.query_tokens)  # they start at zero, and equal queries would stay equal
    return model


def pretrain_blip2(train_rows: list[dict], holdout_rows: list[dict], output_dir: str | Path, num_steps: int) -> float:
    """Trains BLIP-2's vision tower and Q-Former on images and captions, and saves them with their image processor.

    The loss is BLIP-2's contrastive loss, with one embedding for each caption. An image is represented by the mean of
    its queries, so that all of them learn; BLIP-2 takes the closest query. Arguments and result are those of
    `pretrain_clip`.
    """
    set_seed(0)
    image_processor = BlipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    texts = nn.Embedding(len(CAPTIONS), 64)
    texts.register_parameter("logit_scale", nn.Parameter(torch.tensor(2.66)))  # CLIP's, 1 / 0.07
    model = nn.ModuleDict({"images": build_blip2(), "texts": texts})
    pixel_values = load_images(image_processor, train_rows)
    caption_of_image = caption_numbers(train_rows)

    def compare(images: torch.Tensor) -> torch.Tensor:
        embedded = model["images"](pixel_values=images).image_embeds  # [num_images, num_queries, 64]
        return F.normalize(embedded.mean(dim=1), dim=-1) @ F.normalize(texts.weight, dim=-1).T

    def compute_loss() -> torch.Tensor:
        batch, images = draw_images(pixel_values, 64)
        return contrastive_loss(texts.logit_scale.exp() * compare(images), caption_of_image[batch])

    train(model, compute_loss, num_steps, 2e-3, betas=(0.9, 0.98), description="BLIP-2")
    with torch.no_grad():
        guesses = compare(load_images(image_processor, holdout_rows)).argmax(dim=-1)
    model["images"].save_pretrained(output_dir)
    image_processor.save_pretrained(output_dir)
    return (guesses == caption_numbers(holdout_rows)).double().mean().item()


def make_blip2(data: Path, folder: Path, num_steps: int) -> None:
    """
    Trains the towers on the captions that the demo's CLIP was trained on. A folder that has them is left as it is.

    Args:
        data (`Path`): Folder `data` of the demo.
        folder (`Path`): Folder to save to.
        num_steps (`int`): Number of optimizer steps.

    Raises:
        ValueError: If the demo has not written its data.
    """
    if not (data / "stage1_train.json").is_file():
        raise ValueError(f"{data / 'stage1_train.json'}: no such file. Run `make demo` first.")
    with output_lock(folder):
        if (folder / "preprocessor_config.json").is_file():
            print(f"{folder} is there already.")
            return
        captions = json.loads((data / "stage1_train.json").read_text())
        held_out = {row["image"] for row in json.loads((data / "holdout.json").read_text())}
        holdout = [row for row in caption_rows(read_questions("train")) if row["image"] in held_out]
        accuracy = pretrain_blip2(captions, holdout, folder, num_steps)
        print(f"BLIP-2 picks the right one of 24 captions for {accuracy:.1%} of the held-out images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runs/demo"), help="Folder of `make demo`.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo/blip2"), help="Folder of the BLIP-2.")
    parser.add_argument("--steps", type=int, default=60, help="Number of optimizer steps.")
    arguments = parser.parse_args()
    with errors_in_one_line():
        make_blip2(arguments.base / "data", arguments.out, arguments.steps)


if __name__ == "__main__":
    main()
