"""The base of a run, frozen, and what its stage trains: an adapter on it, or language model and projector in full.

A base is a SQ-LLaVA, the one that a stage before stood on, or made of two parts; the last is saved to
`output_dir/base`, because an adapter is loaded on a base that it names. What it does not do: train.
"""

import shutil
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, SFTConfig, get_quantization_config

from processing_sq_llava import SQLlavaProcessor
from sq_llava.checkpoints.compose import compose
from sq_llava.checkpoints.load import load_base_and_processor, load_model
from sq_llava.training.adapter import (
    LORA_INITIALISATIONS,
    LoraOptions,
    LoraSize,
    add_adapter,
    load_adapter_weights,
    train_in_full,
)
from sq_llava.training.settings import (
    SQLlavaArguments,
    architecture,
    named_targets,
    processor_settings,
    starting_point,
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
        model, processor, adapter = load_base_and_processor(start, processor_settings=processing, **quantized_loading)
        return model, processor, None if adapter is None else str(adapter)

    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"vision_model_name_or_path is {parts[0]!r}: under ZeRO-3, the parts are loaded in pieces and cannot be "
            "joined. Save sq_llava.checkpoints.compose.compose(...) first, and give its folder as model_name_or_path."
        )
    if checkpoint is not None:
        return *read_base(checkpoint, arguments, quantized_loading, processing), None
    model, processor = compose(
        *parts,
        arguments.qformer_model_name_or_path,
        **loading,
        processor_kwargs=processing,
        **architecture(arguments),
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
        model = load_model(base, processor, **quantized_loading)
    return model, processor, None


def read_base(checkpoint: str, arguments: SQLlavaArguments, loading: dict, processing: dict):
    """Returns the base beside a checkpoint, and its processor: made anew, its random weights might be others."""
    base = Path(checkpoint).absolute().parent / "base"
    if not base.is_dir():
        raise ValueError(f"{checkpoint}: the base that it stands on is not in {base}. Bring that folder back.")
    processor = SQLlavaProcessor.from_pretrained(base, **processing)
    model = load_model(base, processor, **loading)
    for name, value in architecture(arguments).items():
        if getattr(model.config, name) != value:
            raise ValueError(
                f"{name} is {value!r}, but {checkpoint} was trained with "
                f"{getattr(model.config, name)!r}: give that, or another output_dir to start anew."
            )
    return model, processor


def prepare_stage(model, previous_stage: str | None, arguments: SQLlavaArguments, model_config: ModelConfig):
    """Makes of a frozen base what the stage trains, with the weights of the stage before it, if there is one."""
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
    """Puts on a base what its stage trains."""
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
