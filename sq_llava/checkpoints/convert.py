"""Converts released SQ-LLaVA and LLaVA checkpoints to checkpoints of this library.

    sq-llava convert sqllava-lora-7b --base vicuna-7b --vision openai/clip-vit-large-patch14-336 --out sq-llava-7b

The prompts of the result are those that the source was trained with:

- A released SQ-LLaVA keeps the authors' system message and the question marker `VUSER:`.
- LLaVA keeps Vicuna's system message. Its question marker is `VUSER:`; with a new prototype extractor, it is the token
  `[vusr]`.
- A stage-1 projector gets this library's system message and `[vusr]`: its language model was not trained on
  conversations about images yet.

Everything is checked before the first byte is written. The folder gets its final name only when it is complete. The
result is compared with the source in `sq_llava/checkpoints/verify.py`.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from rich.filesize import decimal
from transformers import CONFIG_MAPPING, AutoImageProcessor, AutoTokenizer, PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save

from configuration_sq_llava import SQLlavaConfig
from modeling_sq_llava import PROTOTYPE_EXTRACTORS, SQLlavaForConditionalGeneration
from processing_sq_llava import SYSTEM_MESSAGE, VUSR_TOKEN, SQLlavaProcessor
from sq_llava.checkpoints.card import write_card
from sq_llava.checkpoints.compose import NEW_TOKENS, config_of, padded_size, set_special_tokens
from sq_llava.checkpoints.config_checks import at_most_parameters, named_errors, require_fitting
from sq_llava.checkpoints.layouts import NAMES, Layout, is_original
from sq_llava.checkpoints.provenance import public_name, write_provenance
from sq_llava.checkpoints.trust import foreign_code, without_remote_code
from sq_llava.checkpoints.weight_files import TORCH_NAMES
from sq_llava.checkpoints.weights import (
    EMBEDDINGS,
    HEAD,
    Sources,
    WeightSource,
    match,
    read_sources,
    write_file,
)
from sq_llava.early_checks import require_new_folder
from sq_llava.json_text import read_json, read_json_if_there
from sq_llava.output import folder_written_whole


VICUNA_SYSTEM_MESSAGE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
# No space between the two messages, as in the authors' code.
RELEASED_SYSTEM_MESSAGE = VICUNA_SYSTEM_MESSAGE + (
    "Also, the artificial intelligence assistant is a curious virtual user. The virtual user asks complex questions "
    "that are relevant to the content in the image, for example, asking about background knowledge of the objects in "
    "the image, asking to discuss about events happening in the image, etc. Again, do not ask about uncertain details."
)
RELEASED_VUSR_MARKER = "VUSER:"
# In a chat template, "USER:" is written out, or, as in that of llava-hf, made from the role.
VICUNA_USER = re.compile(r"USER:|role['\"]?\]?\s*(?:\.upper\(\)|\|\s*upper)")
# Values in the original code's config.json, and what they are called here: how images become square (by default they
# are cropped), which tokens of the tower are used, and the kind of projector.
ASPECT_RATIOS = {"pad": "pad", "square": "crop", None: "crop"}
SELECT_FEATURES = {"patch": "default", "cls_patch": "full"}
PROJECTOR_TYPES = {"cluster": "mlp2x", "mlp2x_gelu": "mlp2x", "linear": "linear"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Conversion:
    """
    A checked plan of what [`write`] writes.

    Attributes:
        model: The model on the meta device, without values.
        files (`dict[str, list[str]]`): Names of the weights in each file.
        size (`int`): Bytes of all weights.
        notes (`list[str]`): Messages for the user.
    """

    layout: Layout
    out: Path
    model: SQLlavaForConditionalGeneration
    processor: SQLlavaProcessor
    sources: Sources
    files: dict[str, list[str]]
    size: int
    notes: list[str]


def plan(
    layout: Layout,
    out: str | Path,
    dtype: str = "auto",
    prototypes: str | None = None,
    max_shard_size: str = "5GB",
) -> Conversion:
    """
    Reads names and shapes in the source, and checks that they match the resulting model.

    Args:
        layout ([`Layout`]): The source, from `recognise`.
        out (`str` or `Path`): Folder for the result; it must be new or empty.
        dtype (`str`): Dtype of the result: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"` for the dtype of the
            language model.
        prototypes (`str`, *optional*): `"paper"` or `"released"`: adds a new, untrained extractor to a LLaVA.
        max_shard_size (`str`): Maximum size of a weight file, such as `"5GB"`.

    Raises:
        ValueError: if anything is missing, superfluous, damaged or of a wrong shape.
    """
    out = Path(out).expanduser().absolute()
    require_new_folder(out)
    _require_parts(layout, prototypes)
    _require_vicuna_prompts(layout)
    text_config, vision_config = _text_config(layout), _vision_config(layout)
    notes = [*_notes_on_tower(layout), *_notes_on_inputs(layout), *_notes_on_code(layout)]
    architecture = _architecture(layout, prototypes, notes)
    config = SQLlavaConfig(vision_config=vision_config, text_config=text_config, **architecture)
    sources = read_sources(layout)
    if EMBEDDINGS not in sources.weights:
        raise ValueError(f"{layout.text_folder} holds no embeddings of a language model. Is it complete?")
    embeddings = sources.weights[EMBEDDINGS].source
    dtype_name = TORCH_NAMES.get(embeddings.dtype, embeddings.dtype) if dtype == "auto" else dtype
    if dtype_name not in DTYPES:
        raise ValueError(f"The weights cannot be stored as {dtype_name!r}. Give --dtype {', '.join(DTYPES)}.")
    processor = _processor(layout, config, prototypes is not None)
    _set_vocabulary(config, processor, embeddings.shape[0], notes)
    model = _empty_model(config, DTYPES[dtype_name], 2 * len(sources.weights) + 1_000)
    if prototypes is not None:
        _add_new_extractor(model, sources, prototypes, notes)
    targets = model.state_dict()
    if config.tie_word_embeddings:
        del targets[HEAD]
    match(sources, targets, embeddings.shape[0], config.tie_word_embeddings)
    split = split_torch_state_dict_into_shards(targets, max_shard_size=max_shard_size)
    size = split.metadata["total_size"]
    _require_space(out, size)
    # Greedy generation. The source's temperature is left out: transformers warns of it without sampling.
    model.generation_config.do_sample = False
    settings = read_json_if_there(layout.text_folder / "generation_config.json") or {}
    set_special_tokens(model, processor, settings.get("eos_token_id"))
    return Conversion(layout, out, model, processor, sources, split.filename_to_tensors, size, notes)


def _require_parts(layout: Layout, prototypes: str | None) -> None:
    path, kind = layout.path, layout.kind
    if kind == "adapter":
        raise ValueError(f"{path} is {NAMES[kind]}. Use `sq-llava merge {path} --out FOLDER`.")
    if kind in ("checkpoint", "training"):
        raise ValueError(f"{path} is {NAMES[kind]}: there is nothing to convert.")
    if not layout.weight_files:
        raise ValueError(f"{path} is {NAMES[kind]}, but has no weight files. Download it again.")
    if kind.endswith("_lora") and not (path / "non_lora_trainables.bin").is_file():
        raise ValueError(f"{path}: non_lora_trainables.bin, which holds the trained projector, is missing.")
    if kind.endswith("_lora") and not any(path.glob("adapter_model.*")):
        raise ValueError(f"{path}: adapter_model.bin, which holds the LoRA, is missing.")
    if kind in ("llava", "sq_llava") and (path / "Vit-lora").is_dir():
        raise ValueError(
            f"{path} holds a complete model and a folder Vit-lora. It is not known whether this LoRA is merged into "
            "the weights already. If it is, move the folder away. If not, merge it with PEFT first."
        )
    needs_base = kind.endswith("_lora") or kind == "projector"
    if needs_base and layout.base is None:
        raise ValueError(f"{path} needs {_missing_part('language model', layout.base_name)}. Give it as --base.")
    if layout.base is not None and not needs_base:
        raise ValueError(f"{path} is {NAMES[kind]} and has its own language model. Remove --base.")
    if kind != "llava_hf" and layout.vision is None:
        raise ValueError(f"{path} needs {_missing_part('vision tower', layout.vision_name)}. Give it as --vision.")
    if kind == "llava_hf" and layout.vision is not None:
        raise ValueError(f"{path} is {NAMES[kind]} and has its own vision tower. Remove --vision.")
    if prototypes is not None and prototypes not in PROTOTYPE_EXTRACTORS:
        raise ValueError(f"--prototypes is {prototypes!r}: choose one of {', '.join(PROTOTYPE_EXTRACTORS)}.")
    if prototypes is not None and layout.projector_type == "cluster":
        raise ValueError(f"{path} has a trained prototype extractor. Remove --prototypes.")


def _missing_part(role: str, name: str | None) -> str:
    return f"the {role} {name}, which is not on this machine" if name else f"a {role} that it does not name"


def _chat_template(folder: Path) -> tuple[Path, str] | None:
    """The chat template of a folder, and its file. As in transformers, the processor's wins over the tokenizer's."""
    if (folder / "chat_template.jinja").is_file():
        return folder / "chat_template.jinja", (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = (read_json_if_there(folder / name) or {}).get("chat_template")
        if isinstance(template, list):  # several templates with names
            template = {part["name"]: part["template"] for part in template}
        if isinstance(template, dict):
            template = template.get("default")
        if template:
            return folder / name, str(template)
    return None


def _require_vicuna_prompts(layout: Layout) -> None:
    found = _chat_template(layout.path)
    if found is None:
        return
    file, template = found
    # The template is not run, because it is a program that could loop for hours.
    if VICUNA_USER.search(template):
        return
    raise ValueError(
        f"{file}: chat_template is {template[:60]!r}..., whose prompts have no USER:. Converted models use Vicuna's "
        "prompts, so convert a LLaVA that was trained with them. If this one was, remove the template."
    )


@named_errors
def _text_config(layout: Layout) -> PreTrainedConfig:
    if layout.kind == "llava_hf":
        return config_of(layout.path).text_config
    folder = layout.text_folder
    fields = read_json(folder / "config.json")
    if is_original(fields):
        text_config = _original_text_config(folder, fields)
    elif "text_config" in fields:
        raise ValueError(f"{folder} is a {fields.get('model_type')}. Give a plain language model as --base.")
    else:
        text_config = config_of(folder)
    text_config.name_or_path = public_name(layout.base_name) if layout.base_name else ""
    return text_config


def _original_text_config(folder: Path, fields: dict) -> PreTrainedConfig:
    """The language model's configuration. The original code keeps its fields and its own fields in one dictionary."""
    name = fields.get("model_type", "llava")
    model_type = "llama" if name == "llava" else name.removeprefix("llava_")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"{folder}/config.json: model_type is {name!r}, but transformers has no such language model.")
    config_class = CONFIG_MAPPING[model_type]
    known = {*config_class().to_dict(), "rope_theta", "rope_scaling"}
    known -= {"model_type", "architectures", "dtype", "transformers_version"}
    return config_class(**{name: value for name, value in fields.items() if name in known})


