"""Training, asking and generating with a 7B model on one NVIDIA GPU.

    python -m benchmarks.gpu           # writes benchmarks/results/gpu.{json,md}; planned for under 8 minutes on 80 GB
    python -m benchmarks.gpu --tiny    # the same code with tiny sizes on a CPU; its figures mean nothing
    python -m benchmarks.gpu --distributed   # instead checks all launchers on all GPUs: see `benchmarks.launchers`

The weights are random, in bfloat16, and made on the device: CLIP ViT-L/14-336, Vicuna-7B's sizes, K = 256, LoRA as in
recipes/sq-llava-7b/stage{1,2}.yaml. A step is forward, backward, clipping and AdamW over 16 rows of a simulated mix
(see `benchmarks.batching`); half of their text has labels. `ours` is SQ-LLaVA, packed, with and without gradient
checkpointing. With `shared images`, two rows are about each image and share its pass; their lengths and labels are
those of the other steps. `stock` is transformers' LlavaForConditionalGeneration under TRL's fused head, padded, with
checkpointing. Both use FlashAttention 2 if it is installed, and SDPA otherwise.

Model FLOPs utilisation counts the operations that the model needs. It does not count recomputed operations:

- For each token, 4 operations for a frozen weight (2 forward, 2 backward to the inputs; frozen weights have no
  gradient) and 6 for a trained one. The head counts only tokens with a label.
- For each pair of positions and each unit of width, attention takes 2 operations forward and 4 backward, twice (scores
  and values), within each row only. In the language model half of the pairs count, because it is causal.
- The extractor's products of K, N and D.

The peak is TRL's figure for the device, or `--peak-tflops`. Not measured: loading images, real weights.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate.utils import send_to_device
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.utils import is_flash_attn_2_available
from trl.trainer.utils import add_fused_lm_head, get_peak_flops

from benchmarks import common, launchers
from benchmarks.batching import simulated_mix
from benchmarks.generate import without_end
from benchmarks.random_models import loss_of, make_model, square_image_processor, with_adapter
from configuration_sq_llava import CLIP_VIT_L_14_336, VICUNA_7B
from modeling_sq_llava import SQLlavaForConditionalGeneration
from processing_sq_llava import SQLlavaProcessor
from sq_llava.data.shared_images import ImageSharing, image_prefix
from sq_llava.inference.assistant import Assistant
from sq_llava.training.adapter import LoraSize
from sq_llava.training.packing import PackingCollator, PackSampler
from sq_llava.training.shared_prefix import attention_mask, register_shared_prefix
from tests.tiny import llama_tokenizer


RECIPES = Path(__file__).parent.parent / "recipes" / "sq-llava-7b"
TINY_VISION = CLIP_VIT_L_14_336 | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56,
    "projection_dim": 32,
}  # fmt: skip
TINY_TEXT = VICUNA_7B | {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    vision: dict
    text: dict
    prototypes: int
    rows: int
    shorter: int  # the length of the text is divided by this
    max_length: int
    rounds: int
    new_tokens: int


FULL = Sizes(CLIP_VIT_L_14_336, VICUNA_7B, 256, rows=16, shorter=1, max_length=2048, rounds=3, new_tokens=64)
TINY = Sizes(TINY_VISION, TINY_TEXT, 8, rows=4, shorter=16, max_length=128, rounds=1, new_tokens=4)


@dataclass(frozen=True)
class Setting:
    """The values that all parts of the benchmark share."""

    sizes: Sizes
    device: str
    attention: str
    processor: SQLlavaProcessor
    peak_flops: float | None

    def model(self, variant: str = "paper") -> SQLlavaForConditionalGeneration:
        sizes, processor = self.sizes, self.processor
        return make_model(
            sizes.vision, sizes.text, self.device, torch.bfloat16, prototype_variant=variant,
            num_prototypes=sizes.prototypes, image_token_id=processor.image_token_id,
            vusr_token_id=processor.vusr_token_id, attn_implementation=self.attention,
        )  # fmt: skip

    @property
    def pad_token_id(self) -> int:
        return self.processor.tokenizer.pad_token_id

    def reset_peak(self) -> None:
        gc.collect()  # with TRL's head, a model refers to itself
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else None


def lora_of(stage: str) -> dict[str, LoraSize]:
    recipe = yaml.safe_load((RECIPES / f"{stage}.yaml").read_text())
    vision = LoraSize(recipe["vision_lora_r"], recipe["vision_lora_alpha"], recipe["vision_lora_dropout"])
    text = LoraSize(recipe["lora_r"], recipe["lora_alpha"], recipe["lora_dropout"]) if "lora_r" in recipe else None
    return {"vision_lora": vision, "text_lora": text or LoraSize(0, 1, 0.0)}


def make_rows(
    setting: Setting, image_seq_length: int, captions: bool, rows_per_image: int = 1
) -> list[dict[str, torch.Tensor | int | None]]:
    """
    Rows of token ids and labels: captions of 30 words, or a mix of conversations with text-only rows. `image` is the
    number of a row's image. All rows begin with the same token, so that rows about one image have the same prefix.
    """
    generator = torch.Generator().manual_seed(0)
    lengths, num_images = simulated_mix(setting.sizes.rows)
    rows, number = [], 0
    for length, images in zip(lengths.tolist(), num_images.tolist()):
        images = 1 if captions else images
        words = 30 if captions else max(4, (length - 576 * images) // setting.sizes.shorter)
        text = torch.randint(3, setting.processor.image_token_id, (words,), generator=generator)
        placeholders = torch.full((images * image_seq_length,), setting.processor.image_token_id)
        ids = torch.cat([torch.tensor([1]), placeholders, text[1:]])
        labels = torch.full_like(ids, -100)
        labels[-(words // 2) :] = ids[-(words // 2) :]
        rows.append({"input_ids": ids, "labels": labels, "image": number // rows_per_image if images else None})
        number += images
    return rows


def pixels(number: int, setting: Setting) -> torch.Tensor:
    side = setting.sizes.vision["image_size"]
    return torch.randn(number, 3, side, side, device=setting.device, dtype=torch.bfloat16)


def num_images(rows: list[dict]) -> int:
    return len({row["image"] for row in rows} - {None})


@dataclass
class RowCollator:
    """Pads rows of token ids on the right: a stand-in for `SelfQuestioningCollator`."""

    setting: Setting

    @property
    def processor(self) -> SQLlavaProcessor:
        return self.setting.processor

    @property
    def max_length(self) -> int:
        return self.setting.sizes.max_length

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = {
            name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fill)
            for name, fill in (("input_ids", 0), ("labels", -100))
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        batch["turn_kinds"] = (batch["labels"] != -100).long()
        shown = [row["image"] for row in rows if row["image"] is not None]
        places = {image: place for place, image in enumerate(dict.fromkeys(shown))}
        batch["image_indices"] = torch.tensor([places[image] for image in shown])
        return batch | {"pixel_values": pixels(len(places), self.setting)}


def packed(rows: list[dict], setting: Setting, rows_per_image: int = 1) -> dict[str, torch.Tensor | int | dict]:
    """The packs of an epoch in one batch, as the trainer makes them."""
    lengths = np.array([len(row["input_ids"]) for row in rows])
    groups = np.array([-1 if row["image"] is None else row["image"] for row in rows])
    prefixes = np.array([image_prefix(row["input_ids"].numpy(), setting.processor.image_token_id) for row in rows])
    sharing = ImageSharing(groups, prefixes, rows_per_image)
    sampler = PackSampler(lengths, setting.sizes.max_length, 1, 1, 0, torch.zeros(()), sharing)
    packs = [[rows[number] for number in pack] for pack in sampler.packs(0)]
    batch = PackingCollator(RowCollator(setting), "flash" in setting.attention, rows_per_image > 1)(packs)
    if "shared_prefix" in batch:
        register_shared_prefix(setting.attention)
    elif "branches" in batch:
        config = AutoConfig.for_model(**setting.sizes.text, attn_implementation=setting.attention)
        batch["attention_mask"] = attention_mask(batch.pop("branches"), batch["position_ids"], config, torch.bfloat16)
    del batch["turn_kinds"], batch["num_tokens"]
    return send_to_device(batch, setting.device)


def padded(rows: list[dict], setting: Setting) -> dict[str, torch.Tensor]:
    batch = RowCollator(setting)(rows)
    del batch["turn_kinds"], batch["image_indices"]
    return send_to_device(batch, setting.device)


def model_flops(model: PeftModel, rows: list[dict]) -> float:
    """Operations of forward and backward over all rows, counted as the module's docstring says."""
    config = model.config
    vision, text = config.vision_config, config.text_config
    lengths = [len(row["input_ids"]) for row in rows]
    images, patches = num_images(rows), config.image_seq_length
    # A row whose image an earlier row has shares the prefix of that row: the first token and the image.
    seen, shared = set(), []
    for row in rows:
        shared.append(patches + 1 if row["image"] in seen else 0)
        seen |= {row["image"]} - {None}
    used = tuple(f".layers.{number}." for number in range(config.num_vision_layers_used))
    total = 0.0
    for name, weight in model.named_parameters():
        if ".original_module." in name or weight.ndim != 2 or "embed" in name:
            continue
        if ".language_model." in name:
            tokens = sum(lengths) - sum(shared)
        elif "lm_head" in name:
            tokens = num_labels(rows)
        elif ".vision_tower." in name:
            tokens = images * (patches + 1) if any(layer in name for layer in used) else 0
        else:
            tokens = images * patches  # approximately: the q of the extractor runs on prototypes
        total += (6 if weight.requires_grad else 4) * weight.numel() * tokens
    pairs = sum(length**2 - prefix**2 for length, prefix in zip(lengths, shared))
    total += 6 * text.num_hidden_layers * text.hidden_size * pairs
    total += 12 * len(used) * vision.hidden_size * images * (patches + 1) ** 2
    products = 4 * (config.num_prototype_iterations + 1) * config.num_prototypes * patches * vision.hidden_size
    return total + 3 * products * images


