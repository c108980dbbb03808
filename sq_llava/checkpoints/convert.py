"""Released SQ-LLaVA and LLaVA checkpoints to checkpoints of this library.

    sq-llava convert sqllava-lora-7b --base vicuna-7b --vision openai/clip-vit-large-patch14-336 --out sq-llava-7b

What a checkpoint says with, it keeps: a released SQ-LLaVA its marker `VUSER:` and its system message, LLaVA the
sentence of Vicuna. A start of training gets the token `[vusr]`. If that is a LLaVA with a new extractor, it keeps the
sentence as well: it has learned to answer behind it, and the marker alone is to say who speaks. If it is a projector
of stage 1, its language model has not seen an image in a conversation yet, and gets this library's own message.

Everything is checked before the first byte is written; a folder has its final name only when it is whole. What this
module does not do: compare the result with the source (`sq_llava/checkpoints/verify.py`).
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from rich.filesize import decimal
from transformers import CONFIG_MAPPING, AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils.chat_template_utils import render_jinja_template

from configuration_sq_llava import SQLlavaConfig
from modeling_sq_llava import PROTOTYPE_EXTRACTORS, SQLlavaForConditionalGeneration
from processing_sq_llava import SYSTEM_MESSAGE, VUSR_TOKEN, SQLlavaProcessor
from sq_llava.checkpoints.card import write_card
from sq_llava.checkpoints.compose import NEW_TOKENS, VOCABULARY_MULTIPLE, stop_token_ids
from sq_llava.checkpoints.layouts import NAMES, Layout, is_original
from sq_llava.checkpoints.provenance import public_name, write_provenance
from sq_llava.checkpoints.weight_files import TORCH_NAMES, read_json, read_json_if_there
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


VICUNA_SYSTEM_MESSAGE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
# Without a space between the two, as the authors' code has it.
RELEASED_SYSTEM_MESSAGE = VICUNA_SYSTEM_MESSAGE + (
    "Also, the artificial intelligence assistant is a curious virtual user. The virtual user asks complex questions "
    "that are relevant to the content in the image, for example, asking about background knowledge of the objects in "
    "the image, asking to discuss about events happening in the image, etc. Again, do not ask about uncertain details."
)
RELEASED_VUSR_MARKER = "VUSER:"
# The original code's names: of what is done to an image that is no square (by default it is cropped), and of which
# tokens of the tower are taken.
ASPECT_RATIOS = {"pad": "pad", "square": "crop", None: "crop"}
SELECT_FEATURES = {"patch": "default", "cls_patch": "full"}
PROJECTOR_TYPES = {"cluster": "mlp2x", "mlp2x_gelu": "mlp2x", "linear": "linear"}
RELEASED_NUM_PROTOTYPES = 256
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Conversion:
    """
    What is to be written, all of it checked.

    Attributes:
        model: On the meta device.
        files (`dict[str, list[str]]`): The names of the weights in each file.
        notes (`list[str]`): What to tell the owner of the checkpoint.
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
    Reads names and shapes, and compares them with the model that they make.

    Args:
        layout ([`Layout`]): As `recognise` gives it.
        out (`str` or `Path`): Folder for the result; it must be new or empty.
        dtype (`str`): Of the result: `"float32"`, `"bfloat16"`, `"float16"`; `"auto"`: as the language model is.
        prototypes (`str`, *optional*): `"paper"` or `"released"`: puts a new extractor, untrained, into a LLaVA.
        max_shard_size (`str`): Of a file of the result.

    Raises:
        ValueError: if anything is missing, superfluous, damaged, or does not fit.
    """
    out = Path(out).expanduser().absolute()
    require_new_folder(out)
    _require_parts(layout, prototypes)
    _require_vicuna_prompts(layout)
    sources = read_sources(layout)
    if EMBEDDINGS not in sources.weights:
        raise ValueError(f"{layout.base or layout.path} holds no embeddings of a language model: is it complete?")
    embeddings = sources.weights[EMBEDDINGS].source
    torch_dtype = _dtype(TORCH_NAMES.get(embeddings.dtype, embeddings.dtype) if dtype == "auto" else dtype)

    text_config, vision_config = _text_config(layout), _vision_config(layout)
    notes = [*_notes_on_tower(layout), *_notes_on_inputs(layout)]
    architecture = _architecture(layout, prototypes, notes)
    config = SQLlavaConfig(vision_config=vision_config, text_config=text_config, **architecture)
    processor = _processor(layout, config, prototypes is not None)
    _set_vocabulary(config, processor, embeddings.shape[0], notes)
    model = _empty_model(config, torch_dtype)
    if prototypes is not None:
        _add_new_extractor(model, sources, prototypes, notes)
    targets = model.state_dict()
    if config.tie_word_embeddings:
        del targets[HEAD]
    match(sources, targets, embeddings.shape[0], config.tie_word_embeddings)
    split = split_torch_state_dict_into_shards(targets, max_shard_size=max_shard_size)
    size = split.metadata["total_size"]
    _require_space(out, size)
    _set_generation(model, processor, layout)
    return Conversion(layout, out, model, processor, sources, split.filename_to_tensors, size, notes)


def _require_parts(layout: Layout, prototypes: str | None) -> None:
    path, kind = layout.path, layout.kind
    if kind == "adapter":
        raise ValueError(f"{path} is {NAMES[kind]}: give it to `sq-llava merge`.")
    if kind in ("checkpoint", "training"):
        raise ValueError(f"{path} is {NAMES[kind]}: there is nothing to convert.")
    if not layout.weight_files:
        raise ValueError(f"{path} is {NAMES[kind]}, but holds no weights: fetch it anew.")
    if kind.endswith("_lora") and not (path / "non_lora_trainables.bin").is_file():
        raise ValueError(f"{path}: non_lora_trainables.bin, which holds the trained projector, is missing.")
    if kind.endswith("_lora") and not any(path.glob("adapter_model.*")):
        raise ValueError(f"{path}: adapter_model.bin, which holds the LoRA, is missing.")
    if kind in ("llava", "sq_llava") and (path / "Vit-lora").is_dir():
        raise ValueError(
            f"{path} holds whole weights and a folder Vit-lora, and nothing says whether that is merged into them. If "
            "it is, move it away; if not, merge it with PEFT first."
        )
    needs_base = kind.endswith("_lora") or kind == "projector"
    if needs_base and layout.base is None:
        raise ValueError(f"{path} stands on {_named(layout.base_name)}: give the language model as --base.")
    if layout.base is not None and not needs_base:
        raise ValueError(f"{path} is {NAMES[kind]}, with all of the language model: leave --base out.")
    if kind != "llava_hf" and layout.vision is None:
        raise ValueError(f"{path} needs {_named(layout.vision_name)}: give the vision tower as --vision.")
    if kind == "llava_hf" and layout.vision is not None:
        raise ValueError(f"{path} is {NAMES[kind]}, with its vision tower: leave --vision out.")
    if prototypes is not None and prototypes not in PROTOTYPE_EXTRACTORS:
        raise ValueError(f"--prototypes is {prototypes!r}: choose one of {', '.join(PROTOTYPE_EXTRACTORS)}.")
    if prototypes is not None and layout.projector_type == "cluster":
        raise ValueError(f"{path} has a trained prototype extractor: leave --prototypes out.")


def _chat_template(folder: Path) -> tuple[Path, str] | None:
    """The template of a folder and its file: the processor's before the tokenizer's, as transformers takes them."""
    if (folder / "chat_template.jinja").is_file():
        return folder / "chat_template.jinja", (folder / "chat_template.jinja").read_text()
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = (read_json_if_there(folder / name) or {}).get("chat_template")
        if isinstance(template, list):  # of several, each with a name
            template = {part["name"]: part["template"] for part in template}
        if isinstance(template, dict):
            template = template.get("default")
        if template:
            return folder / name, template
    return None


def _require_vicuna_prompts(layout: Layout) -> None:
    found = _chat_template(layout.path)
    if found is None:
        return
    file, template = found
    for content in ([{"type": "text", "text": "Hi"}], "Hi"):
        try:
            # Jinja in a sandbox; llava-hf's template makes "USER:" of the role.
            rendered, _ = render_jinja_template([[{"role": "user", "content": content}]], chat_template=template)
        except Exception:  # what a template raises has no common class
            continue
        if "USER:" in rendered[0]:
            return
    raise ValueError(
        f"{file}: chat_template is {template[:60]!r}..., whose prompts have no USER:, but this model's are Vicuna's. "
        "Convert a LLaVA with those; if it was trained with them in spite of that, take the template out."
    )


def _named(name: str | None) -> str:
    return f"{name}, which is not on this machine" if name else "a model that it does not name"


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"The weights cannot be written in {name!r}: give --dtype {', '.join(DTYPES)}.")
    return DTYPES[name]


def _text_config(layout: Layout) -> PreTrainedConfig:
    if layout.kind == "llava_hf":
        return AutoConfig.from_pretrained(layout.path, trust_remote_code=False).text_config
    folder = layout.base or layout.path
    fields = read_json(folder / "config.json")
    text_config = _original_text_config(folder, fields) if is_original(fields) else _plain_config(folder, fields)
    text_config.name_or_path = public_name(layout.base_name) if layout.base_name else ""
    return text_config


def _original_text_config(folder: Path, fields: dict) -> PreTrainedConfig:
    """Of the language model's fields, which the original code keeps beside its own in one dictionary."""
    name = fields.get("model_type", "llava")
    model_type = "llama" if name == "llava" else name.removeprefix("llava_")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"{folder}/config.json: model_type is {name!r}, of a language model that is not known.")
    config_class = CONFIG_MAPPING[model_type]
    known = {*config_class().to_dict(), "rope_theta", "rope_scaling"}
    known -= {"model_type", "architectures", "dtype", "transformers_version"}
    return config_class(**{name: value for name, value in fields.items() if name in known})


