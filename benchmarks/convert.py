"""Peak memory of a conversion: a LoRA release of SQ-LLaVA on a base of 0.8 GB.

    python -m benchmarks.convert            # a minute; writes benchmarks/results/convert.{json,md}; 3 GB of disk

The base is a Llama in float16, in `.bin` files like Vicuna's; the LoRA has rank 128 on all matrices of the base. The
result is the peak of resident memory, including mapped pages of the source files, minus the memory of the libraries.
Another process measures the usual way: load the base, add PEFT's LoRA, merge, save.
"""

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from rich.progress import Progress
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from benchmarks import common
from benchmarks.random_models import square_image_processor, train_tokenizer
from sq_llava.checkpoints.convert import plan, write
from sq_llava.checkpoints.layouts import recognise


LARGE = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 5, "vocab_size": 32_000}
SMALL = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 14, "vocab_size": 8_000}
TOWER = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 128
# The memory may be at most this many times the largest source file plus the largest file of the result.
BOUND = 1.2


def random_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=torch.float16).uniform_(-0.02, 0.02)


def write_source(folder: Path, sizes: dict, num_shards: int) -> None:
    """Writes the language model `base`, the vision tower `clip`, and `release`, which is a LoRA on both."""
    names = write_base(folder / "base", sizes, num_shards)
    CLIPVisionModel(CLIPVisionConfig(**TOWER, image_size=56, patch_size=14)).save_pretrained(folder / "clip")
    square_image_processor(56).save_pretrained(folder / "clip")
    write_release(folder / "release", folder / "base", names, sizes["hidden_size"])


def write_base(folder: Path, sizes: dict, num_shards: int) -> list[tuple[str, torch.Tensor]]:
    """Writes a random Llama. Returns the names of its weights with tensors on the meta device."""
    config = LlamaConfig(num_attention_heads=16, num_key_value_heads=16, **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "float16"
    config.save_pretrained(folder)
    names = list(model.state_dict().items())
    per_shard, weight_map = -(-len(names) // num_shards), {}
    for index in range(num_shards):
        file = f"pytorch_model-{index + 1:05d}-of-{num_shards:05d}.bin"
        part = {name: random_like(tensor) for name, tensor in names[index * per_shard : (index + 1) * per_shard]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    train_tokenizer([]).save_pretrained(folder)
    return names


def write_release(folder: Path, base: Path, names: list[tuple[str, torch.Tensor]], hidden: int) -> None:
    """Writes a LoRA on a Llama with these weights, and a projector with an extractor, as the authors publish them."""
    folder.mkdir()
    fields = {"mm_projector_type": "cluster", "mm_vision_tower": "clip", "num_latents": 4, "model_type": "llava"}
    (folder / "config.json").write_text(json.dumps({**fields, "image_aspect_ratio": "pad"}))
    lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
    lora |= {"target_modules": LINEARS, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(lora))
    matrices = {}
    for name, weight in names:
        if name.split(".")[-2] in LINEARS:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            matrices[f"{module}.lora_A.weight"] = random_like(weight[:1].expand(RANK, -1))
            matrices[f"{module}.lora_B.weight"] = random_like(weight[:, :1].expand(-1, RANK))
    torch.save(matrices, folder / "adapter_model.bin")
    width = TOWER["hidden_size"]
    shapes = {f"{name}.weight": (width, width) for name in "cvf"} | {f"{name}.bias": (width,) for name in "cvf"}
    shapes |= {"sim_alpha": (1, 1, 1), "sim_beta": (1, 1, 1), "mlp.0.weight": (hidden, width), "mlp.0.bias": (hidden,)}
    shapes |= {"mlp.2.weight": (hidden, hidden), "mlp.2.bias": (hidden,)}
    prefix = "base_model.model.model.mm_projector."
    projector = {prefix + name: random_like(torch.empty(shape, device="meta")) for name, shape in shapes.items()}
    torch.save(projector, folder / "non_lora_trainables.bin")


def convert(folder: Path, shard_size: int) -> None:
    layout = recognise(str(folder / "release"), vision=str(folder / "clip"))
    write(plan(layout, folder / "result", max_shard_size=shard_size), Progress(disable=True))


def merge_with_peft(folder: Path, shard_size: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto", trust_remote_code=False)
    merged = PeftModel.from_pretrained(model, folder / "release").merge_and_unload()
    merged.save_pretrained(folder / "merged", max_shard_size=shard_size)


def measure(way: Callable[[Path, int], None], folder: Path, shard_size: int) -> dict:
    """Seconds and memory of `way`. Call it in a fresh process, so that the peak is that of `way` alone."""
    common.begin_peak()
    before = common.resident_bytes("VmRSS")
    seconds = common.seconds_of(partial(way, folder, shard_size))
    return {"seconds": seconds, "peak_bytes": common.resident_bytes("VmHWM") - before, "before_bytes": before}


def run(sizes: dict, num_shards: int, with_peer: bool) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_source(folder, sizes, num_shards)
        base_files = [file.stat().st_size for file in (folder / "base").glob("*.bin")]
        shard_size = max(base_files)
        report = {}
        for name, way in {"convert": convert, **({"peft": merge_with_peft} if with_peer else {})}.items():
            report[name] = common.in_fresh_process(measure, way, folder, shard_size)
        result_files = [file.stat().st_size for file in (folder / "result").glob("*.safetensors")]
        return report | {
            "base_bytes": sum(base_files),
            "base_files": len(base_files),
            "lora_bytes": (folder / "release" / "adapter_model.bin").stat().st_size,
            "result_bytes": sum(result_files),
            "result_files": len(result_files),
            "largest_source_bytes": shard_size,
            "largest_result_bytes": max(result_files),
            "bound_bytes": BOUND * (shard_size + max(result_files)),
        }


def to_markdown(report: dict) -> str:
    size = {name: f"{number / 2**20:,.0f} MiB" for name, number in report.items() if name.endswith("_bytes")}
    rows = []
    for name, title in (("convert", "`sq-llava convert`"), ("peft", "load the base, add PEFT's LoRA, merge, save")):
        if name in report:
            peak, seconds = report[name]["peak_bytes"], report[name]["seconds"]
            share = peak / report["bound_bytes"]
            rows.append([title, f"**{peak / 2**20:,.0f} MiB**", f"{share:.0%}", f"{seconds:.0f} s"])
    return common.text(
        "# Peak memory of a conversion",
        f"A base of {size['base_bytes']} in {report['base_files']} files (the largest has "
        f"{size['largest_source_bytes']}) and a LoRA of {size['lora_bytes']} become {size['result_bytes']} in "
        f"{report['result_files']} files (the largest has {size['largest_result_bytes']}). The memory must stay below "
        f"{BOUND} times the sum of both largest files: {size['bound_bytes']}.",
        common.table(["way", "peak of resident memory without libraries", "share of this limit", "time"], rows),
        "The peak includes mapped pages of the source files, which the system can take back at any time.",
    )


def main():
    arguments = common.parse_arguments(__doc__)
    report = run(SMALL if arguments.quick else LARGE, num_shards=4, with_peer=not arguments.quick)
    common.save("convert", report, to_markdown, arguments)
    if report["convert"]["peak_bytes"] > report["bound_bytes"]:
        raise SystemExit("The peak memory of the conversion is above the limit.")


if __name__ == "__main__":
    main()
