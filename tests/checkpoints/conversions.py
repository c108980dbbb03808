"""Converts tiny released checkpoints, for the tests of conversions."""

from functools import partial
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors.torch import load_file
from typer.testing import CliRunner

from sq_llava.checkpoints import convert
from sq_llava.checkpoints.layouts import recognise
from sq_llava.cli.main import app
from tests import released


LORA, MERGED, PROJECTOR = released.write_sq_llava_lora, released.write_sq_llava_merged, released.write_projector
# For each source: what writes it, and the base and the tower that it needs.
SOURCES = {
    "lora with ViT-LoRA in both places": (LORA, "base", "clip"),
    "lora with ViT-LoRA in its folder": (partial(LORA, vision_lora="folder"), "base", "tower"),
    "lora with ViT-LoRA of its own rank": (partial(LORA, vision_lora="inside", vision_rank=8), "base", "clip"),
    "lora without ViT-LoRA": (partial(LORA, vision_lora=None), "base", "clip"),
    "lora with rsLoRA": (partial(LORA, use_rslora=True, alpha=4), "base", "clip"),
    "lora on a base with a projector": (LORA, "llava-base", "clip"),
    "lora on a tied base": (LORA, "tied", "clip"),
    "merged": (MERGED, None, "clip"),
    "merged without its tower": (partial(MERGED, tower_inside=False), None, "tower"),
    "merged, in one safetensors": (partial(MERGED, shards=1, safetensors=True), None, "clip"),
    "projector": (PROJECTOR, "base", "clip"),
    "projector of LLaVA": (partial(PROJECTOR, projector="mlp2x_gelu"), "tied", "tower"),
    "llava": (partial(released.write_llava, tokenizer="fast"), None, "clip"),
    "llava with one linear layer": (partial(released.write_llava, projector="linear"), None, "clip"),
    "llava lora": (released.write_llava_lora, "base", "clip"),
    "llava on Mistral": (partial(released.write_llava, model_type="llava_mistral"), None, "clip"),
    "llava-hf, older": (partial(released.write_llava_hf, layout="older"), None, None),
    "llava-hf, newer": (partial(released.write_llava_hf, layout="newer"), None, None),
    "llava-hf, of transformers 5": (partial(released.write_llava_hf, layout="transformers5"), None, None),
}


def plan(source: Path, base=None, vision=None, name: str = "result", **settings) -> convert.Conversion:
    """Plans a conversion to a folder beside the source."""
    return convert.plan(recognise(source, base, vision), source.parent / name, **settings)


def convert_source(source: Path, base=None, vision=None, name: str = "result", **settings) -> convert.Conversion:
    """Converts a source; the result is in the folder `out` of what is returned."""
    conversion = plan(source, base, vision, name, **settings)
    convert.write(conversion, Progress(disable=True))
    return conversion


def run_convert(*arguments):
    """Runs `sq-llava convert`; its output is not wrapped."""
    return CliRunner().invoke(app, ["convert", *map(str, arguments)], env={"COLUMNS": "500"})


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
