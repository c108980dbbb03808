"""Makes the model and processor of a stage from the settings: the frozen base, and the weights that the stage trains.

A stage trains an adapter on the base, or language model and projector in full. The base is an SQ-LLaVA checkpoint, the
base of the previous stage, or a newly composed model. A new model is saved to `output_dir/base`, because an adapter
stores only the path of its base. `sq_llava/training/trainer.py` does the training.
"""

import shutil
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, SFTConfig, get_quantization_config

from processing_sq_llava import PROMPT_LAYOUTS, SYSTEM_MESSAGE, SQLlavaProcessor
from sq_llava.checkpoints.chat_templates import check_template
from sq_llava.checkpoints.compose import compose, compose_processor
from sq_llava.checkpoints.load import load_base_and_processor, load_model, load_processor, require_kind
from sq_llava.checkpoints.provenance import public_name
from sq_llava.checkpoints.zero3 import loading_whole
from sq_llava.output import folder_written_whole
from sq_llava.training.adapter import LoraOptions, LoraSize, add_adapter, load_adapter_weights, train_in_full
from sq_llava.training.settings import LORA_INITIALISATIONS, SQLlavaArguments
from sq_llava.training.sharding import loads_in_pieces


# Folder in `output_dir` of a base that is only needed for a dry run.
DRY_RUN_BASE = "dry-run-base"
ARCHITECTURE = ("prototype_variant", "num_prototypes", "num_prototype_iterations", "projector_type")


def starting_point(arguments: SQLlavaArguments, model_config: ModelConfig) -> tuple[str | None, tuple]:
    """
    Finds what the run starts from.

    Returns:
        `tuple[str | None, tuple]`: A folder or Hub id, or `None` for a new model; and the names of the vision and
        text models of a new model, or `(None, None)`.

    Raises:
        ValueError: if both or neither are set, or if the folder is neither a model nor a finished stage.
    """
    start = model_config.model_name_or_path
    parts = (arguments.vision_model_name_or_path, arguments.text_model_name_or_path)
    if (None in parts) if start is None else (parts != (None, None)):
        raise ValueError(
            f"model_name_or_path is {start!r}, vision_model_name_or_path is {parts[0]!r}, text_model_name_or_path is "
            f"{parts[1]!r}. Set only the first (an SQ-LLaVA model, or the output_dir of a stage), or the other two."
        )
    if start is not None and arguments.qformer_model_name_or_path is not None:
        raise ValueError(
            f"qformer_model_name_or_path is {arguments.qformer_model_name_or_path!r}, and model_name_or_path is "
            f"{start!r}, which already has all its parts. Remove one of them."
        )
    if start is not None:
        try:
            require_kind(start)
        except ValueError as error:
            raise ValueError(
                f"model_name_or_path is {start!r}. {error} If a previous stage should write it, train that stage "
                "first. To check the data or plan without it, add vision_model_name_or_path and "
                "text_model_name_or_path."
            ) from error
    return start, parts


def require_other_folder(start: str | None, output_dir: str) -> None:
    """
    Raises:
        ValueError: if the run would write into the folder of the model that it starts from.
    """
    if start is not None and Path(start).expanduser().resolve() == Path(output_dir).expanduser().resolve():
        raise ValueError(
            f"output_dir is {output_dir}, the folder of the model that training starts from. Its files would be "
            "overwritten. Choose another output_dir."
        )


def architecture(arguments: SQLlavaArguments) -> dict:
    """The fields of a new model's configuration that a recipe can set."""
    return {name: getattr(arguments, name) for name in ARCHITECTURE}


def processor_settings(arguments: SQLlavaArguments) -> dict[str, str]:
    """The fields of the processor that the recipe sets, without the prompt layout; the others keep their values."""
    settings = {name: getattr(arguments, name) for name in ("image_aspect_ratio", "system_message")}
    if arguments.system_message == "paper":
        settings["system_message"] = SYSTEM_MESSAGE
    settings["delimiter"] = arguments.eos_token
    if arguments.chat_template_path is not None:
        settings["chat_template"] = Path(arguments.chat_template_path).read_text(encoding="utf-8")
    return {name: value for name, value in settings.items() if value is not None}


def layout_of_checkpoint(arguments: SQLlavaArguments) -> dict:
    """The prompt layout that a recipe sets for an existing checkpoint. With `auto`, the checkpoint keeps its own."""
    return {} if arguments.prompt_layout in (None, "auto") else PROMPT_LAYOUTS[arguments.prompt_layout]


