"""Each launcher with several processes: losses, kill and resume, speed, and the memory of a process.

    python -m benchmarks.gpu --distributed   # on all GPUs of this machine; checks what only GPUs show
    .venv-deepspeed/bin/python -m benchmarks.launchers   # on CPUs

Both write benchmarks/results/launchers.{json,md}. Each run fully finetunes a small model from random weights, whose
vision tower is frozen in bfloat16. On GPUs, `accelerate launch` starts it with a file of recipes/accelerate, and it
uses NCCL, bfloat16, and FlashAttention 2 if it is installed. On CPUs, `tests/launches.py` starts it with the
environment that `accelerate launch` gives, and it uses gloo and float32. The losses of each step are compared with
those of one process. On all GPUs, one process is also killed in the third step, and the run is resumed (the tests do
this on CPUs). Without DeepSpeed, its launchers are left out.

Weights, gradients and optimizer states are what the largest process holds after a step. The peak on a GPU is what
PyTorch allocated; on a CPU it is the growth of the resident memory since before the model was loaded.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import is_flash_attn_2_available

import train_sft
from benchmarks import common
from benchmarks.random_models import clip_sizes, llama_sizes, square_image_processor
from tests import tiny
from tests.launches import (
    allow_deepspeed_on_cpu,
    allow_fsdp_on_cpu,
    environment_of,
    held_bytes,
    write_held_bytes,
)
from tests.processes import PRELOADED, ended, fork
from tests.runs import command_line, die, in_step, losses


RECIPES = Path(__file__).parent.parent / "recipes" / "accelerate"
LAUNCHERS = ("ddp", "fsdp2", "zero2", "zero3")
KILLED_IN_STEP, STEPS = 3, 3
# Largest relative difference of a loss in bfloat16. In float32, the tests compare to 1e-6.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Setting:
    """
    Attributes:
        vision, text: Sizes of the towers.
        rows: Rows of an optimizer step, over all processes.
        counts: Numbers of processes.
    """

    vision: dict
    text: dict
    rows: int
    counts: tuple[int, ...]
    on_gpu: bool


def on_gpus(number: int) -> Setting:
    counts = tuple(2**power for power in range(10) if 2**power <= number)
    vision = clip_sizes(1024, layers=12, heads=16, side=336)
    text = llama_sizes(2048, inner=5504, layers=16, heads=16, vocabulary=32000)
    return Setting(vision, text, 4 * counts[-1], counts, on_gpu=True)


def on_cpus(counts: tuple[int, ...] = (1, 2, 4)) -> Setting:
    vision = clip_sizes(512, layers=4, heads=8, side=56)
    text = llama_sizes(512, inner=1376, layers=4, heads=8, vocabulary=512)
    return Setting(vision, text, 4, counts, on_gpu=False)


def make_parts(setting: Setting, root: Path) -> None:
    """Writes a CLIP, a Llama and rows into a folder."""
    torch.manual_seed(0)
    vision = {name: value for name, value in setting.vision.items() if name != "model_type"}
    clip = CLIPConfig(text_config={"num_hidden_layers": 1, "hidden_size": 32}, vision_config=vision)
    CLIPModel(clip).to(torch.bfloat16).save_pretrained(root / "clip")
    square_image_processor(vision["image_size"]).save_pretrained(root / "clip")
    tokenizer = tiny.llama_tokenizer()
    sizes = setting.text | {"vocab_size": max(setting.text["vocab_size"], len(tokenizer))}
    LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).save_pretrained(root / "llama")
    tokenizer.save_pretrained(root / "llama")
    tiny.write_rows(root, lambda index: [("What is this?", f"A dog {index}.")] * 3, num_rows=2 * setting.rows)


def arguments_of(setting: Setting, launcher: str, processes: int, parts: Path, folder: Path) -> list[str]:
    """The arguments of `train_sft`."""
    settings = {
        "stage": "instruct", "num_prototypes": 16, "full_finetuning": True, "lora_r": 0, "vision_lora_r": 0,
        "vision_model_name_or_path": parts / "clip", "text_model_name_or_path": parts / "llama",
        "dataset_path": parts / "train.json", "output_dir": folder / "run", "dtype": "bfloat16",
        "bf16": setting.on_gpu, "learning_rate": 1e-5, "lr_scheduler_type": "constant", "max_steps": STEPS,
        "logging_steps": 1, "save_steps": KILLED_IN_STEP - 1, "global_batch_size": setting.rows,
        "per_device_train_batch_size": max(1, min(4, setting.rows // processes)), "report_to": "none",
        "disable_tqdm": True, "resume": True, "doctor": "off",
    }  # fmt: skip
    if not setting.on_gpu:
        # `use_cpu` would make accelerate ignore DeepSpeed.
        settings["use_cpu"] = not launcher.startswith("zero")
    if setting.on_gpu and is_flash_attn_2_available():
        settings["attn_implementation"] = "flash_attention_2"
    return command_line(settings)


def command_of(launcher: str, processes: int, folder: Path, arguments: list[str], killed: bool = False) -> list[str]:
    """The command of a run on GPUs, which starts this module in each process."""
    file = RECIPES / f"{'single' if launcher == 'ddp' and processes == 1 else launcher}.yaml"
    launch = ["accelerate.commands.launch", "--config_file", str(file), "--num_processes", str(processes)]
    script = ["benchmarks.launchers", "--process", str(folder), str(KILLED_IN_STEP if killed else 0)]
    return [sys.executable, "-m", *launch, "-m", *script, *arguments]


def run_process(folder: Path, killed_in_step: int, arguments: list[str]) -> None:
    """Runs in each process of a launch."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu and "ACCELERATE_USE_DEEPSPEED" in os.environ:
        allow_deepspeed_on_cpu()
    elif not on_gpu:
        allow_fsdp_on_cpu()
    rank = int(os.environ.get("RANK", 0))
    if killed_in_step and rank == 0:
        in_step(killed_in_step, die)
    write_held_bytes(folder)
    before = common.resident_bytes("VmRSS")
    common.begin_peak()
    train_sft.main(arguments)
    peak = torch.cuda.max_memory_allocated() if on_gpu else common.resident_bytes("VmHWM") - before
    (folder / f"peak{rank}.json").write_text(json.dumps(peak))


