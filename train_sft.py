"""Train SQ-LLaVA: stage 1 ("align", captions) and stage 2 ("instruct", answers and self-questions).

    accelerate launch train_sft.py --config recipes/sq-llava-7b/stage1.yaml
    accelerate launch train_sft.py --config recipes/sq-llava-7b/stage2.yaml

Any setting of a recipe can be given on the command line too, and wins there:

    python train_sft.py --config recipes/sq-llava-7b/stage1.yaml --text_model_name_or_path Qwen/Qwen3-0.6B

Stopped by SIGTERM or SIGINT, it saves a checkpoint and ends with 75 (a launcher such as torchrun ends with 1 then);
killed or stopped, it goes on with `--resume`, as if nothing had been.

The data is checked first, by a sample of its rows: see `sq-llava doctor` and the setting `doctor`.

`--dry_run real` trains one step on the longest rows and says what it takes; `--dry_run meta` says it without weights.

It writes a PEFT adapter with the processor to `output_dir`; `sq-llava merge` makes a plain checkpoint of it. What it
does not do: train the towers' own weights; convert released checkpoints.
"""

import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from transformers import BitsAndBytesConfig, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils.versions import require_version
from trl import ModelConfig, SFTConfig, TrlParser, get_quantization_config

from configuration_sq_llava import SQLlavaConfig
from modeling_sq_llava import SQLlavaForConditionalGeneration
from processing_sq_llava import SQLlavaProcessor
from sq_llava.adapter import LoraSize, add_adapter, count_parameters, load_adapter_weights
from sq_llava.checkpoint import base_of_adapter, compose, compose_config, compose_processor, is_adapter
from sq_llava.data import hold_out, load_rows
from sq_llava.doctor import DataCheck
from sq_llava.doctor_report import SAMPLE_ROWS, check_before_training
from sq_llava.monitoring import GenerationCheck
from sq_llava.planning import (
    describe_steps,
    leave_one_step,
    print_plan,
    resident_peak,
    set_global_batch,
    try_one_step,
)
from sq_llava.recovery import EXIT_TRY_AGAIN, find_checkpoint, warn_of_changes
from sq_llava.self_questioning import EpochCallback, SelfQuestioningCollator
from sq_llava.sources import DataSource
from sq_llava.trainer import SQLlavaTrainer


