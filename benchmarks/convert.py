"""The memory of a conversion: a LoRA release of SQ-LLaVA on a base of 0.8 GB, a file of weights at a time.

    python -m benchmarks.convert            # a minute; writes benchmarks/results/convert.{json,md}; 3 GB of disk
    python -m benchmarks.convert --quick    # a base of 390 MB, writes nothing

The base is a Llama in float16, in `.bin` files as Vicuna's; the LoRA has rank 128 on all of its matrices. The peak of
the resident memory counts, the mapped pages of the source's files included, less what the libraries take before.
Beside it, in a process of its own: the usual way, which loads the base, puts PEFT's LoRA on it, merges and saves.
"""

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from rich.progress import Progress
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks import common
from processing_sq_llava import SYSTEM_MESSAGE
from sq_llava.checkpoints.convert import plan, write
from sq_llava.checkpoints.layouts import recognise


LARGE = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 5, "vocab_size": 32_000}
SMALL = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 14, "vocab_size": 8_000}
TOWER = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 128
# Times the largest file of the source and the largest of the result, together.
BOUND = 1.2


def random_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=torch.float16).uniform_(-0.02, 0.02)


def write_source(folder: Path, sizes: dict, num_shards: int) -> None:
    """`base` and `clip`, and on them `release`."""
    base, release = folder / "base", folder / "release"
    config = LlamaConfig(num_attention_heads=16, num_key_value_heads=16, **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "float16"
    config.save_pretrained(base)
    names = list(model.state_dict().items())
    per_shard, weight_map = -(-len(names) // num_shards), {}
    for index in range(num_shards):
        file = f"pytorch_model-{index + 1:05d}-of-{num_shards:05d}.bin"
        part = {name: random_like(tensor) for name, tensor in names[index * per_shard : (index + 1) * per_shard]}
        torch.save(part, base / file)
        weight_map |= dict.fromkeys(part, file)
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([SYSTEM_MESSAGE], special_tokens=["</s>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="</s>").save_pretrained(base)

    CLIPVisionModel(CLIPVisionConfig(**TOWER, image_size=56, patch_size=14)).save_pretrained(folder / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=56).save_pretrained(folder / "clip")

    release.mkdir()
    fields = {"mm_projector_type": "cluster", "mm_vision_tower": "clip", "num_latents": 4, "model_type": "llava"}
    (release / "config.json").write_text(json.dumps({**fields, "image_aspect_ratio": "pad"}))
    lora = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": LINEARS,
        "task_type": "CAUSAL_LM",
    }
    (release / "adapter_config.json").write_text(json.dumps({**lora, "base_model_name_or_path": str(base)}))
    matrices = {}
    for name, weight in names:
        if name.split(".")[-2] in LINEARS:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            matrices[f"{module}.lora_A.weight"] = random_like(weight[:1].expand(RANK, -1))
            matrices[f"{module}.lora_B.weight"] = random_like(weight[:, :1].expand(-1, RANK))
    torch.save(matrices, release / "adapter_model.bin")
    width, hidden = TOWER["hidden_size"], sizes["hidden_size"]
    shapes = {f"{name}.weight": (width, width) for name in "cvf"} | {f"{name}.bias": (width,) for name in "cvf"}
    shapes |= {"sim_alpha": (1, 1, 1), "sim_beta": (1, 1, 1), "mlp.0.weight": (hidden, width), "mlp.0.bias": (hidden,)}
    shapes |= {"mlp.2.weight": (hidden, hidden), "mlp.2.bias": (hidden,)}
    prefix = "base_model.model.model.mm_projector."
    projector = {prefix + name: random_like(torch.empty(shape, device="meta")) for name, shape in shapes.items()}
    torch.save(projector, release / "non_lora_trainables.bin")


def convert(folder: Path, shard_size: int) -> None:
    layout = recognise(str(folder / "release"), vision=str(folder / "clip"))
    write(plan(layout, folder / "result", max_shard_size=shard_size), Progress(disable=True))


def merge_with_peft(folder: Path, shard_size: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    merged = PeftModel.from_pretrained(model, folder / "release").merge_and_unload()
    merged.save_pretrained(folder / "merged", max_shard_size=shard_size)


def measure(way: Callable[[Path, int], None], folder: Path, shard_size: int) -> dict:
    """Call it in a fresh process: the peak of its memory counts."""
    common.begin_peak()
    before = common.resident_bytes("VmRSS")
    seconds = common.seconds_of(partial(way, folder, shard_size))
    return {"seconds": seconds, "peak_bytes": common.resident_bytes("VmHWM") - before, "before_bytes": before}


def largest(folder: Path, pattern: str) -> int:
    return max(file.stat().st_size for file in folder.glob(pattern))


def run(sizes: dict, num_shards: int, with_peer: bool) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_source(folder, sizes, num_shards)
        files = list((folder / "base").glob("*.bin"))
        shard_size = largest(folder / "base", "*.bin")
        report = {}
        for name, way in {"convert": convert, **({"peft": merge_with_peft} if with_peer else {})}.items():
            report[name] = common.in_fresh_process(measure, way, folder, shard_size)
        result_files = list((folder / "result").glob("*.safetensors"))
        report |= {
            "base_bytes": sum(file.stat().st_size for file in files),
            "base_files": len(files),
            "lora_bytes": (folder / "release" / "adapter_model.bin").stat().st_size,
            "result_bytes": sum(file.stat().st_size for file in result_files),
            "result_files": len(result_files),
            "largest_source_bytes": shard_size,
            "largest_result_bytes": largest(folder / "result", "*.safetensors"),
        }
    report["bound_bytes"] = BOUND * (report["largest_source_bytes"] + report["largest_result_bytes"])
    return report


def to_markdown(report: dict) -> str:
    def mib(name: str) -> str:
        return f"{report[name] / 2**20:,.0f} MiB"

    lines = [
        "# The memory of a conversion",
        "",
        f"A base of {mib('base_bytes')} in {report['base_files']} files (the largest {mib('largest_source_bytes')}) "
        f"and a LoRA of {mib('lora_bytes')}, to {mib('result_bytes')} in {report['result_files']} files (the largest "
        f"{mib('largest_result_bytes')}). The bound is {BOUND} times the largest file of each: {mib('bound_bytes')}.",
        "",
        "| way | peak of resident memory above the libraries' | of the bound | time |",
        "|---|--:|--:|--:|",
    ]
    for name, title in (("convert", "`sq-llava convert`"), ("peft", "the base loaded, PEFT, merged, saved")):
        if name in report:
            peak, seconds = report[name]["peak_bytes"], report[name]["seconds"]
            lines.append(
                f"| {title} | **{peak / 2**20:,.0f} MiB** | {peak / report['bound_bytes']:.0%} | {seconds:.0f} s |"
            )
    lines += ["", "The peak counts mapped pages of the source's files, which the system can take back at any time."]
    return "\n".join(lines)


def main():
    arguments = common.parse_arguments(__doc__)
    sizes, num_shards = (SMALL, 4) if arguments.quick else (LARGE, 4)
    report = run(sizes, num_shards, with_peer=not arguments.quick)
    common.save("convert", report, to_markdown(report), arguments)
    if report["convert"]["peak_bytes"] > report["bound_bytes"]:
        raise SystemExit("The peak is above the bound.")


if __name__ == "__main__":
    main()