def start(setting: Setting, launcher: str, processes: int, parts: Path, folder: Path, killed: bool = False) -> bool:
    """Runs a launch to its end. Returns whether all its processes succeeded."""
    folder.mkdir(exist_ok=True)
    log = folder / "log"
    if setting.on_gpu:
        environment = os.environ | {"PYTHONPATH": str(RECIPES.parent.parent)}
        command = command_of(
            launcher, processes, folder, arguments_of(setting, launcher, processes, parts, folder), killed
        )
        with log.open("a") as stream:
            return subprocess.run(command, env=environment, stdout=stream, stderr=stream).returncode == 0
    environment = environment_of(launcher, num_processes=processes) if (launcher, processes) != ("ddp", 1) else {}
    arguments = (folder, KILLED_IN_STEP if killed else 0, arguments_of(setting, launcher, processes, parts, folder))
    return not any(ended(fork(run_process, arguments, log, None, processes, environment), seconds=600))


def difference(one: Path, other: Path) -> float:
    """The largest relative difference between the losses of two runs."""
    pairs = zip(losses(one / "run"), losses(other / "run"), strict=True)
    return max(abs(left["loss"] - right["loss"]) / abs(left["loss"]) for left, right in pairs)


def measure_one(setting: Setting, launcher: str, processes: int, parts: Path, root: Path) -> dict:
    """Runs a launch. On GPUs and with the largest number of processes, it is also killed and resumed."""
    folder, one = root / f"{launcher}-{processes}", root / "ddp-1"
    if not start(setting, launcher, processes, parts, folder):
        raise SystemExit(f"{launcher} with {processes} processes failed:\n{(folder / 'log').read_text()[-3000:]}")
    history = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
    row = {
        "launcher": launcher,
        "processes": processes,
        "loss_difference": difference(one, folder),
        "rows_per_second": history[-1]["train_samples_per_second"],
        "held": held_bytes(folder),
        "peak": max(json.loads(file.read_text()) for file in folder.glob("peak*.json")),
    }
    if setting.on_gpu and processes == setting.counts[-1]:
        killed = root / f"{launcher}-killed"
        assert not start(setting, launcher, processes, parts, killed, killed=True), "the run was not killed"
        if not start(setting, launcher, processes, parts, killed):
            raise SystemExit(f"{launcher} did not resume:\n{(killed / 'log').read_text()[-3000:]}")
        row["resumed_difference"] = difference(folder, killed)
    return row


def measure(setting: Setting) -> dict:
    launchers = [name for name in LAUNCHERS if find_spec("deepspeed") or not name.startswith("zero")]
    if not setting.on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        PRELOADED.extend(["deepspeed"] * ("zero2" in launchers))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_parts(setting, root)
        rows = []
        for launcher in launchers:
            for processes in setting.counts:
                print(f"{launcher} with {processes} processes", flush=True)
                rows.append(measure_one(setting, launcher, processes, root, root))
    return {"rows": rows, "on_gpu": setting.on_gpu}


def to_markdown(report: dict) -> str:
    rows = []
    for row in report["rows"]:
        held, values = row["held"], [row["loss_difference"], row.get("resumed_difference", 0.0)]
        sizes = [
            held["weights"],
            held.get("weights in bfloat16", 0),
            held["gradients"],
            held["optimizer"],
            row["peak"],
        ]
        resumed = f"{row['resumed_difference']:.0e}" if "resumed_difference" in row else ""
        cells = [f"{size / common.MEBIBYTE:,.1f}" for size in sizes]
        cells += [f"{row['loss_difference']:.0e}", resumed, "yes" if max(values) <= TOLERANCE else "NO"]
        rows.append([row["launcher"], row["processes"], *cells, f"{row['rows_per_second']:.2f}"])
    device = "GPUs, in bfloat16"
    if not report["on_gpu"]:
        device = "CPUs (gloo), in float32 (ZeRO-3 needs one precision, so its frozen tower is in float32 too)"
    header = [
        "launcher", "processes", "weights", "of them bfloat16", "gradients", "optimizer", "peak",
        "loss, differs by", "resumed, differs by", "within tolerance", "rows / s",
    ]  # fmt: skip
    return common.text(
        "# Each launcher with several processes",
        f"On {device}. Memory is in MiB, of the process that holds most. The vision tower is frozen in bfloat16; all "
        "other weights are trained. Losses differ relative to those of one process, and after a kill relative to the "
        f"run that was not killed. The tolerance is {TOLERANCE:g}.",
        common.table(header, rows, left=1),
    )


def main():
    arguments = common.parse_arguments(__doc__)
    report = measure(on_cpus((1, 2) if arguments.quick else (1, 2, 4)))
    common.save("launchers", report, to_markdown, arguments)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        run_process(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    else:
        main()