@dataclass
class SQLlavaArguments:
    """What to train, from what, on what."""

    stage: Literal["align", "instruct"] = field(
        metadata={"help": "'align': captions train ViT-LoRA, extractor and projector. 'instruct': LLM-LoRA too."}
    )
    dataset_path: str | None = field(
        default=None, metadata={"help": "Rows in LLaVA's or TRL's layout: JSON, JSONL, Parquet, a folder, a Hub id."}
    )
    image_root: str | None = field(default=None, metadata={"help": "Folder of the images; default: that of the data."})
    datasets: list[DataSource] = field(
        default_factory=list,
        metadata={"help": "Instead: several; in a recipe each with path, image_root, split, weight or num_rows."},
    )
    eval_datasets: list[DataSource] = field(
        default_factory=list, metadata={"help": "Rows to measure the losses on while training, as datasets."}
    )
    num_eval_rows: int = field(
        default=0, metadata={"help": "Instead: so many rows are drawn from the data, and not trained on."}
    )
    generation_datasets: list[DataSource] = field(
        default_factory=list,
        metadata={"help": "A few rows whose first question is answered at each evaluation, as datasets."},
    )
    vision_model_name_or_path: str | None = field(
        default=None, metadata={"help": "CLIP or SigLIP to start from, with text_model_name_or_path."}
    )
    text_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Causal LM to start from; instead: model_name_or_path, a SQ-LLaVA or a stage."}
    )
    prototype_variant: Literal["paper", "released", "none"] = field(
        default="paper", metadata={"help": "Prototype extractor of a model made from parts."}
    )
    num_prototypes: int = field(default=256, metadata={"help": "Prototypes of a model made from parts."})
    num_prototype_iterations: int = field(default=2, metadata={"help": "EM iterations of a model made from parts."})
    projector_type: Literal["mlp2x", "linear"] = field(
        default="mlp2x", metadata={"help": "Projector of a model made from parts."}
    )
    image_aspect_ratio: Literal["pad", "crop"] | None = field(
        default=None,
        metadata={"help": "'pad' to a square with the mean colour, or 'crop' the centre; default: as before, or pad."},
    )
    system_message: str | None = field(
        default=None, metadata={"help": "Stands before each conversation; default: as before, or the paper's."}
    )
    self_question_ratio: float = field(
        default=0.5, metadata={"help": "Probability that a turn after the first is asked by the model (1 - delta)."}
    )
    question_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of a self-question's token beside an answer's."}
    )
    vision_lr: float | None = field(default=None, metadata={"help": "Of ViT-LoRA; default: learning_rate."})
    connector_lr: float | None = field(
        default=None, metadata={"help": "Of extractor and projector; default: learning_rate."}
    )
    vision_lora_r: int = field(default=32, metadata={"help": "Rank of ViT-LoRA; 0 for none."})
    vision_lora_alpha: int = field(default=64, metadata={"help": "Alpha of ViT-LoRA."})
    vision_lora_dropout: float = field(default=0.2, metadata={"help": "Dropout of ViT-LoRA."})
    resume: bool = field(
        default=False, metadata={"help": "Go on from the newest complete checkpoint of output_dir, if there is one."}
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows of an optimizer step, over all processes; instead of gradient_accumulation_steps."},
    )
    dry_run: Literal["off", "meta", "real"] = field(
        default="off",
        metadata={
            "help": "'real': one step on the longest rows, with parameters, memory and steps, then stop. 'meta': the "
            "same from the configurations alone, without weights and without a step."
        },
    )
    num_gpus: int | None = field(
        default=None, metadata={"help": "For dry_run meta: the processes to plan for; default: those of this launch."}
    )
    doctor: Literal["sample", "full", "off"] = field(
        default="sample",
        metadata={"help": "Rows and images to look at before the model is loaded; `sq-llava doctor` tells more."},
    )
    max_loss: float | None = field(
        default=None, metadata={"help": "Stop at a step with a higher loss; default: 2 ln(vocabulary size)."}
    )

    def __post_init__(self):
        for name in ("datasets", "eval_datasets", "generation_datasets"):
            sources = getattr(self, name)
            setattr(self, name, [DataSource(**s) if isinstance(s, dict) else s for s in sources])
        if (self.dataset_path is None) == (not self.datasets) or (self.datasets and self.image_root is not None):
            raise ValueError(
                f"dataset_path is {self.dataset_path!r}, image_root {self.image_root!r}, and datasets has "
                f"{len(self.datasets)} entries: give dataset_path (and image_root), or datasets."
            )
        self.datasets = self.datasets or [DataSource(self.dataset_path, self.image_root)]
        if self.eval_datasets and self.num_eval_rows:
            raise ValueError(f"num_eval_rows is {self.num_eval_rows}, and eval_datasets is given: leave one out.")
        for name in ("self_question_ratio", "question_loss_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number from 0 to 1.")

    @property
    def part_learning_rates(self) -> dict[str, float]:
        rates = {"vision": self.vision_lr, "connector": self.connector_lr}
        return {part: rate for part, rate in rates.items() if rate is not None}


# Settings of TRL's ModelConfig that this script has no use for. Given all the same, they are refused, not ignored.
UNUSED_MODEL_SETTINGS = (
    "lora_target_modules", "lora_target_parameters", "lora_modules_to_save", "use_rslora", "use_dora",
)  # fmt: skip
# What stays as it is in a quantized model: what is trained in full, and the head, which TRL's loss multiplies by. The
# paths are whole ones, as transformers compares them.
NOT_QUANTIZED = ["model.multi_modal_projector", "model.prototype_extractor", "lm_head"]


def quantization_config(model_config: ModelConfig) -> BitsAndBytesConfig | None:
    """How bitsandbytes holds the towers, by TRL's `load_in_4bit`, `load_in_8bit`, ...; `None` if it does not."""
    if model_config.load_in_4bit and model_config.dtype == "auto":
        raise ValueError("dtype is 'auto': with load_in_4bit, give the precision to compute in, such as bfloat16.")
    config = get_quantization_config(model_config)
    if config is not None:
        config.llm_int8_skip_modules = NOT_QUANTIZED
    return config


