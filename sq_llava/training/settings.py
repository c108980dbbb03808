"""The settings of a run: recipe and command line, checked.

    arguments, training_args, model_config = parse_settings(["--config", "recipes/sq-llava-7b/stage1.yaml"])
    arguments, training_args, model_config = parse_recipe("recipes/sq-llava-7b/stage1.yaml", learning_rate=1e-4)

`SQLlavaArguments` are this project's own; the others are TRL's `SFTConfig` and `ModelConfig`. What it does not do:
say what they mean for model and processor (`sq_llava/training/stage_model.py`).
"""

import shlex
import sys
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from trl import ModelConfig, SFTConfig, TrlParser

from sq_llava.console import needs_extra
from sq_llava.data.sources import DataSource
from sq_llava.training.setting_table import is_given, refuse_settings


# Values of the setting `init_lora_weights`, and what PEFT calls them.
LORA_INITIALISATIONS = {"default": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}


def _option(help: str, **settings: Any) -> Any:
    """A field of the settings, with its line of `--help`."""
    return field(metadata={"help": help}, **settings)


@dataclass
class SQLlavaArguments:
    """What to train, from what, on what."""

    stage: Literal["align", "instruct"] = _option(
        "'align' trains ViT-LoRA, extractor and projector on captions; 'instruct' trains LLM-LoRA too."
    )
    dataset_path: str | None = _option(
        "Training data in LLaVA's or TRL's layout: JSON, JSONL, Parquet, a folder, a Hub id.", default=None
    )
    image_root: str | None = _option("Folder of the images; default: the folder of the data.", default=None)
    datasets: list[DataSource] = field(
        default_factory=list,
        metadata={
            "help": "Several sources in place of dataset_path, each with path, image_root, split, weight or num_rows."
        },
    )
    eval_datasets: list[DataSource] = field(
        default_factory=list, metadata={"help": "Sources of evaluation rows, as in datasets."}
    )
    num_eval_rows: int = _option(
        "Number of training rows to hold out for evaluation, in place of eval_datasets.", default=0
    )
    generation_datasets: list[DataSource] = field(
        default_factory=list,
        metadata={"help": "Sources of a few rows whose first question is answered at each evaluation."},
    )
    vision_model_name_or_path: str | None = _option(
        "CLIP or SigLIP to start from, beside text_model_name_or_path.", default=None
    )
    text_model_name_or_path: str | None = _option(
        "Causal LM to start from. To start from a SQ-LLaVA or a stage, give model_name_or_path.", default=None
    )
    qformer_model_name_or_path: str | None = _option(
        "BLIP-2 whose frozen Q-Former is put before the projector of a model made from parts.", default=None
    )
    prototype_variant: Literal["paper", "released", "none"] = _option(
        "Prototype extractor of a model made from parts.", default="paper"
    )
    num_prototypes: int = _option("Prototypes of a model made from parts.", default=256)
    num_prototype_iterations: int = _option("EM iterations of a model made from parts.", default=2)
    projector_type: Literal["mlp2x", "linear"] = _option("Projector of a model made from parts.", default="mlp2x")
    image_aspect_ratio: Literal["pad", "crop"] | None = _option(
        "'pad' to a square with the mean colour, or 'crop' the centre; default: that of the model, or pad.",
        default=None,
    )
    prompt_layout: Literal["minigpt4"] | None = _option(
        "Markers of turns and images; default: those of the model, or of Vicuna v1.", default=None
    )
    system_message: str | None = _option(
        "Text before each conversation; default: that of the model, or the paper's.", default=None
    )
    self_question_ratio: float = _option(
        "Probability that a turn after the first is asked by the model (1 - delta).", default=0.5
    )
    question_loss_weight: float = _option(
        "Weight of a self-question's token in the loss; an answer's token has 1.", default=1.0
    )
    vision_lr: float | None = _option("Learning rate of ViT-LoRA; default: learning_rate.", default=None)
    connector_lr: float | None = _option(
        "Learning rate of extractor and projector; default: learning_rate.", default=None
    )
    vision_lora_r: int = _option("Rank of ViT-LoRA; 0 for none.", default=32)
    vision_lora_alpha: int = _option("Alpha of ViT-LoRA.", default=64)
    vision_lora_dropout: float = _option("Dropout of ViT-LoRA.", default=0.2)
    init_lora_weights: str = _option(
        "Initialisation of new LoRA weights: default, gaussian or orthogonal, as PEFT names them.", default="default"
    )
    full_finetuning: bool = _option(
        "Train all weights of language model, extractor and projector in float32, as LLaVA's stage 2, and no "
        "adapter (lora_r and vision_lora_r 0). output_dir then holds a plain checkpoint in the model's dtype.",
        default=False,
    )
    resume: bool = _option("Resume from the newest complete checkpoint of output_dir, if there is one.", default=False)
    global_batch_size: int | None = _option(
        "Rows of an optimizer step over all processes, in place of gradient_accumulation_steps. With packing "
        "it counts packs, as per_device_train_batch_size does; the run prints how many rows these hold.",
        default=None,
    )
    dry_run: Literal["off", "meta", "real"] = _option(
        "'real' trains one step on the longest rows, prints parameters, memory and steps, and stops. 'meta' "
        "prints the same from the configurations alone, without weights and without a step.",
        default="off",
    )
    num_gpus: int | None = _option(
        "Number of processes that dry_run meta plans for; default: those of this launch.", default=None
    )
    doctor: Literal["sample", "full", "off"] = _option(
        "Rows and images to check before the model is loaded; `sq-llava doctor` tells more.", default="sample"
    )
    # Settings of TRL, moved here by `parse_settings`: TRL refuses `packing` for images, and applies `eos_token` only
    # after data and template have been read.
    packing: bool = field(init=False, default=False)
    eos_token: str | None = field(init=False, default=None)
    # The command that checks the data of these settings; written by `parse_settings`.
    doctor_command: str = field(init=False, default="sq-llava doctor")
    max_loss: float | None = _option(
        "Stop at a step with a higher loss; default: 2 ln(vocabulary size).", default=None
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
    args = sys.argv[1:] if args is None else args
    parser = _Parser((SQLlavaArguments, SFTConfig, ModelConfig), description=description)
    arguments, training_args, model_config = parser.parse_args_and_config(args)
    refuse_settings(training_args, model_config)
    _require_evaluation(arguments, training_args)
    _require_lora_use(arguments, model_config)
    _require_four_bits(model_config)
    _require_trainer_settings(training_args)
    if training_args.metric_for_best_model is not None:
        # The Trainer takes a metric whose name does not end in "loss" for one that grows: loss_answers, too.
        training_args.greater_is_better = "loss" not in training_args.metric_for_best_model
    if arguments.full_finetuning:
        _require_no_adapter(arguments, model_config)
    _take_over_packing(arguments, training_args)
    arguments.eos_token = training_args.eos_token
    arguments.doctor_command = shlex.join(["sq-llava", "doctor", *args])
    return arguments, training_args, model_config


def parse_recipe(recipe: str | Path, **overrides: Any) -> tuple[SQLlavaArguments, SFTConfig, ModelConfig]:
    """As `parse_settings`, of a recipe and settings that win over it."""
    options = [text for name, value in overrides.items() for text in (f"--{name}", str(value))]
    return parse_settings(["--config", str(recipe), *options])


def _require_evaluation(arguments: SQLlavaArguments, training_args: SFTConfig) -> None:
    """
    Raises:
        ValueError: if there are rows to evaluate on, but no time for it; or the other way round.
    """
    evaluates = bool(arguments.eval_datasets or arguments.num_eval_rows)
    asks_for_it = training_args.eval_strategy != "no" or training_args.do_eval
    if evaluates != asks_for_it or (arguments.generation_datasets and not evaluates):
        raise ValueError(
            f"eval_strategy is {str(training_args.eval_strategy)!r}, eval_datasets has {len(arguments.eval_datasets)} "
            f"entries, num_eval_rows is {arguments.num_eval_rows}, generation_datasets has "
            f"{len(arguments.generation_datasets)} entries: to evaluate, give eval_strategy (steps or epoch) and one "
            "of eval_datasets and num_eval_rows; generation_datasets goes with them."
        )


def _require_lora_use(arguments: SQLlavaArguments, model_config: ModelConfig) -> None:
    """
    Raises:
        ValueError: for a setting of LoRA that has no use in this run, or that PEFT cannot combine with another.
    """
    on_text = arguments.stage == "instruct" and model_config.lora_r > 0
    on_any = on_text or arguments.vision_lora_r > 0
    no_lora = "this run trains no LoRA (lora_r and vision_lora_r are 0, or the stage is align and vision_lora_r 0)"
    no_text_lora = "this run trains no LoRA on the language model (lora_r is 0, or the stage is align)"
    for holder, name, has_use, reason in (
        (model_config, "use_rslora", on_any, no_lora),
        (model_config, "use_dora", on_any, no_lora),
        (arguments, "init_lora_weights", on_any, no_lora),
        (model_config, "lora_target_modules", on_text, no_text_lora),
    ):
        _require_use(holder, name, has_use, reason)
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


def _require_four_bits(model_config: ModelConfig) -> None:
    for name in ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"):
        _require_use(model_config, name, model_config.load_in_4bit, "load_in_4bit is not set")


def _require_use(holder: SQLlavaArguments | ModelConfig, name: str, has_use: bool, reason: str) -> None:
    if is_given(holder, name) and not has_use:
        raise ValueError(f"{name} is {getattr(holder, name)!r}, but {reason}: leave it out.")


def _require_trainer_settings(training_args: SFTConfig) -> None:
    """
    Raises:
        ValueError: for a setting of the Trainer that does nothing here, or makes other batches than it says.
    """
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


def _take_over_packing(arguments: SQLlavaArguments, training_args: SFTConfig) -> None:
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


def _require_no_adapter(arguments: SQLlavaArguments, model_config: ModelConfig) -> None:
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