@named_errors
def _vision_config(layout: Layout) -> PreTrainedConfig:
    config = config_of(layout.vision_folder)
    config = getattr(config, "vision_config", config)
    config.name_or_path = public_name(layout.vision_name) if layout.vision_name else ""
    return config


def _notes_on_tower(layout: Layout) -> Iterator[str]:
    """Warns of a tower that differs from the one that the source or the base was trained on."""
    if layout.vision is None:
        return
    for role, folder in (("source", layout.path), ("base", layout.base)):
        named = (read_json_if_there(folder / "config.json") or {}).get("mm_vision_tower") if folder else None
        if isinstance(named, str) and Path(named).name != Path(layout.vision_name).name:
            yield f"The {role} names the vision tower {named} (mm_vision_tower), but {layout.vision_name} is given."


def _notes_on_inputs(layout: Layout) -> Iterator[str]:
    """Says where texts and images are processed differently from the source's processor in transformers."""
    if layout.kind != "llava_hf":
        return
    if found := _chat_template(layout.path):
        yield f"Prompts are Vicuna's with its system message. They replace those of {found[0]}."
    settings = read_json_if_there(layout.path / "preprocessor_config.json") or {}
    if settings.get("do_center_crop", True) and not settings.get("do_pad"):
        yield "Images are padded to a square, as in LLaVA-1.5's training. The source's processor crops them."


