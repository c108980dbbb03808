"""What the settings of a run mean for its model and processor: the frozen base, and what its stage trains.

The stage trains an adapter on the base, or language model and projector in full. The base is a SQ-LLaVA, the one that
the stage before stood on, or made of parts. The last is saved to `output_dir/base`, because an adapter names the base
that it is loaded on. What it does not do: train.
"""

import shutil
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, SFTConfig, get_quantization_config

from processing_sq_llava import PROMPT_LAYOUTS, SQLlavaProcessor
from sq_llava.checkpoints.compose import compose, compose_processor
from sq_llava.checkpoints.load import load_base_and_processor, load_model, require_kind
from sq_llava.training.adapter import LoraOptions, LoraSize, add_adapter, load_adapter_weights, train_in_full
from sq_llava.training.settings import LORA_INITIALISATIONS, SQLlavaArguments
from sq_llava.training.sharding import loading_whole, loads_in_pieces


ARCHITECTURE = ("prototype_variant", "num_prototypes", "num_prototype_iterations", "projector_type")


def starting_point(arguments: SQLlavaArguments, model_config: ModelConfig) -> tuple[str | None, tuple]:
    """Where a model comes from: a folder or Hub id, and its two parts. One of both is given, the other is `None`."""
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


def load_base(
    arguments: SQLlavaArguments, training_args: SFTConfig, model_config: ModelConfig, checkpoint: str | None
):
    """Returns the frozen base, its processor, and the folder of the stage before, if there is one."""
    start, parts = starting_point(arguments, model_config)
    quantization = quantization_config(model_config)
    loading = {"dtype": model_config.dtype, "attn_implementation": model_config.attn_implementation}
    quantized_loading = loading if quantization is None else {**loading, "quantization_config": quantization}
    processing = processor_settings(arguments)
    if start is not None:
        model, processor, adapter = load_base_and_processor(start, processor_settings=processing, **quantized_loading)
        return model, processor, None if adapter is None else str(adapter)

    base = Path(training_args.output_dir).absolute() / "base"
    if checkpoint is not None:
        return *read_base(Path(checkpoint).absolute().parent / "base", arguments, quantized_loading, processing), None
    model = processor = None
    if PartialState().is_main_process or not loads_in_pieces():
        with loading_whole():
            model, processor = compose(
                *parts,
                arguments.qformer_model_name_or_path,
                **loading,
                processor_kwargs=processing,
                **architecture(arguments),
            )
    if arguments.dry_run == "real" and quantization is None and not loads_in_pieces():
        return model, processor, None
    # An adapter names the base that it is loaded on, so the model made from parts is saved beside it.
    if PartialState().is_main_process:
        part = base.with_name("half-written-base")
        for folder in (part, base):
            shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(part)
        processor.save_pretrained(part)
        part.rename(base)
    PartialState().wait_for_everyone()
    if loads_in_pieces():
        return *read_base(base, arguments, quantized_loading, processing), None
    model.name_or_path = str(base)
    if quantization is not None:
        model = load_model(base, processor, **quantized_loading)
    return model, processor, None


def read_base(base: Path, arguments: SQLlavaArguments, loading: dict, processing: dict):
    """Returns the base that a run was begun on, and its processor. A new one could have other random weights."""
    if not base.is_dir():
        raise ValueError(f"{base}, the base that the checkpoints beside it stand on, is not there. Bring it back.")
    processor = SQLlavaProcessor.from_pretrained(base, **processing)
    model = load_model(base, processor, **loading)
    for name, value in architecture(arguments).items():
        if getattr(model.config, name) != value:
            raise ValueError(
                f"{name} is {value!r}, but the checkpoints beside {base} were trained with "
                f"{getattr(model.config, name)!r}: give that, or another output_dir to start from the beginning."
            )
    return model, processor


def prepare_stage(model, previous_stage: str | None, arguments: SQLlavaArguments, model_config: ModelConfig):
    """Adds to a frozen base what the stage trains, and loads the weights of the stage before it, if there is one."""
    if not arguments.full_finetuning:
        model = add_stage_adapter(model, arguments, model_config)
        if previous_stage is not None:
            load_adapter_weights(model, previous_stage)
        return model
    train_in_full(model, trained_dtype(model))
    if previous_stage is None:
        return model
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"model_name_or_path is {previous_stage!r}, an adapter: under ZeRO-3, it cannot be merged into a model "
            f"in pieces. Run `sq-llava merge {previous_stage} --out FOLDER` first, and give that folder."
        )
    # Merged into weights of full precision: what the stage before learned is not rounded. PEFT freezes them, though.
    model = PeftModel.from_pretrained(model, previous_stage).merge_and_unload()
    train_in_full(model, trained_dtype(model))
    return model


def trained_dtype(model) -> torch.dtype:
    # ZeRO-3 fails on weights of two precisions (https://github.com/huggingface/trl/issues/6089), and its optimizer has
    # float32 copies by itself.
    return model.dtype if is_deepspeed_zero3_enabled() else torch.float32


def add_stage_adapter(model, arguments: SQLlavaArguments, model_config: ModelConfig):
    """Puts the adapter of its stage on a base."""
    instruct = arguments.stage == "instruct"
    text_lora = LoraSize(model_config.lora_r if instruct else 0, model_config.lora_alpha, model_config.lora_dropout)
    options = LoraOptions(
        target_modules=named_targets(model_config),
        use_rslora=model_config.use_rslora,
        use_dora=model_config.use_dora,
        init_lora_weights=LORA_INITIALISATIONS[arguments.init_lora_weights],
    )
    return add_adapter(
        model,
        LoraSize(arguments.vision_lora_r, arguments.vision_lora_alpha, arguments.vision_lora_dropout),
        text_lora,
        # With LLM-LoRA also where nothing is asked: the weights of a stage that asked have their place then. MiniGPT-4
        # trains neither.
        train_vusr=instruct and (arguments.self_question_ratio > 0 or text_lora.rank > 0),
        trained_dtype=trained_dtype(model),
        options=options,
    )


def named_targets(model_config: ModelConfig) -> tuple[str, ...] | None:
    """The linear layers of the language model that `lora_target_modules` names; `None` for all of them."""
    names = model_config.lora_target_modules
    names = [names] if isinstance(names, str) else names  # of one name, TRL makes a string
    return None if names in (None, ["all-linear"]) else tuple(names)


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
