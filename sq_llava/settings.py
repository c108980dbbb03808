"""The settings of a run: recipe and command line, checked, and what they mean for data, processor and weights.

    arguments, training_args, model_config = parse_settings(["--config", "recipes/sq-llava-7b/stage1.yaml"])

`SQLlavaArguments` are this project's own; the others are TRL's `SFTConfig` and `ModelConfig`. What it does not do:
load a model (`sq_llava/base.py`).
"""

from dataclasses import dataclass, field
from typing import Literal

from transformers import BitsAndBytesConfig
from trl import ModelConfig, SFTConfig, TrlParser, get_quantization_config

from processing_sq_llava import PROMPT_LAYOUTS, SQLlavaProcessor
from sq_llava.checkpoint import compose_processor, is_missing_folder
from sq_llava.doctor import DataCheck
from sq_llava.sources import DataSource


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
    qformer_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "BLIP-2 whose Q-Former stands, frozen, before the projector of a model made from parts."},
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
    prompt_layout: Literal["minigpt4"] | None = field(
        default=None, metadata={"help": "Markers of turns and images; default: as before, or those of Vicuna v1."}
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
    full_finetuning: bool = field(
        default=False,
        metadata={
            "help": "Train all weights of language model, extractor and projector in float32, and no adapter (lora_r "
            "and vision_lora_r 0), as LLaVA's stage 2: output_dir holds a plain checkpoint then, in the model's dtype."
        },
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on from the newest complete checkpoint of output_dir, if there is one."}
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of an optimizer step, over all processes; instead of gradient_accumulation_steps. With "
            "packing it counts packs, as per_device_train_batch_size does: the run says how many rows these hold."
        },
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
    feature_cache: str | None = field(
        default=None,
        metadata={"help": "Folder of `sq-llava cache-features`, read instead of images; with vision_lora_r 0."},
    )
    # TRL's own setting, which it refuses for images: `parse_settings` moves it here.
    packing: bool = field(init=False, default=False)
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


def parse_settings(
    args: list[str] | None = None, description: str | None = None
) -> tuple[SQLlavaArguments, SFTConfig, ModelConfig]:
    """Reads a recipe and the command line."""
    parser = TrlParser((SQLlavaArguments, SFTConfig, ModelConfig), description=description)
    arguments, training_args, model_config = parser.parse_args_and_config(args)
    for name in UNUSED_MODEL_SETTINGS:
        if getattr(model_config, name):
            raise ValueError(
                f"{name} is {getattr(model_config, name)}: train_sft.py does not support it, leave it out."
            )
    evaluates = bool(arguments.eval_datasets or arguments.num_eval_rows)
    if evaluates != (training_args.eval_strategy != "no") or (arguments.generation_datasets and not evaluates):
        raise ValueError(
            f"eval_strategy is {str(training_args.eval_strategy)!r}, eval_datasets has {len(arguments.eval_datasets)} "
            f"entries, num_eval_rows is {arguments.num_eval_rows}, generation_datasets has "
            f"{len(arguments.generation_datasets)} entries: to evaluate, give eval_strategy (steps or epoch) and one "
            "of eval_datasets and num_eval_rows; generation_datasets goes with them."
        )
    if arguments.feature_cache is not None:
        require_frozen_tower(arguments, model_config)
    if arguments.full_finetuning:
        require_no_adapter(arguments, model_config)
    take_over_packing(arguments, training_args)
    return arguments, training_args, model_config


def take_over_packing(arguments: SQLlavaArguments, training_args: SFTConfig) -> None:
    """
    Moves TRL's `packing` to `arguments`: TRL refuses it for images, `sq_llava/packing.py` does it.

    Raises:
        ValueError: for what does not go with it, or is not done here.
    """
    if training_args.padding_free or training_args.eval_packing:
        raise ValueError(
            f"padding_free is {training_args.padding_free}, eval_packing {training_args.eval_packing}: neither is "
            "done for images. Leave them out; packing: true leaves hardly any padding, and evaluation stays padded."
        )
    if not training_args.packing:
        return
    refused = {"packing_strategy": "bfd", "train_sampling_strategy": "random", "auto_find_batch_size": False}
    for name, only in refused.items():
        if (value := getattr(training_args, name)) != only:
            raise ValueError(
                f"packing is true and {name} is {str(value)!r}: packing keeps rows whole and has an order and size of "
                f"its own. Give {name} {only!r}, or leave packing out."
            )
    if training_args.max_length is None:
        raise ValueError("packing is true and max_length is not given: give it, it is the size of a packed row.")
    arguments.packing, training_args.packing = True, False


def require_no_adapter(arguments: SQLlavaArguments, model_config: ModelConfig) -> None:
    """
    Raises:
        ValueError: if what is trained in full were to have an adapter, or to be held in few bits.
    """
    refused = {"lora_r": model_config.lora_r, "vision_lora_r": arguments.vision_lora_r}
    refused |= {name: getattr(model_config, name) for name in ("load_in_4bit", "load_in_8bit")}
    given = ", ".join(f"{name} {value}" for name, value in refused.items() if value)
    if given:
        raise ValueError(
            f"full_finetuning is true, with {given}: it trains the language model's own weights and freezes the "
            "vision tower. Give lora_r 0 and vision_lora_r 0, and leave load_in_4bit and load_in_8bit out."
        )


def require_frozen_tower(arguments: SQLlavaArguments, model_config: ModelConfig) -> None:
    """
    Raises:
        ValueError: if training would change the vision tower, so that features made before would not be its own.
    """
    if arguments.vision_lora_r:
        raise ValueError(
            f"vision_lora_r is {arguments.vision_lora_r}: ViT-LoRA changes the vision tower in each step, and "
            "features made before would not be its own. Give vision_lora_r 0, which freezes it (the paper trains it), "
            "or leave feature_cache out."
        )
    if model_config.load_in_4bit or model_config.load_in_8bit:
        raise ValueError(
            "load_in_4bit or load_in_8bit is set: the features of a quantized vision tower are not cached. Leave it "
            "out, or feature_cache."
        )


# What stays as it is in a quantized model: what is trained in full, and the head, which TRL's loss multiplies by. The
# paths are whole ones, as transformers compares them.
NOT_QUANTIZED = ["model.multi_modal_projector", "model.prototype_extractor", "model.resampler", "lm_head"]


def quantization_config(model_config: ModelConfig) -> BitsAndBytesConfig | None:
    """How bitsandbytes holds the towers, by TRL's `load_in_4bit`, `load_in_8bit`, ...; `None` if it does not."""
    if model_config.load_in_4bit and model_config.dtype == "auto":
        raise ValueError("dtype is 'auto': with load_in_4bit, give the precision to compute in, such as bfloat16.")
    config = get_quantization_config(model_config)
    if config is not None:
        config.llm_int8_skip_modules = NOT_QUANTIZED
    return config


ARCHITECTURE = ("prototype_variant", "num_prototypes", "num_prototype_iterations", "projector_type")


def starting_point(arguments: SQLlavaArguments, model_config: ModelConfig) -> tuple[str | None, tuple]:
    """Where a model comes from: a folder or Hub id, or its two parts; and the other is `None`."""
    start = model_config.model_name_or_path
    parts = (arguments.vision_model_name_or_path, arguments.text_model_name_or_path)
    if (None in parts) if start is None else (parts != (None, None)):
        raise ValueError(
            f"model_name_or_path is {start!r}, vision_model_name_or_path {parts[0]!r}, text_model_name_or_path "
            f"{parts[1]!r}: give the first (a SQ-LLaVA, or the output_dir of a stage), or both of the others."
        )
    if start is not None and arguments.qformer_model_name_or_path is not None:
        raise ValueError(
            f"qformer_model_name_or_path is {arguments.qformer_model_name_or_path!r} and model_name_or_path "
            f"{start!r}, which has its own parts: leave one of them out."
        )
    if start is not None and is_missing_folder(start):
        raise ValueError(
            f"model_name_or_path is {start!r}: no such folder. Train that stage first; to check the data or to plan "
            "without it, give vision_model_name_or_path and text_model_name_or_path beside it."
        )
    return start, parts


def architecture(arguments: SQLlavaArguments) -> dict:
    """The fields of the configuration of a model made from parts that a recipe may set."""
    return {name: getattr(arguments, name) for name in ARCHITECTURE}


def processor_settings(arguments: SQLlavaArguments) -> dict[str, str]:
    settings = {name: getattr(arguments, name) for name in ("image_aspect_ratio", "system_message")}
    layout = {} if arguments.prompt_layout is None else PROMPT_LAYOUTS[arguments.prompt_layout]
    return layout | {name: value for name, value in settings.items() if value is not None}


def composed_processor(arguments: SQLlavaArguments, model_config: ModelConfig) -> SQLlavaProcessor:
    """The processor of a recipe, without any weights."""
    parts = (arguments.vision_model_name_or_path, arguments.text_model_name_or_path)
    settings = processor_settings(arguments)
    if None not in parts:  # also in place of a stage that is not there yet
        return compose_processor(*parts, arguments.qformer_model_name_or_path, **settings)
    start, _ = starting_point(arguments, model_config)
    return SQLlavaProcessor.from_pretrained(start, **settings)


def data_check(
    arguments: SQLlavaArguments, training_args: SFTConfig, model_config: ModelConfig, **looked_at: bool
) -> DataCheck:
    """What the doctor needs of a recipe: the data and the processor, but no weights."""
    return DataCheck(
        arguments.datasets,
        composed_processor(arguments, model_config),
        plain=arguments.stage == "align",
        max_length=training_args.max_length,
        self_question_ratio=arguments.self_question_ratio,
        packing=arguments.packing,
        eval_sources=[*arguments.eval_datasets, *arguments.generation_datasets],
        **looked_at,
    )