def starting_point(arguments: SQLlavaArguments, model_config: ModelConfig) -> tuple[str | None, tuple]:
    """Where a model comes from: a folder or Hub id, or its two parts; and the other is `None`."""
    start = model_config.model_name_or_path
    parts = (arguments.vision_model_name_or_path, arguments.text_model_name_or_path)
    if (None in parts) if start is None else (parts != (None, None)):
        raise ValueError(
            f"model_name_or_path is {start!r}, vision_model_name_or_path {parts[0]!r}, text_model_name_or_path "
            f"{parts[1]!r}: give the first (a SQ-LLaVA, or the output_dir of a stage), or both of the others."
        )
    return start, parts


def processor_settings(arguments: SQLlavaArguments) -> dict[str, str]:
    settings = {name: getattr(arguments, name) for name in ("image_aspect_ratio", "system_message")}
    return {name: value for name, value in settings.items() if value is not None}


def data_check(
    arguments: SQLlavaArguments, training_args: SFTConfig, model_config: ModelConfig, **looked_at: bool
) -> DataCheck:
    """What the doctor needs of a recipe: the data and the processor, but no weights."""
    start, parts = starting_point(arguments, model_config)
    settings = processor_settings(arguments)
    if start is None:
        processor = compose_processor(*parts, **settings)
    else:
        processor = SQLlavaProcessor.from_pretrained(start, **settings)
    return DataCheck(
        arguments.datasets,
        processor,
        plain=arguments.stage == "align",
        max_length=training_args.max_length,
        self_question_ratio=arguments.self_question_ratio,
        eval_sources=[*arguments.eval_datasets, *arguments.generation_datasets],
        **looked_at,
    )


def load_base(
    arguments: SQLlavaArguments, training_args: SFTConfig, model_config: ModelConfig, checkpoint: str | None
):
    """Returns the frozen base, its processor, and the folder of the stage to go on from, if there is one."""
    start, parts = starting_point(arguments, model_config)
    quantization = quantization_config(model_config)
    loading = {"dtype": model_config.dtype, "attn_implementation": model_config.attn_implementation}
    quantized_loading = loading if quantization is None else {**loading, "quantization_config": quantization}
    processing = processor_settings(arguments)
    if start is not None:
        base = base_of_adapter(start) if is_adapter(start) else start
        processor = SQLlavaProcessor.from_pretrained(start, **processing)
        model = SQLlavaForConditionalGeneration.from_pretrained(base, **quantized_loading)
        return model, processor, start if is_adapter(start) else None

    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"vision_model_name_or_path is {parts[0]!r}: under ZeRO-3, the parts are loaded in pieces and cannot be "
            "joined. Save sq_llava.checkpoint.compose(...) first, and give its folder as model_name_or_path."
        )
    if checkpoint is not None:
        return *read_base(checkpoint, arguments, quantized_loading, processing), None
    model, processor = compose(
        *parts,
        **loading,
        processor_kwargs=processing,
        prototype_variant=arguments.prototype_variant,
        num_prototypes=arguments.num_prototypes,
        num_prototype_iterations=arguments.num_prototype_iterations,
        projector_type=arguments.projector_type,
    )
    if arguments.dry_run == "real" and quantization is None:
        return model, processor, None
    # An adapter is loaded on a base that it names, so the model made from parts is saved beside it.
    base = Path(training_args.output_dir).absolute() / "base"
    if PartialState().is_main_process:
        part = base.with_name("half-written-base")
        for folder in (part, base):
            shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(part)
        processor.save_pretrained(part)
        part.rename(base)
    PartialState().wait_for_everyone()
    model.name_or_path = str(base)
    if quantization is not None:
        model = SQLlavaForConditionalGeneration.from_pretrained(base, **quantized_loading)
    return model, processor, None


def read_base(checkpoint: str, arguments: SQLlavaArguments, loading: dict, processing: dict):
    """Returns the base beside a checkpoint, and its processor: made anew, its random weights might be others."""
    base = Path(checkpoint).absolute().parent / "base"
    if not base.is_dir():
        raise ValueError(f"{checkpoint}: the base that it stands on is not in {base}. Bring that folder back.")
    model = SQLlavaForConditionalGeneration.from_pretrained(base, **loading)
    for name in ("prototype_variant", "num_prototypes", "num_prototype_iterations", "projector_type"):
        if getattr(model.config, name) != getattr(arguments, name):
            raise ValueError(
                f"{name} is {getattr(arguments, name)!r}, but {checkpoint} was trained with "
                f"{getattr(model.config, name)!r}: give that, or another output_dir to start anew."
            )
    return model, SQLlavaProcessor.from_pretrained(base, **processing)