def stock_loss(model: PeftModel, batch: dict) -> torch.Tensor:
    return model(**batch, fused_lm_head=True).loss


def time_steps(model: PeftModel, batch: dict, loss: Callable, setting: Setting) -> dict | None:
    """Seconds and peak memory of training steps, or `None` if they do not fit into memory."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step():
        with torch.autocast(setting.device, dtype=torch.bfloat16):
            value = loss(model, batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    setting.reset_peak()
    try:
        times = common.interleave({"step": step}, setting.sizes.rounds)["step"]
    except torch.OutOfMemoryError:
        return None
    return {"seconds": common.summary(times), "peak_gib": setting.peak_gib()}


def num_labels(rows: list[dict]) -> int:
    return sum(int((row["labels"] != -100).sum()) for row in rows)


def train_ours(setting: Setting, stage: str, checkpointing: bool, rows_per_image: int = 1) -> dict | None:
    model = with_adapter(setting.model(), **lora_of(stage), checkpointing=checkpointing)
    rows = make_rows(setting, model.config.image_seq_length, stage == "stage1", rows_per_image)
    batch = packed(rows, setting, rows_per_image)
    result = time_steps(model, batch, loss_of, setting)
    if result is not None:
        seconds = result["seconds"]["median"]
        flops = model_flops(model, rows)
        result["label_tokens_per_second"] = num_labels(rows) / seconds
        result["tflops"] = flops / seconds / 1e12
        result["utilisation"] = None if setting.peak_flops is None else flops / seconds / setting.peak_flops
    return result


def stock_model(setting: Setting) -> LlavaForConditionalGeneration:
    sizes = setting.sizes
    config = LlavaConfig(
        vision_config=dict(sizes.vision), text_config=dict(sizes.text),
        image_token_index=setting.processor.image_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(setting.device):
        return LlavaForConditionalGeneration._from_config(
            config, dtype=torch.bfloat16, attn_implementation=setting.attention
        )


def train_stock(setting: Setting) -> dict | None:
    """Trains on the rows of stage 2, padded, with the same LoRA, under TRL's fused head."""
    model = stock_model(setting)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    lora = lora_of("stage2")
    names = "q_proj|k_proj|v_proj|o_proj|out_proj|fc1|fc2|gate_proj|up_proj|down_proj"
    model = get_peft_model(
        model,
        LoraConfig(
            r=lora["text_lora"].rank, lora_alpha=lora["text_lora"].alpha, lora_dropout=lora["text_lora"].dropout,
            target_modules=rf".*\.layers\..*\b({names})", modules_to_save=["multi_modal_projector"],
            rank_pattern={".*vision_tower.*": lora["vision_lora"].rank},
            alpha_pattern={".*vision_tower.*": lora["vision_lora"].alpha},
        ),
    ).train()  # fmt: skip
    model.gradient_checkpointing_enable({"use_reentrant": False})
    patches = (setting.sizes.vision["image_size"] // setting.sizes.vision["patch_size"]) ** 2
    rows = make_rows(setting, patches, captions=False)
    result = time_steps(model, padded(rows, setting), stock_loss, setting)
    if result is not None:
        result["label_tokens_per_second"] = num_labels(rows) / result["seconds"]["median"]
    return result


@torch.inference_mode()
def extractor_share(setting: Setting) -> dict:
    model = setting.model().model.eval()
    pixel_values = pixels(setting.sizes.rows, setting)
    features = model.get_vision_features(pixel_values)
    functions = {
        "tower": partial(model.get_vision_features, pixel_values),
        "extractor": partial(model.prototype_extractor, features),
    }
    times = common.interleave(functions, 3 * setting.sizes.rounds)
    return {name: common.summary(times[name]) for name in functions} | {
        "share": common.ratio(times, "extractor", "tower")
    }


def ask(setting: Setting) -> list[dict]:
    """Times n questions about one image in one call, and in n calls."""
    assistant = Assistant(without_end(setting.model(), setting.pad_token_id), setting.processor)
    image = Image.new("RGB", (640, 480), (120, 80, 40))
    history = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A dog in the grass."}]
    once = partial(assistant.ask, image, history, max_new_tokens=setting.sizes.new_tokens, seed=0)
    results = []
    for number in (1, 4, 16):
        together, apart = partial(once, number), lambda number=number: [once(1) for _ in range(number)]
        times = common.interleave({"together": together, "apart": apart}, 1)
        seconds = {name: common.summary(values) for name, values in times.items()}
        results.append({"questions": number, "times_faster": common.ratio(times, "apart", "together"), **seconds})
    return results


def generate(setting: Setting) -> dict:
    """Tokens per second of one answer, compared with transformers' LLaVA of the same sizes."""
    models = {"ours": setting.model(), "without extractor": setting.model("none"), "stock": stock_model(setting)}
    image_tokens = models["ours"].config.image_seq_length
    ids = torch.randint(3, setting.processor.image_token_id, (1, 32))
    placeholders = torch.full((1, image_tokens), setting.processor.image_token_id)
    input_ids = torch.cat([ids[:, :1], placeholders, ids[:, 1:]], dim=1).to(setting.device)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    inputs |= {"pixel_values": pixels(1, setting), "do_sample": False}
    new_tokens = 2 * setting.sizes.new_tokens
    functions = {
        name: partial(without_end(model, setting.pad_token_id).generate, **inputs, max_new_tokens=new_tokens)
        for name, model in models.items()
    }
    times = common.interleave(functions, setting.sizes.rounds)
    result = {name: common.summary([new_tokens / value for value in seconds]) for name, seconds in times.items()}
    return {"tokens_per_second": result, "slower": common.ratio(times, "ours", "stock")}


def make_setting(tiny: bool, peak_tflops: int) -> Setting:
    sizes = TINY if tiny else FULL
    device = "cpu" if tiny else "cuda"
    side = sizes.vision["image_size"]
    tokens = (side // sizes.vision["patch_size"]) ** 2
    processor = SQLlavaProcessor(square_image_processor(side), llama_tokenizer(), image_seq_length=tokens)
    attention = "flash_attention_2" if device == "cuda" and is_flash_attn_2_available() else "sdpa"
    peak = peak_tflops * 1e12 or None
    if peak is None and device == "cuda":
        peak = get_peak_flops(torch.cuda.get_device_name(), "bfloat16")
    return Setting(sizes, device, attention, processor, peak)


PARTS = {
    "stage 2, ours, checkpointing": partial(train_ours, stage="stage2", checkpointing=True),
    "stage 2, ours": partial(train_ours, stage="stage2", checkpointing=False),
    "stage 2, ours, shared images, checkpointing": partial(
        train_ours, stage="stage2", checkpointing=True, rows_per_image=2
    ),
    "stage 2, stock, checkpointing": train_stock,
    "stage 1, ours, checkpointing": partial(train_ours, stage="stage1", checkpointing=True),
    "stage 1, ours": partial(train_ours, stage="stage1", checkpointing=False),
    "extractor": extractor_share,
    "ask": ask,
    "generate": generate,
}


def or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def to_markdown(report: dict) -> str:
    parts, steps = report["parts"], []
    for name, result in parts.items():
        if name.startswith("stage") and result is None:
            steps.append([name, "does not fit into memory", *[""] * 4])
        elif name.startswith("stage"):
            cells = [common.with_spread(result["seconds"]), f"{result['label_tokens_per_second']:,.0f}"]
            cells += [or_dash(result["peak_gib"], ".1f"), or_dash(result.get("tflops"), ".1f")]
            steps.append([name, *cells, or_dash(result.get("utilisation"), ".1%")])
    asked = [
        [
            row["questions"],
            *(f"{row[name]['median']:.2f} s" for name in ("together", "apart")),
            f"{row['times_faster']['median']:.1f}x",
        ]
        for row in parts["ask"]
    ]
    rates = [[name, common.with_spread(rate)] for name, rate in parts["generate"]["tokens_per_second"].items()]
    header = ["step", "seconds", "label tokens / s", "peak memory, GiB", "TFLOPS", "model FLOPs utilisation"]
    return common.text(
        "# One GPU: training, asking and generating",
        f"Attention: {report['attention']}. Peak: {or_dash(report['peak_tflops'], '.0f')} TFLOPS in bfloat16. The "
        f"whole run took {report['seconds']:.0f} s. `ours` is SQ-LLaVA, packed; `stock` is transformers' LLaVA, "
        "padded.",
        common.table(header, steps),
        f"The extractor takes {common.with_spread(parts['extractor']['share'], '.2%')} of the vision tower's time.",
        common.table(["questions about an image", "one call", "separate calls", "faster"], asked, left=0),
        common.table(["generating, one row", "tokens / s"], rates),
        f"Ours takes {common.with_spread(parts['generate']['slower'])} times as long as stock.",
    )


def measure(setting: Setting) -> dict:
    begin, parts = time.perf_counter(), {}
    for name, part in PARTS.items():
        print(name, flush=True)
        setting.reset_peak()
        parts[name] = part(setting)
    return {
        "parts": parts,
        "attention": setting.attention,
        "peak_tflops": setting.peak_flops and setting.peak_flops / 1e12,
        "seconds": time.perf_counter() - begin,
    }


def main():
    arguments = common.parse_arguments(
        __doc__,
        tiny=(False, "Run tiny sizes on a CPU, to see that the code works."),
        distributed=(False, "Check all launchers on the GPUs of this machine: losses, resume, speed and memory."),
        peak_tflops=(0, "Peak of the GPU in bfloat16, in TFLOPS; 0 takes TRL's figure for the device."),
    )
    arguments.quick = arguments.quick or arguments.tiny
    if not arguments.quick and not torch.cuda.is_available():
        raise SystemExit("No NVIDIA GPU was found. Run this on a GPU, or try the same code on a CPU with --tiny.")
    if arguments.distributed:
        setting = launchers.on_cpus((1, 2)) if arguments.quick else launchers.on_gpus(torch.cuda.device_count())
        report = {"command": "python -m benchmarks.gpu --distributed"} | launchers.measure(setting)
        common.save("launchers", report, launchers.to_markdown, arguments)
        return
    report = measure(make_setting(arguments.quick, arguments.peak_tflops))
    common.save("gpu", report, to_markdown, arguments)


if __name__ == "__main__":
    main()