def template_needs(arguments: SQLlavaArguments) -> set[str]:
    """What the chat template of a run must know, as keys of `MISSING` in `sq_llava/checkpoints/chat_templates.py`."""
    if arguments.stage == "align":
        return {"plain"}
    return {"image", "generation"} | ({"self_question"} if arguments.self_question_ratio > 0 else set())


def composed_processor(arguments: SQLlavaArguments, model_config: ModelConfig) -> SQLlavaProcessor:
    """
    Makes the processor of a recipe. Loads no weights.

    Raises:
        ValueError: if the settings do not name a model, or its chat template cannot be used for this stage.
    """
    processor = _composed_processor(arguments, model_config)
    check_template(processor, template_needs(arguments))
    return processor


def _composed_processor(arguments: SQLlavaArguments, model_config: ModelConfig) -> SQLlavaProcessor:
    parts = (arguments.vision_model_name_or_path, arguments.text_model_name_or_path)
    settings = processor_settings(arguments)
    if None not in parts:  # used even if a previous stage is set, because it may not exist yet
        return compose_processor(
            *parts, arguments.qformer_model_name_or_path, prompt_layout=arguments.prompt_layout, **settings
        )
    start, _ = starting_point(arguments, model_config)
    return load_processor(start, **layout_of_checkpoint(arguments) | settings)


def load_base(
    arguments: SQLlavaArguments, training_args: SFTConfig, model_config: ModelConfig, checkpoint: str | None
):
    """
    Loads or makes the frozen base.

    Args:
        arguments, training_args, model_config: Settings from `parse_settings`.
        checkpoint (`str`, *optional*): Checkpoint to resume from. The base of a new model is then in its folder.

    Returns:
        The base model, its processor, and the folder of the previous stage's adapter (`None` if there is none).

    Raises:
        ValueError: if the settings do not name a model that can be loaded.
    """
    start, parts = starting_point(arguments, model_config)
    quantization = quantization_config(model_config)
    loading = {"dtype": model_config.dtype, "attn_implementation": model_config.attn_implementation}
    quantized_loading = loading if quantization is None else {**loading, "quantization_config": quantization}
    processing = processor_settings(arguments)
    if start is not None:
        settings = layout_of_checkpoint(arguments) | processing
        model, processor, adapter = load_base_and_processor(start, processor_settings=settings, **quantized_loading)
        return model, processor, None if adapter is None else str(adapter)

    if checkpoint is not None:
        return *read_base(Path(checkpoint).absolute().parent / "base", arguments, quantized_loading, processing), None
    model = processor = None
    if PartialState().is_main_process or not loads_in_pieces():
        with loading_whole():
            model, processor = compose(
                *parts,
                arguments.qformer_model_name_or_path,
                **loading,
                processor_kwargs={"prompt_layout": arguments.prompt_layout, **processing},
                **architecture(arguments),
            )
    if arguments.dry_run == "real" and quantization is None and not loads_in_pieces():
        return model, processor, None
    name = DRY_RUN_BASE if arguments.dry_run == "real" else "base"
    base = save_base(model, processor, training_args.output_dir, name)
    if loads_in_pieces() or quantization is not None:
        return *read_base(base, arguments, quantized_loading, processing), None
    return model, processor, None


def save_base(model, processor, output_dir: str, name: str) -> Path:
    """
    Saves a new model to the folder `name` in `output_dir`, because an adapter stores only the path of its base.

    Args:
        model, processor: `None` in processes that do not hold them.
    """
    base = Path(output_dir).absolute() / name
    if PartialState().is_main_process:
        if name == "base":  # an adapter of an earlier run does not fit the new base
            (base.parent / "adapter_config.json").unlink(missing_ok=True)
        shutil.rmtree(base, ignore_errors=True)
        with folder_written_whole(base) as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
    PartialState().wait_for_everyone()
    if model is not None:
        model.name_or_path = str(base)
    return base


