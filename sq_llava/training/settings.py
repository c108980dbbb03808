"""Parses and checks the settings of a run, from a recipe and the command line.

    arguments, training_args, model_config = parse_settings(["--config", "recipes/sq-llava-7b/stage1.yaml"])
    arguments, training_args, model_config = parse_recipe("recipes/sq-llava-7b/stage1.yaml", learning_rate=1e-4)

`SQLlavaArguments` has this project's own settings; the others are TRL's `SFTConfig` and `ModelConfig`.
`sq_llava/training/stage_model.py` applies the settings to model and processor.
"""

import shlex
import sys
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from trl import ModelConfig, SFTConfig, TrlParser

from processing_sq_llava import PROMPT_LAYOUTS
from sq_llava.console import needs_extra
from sq_llava.data.sources import DataSource
from sq_llava.training.setting_table import is_given, refuse_settings


# Values of the setting `init_lora_weights` -> PEFT's values.
LORA_INITIALISATIONS = {"default": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}


def _option(help: str, **settings: Any) -> Any:
    """A field of the settings, with its text in `--help`."""
    return field(metadata={"help": help}, **settings)


@dataclass
class SQLlavaArguments:
    """This project's own settings: the stage, the data, the model to start from, and the loss."""

    stage: Literal["align", "instruct"] = _option(
        "Training stage (required). 'align' (stage 1) trains LoRA on the vision tower (ViT-LoRA), prototype extractor "
        "and projector, on captions. 'instruct' (stage 2) also trains LoRA on the language model, on conversations."
    )
    dataset_path: str | None = _option(
        "Training data: a JSON, JSONL or Parquet file, a folder, or a Hub id. docs/data.md shows the layouts.",
        default=None,
    )
    image_root: str | None = _option("Folder of the images. Default: the folder of the data.", default=None)
    datasets: list[DataSource] = field(
        default_factory=list,
        metadata={
            "help": "Several data sources instead of dataset_path. Each entry has path, and optionally image_root, "
            "split, name, revision, instructions, and weight or num_rows."
        },
    )
    eval_datasets: list[DataSource] = field(
        default_factory=list, metadata={"help": "Data sources for evaluation, in the format of datasets."}
    )
    num_eval_rows: int = _option(
        "Number of training rows to hold out for evaluation, instead of eval_datasets.", default=0
    )
    generation_datasets: list[DataSource] = field(
        default_factory=list,
        metadata={
            "help": "Data sources of a few rows. At each evaluation, the model answers the first question of each row."
        },
    )
    text_probe: str | None = _option(
        "File of held-out text-only rows. The loss of the language model on them is measured before and after "
        "training, and at each evaluation (eval_text_probe_loss).",
        default=None,
    )
    vision_model_name_or_path: str | None = _option(
        "CLIP or SigLIP model to make a new model from, together with text_model_name_or_path.", default=None
    )
    text_model_name_or_path: str | None = _option(
        "Causal language model to make a new model from. To continue from an SQ-LLaVA or a finished stage, give "
        "model_name_or_path instead.",
        default=None,
    )
    qformer_model_name_or_path: str | None = _option(
        "BLIP-2 model whose frozen Q-Former is placed before the projector of a new model.", default=None
    )
    prototype_variant: Literal["paper", "released", "none"] = _option(
        "Prototype extractor of a new model: as in the paper, as in the released code, or none.", default="paper"
    )
    num_prototypes: int = _option("Number of prototypes of a new model.", default=256)
    num_prototype_iterations: int = _option("Number of EM iterations of the prototypes of a new model.", default=2)
    projector_type: Literal["mlp2x", "linear"] = _option("Projector type of a new model.", default="mlp2x")
    image_aspect_ratio: Literal["pad", "crop"] | None = _option(
        "'pad' pads images to a square with the mean colour; 'crop' crops the centre. Default: the model's, or pad.",
        default=None,
    )
    prompt_layout: Literal["auto", *PROMPT_LAYOUTS] | None = _option(
        "Prompt layout: how turns and images are written. auto: the one of the language model's own chat template, or "
        "vicuna; a model that exists keeps its own. Default: auto.",
        default=None,
    )
    system_message: str | None = _option(
        "System message before each conversation. 'paper': that of the paper. Default: the model's; a new model has "
        "the language model's own in its own layout, and the paper's in another.",
        default=None,
    )
    self_question_ratio: float = _option(
        "Probability that a user turn after the first becomes a self-question (the paper's 1 - delta).", default=0.5
    )
    question_loss_weight: float = _option(
        "Weight of each self-question token in the loss. Each answer token has weight 1.", default=1.0
    )
    vision_lr: float | None = _option("Learning rate of ViT-LoRA. Default: learning_rate.", default=None)
    connector_lr: float | None = _option(
        "Learning rate of extractor and projector. Default: learning_rate.", default=None
    )
    vision_lora_r: int = _option("Rank of ViT-LoRA. 0 turns it off.", default=32)
    vision_lora_alpha: int = _option("Alpha of ViT-LoRA.", default=64)
    vision_lora_dropout: float = _option("Dropout of ViT-LoRA.", default=0.2)
    init_lora_weights: str = _option(
        "Initialisation of new LoRA weights, with PEFT's names: default, gaussian or orthogonal.", default="default"
    )
    full_finetuning: bool = _option(
        "Train all weights of language model, extractor and projector in float32, as LLaVA's stage 2 does. Set lora_r "
        "and vision_lora_r to 0. The result is a plain checkpoint in the model's dtype, not an adapter.",
        default=False,
    )
    resume: bool = _option("Resume from the newest complete checkpoint in output_dir, if there is one.", default=False)
    global_batch_size: int | None = _option(
        "Rows per optimizer step over all processes. Sets gradient_accumulation_steps. With packing, it counts packs, "
        "like per_device_train_batch_size, and the run prints the number of rows per step.",
        default=None,
    )
    dry_run: Literal["off", "meta", "real"] = _option(
        "'real' trains one step on the longest rows, prints parameters, memory and steps, and stops. 'meta' "
        "prints estimates from the model configurations alone: it loads no weights and trains no step.",
        default="off",
    )
    num_gpus: int | None = _option(
        "Number of GPUs to plan for, with dry_run meta. Default: the number of processes of this launch.", default=None
    )
    doctor: Literal["sample", "full", "off"] = _option(
        "Check the data before the model is loaded: a sample of the rows, all (full) or none (off). "
        "`sq-llava doctor` prints a full report.",
        default="sample",
    )
    share_images: bool = _option(
        "With packing, rows that begin with the same text and image share one pass over both. Losses and gradients "
        "are those of the rows alone.",
        default=False,
    )
    max_rows_per_image: int = _option(
        "Maximum number of rows that share one pass over an image. Needs share_images.", default=8
    )
    # TRL's settings, moved here by `parse_settings`: TRL refuses `packing` for images, and applies `eos_token` and
    # `chat_template_path` only after the data has been read.
    packing: bool = field(init=False, default=False)
    eos_token: str | None = field(init=False, default=None)
    chat_template_path: str | None = field(init=False, default=None)
    # The command that checks the data of these settings, set by `parse_settings`.
    doctor_command: str = field(init=False, default="sq-llava doctor")
    max_loss: float | None = _option(
        "Stop the run at a step whose loss is above this. Default: twice the mean loss of the first ten steps, or "
        "twice that of a uniform guess if it is higher.",
        default=None,
    )

    def __post_init__(self):
        for name in ("datasets", "eval_datasets", "generation_datasets"):
            setattr(self, name, [_data_source(name, source) for source in getattr(self, name) or []])
        if (self.dataset_path is None) == (not self.datasets) or (self.datasets and self.image_root is not None):
            raise ValueError(
                f"dataset_path is {self.dataset_path!r}, image_root is {self.image_root!r}, and datasets has "
                f"{len(self.datasets)} entries. Set either dataset_path (and image_root), or datasets."
            )
        self.datasets = self.datasets or [DataSource(self.dataset_path, self.image_root)]
        if self.eval_datasets and self.num_eval_rows:
            raise ValueError(f"num_eval_rows is {self.num_eval_rows} and eval_datasets is set: remove one of them.")
        if self.text_probe is not None and self.stage == "align":
            raise ValueError(
                f"text_probe is {self.text_probe!r} in stage align, which does not change the language model: set it "
                "in stage instruct."
            )
        for name in ("self_question_ratio", "question_loss_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be a number from 0 to 1.")
        if self.max_rows_per_image < 2:
            raise ValueError(f"max_rows_per_image is {self.max_rows_per_image}: it must be 2 or more.")
        if self.init_lora_weights not in LORA_INITIALISATIONS:
            raise ValueError(
                f"init_lora_weights is {self.init_lora_weights!r}: choose one of {', '.join(LORA_INITIALISATIONS)}. "
                "(PEFT's pissa, olora, corda, loftq and lora_ga change the weights of the base, so the saved adapter "
                "would not fit the original base. eva needs to read data first, and mica freezes half of LoRA.)"
            )

    @property
    def rows_per_image_pass(self) -> int:
        """The most rows that share one pass over their image; 1 without `share_images`."""
        return self.max_rows_per_image if self.share_images else 1

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
        raise ValueError(
            f"{setting} contains {entry!r}: each entry needs a path, and may have {', '.join(known[1:])}."
        )
    if unknown := [name for name in entry if name not in known]:
        raise ValueError(f"{setting}, {entry['path']}: unknown key {unknown[0]!r}. Valid keys are {', '.join(known)}.")
    return DataSource(**entry)


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and shows no default of `None`."""

    def _get_help_string(self, action: Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(TrlParser):
    def error(self, message: str) -> None:
        hint = ". Most settings come from a recipe: give one with --config" if "required: --stage" in message else ""
        self.exit(2, f"Error: {message}{hint}\n")  # without the usage, which would hide the message


def parse_settings(
    args: list[str] | None = None, description: str | None = None
) -> tuple[SQLlavaArguments, SFTConfig, ModelConfig]:
    """
    Parses a recipe and the command line.

    Args:
        args (`list[str]`, *optional*): The arguments. Default: those of the command line.
        description (`str`, *optional*): Text at the top of `--help`.

    Returns:
        `tuple[SQLlavaArguments, SFTConfig, ModelConfig]`: The checked settings.

    Raises:
        ValueError: for a setting that is unknown, would do nothing, or does not work with another setting.
    """
    args = sys.argv[1:] if args is None else args
    parser = _Parser(
        (SQLlavaArguments, SFTConfig, ModelConfig),
        usage="python -m train_sft [--config RECIPE] [--SETTING VALUE ...]",
        description=description,
        formatter_class=_HelpFormatter,
    )
    arguments, training_args, model_config = parser.parse_args_and_config(args)
    refuse_settings(training_args, model_config)
    _require_evaluation(arguments, training_args)
    _require_lora_use(arguments, model_config)
    for name in ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"):
        _require_use(model_config, name, model_config.load_in_4bit, "load_in_4bit is not set")
    _require_trainer_settings(training_args)
    if training_args.metric_for_best_model is not None:
        # The Trainer would maximise every metric whose name does not end in "loss", such as loss_answers.
        training_args.greater_is_better = "loss" not in training_args.metric_for_best_model
    if arguments.full_finetuning:
        _require_no_adapter(arguments, model_config)
    _take_over_packing(arguments, training_args)
    arguments.eos_token = training_args.eos_token
    _take_over_chat_template(arguments, training_args)
    arguments.doctor_command = shlex.join(["sq-llava", "doctor", *args])
    return arguments, training_args, model_config


def parse_recipe(recipe: str | Path, **overrides: Any) -> tuple[SQLlavaArguments, SFTConfig, ModelConfig]:
    """Like `parse_settings`, for a recipe and settings that override it."""
    options = ["--config", str(recipe)]
    for name, value in overrides.items():
        if value is None:
            raise ValueError(f"{name} is None. To keep the recipe's value, leave it out.")
        options += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return parse_settings(options)


def _take_over_chat_template(arguments: SQLlavaArguments, training_args: SFTConfig) -> None:
    path, training_args.chat_template_path = training_args.chat_template_path, None
    if path is None:
        return
    if not (Path(path).is_file() and path.endswith((".jinja", ".j2"))):
        raise ValueError(
            f"chat_template_path is {path!r}: give a Jinja file (.jinja or .j2). To take the chat format of the "
            "language model, remove chat_template_path: prompt_layout auto does that."
        )
    if arguments.prompt_layout is not None:
        raise ValueError(
            f"chat_template_path is {path!r} and prompt_layout is {arguments.prompt_layout!r}: remove one of them."
        )
    arguments.chat_template_path = path


def _require_evaluation(arguments: SQLlavaArguments, training_args: SFTConfig) -> None:
    """Refuses evaluation rows without an `eval_strategy`, and an `eval_strategy` without evaluation rows."""
    evaluates = bool(arguments.eval_datasets or arguments.num_eval_rows)
    asks_for_it = training_args.eval_strategy != "no" or training_args.do_eval
    if evaluates != asks_for_it or (arguments.generation_datasets and not evaluates):
        raise ValueError(
            f"eval_strategy is {str(training_args.eval_strategy)!r}, eval_datasets has {len(arguments.eval_datasets)} "
            f"entries, num_eval_rows is {arguments.num_eval_rows}, generation_datasets has "
            f"{len(arguments.generation_datasets)} entries. To evaluate, set eval_strategy (steps or epoch), and "
            "either eval_datasets or num_eval_rows. generation_datasets needs them too."
        )


def _require_lora_use(arguments: SQLlavaArguments, model_config: ModelConfig) -> None:
    """Refuses a LoRA setting that would do nothing in this run, or that PEFT cannot combine with another."""
    on_text = arguments.stage == "instruct" and model_config.lora_r > 0
    on_any = on_text or arguments.vision_lora_r > 0
    no_lora = "this run trains no LoRA (lora_r and vision_lora_r are 0, or stage is align and vision_lora_r is 0)"
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
                f"init_lora_weights is 'orthogonal', but {odd[0] if odd else 'the base is quantized'}. It needs even "
                "ranks and a base that is not quantized."
            )
    if model_config.use_dora and model_config.load_in_8bit:
        raise ValueError(
            "use_dora is True and load_in_8bit is set. DoRA needs the base's weights, which PEFT cannot always "
            "dequantize from 8 bits. Use load_in_4bit, or remove use_dora."
        )


def _require_use(holder: SQLlavaArguments | ModelConfig, name: str, has_use: bool, reason: str) -> None:
    if is_given(holder, name) and not has_use:
        raise ValueError(f"{name} is {getattr(holder, name)!r}, but {reason}: remove {name}.")


def _require_trainer_settings(training_args: SFTConfig) -> None:
    """Refuses a Trainer setting that would do nothing, or that would make other batches than its name says."""
    if training_args.activation_offloading and training_args.device.type == "cpu":
        raise ValueError("activation_offloading is True, but the model is on the CPU already: remove it.")
    if training_args.accelerator_config.split_batches:
        raise ValueError(
            "accelerator_config has split_batches true, which would divide per_device_train_batch_size among the "
            "processes. Remove it, and set per_device_train_batch_size to the rows of one process."
        )
    if training_args.accelerator_config.dispatch_batches or not training_args.accelerator_config.even_batches:
        raise ValueError(
            "accelerator_config has dispatch_batches true or even_batches false. Batches of images and texts of "
            "different lengths cannot be cut in parts, and processes with fewer batches would wait forever for the "
            "others: remove it."
        )
    if training_args.train_sampling_strategy == "batch_rebalance":
        raise ValueError(
            "train_sampling_strategy is 'batch_rebalance', which is not supported. Choose random, sequential or "
            "group_by_length (which also groups by modality), or set packing to true."
        )


def require_extras(training_args: SFTConfig, model_config: ModelConfig) -> None:
    """
    Checks, before a model is loaded, that the optional packages for these settings are installed.

    Raises:
        ValueError: if one is not installed.
    """
    if model_config.load_in_4bit or model_config.load_in_8bit:
        with needs_extra("quantization"):
            import_module("bitsandbytes")
    if "tensorboard" in training_args.report_to:
        with needs_extra("tracking"):
            import_module("tensorboard")


def _take_over_packing(arguments: SQLlavaArguments, training_args: SFTConfig) -> None:
    """
    Moves TRL's `packing` to `arguments`: TRL refuses it for images, and `sq_llava/training/packing.py` implements it.
    Refuses settings that do not work with packing.
    """
    if arguments.share_images and not training_args.packing:
        raise ValueError("share_images is true, but packing is not: set packing to true, or remove share_images.")
    if arguments.share_images and arguments.stage == "align":
        raise ValueError(
            "share_images is true in stage align. Its rows are an image and a caption: nothing is shared. Remove it."
        )
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
                f"packing is true and {name} is {str(value)!r}. Packing chooses the order and size of batches itself, "
                f"and drops no rows. Set {name} to {only!r}, or remove packing."
            )
    if training_args.max_length is None:
        raise ValueError("packing is true, but max_length is not set. Set it: it is the size of a packed row.")
    arguments.packing, training_args.packing = True, False


def _require_no_adapter(arguments: SQLlavaArguments, model_config: ModelConfig) -> None:
    """Refuses full finetuning together with LoRA or quantization."""
    refused = {"lora_r": model_config.lora_r, "vision_lora_r": arguments.vision_lora_r}
    refused |= {name: getattr(model_config, name) for name in ("load_in_4bit", "load_in_8bit", "use_peft")}
    given = ", ".join(f"{name} {value}" for name, value in refused.items() if value)
    if given:
        raise ValueError(
            f"full_finetuning is true, together with {given}. It trains the language model's own weights and freezes "
            "the vision tower. Set lora_r and vision_lora_r to 0, and remove load_in_4bit, load_in_8bit and use_peft."
        )
