"""Training speed on the same rows: TRL's stock SFTTrainer, this project's batches of similar length, and its packs.

    python -m benchmarks.train_step            # writes benchmarks/results/train_step.{json,md,png}, under 4 minutes

The result is the number of tokens with loss per second over whole epochs of `trainer.train()`: data loading, forward,
backward and optimizer, on the CPU in float32.

    stock     TRL's SFTTrainer and vision collator, transformers' LlavaForConditionalGeneration, rows in random order
    padded    SQLlavaTrainer with train_sampling_strategy group_by_length, and prototypes
    packed    SQLlavaTrainer with packing, and prototypes

The rows simulate llava_v1_5_mix665k at a ninth of its lengths: 6% text-only, 64 tokens an image, one to three
exchanges, at most 228 tokens a row, packs of 228. The sizes of the towers (but not their random weights), LoRA,
optimizer, rows and labels (no self-questions) are the same for all; only this project has an extractor. A step has 8
rows, or the packs that hold about 8 rows. The head has a tenth of the language model's multiplications (Vicuna-7B: 2%,
Qwen3-0.6B: 26%). Not measured: a GPU.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import datasets
import matplotlib
import numpy as np
import torch


matplotlib.use("Agg")

from matplotlib import pyplot as plt
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    logging,
)
from trl import SFTConfig, SFTTrainer

from benchmarks import common
from benchmarks.random_models import clip_sizes, llama_sizes, make_model, square_image_processor
from processing_sq_llava import SQLlavaProcessor
from sq_llava.data.lengths import LengthBound, with_length_bounds
from sq_llava.data.rows import load_rows
from sq_llava.data.sources import DataSource
from sq_llava.training.adapter import LoraSize, add_adapter
from sq_llava.training.collator import SelfQuestioningCollator
from sq_llava.training.packing import pack_sampler
from sq_llava.training.trainer import SQLlavaTrainer


SIDE, MAX_LENGTH, NUM_WORDS = 112, 228, 1000
# Fields of the vision tower and of the language model.
TOWERS = (clip_sizes(96, layers=6, heads=4, side=SIDE), llama_sizes(192, 512, layers=4, heads=4, vocabulary=NUM_WORDS))
LORA = LoraSize(8, 16, 0.0)
# With this vocabulary, the head's share of the multiplications is that of Qwen3-0.6B.
BIG_VOCABULARY = 3200
PATHS = ("stock", "padded", "packed")
PROTOTYPES = 32
TOP_OPERATORS = 10
# Mean and shape of the gamma distribution of the words per row: equal rows, the mix, and a few very long rows.
MIXES = {"even": (28, 200.0), "as of LLaVA": (31, 1.6), "long tail": (31, 0.5)}


@dataclass
class Data:
    """Rows, their processor, the number of their tokens with loss, and of all their tokens."""

    processor: SQLlavaProcessor
    rows: datasets.Dataset
    num_labels: int
    num_tokens: int


def word_processor(vocabulary: int) -> SQLlavaProcessor:
    """A processor with one token for each word, so that lengths are exactly as drawn."""
    words = [f"w{number}" for number in range(vocabulary)] + ["USER:", "ASSISTANT:", "<unk>", "</s>"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    return SQLlavaProcessor(square_image_processor(SIDE), tokenizer, image_seq_length=64, system_message="")


def make_data(folder: Path, num_rows: int, mix: str = "as of LLaVA", vocabulary: int = NUM_WORDS) -> Data:
    generator = np.random.default_rng(0)
    mean, shape = MIXES[mix]
    raw = []
    for number in range(num_rows):
        num_words = min(3 + int(generator.gamma(shape, mean / shape)), MAX_LENGTH - 64 - 3 * 4)
        words = draw_words(num_words, generator)
        row = {"id": str(number)} | conversation(words, min(generator.integers(1, 4), max(1, num_words // 3)))
        if generator.random() >= 0.06:
            draw_image(folder / f"{number}.jpg", generator)
            show_image(row, f"{number}.jpg")
        raw.append(row)
    return read_data(folder, raw, vocabulary)


def draw_words(number: int, generator: np.random.Generator) -> list[str]:
    return [f"w{word}" for word in generator.integers(NUM_WORDS, size=number)]


def conversation(words: list[str], num_exchanges: int) -> dict[str, list]:
    """A conversation with these words. A third of each exchange is the question, the rest the answer."""
    turns = []
    for piece in np.array_split(words, num_exchanges):
        asked = max(1, len(piece) // 3)
        turns += [("human", " ".join(piece[:asked])), ("gpt", " ".join(piece[asked:]) or "w0")]
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


def draw_image(path: Path, generator: np.random.Generator) -> None:
    pixels = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((160, 120), Image.Resampling.BICUBIC).save(path)


def show_image(row: dict, name: str) -> None:
    """Puts an image before the first question."""
    row["image"] = name
    row["conversations"][0]["value"] = "<image>\n" + row["conversations"][0]["value"]


def read_data(folder: Path, raw: list[dict], vocabulary: int = NUM_WORDS) -> Data:
    """Writes the rows into a file, and reads them as training does."""
    path = folder / "rows.json"
    path.write_text(json.dumps(raw))
    processor = word_processor(vocabulary)
    rows = load_rows([DataSource(str(path))], image_seq_length=64)
    bound = LengthBound(processor, MAX_LENGTH, self_question_ratio=0.0)
    rows = with_length_bounds(rows, bound, prefixes=True)
    batch = SelfQuestioningCollator(processor, self_question_ratio=0.0)([rows[index] for index in range(len(rows))])
    return Data(processor, rows, int((batch["labels"] != -100).sum()), int(batch["attention_mask"].sum()))


def settings(folder: Path, batch_size: int, **more) -> SFTConfig:
    return SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        num_train_epochs=1,
        learning_rate=1e-5,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=MAX_LENGTH,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **more,
    )


def stock_trainer(data: Data, folder: Path, rows_per_step: int, towers: tuple[dict, dict] = TOWERS) -> Trainer:
    processor = data.processor
    vision, text = towers[0], towers[1] | {"vocab_size": len(processor.tokenizer)}
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=dict(vision), text_config=text, image_token_index=processor.image_token_id, image_seq_length=64
    )
    model = LlavaForConditionalGeneration(config)
    used = rf"vision_tower\.encoder\.layers\.[0-{vision['num_hidden_layers'] - 2}]\..*"
    lora = LoraConfig(
        r=LORA.rank,
        lora_alpha=LORA.alpha,
        target_modules=rf".*({used}|language_model\..*)\b"
        r"(q_proj|k_proj|v_proj|out_proj|o_proj|fc1|fc2|gate_proj|up_proj|down_proj)",
        modules_to_save=["multi_modal_projector"],
    )
    rows = datasets.Dataset.from_list(
        [{"messages": stock_messages(row["messages"]), "images": row["images"]} for row in data.rows]
    ).cast_column("images", datasets.List(datasets.Image()))
    return SFTTrainer(
        model=get_peft_model(model, lora),
        args=settings(folder, rows_per_step, assistant_only_loss=True),
        train_dataset=rows,
        processing_class=processor,
    )


def stock_messages(messages: list[dict]) -> list[dict]:
    """Messages of text only: TRL itself adds the images before the first user turn."""
    return [{"role": m["role"], "content": "".join(part.get("text", "") for part in m["content"])} for m in messages]


def own_trainer(
    data: Data,
    folder: Path,
    rows_per_step: int,
    packing: bool,
    prototypes: int,
    max_rows_per_image: int = 1,
    towers: tuple[dict, dict] = TOWERS,
) -> Trainer:
    processor = data.processor
    fields = {"num_prototypes": prototypes} if prototypes else {"prototype_variant": "none"}
    vision, text = towers[0], towers[1] | {"vocab_size": len(processor.tokenizer)}
    model = make_model(
        vision, text, image_token_id=processor.image_token_id, vusr_token_id=processor.vusr_token_id, **fields
    )
    if packing:
        packs = pack_sampler(data.rows, settings(folder, 1), 1, max_rows_per_image=max_rows_per_image)
        args = settings(folder, max(1, round(rows_per_step * packs.num_packs / len(data.rows))))
    else:
        args = settings(folder, rows_per_step, train_sampling_strategy="group_by_length")
    return SQLlavaTrainer(
        model=add_adapter(model, LORA, LORA, train_vusr=True),
        args=args,
        train_dataset=data.rows,
        data_collator=SelfQuestioningCollator(processor, self_question_ratio=0.0, max_length=MAX_LENGTH),
        processing_class=processor,
        question_loss_weight=1.0,
        part_learning_rates={},
        packing=packing,
        max_rows_per_image=max_rows_per_image,
    )


def make_trainers(data: Data, folder: Path, rows_per_step: int, prototypes: int = PROTOTYPES) -> dict[str, Trainer]:
    trainers = {
        "stock": stock_trainer(data, folder, rows_per_step),
        "padded": own_trainer(data, folder, rows_per_step, packing=False, prototypes=prototypes),
        "packed": own_trainer(data, folder, rows_per_step, packing=True, prototypes=prototypes),
    }
    for trainer in trainers.values():
        trainer.remove_callback(PrinterCallback)
    return trainers


def check_labels(data: Data, trainers: dict[str, Trainer]) -> dict[str, float]:
    """Checks that all paths train on the same labels. Returns the share of positions that are not padding."""
    shares = {}
    for name, trainer in trainers.items():
        labels = positions = 0
        for batch in trainer.get_train_dataloader():
            labels += int((batch["labels"] != -100).sum())
            positions += batch["input_ids"].numel()
        assert labels == data.num_labels, f"{name} has {labels} labels, expected {data.num_labels}"
        shares[name] = data.num_tokens / positions
    return shares


def measure(data: Data, trainers: dict[str, Trainer], rounds: int) -> dict:
    times = common.interleave({name: trainer.train for name, trainer in trainers.items()}, rounds)
    return {
        "rows": len(data.rows),
        "tokens_with_loss": data.num_labels,
        "seconds": times,
        "per_second": {name: common.summary([data.num_labels / s for s in times[name]]) for name in times},
        "times_faster": {name: common.ratio(times, "stock", name) for name in times if "stock" in times},
    }


def operators(data: Data, trainer: Trainer) -> dict[str, float]:
    """CPU milliseconds spent in each operator itself, per thousand tokens with loss."""
    trainer.train()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        trainer.train()
    return {
        event.key: event.self_cpu_time_total / data.num_labels
        for event in profiler.key_averages()
        if not event.key.startswith(("ProfilerStep", "enumerate(", "Optimizer."))
    }


def scale(root: Path, num_rows: int, quick: bool) -> dict[str, dict]:
    """Varies the rows of a step, the mix of lengths, the number of prototypes (0: no extractor), and the head."""
    cases = {
        "2 rows a step": {"rows_per_step": 2},
        "16 rows a step": {"rows_per_step": 16},
        "lengths: even": {"mix": "even"},
        "lengths: long tail": {"mix": "long tail"},
        "0 prototypes": {"prototypes": 0},
        "128 prototypes": {"prototypes": 128},
        "a head of 26% of the language model": {"vocabulary": BIG_VOCABULARY},
    }
    names = ["lengths: long tail"] if quick else list(cases)
    return {name: scale_case(root, name, num_rows, **cases[name]) for name in names}


def scale_case(
    root: Path,
    name: str,
    num_rows: int,
    rows_per_step: int = 8,
    mix: str = "as of LLaVA",
    prototypes: int = PROTOTYPES,
    vocabulary: int = NUM_WORDS,
) -> dict:
    print(f"varying the settings: {name}", flush=True)
    folder = root / f"{mix}-{num_rows}"
    folder.mkdir(exist_ok=True)
    data = make_data(folder, num_rows, mix, vocabulary)
    return measure(data, make_trainers(data, folder, rows_per_step, prototypes), rounds=2)


def to_markdown(report: dict) -> str:
    main = report["main"]
    paths = [
        [
            path,
            common.with_spread(main["per_second"][path]),
            f"**{common.with_spread(main['times_faster'][path])}**",
            f"{report['not_padding'][path]:.0%}",
        ]
        for path in PATHS
    ]
    cases = [
        [
            name,
            f"{found['per_second']['stock']['median']:,.0f}",
            *(f"{found['times_faster'][path]['median']:.2f}" for path in ("padded", "packed")),
        ]
        for name, found in report["scaling"].items()
    ]
    operators = [
        [f"`{name}`", *(f"{milliseconds[path]:,.0f}" for path in PATHS)]
        for name, milliseconds in report["profile"].items()
    ]
    return common.text(
        "# Training speed on the same rows: stock, padded, packed",
        "Three ways to train are compared. `stock` is TRL's SFTTrainer with transformers' LLaVA and rows in random "
        "order. `padded` is this project with batches of similar length. `packed` is this project with packing.",
        f"Whole epochs of {main['rows']} rows with {main['tokens_with_loss']:,} tokens with loss; median (lowest to "
        f"highest) of {report['rounds']} rounds. The last column is the share of the language model's "
        "positions that are not padding:",
        common.table(["path", "tokens with loss per second", "times faster than stock", "not padding"], paths),
        f"The same with one setting changed, on {report['scaling_rows']} rows; median of two rounds. Unless "
        f"the first column says otherwise, a step has 8 rows and the extractor {PROTOTYPES} prototypes; stock has no "
        "extractor:",
        common.table(
            ["changed setting", "stock, tokens with loss per second", "padded / stock", "packed / stock"], cases
        ),
        "CPU time of each operator itself, in milliseconds per thousand tokens with loss, under the profiler, on "
        f"{report['profiled_rows']} rows:",
        common.table(["operator", *PATHS], operators),
        "![Tokens with loss per second, relative to stock](train_step.png)",
    )


def draw(report: dict, path: Path) -> None:
    names = list(report["scaling"])
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(names) + 1.2), layout="constrained")
    for offset, which in ((-0.2, "padded"), (0.2, "packed")):
        values = [report["scaling"][name]["times_faster"][which]["median"] for name in names]
        axes.barh(np.arange(len(names)) + offset, values, height=0.38, label=which)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(np.arange(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("tokens with loss per second, relative to TRL's stock trainer")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def profile_paths(data: Data, trainers: dict[str, Trainer]) -> dict[str, dict[str, float]]:
    """CPU time of the operators that take the most time in any path, and of all others together."""
    found = {name: operators(data, trainer) for name, trainer in trainers.items()}
    every = {operator for of_path in found.values() for operator in of_path}
    most = sorted(every, key=lambda operator: -max(of_path.get(operator, 0) for of_path in found.values()))
    table = {name: {path: found[path].get(name, 0.0) for path in found} for name in most[:TOP_OPERATORS]}
    table["all others"] = {path: sum(found[path].get(name, 0.0) for name in most[TOP_OPERATORS:]) for path in found}
    table["all"] = {path: sum(found[path].values()) for path in found}
    return table


def main():
    arguments = common.parse_arguments(__doc__)
    quick = arguments.quick
    num_rows, scaling_rows, profiled_rows, rounds = (16, 8, 8, 1) if quick else (96, 16, 16, 2)
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        data = make_data(root, num_rows)
        trainers = make_trainers(data, root, 8)
        report = {"rounds": rounds, "not_padding": check_labels(data, trainers)}
        print("comparing the three paths", flush=True)
        report["main"] = measure(data, trainers, rounds)
        report["scaling_rows"], report["profiled_rows"] = scaling_rows, profiled_rows
        report["scaling"] = scale(root, scaling_rows, quick)
        print("profiling", flush=True)
        (root / "profile").mkdir()
        data = make_data(root / "profile", profiled_rows)
        report["profile"] = profile_paths(data, make_trainers(data, root, 8))
    common.save("train_step", report, to_markdown, arguments, draw)


if __name__ == "__main__":
    main()