def _notes_on_code(layout: Layout) -> Iterator[str]:
    """Says which entries are left out because they name code that the result does not have."""
    for folder in dict.fromkeys((layout.path, layout.text_folder, layout.vision_folder)):
        for entry in foreign_code(folder):
            yield f"Left out, and never run: the code that {folder} names. {entry}"


def _architecture(layout: Layout, prototypes: str | None, notes: list[str]) -> dict:
    """The fields of `SQLlavaConfig` for extractor, projector and image features."""
    config = layout.config
    if layout.kind == "llava_hf":
        return {
            "prototype_variant": prototypes or "none",
            "projector_hidden_act": config.get("projector_hidden_act", "gelu"),
            "vision_feature_layer": config.get("vision_feature_layer", -2),
            "vision_feature_select_strategy": config.get("vision_feature_select_strategy", "default"),
        }
    if config.get("mm_use_im_start_end"):
        raise ValueError(
            f"{layout.path}/config.json: mm_use_im_start_end is true. Tokens around each image are not supported. "
            "Convert a checkpoint of LLaVA 1.5 or of SQ-LLaVA."
        )
    if not config:
        notes.append("There is no config.json next to the projector. LLaVA-1.5's and SQ-LLaVA's settings are used.")
    fields = {
        "prototype_variant": prototypes or "none",
        "projector_type": _choose(layout, "mm_projector_type", PROJECTOR_TYPES, layout.projector_type),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": layout.feature_layer,
        "vision_feature_select_strategy": _choose(
            layout, "mm_vision_select_feature", SELECT_FEATURES, layout.feature_select
        ),
    }
    if layout.projector_type == "cluster":
        if "num_latents" not in config:
            notes.append(f"The number of prototypes (num_latents) is not given: {layout.num_prototypes} is used.")
        fields |= {"prototype_variant": "released", "num_prototypes": layout.num_prototypes}
        fields["projector_hidden_act"] = "quick_gelu"
    return fields


