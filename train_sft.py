"""Train SQ-LLaVA: stage 1 ("align", captions) and stage 2 ("instruct", answers and self-questions).

    accelerate launch train_sft.py --config recipes/sq-llava-7b/stage1.yaml
    accelerate launch train_sft.py --config recipes/sq-llava-7b/stage2.yaml

Any setting of a recipe can be given on the command line too, and wins there:

    python train_sft.py --config recipes/sq-llava-7b/stage1.yaml --text_model_name_or_path Qwen/Qwen3-0.6B

Stopped by SIGTERM or SIGINT, it saves a checkpoint and ends with 75 (a launcher such as torchrun ends with 1 then);
killed or stopped, it goes on with `--resume`, as if nothing had been.

It writes a PEFT adapter with the processor to `output_dir`; `sq-llava merge` makes a plain checkpoint of it. What it
does not do: train the towers' own weights; convert released checkpoints.
"""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from transformers import set_seed
from transformers.utils.versions import require_version
from trl import ModelConfig, SFTConfig, TrlParser

from modeling_sq_llava import SQLlavaForConditionalGeneration
from processing_sq_llava import SQLlavaProcessor
from sq_llava.adapter import LoraSize, add_adapter, count_parameters, load_adapter_weights
from sq_llava.checkpoint import base_of_adapter, compose, is_adapter
from sq_llava.data import check_rows, load_rows
from sq_llava.recovery import EXIT_TRY_AGAIN, find_checkpoint, warn_of_changes
from sq_llava.self_questioning import EpochCallback, SelfQuestioningCollator
from sq_llava.trainer import SQLlavaTrainer


@dataclass
class SQLlavaArguments:
    """What to train, from what, on what."""

    stage: Literal["align", "instruct"] = field(
        metadata={"help": "'align': captions train ViT-LoRA, extractor and projector. 'instruct': LLM-LoRA too."}
    )
    dataset_path: str = field(metadata={"help": "LLaVA JSON or JSONL: id, image, conversations."})
    image_root: str | None = field(default=None, metadata={"help": "Folder of the images; default: that of the data."})
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
    max_loss: float | None = field(
        default=None, metadata={"help": "Stop at a step with a higher loss; default: 2 ln(vocabulary size)."}
    )

    def __post_init__(self):
        for name in ("self_question_ratio", "question_loss_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number from 0 to 1.")


# Settings of TRL's ModelConfig that this script has no use for. Given all the same, they are refused, not ignored.
UNUSED_MODEL_SETTINGS = (
    "lora_target_modules", "lora_target_parameters", "lora_modules_to_save", "use_rslora", "use_dora",
    "load_in_8bit", "load_in_4bit",
)  # fmt: skip


def load_base(
    arguments: SQLlavaArguments, training_args: SFTConfig, model_config: ModelConfig, checkpoint: str | None
):
    """Returns the frozen base, its processor, and the folder of the stage to go on from, if there is one."""
    start = model_config.model_name_or_path
    parts = (arguments.vision_model_name_or_path, arguments.text_model_name_or_path)
    if (None in parts) if start is None else (parts != (None, None)):
        raise ValueError(
            f"model_name_or_path is {start!r}, vision_model_name_or_path {parts[0]!r}, text_model_name_or_path "
            f"{parts[1]!r}: give the first (a SQ-LLaVA, or the output_dir of a stage), or both of the others."
        )
    loading = {"dtype": model_config.dtype, "attn_implementation": model_config.attn_implementation}
    processing = {
        name: getattr(arguments, name)
        for name in ("image_aspect_ratio", "system_message")
        if getattr(arguments, name) is not None
    }
    if start is not None:
        base = base_of_adapter(start) if is_adapter(start) else start
        processor = SQLlavaProcessor.from_pretrained(start, **processing)
        model = SQLlavaForConditionalGeneration.from_pretrained(base, **loading)
        return model, processor, start if is_adapter(start) else None

    if checkpoint is not None:
        return *read_base(checkpoint, arguments, loading, processing), None
    model, processor = compose(
        *parts,
        **loading,
        processor_kwargs=processing,
        prototype_variant=arguments.prototype_variant,
        num_prototypes=arguments.num_prototypes,
        num_prototype_iterations=arguments.num_prototype_iterations,
        projector_type=arguments.projector_type,
    )
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


def print_parameters(model, trainer: SQLlavaTrainer) -> None:
    """Says what is trained, what is frozen, and with which learning rate."""
    table = Table("Part", "Trained", "Frozen", "Learning rate", title="Parameters")
    for part, (trained, frozen) in count_parameters(model).items():
        rate = trainer.part_learning_rates.get(part, trainer.args.learning_rate)
        table.add_row(part, f"{trained:,}", f"{frozen:,}", f"{rate:g}" if trained else "-")
    Console().print(table)


def main(args: list[str] | None = None) -> SQLlavaTrainer:
    parser = TrlParser((SQLlavaArguments, SFTConfig, ModelConfig), description=__doc__)
    arguments, training_args, model_config = parser.parse_args_and_config(args)
    for name in UNUSED_MODEL_SETTINGS:
        if getattr(model_config, name):
            raise ValueError(
                f"{name} is {getattr(model_config, name)}: train_sft.py does not support it, leave it out."
            )
    # Before 5.18, the mask of what is in the loss is wrong behind an image.
    require_version("transformers>=5.18")
    instruct = arguments.stage == "instruct"
    training_args.remove_unused_columns = False  # the collator makes the model's inputs of our columns
    training_args.ddp_find_unused_parameters = False  # every trained weight is in the graph of every batch
    set_seed(training_args.seed)
    with PartialState().main_process_first():
        checkpoint = find_checkpoint(training_args.output_dir, arguments.resume, training_args.resume_from_checkpoint)

    rows = load_rows(arguments.dataset_path, arguments.image_root)
    model, processor, previous_stage = load_base(arguments, training_args, model_config, checkpoint)
    check_rows(rows, processor)
    model = add_adapter(
        model,
        LoraSize(arguments.vision_lora_r, arguments.vision_lora_alpha, arguments.vision_lora_dropout),
        LoraSize(model_config.lora_r if instruct else 0, model_config.lora_alpha, model_config.lora_dropout),
        train_vusr=instruct,
    )
    if previous_stage is not None:
        load_adapter_weights(model, previous_stage)

    collator = SelfQuestioningCollator(
        processor,
        plain=not instruct,
        self_question_ratio=arguments.self_question_ratio,
        seed=training_args.seed,
        max_length=training_args.max_length,
    )
    rates = {"vision": arguments.vision_lr, "connector": arguments.connector_lr}
    trainer = SQLlavaTrainer(
        model=model,
        args=training_args,
        train_dataset=rows,
        data_collator=collator,
        processing_class=processor,
        callbacks=[EpochCallback(collator)],
        question_loss_weight=arguments.question_loss_weight,
        part_learning_rates={part: rate for part, rate in rates.items() if rate is not None},
        max_loss=arguments.max_loss,
    )
    if trainer.accelerator.is_main_process:
        print_parameters(model, trainer)
        if checkpoint is not None:
            warn_of_changes(checkpoint, trainer.run)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.watch.stopped and trainer.state.global_step < trainer.state.max_steps:
        # A launcher ends the others when the first has ended.
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.print(f"Stopped at step {trainer.state.global_step}. Go on with --resume.")
        sys.exit(EXIT_TRY_AGAIN)
    trainer.save_model()
    trainer.save_state()
    return trainer


if __name__ == "__main__":
    main()