def add_stage_adapter(model, arguments: SQLlavaArguments, model_config: ModelConfig):
    """Puts on a base what its stage trains."""
    instruct = arguments.stage == "instruct"
    # ZeRO-3 fails on weights of two precisions (https://github.com/huggingface/trl/issues/6089), and its optimizer has
    # float32 copies by itself.
    trained_dtype = model.dtype if is_deepspeed_zero3_enabled() else torch.float32
    return add_adapter(
        model,
        LoraSize(arguments.vision_lora_r, arguments.vision_lora_alpha, arguments.vision_lora_dropout),
        LoraSize(model_config.lora_r if instruct else 0, model_config.lora_alpha, model_config.lora_dropout),
        train_vusr=instruct,
        trained_dtype=trained_dtype,
    )


def print_parameters(model, part_learning_rates: dict[str, float], learning_rate: float) -> None:
    """Says what is trained, what is frozen, and with which learning rate."""
    table = Table("Part", "Trained", "Frozen", "Learning rate", title="Parameters")
    for part, (trained, frozen) in count_parameters(model).items():
        rate = part_learning_rates.get(part, learning_rate)
        table.add_row(part, f"{trained:,}", f"{frozen:,}", f"{rate:g}" if trained else "-")
    Console().print(table)


def plan_from_configs(
    arguments: SQLlavaArguments, training_args: SFTConfig, model_config: ModelConfig, num_gpus: int
) -> None:
    """Prints the parameters, the memory and the steps of a run, from the configurations of its models alone."""
    parts = (arguments.vision_model_name_or_path, arguments.text_model_name_or_path)
    if None not in parts:  # also in place of a stage that is not there yet
        config = compose_config(
            *parts,
            prototype_variant=arguments.prototype_variant,
            num_prototypes=arguments.num_prototypes,
            num_prototype_iterations=arguments.num_prototype_iterations,
            projector_type=arguments.projector_type,
        )
    else:
        start, _ = starting_point(arguments, model_config)
        try:
            config = SQLlavaConfig.from_pretrained(base_of_adapter(start) if is_adapter(start) else start)
        except OSError as error:
            raise ValueError(
                f"model_name_or_path is {start!r}, which cannot be read: {error} To plan a stage before the one that "
                "it begins from is there, give vision_model_name_or_path and text_model_name_or_path beside it."
            ) from error
    dtype = config.text_config.dtype if model_config.dtype in (None, "auto") else getattr(torch, model_config.dtype)
    with torch.device("meta"):
        model = SQLlavaForConditionalGeneration._from_config(
            config, dtype=dtype, attn_implementation=model_config.attn_implementation
        )
        model = add_stage_adapter(model, arguments, model_config)
    print_parameters(model, arguments.part_learning_rates, training_args.learning_rate)
    print_plan(model, training_args, num_gpus, quantization_config(model_config))
    try:
        num_rows = len(load_rows(arguments.datasets, training_args.seed, config.image_seq_length))
        num_rows -= arguments.num_eval_rows
    except ValueError as error:
        print(f"Steps: not known without the data. {error}")
    else:
        print(describe_steps(num_rows, training_args, num_gpus))


def parse_settings(args: list[str] | None) -> tuple[SQLlavaArguments, SFTConfig, ModelConfig]:
    """Reads a recipe and the command line."""
    parser = TrlParser((SQLlavaArguments, SFTConfig, ModelConfig), description=__doc__)
    arguments, training_args, model_config = parser.parse_args_and_config(args)
    for name in UNUSED_MODEL_SETTINGS:
        if getattr(model_config, name):
            raise ValueError(
                f"{name} is {getattr(model_config, name)}: train_sft.py does not support it, leave it out."
            )
    return arguments, training_args, model_config