def _choose(layout: Layout, name: str, choices: dict, value):
    if value not in choices:
        raise ValueError(
            f"{layout.path}/config.json: {name} is {value!r}, which is not supported. Supported values: "
            f"{', '.join(map(repr, filter(None, choices)))}."
        )
    return choices[value]


@named_errors
def _processor(layout: Layout, config: SQLlavaConfig, new_extractor: bool) -> SQLlavaProcessor:
    folder, tower = layout.text_folder, layout.vision_folder
    if not any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        raise ValueError(f"{folder} holds neither tokenizer.model nor tokenizer.json. Copy the tokenizer there.")
    if not (tower / "preprocessor_config.json").is_file():
        raise ValueError(f"{tower} holds no preprocessor_config.json. Copy the one of the vision tower there.")
    # The language model's configuration is given: with a LLaVA config.json, the ids would differ from SentencePiece's.
    with without_remote_code(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config.text_config, trust_remote_code=False)
    vusr_marker, system_message = RELEASED_VUSR_MARKER, VICUNA_SYSTEM_MESSAGE
    if layout.kind == "projector":
        vusr_marker, system_message = VUSR_TOKEN, SYSTEM_MESSAGE
    elif new_extractor:
        vusr_marker = VUSR_TOKEN
    elif layout.projector_type == "cluster":
        system_message = RELEASED_SYSTEM_MESSAGE
    with without_remote_code(tower):
        image_processor = AutoImageProcessor.from_pretrained(tower, trust_remote_code=False)
    settings = {
        "image_seq_length": config.image_seq_length,
        "image_aspect_ratio": _choose(layout, "image_aspect_ratio", ASPECT_RATIOS, layout.aspect_ratio),
        "system_message": system_message,
        "vusr_marker": vusr_marker,
    }
    processor = SQLlavaProcessor(image_processor, tokenizer, **settings)
    if layout.kind != "llava_hf" and not _keeps_text_apart(processor):
        processor = SQLlavaProcessor(image_processor, tokenizer, **settings, text_prefix=" ")
    image_token_id = layout.config.get("image_token_index", processor.image_token_id)
    if layout.kind == "llava_hf" and image_token_id != processor.image_token_id:
        raise ValueError(
            f"{layout.path}: image_token_index is {image_token_id} in config.json, but the id of <image> in the "
            f"tokenizer is {processor.image_token_id}. Use the tokenizer that belongs to this model."
        )
    require_fitting(processor, config)
    return processor


def _keeps_text_apart(processor: SQLlavaProcessor) -> bool:
    """Returns whether text after an image has the same tokens as on its own, as in the original code."""
    text = "\nWhat is this?"
    after_image = processor.tokenizer(processor.image_token + text, add_special_tokens=False).input_ids[1:]
    return after_image == processor.tokenizer(text, add_special_tokens=False).input_ids


