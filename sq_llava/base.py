"""The base of a run, frozen, and the adapter that its stage trains.

A base is a SQ-LLaVA, the one that a stage before stood on, or made of two parts; the last is saved to
`output_dir/base`, because an adapter is loaded on a base that it names. What it does not do: train.
"""

import shutil
from pathlib import Path

import torch
from accelerate import PartialState
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, SFTConfig

from modeling_sq_llava import SQLlavaForConditionalGeneration
from processing_sq_llava import SQLlavaProcessor
from sq_llava.adapter import LoraSize, add_adapter
from sq_llava.checkpoint import base_of_adapter, compose, is_adapter
from sq_llava.settings import SQLlavaArguments, processor_settings, quantization_config, starting_point


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
