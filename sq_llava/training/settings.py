"""The settings of a run: recipe and command line, checked, and what they mean for data, processor and weights.

    arguments, training_args, model_config = parse_settings(["--config", "recipes/sq-llava-7b/stage1.yaml"])

`SQLlavaArguments` are this project's own; the others are TRL's `SFTConfig` and `ModelConfig`. What it does not do:
load a model (`sq_llava/training/stage_model.py`).
"""

from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import Literal

from trl import ModelConfig, SFTConfig, TrlParser

from processing_sq_llava import PROMPT_LAYOUTS, SQLlavaProcessor
from sq_llava.checkpoints.compose import compose_processor
from sq_llava.checkpoints.load import require_kind
from sq_llava.console import needs_extra
from sq_llava.data.sources import DataSource
from sq_llava.training.adapter import LORA_INITIALISATIONS
from sq_llava.training.setting_table import is_given, refuse_settings


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
    init_lora_weights: str = field(
        default="default",
        metadata={"help": "Initialisation of new LoRA weights: default, gaussian or orthogonal, as PEFT names them."},
    )
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
    # Settings of TRL, moved here by `parse_settings`: it refuses `packing` for images, and takes up `eos_token` only
    # when data and template have been read.
    packing: bool = field(init=False, default=False)
    eos_token: str | None = field(init=False, default=None)
    max_loss: float | None = field(
        default=None, metadata={"help": "Stop at a step with a higher loss; default: 2 ln(vocabulary size)."}
    )

    def __post_init__(self):
        for name in ("datasets", "eval_datasets", "generation_datasets"):
            setattr(self, name, [_data_source(name, source) for source in getattr(self, name)])
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
        if self.init_lora_weights not in LORA_INITIALISATIONS:
            raise ValueError(
                f"init_lora_weights is {self.init_lora_weights!r}: choose one of {', '.join(LORA_INITIALISATIONS)}. "
                "(pissa, olora, corda, loftq and lora_ga change the base's own weights, on which the saved adapter "
                "would no longer fit; eva reads data first, and mica freezes half of the LoRA.)"
            )

    @property
    def part_learning_rates(self) -> dict[str, float]:
        rates = {"vision": self.vision_lr, "connector": self.connector_lr}
        return {part: rate for part, rate in rates.items() if rate is not None}


def _data_source(setting: str, entry: DataSource | dict) -> DataSource:
    """One entry of `datasets` in a recipe."""
    if isinstance(entry, DataSource):
        return entry
    known = [source_field.name for source_field in fields(DataSource)]
    if not isinstance(entry, dict) or "path" not in entry:
        raise ValueError(f"{setting} holds {entry!r}: an entry has a path, and may have {', '.join(known[1:])}.")
    if unknown := [name for name in entry if name not in known]:
        raise ValueError(f"{setting}, {entry['path']}: unknown key {unknown[0]!r}. The keys are {', '.join(known)}.")
    return DataSource(**entry)


class _Parser(TrlParser):
    def error(self, message: str) -> None:
        self.exit(2, f"Error: {message}\n")  # without the usage, whose hundreds of lines would hide it


def parse_settings(
    args: list[str] | None = None, description: str | None = None
) -> tuple[SQLlavaArguments, SFTConfig, ModelConfig]:
    """
    Reads a recipe and the command line.

    Raises:
        ValueError: for a setting that is unknown, that would do nothing here, or that does not go with another.
    """
    parser = _Parser((SQLlavaArguments, SFTConfig, ModelConfig), description=description)
    arguments, training_args, model_config = parser.parse_args_and_config(args)
    refuse_settings(training_args, model_config)
    evaluates = bool(arguments.eval_datasets or arguments.num_eval_rows)
    asks_for_it = training_args.eval_strategy != "no" or training_args.do_eval
    if evaluates != asks_for_it or (arguments.generation_datasets and not evaluates):
        raise ValueError(
            f"eval_strategy is {str(training_args.eval_strategy)!r}, eval_datasets has {len(arguments.eval_datasets)} "
            f"entries, num_eval_rows is {arguments.num_eval_rows}, generation_datasets has "
            f"{len(arguments.generation_datasets)} entries: to evaluate, give eval_strategy (steps or epoch) and one "
            "of eval_datasets and num_eval_rows; generation_datasets goes with them."
        )
    require_use(arguments, training_args, model_config)
    if training_args.metric_for_best_model is not None:
        # The Trainer takes a metric whose name does not end in "loss" for one that grows: loss_answers, too.
        training_args.greater_is_better = "loss" not in training_args.metric_for_best_model
    if arguments.full_finetuning:
        require_no_adapter(arguments, model_config)
    take_over_packing(arguments, training_args)
    arguments.eos_token = training_args.eos_token
    return arguments, training_args, model_config