def _plain_config(folder: Path, fields: dict) -> PreTrainedConfig:
    if "text_config" in fields:
        raise ValueError(f"{folder} ({fields.get('model_type')}) is more than a language model: give one as --base.")
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _vision_config(layout: Layout) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(layout.vision or layout.path, trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    config.name_or_path = public_name(layout.vision_name) if layout.vision_name else ""
    return config


def _notes_on_tower(layout: Layout) -> Iterator[str]:
    """Another tower than source or base name: features of one that they were not trained on."""
    if layout.vision is None:
        return
    for role, folder in (("source", layout.path), ("base", layout.base)):
        named = (read_json_if_there(folder / "config.json") or {}).get("mm_vision_tower") if folder else None
        if isinstance(named, str) and Path(named).name != Path(layout.vision_name).name:
            yield f"The {role} names the vision tower {named} (mm_vision_tower), but {layout.vision_name} is given."


def _notes_on_inputs(layout: Layout) -> Iterator[str]:
    """What transformers would do otherwise with texts and images of the source."""
    if layout.kind != "llava_hf":
        return
    if found := _chat_template(layout.path):
        yield f"Prompts are Vicuna's, with its system message, in place of those by {found[0]}."
    settings = read_json_if_there(layout.path / "preprocessor_config.json") or {}
    if settings.get("do_center_crop", True) and not settings.get("do_pad"):
        yield "Images are padded to a square, as LLaVA-1.5 was trained; the source's processor crops them."


def _architecture(layout: Layout, prototypes: str | None, notes: list[str]) -> dict:
    """The fields of `SQLlavaConfig` beside the two towers'."""
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
            f"{layout.path}/config.json: mm_use_im_start_end is true, so tokens stand round each image, which this "
            "model does not write. Convert a checkpoint of LLaVA 1.5 or of SQ-LLaVA."
        )
    if not config:
        notes.append("There is no config.json beside the projector: the settings of LLaVA-1.5 and SQ-LLaVA are taken.")
    fields = {
        "prototype_variant": prototypes or "none",
        "projector_type": _choose(layout, "mm_projector_type", PROJECTOR_TYPES, layout.projector_type),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": _choose(
            layout, "mm_vision_select_feature", SELECT_FEATURES, config.get("mm_vision_select_feature", "patch")
        ),
    }
    if layout.projector_type == "cluster":
        if "num_latents" not in config:
            notes.append(f"Nothing says the number of prototypes (num_latents): {RELEASED_NUM_PROTOTYPES} are taken.")
        num_prototypes = config.get("num_latents", RELEASED_NUM_PROTOTYPES)
        fields |= {"prototype_variant": "released", "num_prototypes": num_prototypes}
        fields["projector_hidden_act"] = "quick_gelu"
    return fields