def read_base(base: Path, arguments: SQLlavaArguments, loading: dict, processing: dict):
    """Loads the base of a run, and its processor. A newly composed base could have other random weights."""
    if not base.is_dir():
        raise ValueError(f"The checkpoints need their base in {base}, which does not exist. Restore that folder.")
    processor = load_processor(base, **processing)
    for name, value in layout_of_checkpoint(arguments).items():
        there = processor.tokenizer.eos_token if name == "delimiter" else getattr(processor, name)
        if name not in processing and there != value:
            raise ValueError(
                f"prompt_layout is {arguments.prompt_layout!r}, but the base in {base} has another layout ({name} is "
                f"{there!r}). Remove prompt_layout, or choose another output_dir to start from the beginning."
            )
    model = load_model(base, processor, **loading)
    for part in ("vision", "text"):
        asked = public_name(getattr(arguments, f"{part}_model_name_or_path"))
        there = getattr(model.config, f"{part}_config").name_or_path
        if there and asked != there and PartialState().is_main_process:
            print(f"Warning: {part}_model_name_or_path is {asked}, but the base in {base} has {there}, which is used.")
    for name, value in architecture(arguments).items():
        if getattr(model.config, name) != value:
            raise ValueError(
                f"{name} is {value!r}, but the base in {base} has {getattr(model.config, name)!r}. Use that value, or "
                "choose another output_dir to start from the beginning."
            )
    return model, processor


def prepare_stage(model, previous_stage: str | None, arguments: SQLlavaArguments, model_config: ModelConfig):
    """Adds the weights that the stage trains to a frozen base, and loads those of the previous stage, if any."""
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
            f"model_name_or_path is {previous_stage!r}, an adapter. Under ZeRO-3 the weights are loaded in pieces, so "
            f"it cannot be merged. Run `sq-llava merge {previous_stage} --out FOLDER` first, and set "
            "model_name_or_path to that folder."
        )
    # Weights are in float32 here, so merging does not round the previous stage. But PEFT freezes them again.
    model = PeftModel.from_pretrained(model, previous_stage).merge_and_unload()
    train_in_full(model, trained_dtype(model))
    return model


def trained_dtype(model) -> torch.dtype:
    """The precision of trained weights: float32, except under ZeRO-3."""
    # ZeRO-3 fails on weights of two precisions (https://github.com/huggingface/trl/issues/6089). Its optimizer keeps
    # float32 copies anyway.
    return model.dtype if is_deepspeed_zero3_enabled() else torch.float32


def add_stage_adapter(model, arguments: SQLlavaArguments, model_config: ModelConfig):
    """
    Adds the adapter of the stage to the base.

    Raises:
        ValueError: if the launch cannot train what the stage trains.
    """
    instruct = arguments.stage == "instruct"
    text_lora = LoraSize(model_config.lora_r if instruct else 0, model_config.lora_alpha, model_config.lora_dropout)
    # With LLM-LoRA, `[vusr]` is trained even with self_question_ratio 0. Otherwise the adapter of a stage with
    # self-questions could not be loaded. MiniGPT-4 has neither.
    train_vusr = instruct and (arguments.self_question_ratio > 0 or text_lora.rank > 0)
    if train_vusr and model.config.tie_word_embeddings and is_deepspeed_zero3_enabled():
        # TRL's loss gathers the head's weight, which is not a parameter then: PEFT computes it from embeddings.
        raise ValueError(
            "ZeRO-3 cannot train the embedding of [vusr] in a language model whose head shares its weights with the "
            "embeddings. Launch with recipes/accelerate/fsdp2.yaml or zero2.yaml."
        )
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
        train_vusr=train_vusr,
        trained_dtype=trained_dtype(model),
        options=options,
    )


def named_targets(model_config: ModelConfig) -> tuple[str, ...] | None:
    """The language model's linear layers named in `lora_target_modules`; `None` for all of them."""
    names = model_config.lora_target_modules
    names = [names] if isinstance(names, str) else names  # TRL turns a list of one name into a string
    return None if names in (None, ["all-linear"]) else tuple(names)


# Modules that are not quantized: those that are trained in full, and the head, whose weight TRL's loss uses directly.
# Transformers compares full module paths.
NOT_QUANTIZED = ["model.multi_modal_projector", "model.prototype_extractor", "model.resampler", "lm_head"]


def quantization_config(model_config: ModelConfig) -> BitsAndBytesConfig | None:
    """The quantization of both towers, from TRL's `load_in_4bit`, `load_in_8bit`, ...; `None` if there is none."""
    if model_config.load_in_4bit and model_config.dtype == "auto":
        raise ValueError("dtype is 'auto'. With load_in_4bit, set dtype to a compute precision such as bfloat16.")
    config = get_quantization_config(model_config)
    if config is not None:
        config.llm_int8_skip_modules = NOT_QUANTIZED
    return config