def require_use(arguments: SQLlavaArguments, training_args: SFTConfig, model_config: ModelConfig) -> None:
    """
    Raises:
        ValueError: for a setting that has no use beside the others.
    """
    on_text = arguments.stage == "instruct" and model_config.lora_r > 0
    on_any = on_text or arguments.vision_lora_r > 0
    no_lora = "this run trains no LoRA (lora_r and vision_lora_r are 0, or the stage is align and vision_lora_r 0)"
    no_text_lora = "this run trains no LoRA on the language model (lora_r is 0, or the stage is align)"
    used = {
        "use_rslora": (on_any, no_lora),
        "use_dora": (on_any, no_lora),
        "init_lora_weights": (on_any, no_lora),
        "lora_target_modules": (on_text, no_text_lora),
    }
    needs_4bit = (model_config.load_in_4bit, "load_in_4bit is not set")
    used |= dict.fromkeys(("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"), needs_4bit)
    for name, (has_use, reason) in used.items():
        holder = arguments if name == "init_lora_weights" else model_config
        if is_given(holder, name) and not has_use:
            raise ValueError(f"{name} is {getattr(holder, name)!r}, but {reason}: leave it out.")
    if arguments.init_lora_weights == "orthogonal":
        ranks = {"lora_r": model_config.lora_r * on_text, "vision_lora_r": arguments.vision_lora_r}
        odd = [f"{name} is {rank}" for name, rank in ranks.items() if rank % 2]
        if odd or model_config.load_in_4bit or model_config.load_in_8bit:
            raise ValueError(
                f"init_lora_weights is 'orthogonal' and {odd[0] if odd else 'the base is quantized'}: it needs even "
                "ranks, and a base that is not quantized."
            )
    if model_config.use_dora and model_config.load_in_8bit:
        raise ValueError(
            "use_dora is True and load_in_8bit is set: DoRA needs the weights of the base, which PEFT cannot read "
            "out of 8 bits everywhere. Give load_in_4bit, or leave use_dora out."
        )
    if training_args.activation_offloading and training_args.device.type == "cpu":
        raise ValueError("activation_offloading is True, but the model is on the CPU already: leave it out.")
    if training_args.accelerator_config.split_batches:
        raise ValueError(
            "accelerator_config has split_batches true, which would divide per_device_train_batch_size among the "
            "processes: leave it out, and give the rows of one process there."
        )
    if training_args.train_sampling_strategy == "batch_rebalance":
        raise ValueError(
            "train_sampling_strategy is 'batch_rebalance': choose random, sequential or group_by_length (which groups "
            "by modality too), or packing true."
        )


def named_targets(model_config: ModelConfig) -> tuple[str, ...] | None:
    """The linear layers of the language model that `lora_target_modules` names; `None` for all of them."""
    names = model_config.lora_target_modules
    names = [names] if isinstance(names, str) else names  # of one name, TRL makes a string
    return None if names in (None, ["all-linear"]) else tuple(names)


def require_extras(training_args: SFTConfig, model_config: ModelConfig) -> None:
    """
    Asks for optional packages before a model is loaded.

    Raises:
        ValueError: if one that the settings need is not installed.
    """
    if model_config.load_in_4bit or model_config.load_in_8bit:
        with needs_extra("quantization"):
            import_module("bitsandbytes")
    if "tensorboard" in training_args.report_to:
        with needs_extra("tracking"):
            import_module("tensorboard")


def take_over_packing(arguments: SQLlavaArguments, training_args: SFTConfig) -> None:
    """
    Moves TRL's `packing` to `arguments`: TRL refuses it for images, `sq_llava/training/packing.py` does it.

    Raises:
        ValueError: for what does not go with it.
    """
    if not training_args.packing:
        return
    refused = {
        "train_sampling_strategy": "random",
        "pad_to_multiple_of": None,
        "dataloader_drop_last": False,
        "dataloader_in_order": True,
    }
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
    refused |= {name: getattr(model_config, name) for name in ("load_in_4bit", "load_in_8bit", "use_peft")}
    given = ", ".join(f"{name} {value}" for name, value in refused.items() if value)
    if given:
        raise ValueError(
            f"full_finetuning is true, with {given}: it trains the language model's own weights and freezes the "
            "vision tower. Give lora_r 0 and vision_lora_r 0, and leave load_in_4bit, load_in_8bit and use_peft out."
        )


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
    if start is not None:
        try:
            require_kind(start)
        except ValueError as error:
            raise ValueError(
                f"model_name_or_path is {start!r}. {error} If it is a stage to come, train that first; to check the "
                "data or to plan without it, give vision_model_name_or_path and text_model_name_or_path beside it."
            ) from error
    return start, parts


def architecture(arguments: SQLlavaArguments) -> dict:
    """The fields of the configuration of a model made from parts that a recipe may set."""
    return {name: getattr(arguments, name) for name in ARCHITECTURE}


def processor_settings(arguments: SQLlavaArguments) -> dict[str, str]:
    settings = {name: getattr(arguments, name) for name in ("image_aspect_ratio", "system_message")}
    settings["delimiter"] = arguments.eos_token
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