def _choose(layout: Layout, name: str, choices: dict, value):
    if value not in choices:
        raise ValueError(
            f"{layout.path}/config.json: {name} is {value!r}, which this model does not have. Known are "
            f"{', '.join(map(repr, filter(None, choices)))}."
        )
    return choices[value]


def _processor(layout: Layout, config: SQLlavaConfig, new_extractor: bool) -> SQLlavaProcessor:
    folder, tower = layout.base or layout.path, layout.vision or layout.path
    if not any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        raise ValueError(
            f"{folder} holds neither tokenizer.model nor tokenizer.json: put the tokenizer's files there."
        )
    if not (tower / "preprocessor_config.json").is_file():
        raise ValueError(f"{tower} holds no preprocessor_config.json: put it there, from where the tower is from.")
    # By the language model's configuration: beside one of LLaVA's, other ids come out than SentencePiece gives.
    tokenizer = AutoTokenizer.from_pretrained(folder, config=config.text_config, trust_remote_code=False)
    if layout.kind == "llava_hf" or not layout.config:
        image_aspect_ratio = "pad"
    else:
        value = layout.config.get("image_aspect_ratio")
        image_aspect_ratio = _choose(layout, "image_aspect_ratio", ASPECT_RATIOS, value)
    vusr_marker, system_message = RELEASED_VUSR_MARKER, VICUNA_SYSTEM_MESSAGE
    if layout.kind == "projector":
        vusr_marker, system_message = VUSR_TOKEN, SYSTEM_MESSAGE
    elif new_extractor:
        vusr_marker = VUSR_TOKEN
    elif layout.projector_type == "cluster":
        system_message = RELEASED_SYSTEM_MESSAGE
    image_processor = AutoImageProcessor.from_pretrained(tower, trust_remote_code=False)
    settings = {
        "image_seq_length": config.image_seq_length,
        "image_aspect_ratio": image_aspect_ratio,
        "system_message": system_message,
        "vusr_marker": vusr_marker,
    }
    processor = SQLlavaProcessor(image_processor, tokenizer, **settings)
    if layout.kind != "llava_hf" and not _keeps_text_apart(processor):
        processor = SQLlavaProcessor(image_processor, tokenizer, **settings, text_prefix=" ")
    image_token_id = layout.config.get("image_token_index", processor.image_token_id)
    if layout.kind == "llava_hf" and image_token_id != processor.image_token_id:
        raise ValueError(
            f"{layout.path}: image_token_index is {image_token_id} in config.json, but the tokenizer has <image> as "
            f"{processor.image_token_id}. Fetch the tokenizer that belongs to it."
        )
    return processor