def _set_vocabulary(config: SQLlavaConfig, processor: SQLlavaProcessor, rows: int, notes: list[str]) -> None:
    tokenizer = processor.tokenizer
    num_tokens = len(tokenizer)
    config.text_config.vocab_size = rows
    if num_tokens > rows:
        config.text_config.vocab_size = padded_size(num_tokens)
        added = [token for token in NEW_TOKENS if rows <= tokenizer.get_vocab().get(token, -1)]
        notes.append(
            f"The vocabulary grows from {rows} to {config.text_config.vocab_size} rows for {', '.join(added)} and "
            "padding. Each new row is the mean of the old ones."
        )
    config.text_config.pad_token_id = tokenizer.pad_token_id
    config.image_token_id = processor.image_token_id
    config.vusr_token_id = processor.vusr_token_id


def _empty_model(config: SQLlavaConfig, dtype: torch.dtype, most_parameters: int) -> SQLlavaForConditionalGeneration:
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    with torch.device("meta"), at_most_parameters(most_parameters):
        model = SQLlavaForConditionalGeneration._from_config(config, dtype=dtype)
    config.architectures = [type(model).__name__]
    return model


def _add_new_extractor(
    model: SQLlavaForConditionalGeneration, sources: Sources, variant: str, notes: list[str]
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        extractor = PROTOTYPE_EXTRACTORS[variant](model.config)
        for module in extractor.modules():
            model._init_weights(module)
    for name, value in extractor.state_dict().items():
        sources.weights[f"model.prototype_extractor.{name}"] = WeightSource(value=value)
    notes.append(f"The prototype extractor ({variant}) is new and untrained. Train the model before you use it.")


def _require_space(out: Path, size: int) -> None:
    folder = out
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ValueError(f"{folder} has {decimal(free)} left, but the result needs {decimal(size)}. Free some space.")


def describe(conversion: Conversion) -> Iterator[str]:
    """Lines for the user: the kind of the source, and what is merged, new or not used."""
    layout, sources, config = conversion.layout, conversion.sources, conversion.model.config
    yield f"{layout.path} is {NAMES[layout.kind]}: {layout.evidence}."
    for name, path in (("Language model", layout.base), ("Vision tower", layout.vision)):
        if path is not None:
            yield f"{name}: {path}"
    yield from sources.notes
    yield from conversion.notes
    for what, count in [*sources.replaced.items(), *sources.unused.items()]:
        yield f"Not used ({count}): {what}."
    yield (
        f"Result: {len(sources.weights)} weights, {decimal(conversion.size)} in {len(conversion.files)} file(s) "
        f"of {str(config.dtype).removeprefix('torch.')}; prototypes: {config.prototype_variant}; "
        f"question marker: {conversion.processor.vusr_marker}"
    )


def write(conversion: Conversion, progress) -> None:
    """
    Writes the complete folder: weights, configurations, processor, code and card.

    Args:
        progress: A running `rich.progress.Progress`.
    """
    with folder_written_whole(conversion.out) as folder:
        _write_weights(conversion, folder, progress)
        _write_other_files(conversion, folder)


def _write_weights(conversion: Conversion, folder: Path, progress) -> None:
    task = progress.add_task("", total=conversion.size)
    for number, (name, targets) in enumerate(conversion.files.items(), start=1):
        progress.update(task, description=f"Writing file {number} of {len(conversion.files)}")
        chosen = {target: conversion.sources.weights[target] for target in targets}
        write_file(folder / name, chosen, conversion.model.dtype, partial(progress.advance, task))
    if len(conversion.files) > 1:
        weight_map = {target: name for name, targets in conversion.files.items() for target in targets}
        index = {"metadata": {"total_size": conversion.size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_other_files(conversion: Conversion, folder: Path) -> None:
    model = conversion.model
    custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    conversion.processor.save_pretrained(folder)
    layout, variant = conversion.layout, model.config.prototype_variant
    provenance = {"converted_from": public_name(str(layout.path)), "converted_kind": NAMES[layout.kind]}
    if variant != "none" and layout.projector_type != "cluster":
        provenance["new_extractor"] = variant
    write_provenance(folder, provenance)
    write_card(folder)