def main(args: list[str] | None = None) -> SQLlavaTrainer:
    arguments, training_args, model_config = parse_settings(args)
    # Before 5.18, the mask of what is in the loss is wrong behind an image.
    require_version("transformers>=5.18")
    evaluates = bool(arguments.eval_datasets or arguments.num_eval_rows)
    if evaluates != (training_args.eval_strategy != "no") or (arguments.generation_datasets and not evaluates):
        raise ValueError(
            f"eval_strategy is {str(training_args.eval_strategy)!r}, eval_datasets has {len(arguments.eval_datasets)} "
            f"entries, num_eval_rows is {arguments.num_eval_rows}, generation_datasets has "
            f"{len(arguments.generation_datasets)} entries: to evaluate, give eval_strategy (steps or epoch) and one "
            "of eval_datasets and num_eval_rows; generation_datasets goes with them."
        )
    instruct = arguments.stage == "instruct"
    training_args.remove_unused_columns = False  # the collator makes the model's inputs of our columns
    training_args.ddp_find_unused_parameters = False  # every trained weight is in the graph of every batch
    if training_args.data_seed is None:
        training_args.data_seed = training_args.seed  # else, rows come in an order of where PyTorch's seed stands
    num_processes = arguments.num_gpus or training_args.world_size
    if arguments.num_gpus is not None and arguments.dry_run != "meta":
        raise ValueError(f"num_gpus is {arguments.num_gpus}: it is for --dry_run meta; else the launcher says it.")
    if arguments.global_batch_size is not None:
        set_global_batch(training_args, arguments.global_batch_size, num_processes)
    if arguments.dry_run == "meta":
        return plan_from_configs(arguments, training_args, model_config, num_processes)
    resident_before = resident_peak()
    set_seed(training_args.seed)
    with PartialState().main_process_first():
        checkpoint = find_checkpoint(training_args.output_dir, arguments.resume, training_args.resume_from_checkpoint)
        if arguments.doctor != "off" and PartialState().is_main_process:
            command = shlex.join(["sq-llava", "doctor", *(sys.argv[1:] if args is None else args)])
            check = data_check(arguments, training_args, model_config)
            check_before_training(check, SAMPLE_ROWS if arguments.doctor == "sample" else None, command)

    model, processor, previous_stage = load_base(arguments, training_args, model_config, checkpoint)
    rows = load_rows(arguments.datasets, training_args.seed, processor.image_seq_length)
    model = add_stage_adapter(model, arguments, model_config)
    if previous_stage is not None:
        load_adapter_weights(model, previous_stage)

    collator = SelfQuestioningCollator(
        processor,
        plain=not instruct,
        self_question_ratio=arguments.self_question_ratio,
        seed=training_args.seed,
        max_length=training_args.max_length,
    )
    eval_rows = generation_check = None
    if arguments.eval_datasets:
        eval_rows = load_rows(arguments.eval_datasets, training_args.seed, processor.image_seq_length)
    elif arguments.num_eval_rows:
        rows, eval_rows = hold_out(rows, arguments.num_eval_rows, training_args.seed)
    if arguments.generation_datasets:
        generation_check = GenerationCheck(load_rows(arguments.generation_datasets, training_args.seed), processor)
    if arguments.dry_run == "real":
        steps = describe_steps(len(rows), training_args, training_args.world_size)
        leave_one_step(training_args)
    trainer = SQLlavaTrainer(
        model=model,
        args=training_args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=collator,
        processing_class=processor,
        callbacks=[EpochCallback(collator)],
        question_loss_weight=arguments.question_loss_weight,
        part_learning_rates=arguments.part_learning_rates,
        max_loss=arguments.max_loss,
        generation_check=generation_check,
    )
    if trainer.accelerator.is_main_process:
        print_parameters(model, arguments.part_learning_rates, training_args.learning_rate)
        if checkpoint is not None:
            warn_of_changes(checkpoint, trainer.run)
    if arguments.dry_run == "real":
        try_one_step(trainer, resident_before)
        if trainer.accelerator.is_main_process:
            print(steps)
        return trainer
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.watch.stopped and trainer.state.global_step < trainer.state.max_steps:
        # A launcher ends the others when the first has ended.
        trainer.accelerator.wait_for_everyone()
        saved = (
            "save_strategy is no, so nothing was saved"
            if training_args.save_strategy == "no"
            else "Go on with --resume"
        )
        trainer.accelerator.print(f"Stopped at step {trainer.state.global_step}. {saved}.")
        sys.exit(EXIT_TRY_AGAIN)
    trainer.save_model()
    trainer.save_state()
    return trainer


if __name__ == "__main__":
    main()
