"""Writes the table of pairs and their memory into docs/training.md, as `--dry_run meta` estimates it.

python -m tests.recipe_memory

The estimate needs only the configurations of the models. Here they are written out, because the tests have no network.
"""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import yaml
from transformers import (
    Blip2Config,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
    SiglipVisionConfig,
    SmolLM3Config,
)

import train_sft
from configuration_sq_llava import CLIP_VIT_L_14_336, VICUNA_7B, SQLlavaConfig
from sq_llava.resources import find_resource
from tests import ROOT, runs


RECIPES = find_resource("recipes")
PAIRS = (
    "siglip2-smollm2-360m",
    "siglip2-qwen3-1.7b",
    "siglip2-smollm3-3b",
    "clip-llama3.1-8b",
    "siglip2-qwen3-8b",
)
# Other language models that the comment of a recipe names.
VARIANTS = {"siglip2-smollm2-360m": ["SmolLM2-135M-Instruct"]}
DOCUMENT = ROOT / "docs" / "training.md"
BEGIN, END = "<!-- pairs: written by tests/recipe_memory.py -->\n", "<!-- end of pairs -->\n"
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "per_device_train_batch_size": 1, "num_gpus": 1}

VICUNA_13B = {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824}


def llama(hidden_size: int, intermediate_size: int, layers: int, heads: int, kv_heads: int, **fields) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **fields,
    )


def qwen3(hidden_size: int, intermediate_size: int, layers: int, heads: int, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        tie_word_embeddings=tied,
        max_position_embeddings=40960,
    )


def configurations() -> dict[str, PreTrainedConfig]:
    """The configurations of all models that recipes name, by the last part of their Hub id."""
    vicuna = {**VICUNA_7B, "vocab_size": 32000}
    so400m = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    smollm2 = {"vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192}
    return {
        "clip-vit-large-patch14-336": CLIPVisionConfig(**CLIP_VIT_L_14_336),
        "clip-vit-large-patch14": CLIPVisionConfig(**{**CLIP_VIT_L_14_336, "image_size": 224}),
        "blip2-flan-t5-xxl": Blip2Config(),
        "siglip2-so400m-patch14-384": SiglipVisionConfig(**so400m, image_size=384, patch_size=14),
        "siglip2-base-patch16-384": SiglipVisionConfig(image_size=384),
        "siglip2-base-patch16-256": SiglipVisionConfig(image_size=256),
        "vicuna-7b-v1.5": LlamaConfig(**vicuna),
        "vicuna-7b-v1.3": LlamaConfig(**vicuna),
        "vicuna-7b": LlamaConfig(**vicuna),
        "vicuna-13b-v1.5": LlamaConfig(**vicuna, **VICUNA_13B),
        "Llama-3.1-8B-Instruct": llama(4096, 14336, 32, 32, 8, vocab_size=128256, max_position_embeddings=131072),
        "Qwen3-1.7B": qwen3(2048, 6144, 28, 16, tied=True),
        "Qwen3-8B": qwen3(4096, 12288, 36, 32, tied=False),
        "SmolLM3-3B": SmolLM3Config(),
        "SmolLM2-360M-Instruct": llama(960, 2560, 32, 15, 5, **smollm2),
        "SmolLM2-135M-Instruct": llama(576, 1536, 30, 9, 3, **smollm2),
    }


def write_configurations(root: Path) -> Path:
    for name, config in configurations().items():
        config.save_pretrained(root / name)
    return root


def estimates(recipe: Path, root: Path, **overrides) -> list[str]:
    """
    The memory that `--dry_run meta` estimates for a recipe, one size for each kind of sharding: `["54.7 GiB", ...]`.

    Args:
        recipe (`Path`): Relative to the recipes.
        root (`Path`): Folder of the configurations.
        overrides: Settings in place of those of the recipe.
    """
    stage1 = yaml.safe_load((RECIPES / recipe).with_name("stage1.yaml").read_text())
    parts = {name: root / Path(stage1[name]).name for name in stage1 if name.endswith("_model_name_or_path")}
    settings = {"config": RECIPES / recipe, "dry_run": "meta", "num_gpus": num_gpus(recipe), "use_cpu": True}
    output = io.StringIO()
    with patch.dict("os.environ", COLUMNS="200"), redirect_stdout(output):
        train_sft.main(runs.command_line(settings | parts | overrides))
    total = next(line for line in output.getvalue().splitlines() if line.startswith("│ total "))
    return sizes_in(total)


def sizes_in(text: str) -> list[str]:
    return re.findall(r"\d+\.\d [GM]iB", text)


def header(recipe: Path) -> str:
    """The comment at the beginning of a recipe."""
    return (RECIPES / recipe).read_text().partition("\nstage:")[0]


def num_gpus(recipe: Path) -> int:
    return 8 if "8 GPUs" in header(recipe) else 1


def row(pair: str, memory: list[str], text: str | None = None) -> str:
    """
    A row of the table.

    Args:
        pair (`str`): One of `PAIRS`.
        memory (`list[str]`): Memory of stage 1, of stage 2, and in 4 bits.
        text (`str`, *optional*): Another language model than that of the recipes.
    """
    settings = yaml.safe_load((RECIPES / pair / "stage1.yaml").read_text())
    vision, own = (Path(settings[f"{part}_model_name_or_path"]).name for part in ("vision", "text"))
    config = SQLlavaConfig(vision_config=configurations()[vision])
    number = num_gpus(Path(pair, "stage1.yaml"))
    gpus = "one GPU" if number == 1 else f"each of {number} GPUs"
    return f"| `{pair}` | {vision} | {text or own} | {config.image_seq_length} | {gpus} | {' | '.join(memory)} |"


def memory(pair: str, root: Path, **overrides) -> list[str]:
    """Memory of stage 1, of stage 2, and of the larger one in 4 bits. With several GPUs, that of DDP."""
    stages = [Path(pair, f"stage{number}.yaml") for number in (1, 2)]
    whole = [estimates(stage, root, **overrides)[0] for stage in stages]
    in_four_bits = [estimates(stage, root, **FOUR_BITS | overrides)[0] for stage in stages]
    return [*whole, max(in_four_bits, key=lambda size: (size.endswith("GiB"), float(size.split()[0])))]


def main():
    lines = [
        "| recipes | vision tower | language model | tokens per image | memory is for | stage 1 | stage 2 "
        "| in 4 bits, 1 row |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with TemporaryDirectory() as folder:
        root = write_configurations(Path(folder))
        for pair in PAIRS:
            for text in VARIANTS.get(pair, []):
                lines.append(row(pair, memory(pair, root, text_model_name_or_path=root / text), text))
            lines.append(row(pair, memory(pair, root)))
    text = DOCUMENT.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    DOCUMENT.write_text(f"{before}{BEGIN}\n{chr(10).join(lines)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