def _keeps_text_apart(processor: SQLlavaProcessor) -> bool:
    """Whether text behind an image has the tokens that it has alone: the original code tokenizes it apart."""
    text = "\nWhat is this?"
    behind = processor.tokenizer(processor.image_token + text, add_special_tokens=False).input_ids[1:]
    return behind == processor.tokenizer(text, add_special_tokens=False).input_ids


def _set_vocabulary(config: SQLlavaConfig, processor: SQLlavaProcessor, rows: int, notes: list[str]) -> None:
    tokenizer = processor.tokenizer
    num_tokens = len(tokenizer)
    config.text_config.vocab_size = rows
    if num_tokens > rows:
        config.text_config.vocab_size = -(-num_tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        added = [token for token in NEW_TOKENS if rows <= tokenizer.get_vocab().get(token, -1)]
        notes.append(
            f"The vocabulary grows from {rows} to {config.text_config.vocab_size} rows, for {', '.join(added)} and "
            "padding: each new row is the mean of the others."
        )
    config.text_config.pad_token_id = tokenizer.pad_token_id
    config.image_token_id = processor.image_token_id
    config.vusr_token_id = processor.vusr_token_id


def _empty_model(config: SQLlavaConfig, dtype: torch.dtype) -> SQLlavaForConditionalGeneration:
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    with torch.device("meta"):
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
    notes.append(f"The prototype extractor ({variant}) is new, untrained: train it before you use the model.")


def _set_generation(model: SQLlavaForConditionalGeneration, processor: SQLlavaProcessor, layout: Layout) -> None:
    """
    Greedy, and stops as the source does and at the delimiter. Its temperature, which transformers would warn about
    without sampling, is left out.
    """
    settings = read_json_if_there((layout.base or layout.path) / "generation_config.json") or {}
    tokenizer = processor.tokenizer
    model.generation_config.update(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_token_ids(settings.get("eos_token_id"), processor),
        pad_token_id=tokenizer.pad_token_id,
    )


def _require_space(out: Path, size: int) -> None:
    folder = out
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ValueError(f"{folder} has {decimal(free)} left, but the result has {decimal(size)}: make room.")


def describe(conversion: Conversion) -> Iterator[str]:
    """Lines for the owner: what was recognised and by what, what is merged, new, and not used."""
    layout, sources, config = conversion.layout, conversion.sources, conversion.model.config
    yield f"{layout.path} is {NAMES[layout.kind]}: {layout.evidence}."
    for name, path in (("Language model", layout.base), ("Vision tower", layout.vision)):
        if path is not None:
            yield f"{name}: {path}"
    yield from sources.notes
    yield from conversion.notes
    for what, count in sources.replaced.items():
        yield f"Not used ({count}): {what}."
    for kind, count in sources.unused.items():
        yield f"Not used ({count}): {kind}."
    yield (
        f"Result: {len(sources.weights)} weights, {decimal(conversion.size)} in {len(conversion.files)} file(s) "
        f"of {str(config.dtype).removeprefix('torch.')}; prototypes: {config.prototype_variant}; "
        f"marker of its questions: {conversion.processor.vusr_marker}"
    )


def _provenance(conversion: Conversion) -> dict:
    layout, variant = conversion.layout, conversion.model.config.prototype_variant
    provenance = {"converted_from": public_name(str(layout.path)), "converted_kind": NAMES[layout.kind]}
    if variant != "none" and layout.projector_type != "cluster":
        provenance["new_extractor"] = variant
    return provenance


def write(conversion: Conversion, progress) -> None:
    """
    Writes the whole folder: weights, configurations, processor, code, card.

    Args:
        progress: A `rich.progress.Progress` that is running.
    """
    out, model = conversion.out, conversion.model
    # A folder of the final name inside of another: the card is named after it. What a run left that was killed goes.
    beside = out.with_name(f"half-written-{out.name}")
    shutil.rmtree(beside, ignore_errors=True)
    folder = beside / out.name
    folder.mkdir(parents=True)
    task = progress.add_task("", total=conversion.size)
    for number, (name, targets) in enumerate(conversion.files.items(), start=1):
        progress.update(task, description=f"Writing file {number} of {len(conversion.files)}")
        chosen = {target: conversion.sources.weights[target] for target in targets}
        write_file(folder / name, chosen, model.dtype, partial(progress.advance, task))
    if len(conversion.files) > 1:
        weight_map = {target: name for name, targets in conversion.files.items() for target in targets}
        index = {"metadata": {"total_size": conversion.size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    conversion.processor.save_pretrained(folder)
    write_provenance(folder, _provenance(conversion))
    write_card(folder)
    _sync(folder)
    if out.is_dir():
        out.rmdir()
    folder.rename(out)
    beside.rmdir()


def _sync(folder: Path) -> None:
    """Puts a folder's files on the disk: after a loss of power, its name must not stand for empty ones."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
