"""Recognises what a folder holds by its files: a checkpoint of this library, or a released SQ-LLaVA or LLaVA.

    >>> layout = recognise("sqllava-lora-7b", base="lmsys/vicuna-7b-v1.5")
    >>> layout.kind, layout.evidence
    ('sq_llava_lora', 'adapter_config.json, and mm_projector_type "cluster" in config.json')

Only JSON files are read, and the names of the tensors in a separate projector file. Hub ids are looked up in the local
cache; downloads only happen on request. `inspection.py` checks whether the weights are complete.
"""

import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

from sq_llava.checkpoints.weight_files import WeightFile, find_weight_files
from sq_llava.json_text import read_json_if_there
from sq_llava.locations import hub_errors, is_missing_folder, require_folder_or_id


Kind = Literal[
    "checkpoint", "adapter", "training", "sq_llava_lora", "sq_llava", "llava_lora", "llava", "projector", "llava_hf"
]
NAMES: dict[Kind, str] = {
    "checkpoint": "a checkpoint of this library",
    "adapter": "an adapter from a training stage of this library",
    "training": "the folder of a training run of this library",
    "sq_llava_lora": "the LoRA of the authors' SQ-LLaVA",
    "sq_llava": "a complete SQ-LLaVA of the authors' code",
    "llava_lora": "the LoRA of an original LLaVA",
    "llava": "a complete original LLaVA",
    "projector": "a stage-1 projector of the original code",
    "llava_hf": "a LLaVA in the format of transformers",
}
WANTED_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors", "*.bin")
# Number of prototypes in the release, for sources without a config.json.
RELEASED_NUM_PROTOTYPES = 256


@dataclass(frozen=True)
class Layout:
    """
    The files of a source, and the models that it is based on.

    Attributes:
        path (`Path`): The folder. For a projector that was given as a file, the folder of this file.
        kind, evidence: The kind of checkpoint, and how it was recognised.
        weight_files (`tuple[Path, ...]`): Weight files in the folder, with the ViT-LoRA. Files that an index lists may
            be missing. `base_files` and `vision_files` are the weight files of the other two folders.
        config (`dict`): Its `config.json`; empty if there is none.
        adapter_config, vision_adapter_config (`dict`, *optional*): The LoRA's `adapter_config.json`, and the one in
            `Vit-lora`.
        projector_type (`str`, *optional*): `"cluster"`, `"mlp2x_gelu"`, `"linear"`, or another name in the source.
        base_name, vision_name (`str`, *optional*): The language model and the vision tower that it is based on, as
            named by the caller or by the configurations.
        base, vision (`Path`, *optional*): Folders of these two; `None` if they are not on this machine or not needed.
    """

    path: Path
    kind: Kind
    evidence: str
    weight_files: tuple[Path, ...]
    config: dict
    adapter_config: dict | None = None
    vision_adapter_config: dict | None = None
    projector_type: str | None = None
    base_name: str | None = None
    vision_name: str | None = None
    base: Path | None = None
    vision: Path | None = None

    @property
    def text_folder(self) -> Path:
        """The folder with configuration, tokenizer and weights of the language model."""
        return self.base or self.path

    @property
    def vision_folder(self) -> Path:
        """The folder with configuration and preprocessing of the vision tower."""
        return self.vision or self.path

    @property
    def feature_layer(self) -> int:
        """The hidden state of the tower that an original projector reads."""
        return self.config.get("mm_vision_select_layer", -2)

    @property
    def feature_select(self) -> str:
        """The tokens of the tower that an original projector reads: `"patch"`, or with the CLS token `"cls_patch"`."""
        return self.config.get("mm_vision_select_feature", "patch")

    @property
    def aspect_ratio(self) -> str | None:
        """The original code's way to make images square: `"pad"`, or by default a crop."""
        # LLaVA-1.5 pads. Its configuration for transformers does not say so.
        return "pad" if self.kind == "llava_hf" or not self.config else self.config.get("image_aspect_ratio")

    @property
    def num_prototypes(self) -> int:
        return self.config.get("num_latents", RELEASED_NUM_PROTOTYPES)

    @property
    def base_files(self) -> tuple[Path, ...]:
        return find_weight_files(self.base) if self.base else ()

    @property
    def vision_files(self) -> tuple[Path, ...]:
        return find_weight_files(self.vision) if self.vision else ()


def recognise(
    source: str | Path, base: str | Path | None = None, vision: str | Path | None = None, download: bool = False
) -> Layout:
    """
    Recognises the kind of a checkpoint and finds the models that it is based on.

    Args:
        source (`str` or `Path`): A folder, the file of a projector, or a Hub id.
        base, vision (`str` or `Path`, *optional*): Folder or Hub id of the language model and the vision tower, for
            sources without them. Default: the names in the source's configurations, if they are on this machine.
        download (`bool`): Whether to download Hub ids that were given and are not in the cache.

    Raises:
        ValueError: if it is not a known kind of checkpoint, or a folder or Hub id cannot be found.
    """
    given = Path(source).expanduser()
    file = given if given.is_file() else None
    folder = given.parent if file else _find(str(source), "the source", download)
    config, adapter_config = (read_json_if_there(folder / name) for name in ("config.json", "adapter_config.json"))
    if file or (_is_lone_projector(folder) and adapter_config is None):
        fields = _recognise_projector(file or folder / "mm_projector.bin")
    elif adapter_config is not None:
        fields = _recognise_adapter(folder, config, adapter_config)
    elif config is not None:
        fields = _recognise_whole(folder, config)
    elif list(folder.glob("checkpoint-*")):
        fields = {"kind": "training", "evidence": "its folders checkpoint-*", "weight_files": ()}
    else:
        raise ValueError(_unknown(folder, "it holds neither config.json nor adapter_config.json nor mm_projector.bin"))
    base_name = fields.pop("base_name", None)
    vision_name = vision or (config or {}).get("mm_vision_tower")
    names = {"base_name": base or base_name, "vision_name": vision_name}
    names = {field: str(name) if name else None for field, name in names.items()}
    return Layout(
        path=folder,
        config=config or {},
        adapter_config=adapter_config,
        vision_adapter_config=read_json_if_there(folder / "Vit-lora" / "adapter_config.json"),
        base=_find(str(base), "--base", download) if base else _find_if_there(names["base_name"]),
        vision=_find(str(vision), "--vision", download) if vision else _find_if_there(names["vision_name"]),
        **names,
        **fields,
    )


def _is_lone_projector(folder: Path) -> bool:
    return (folder / "mm_projector.bin").is_file() and not find_weight_files(folder)


def _recognise_projector(file: Path) -> dict:
    if file.suffix not in (".bin", ".safetensors"):
        raise ValueError(f"{file}: give a folder, a Hub id, or the .bin file of a projector.")
    names = [tensor.name for tensor in WeightFile(file).headers()]
    projector_type = projector_type_of(names)
    if projector_type is None:
        raise ValueError(f"{file} holds no projector (mm_projector.*): its tensors are {', '.join(names[:4])}, ...")
    base = (read_json_if_there(file.parent / "config.json") or {}).get("_name_or_path")
    return {
        "kind": "projector",
        "evidence": f"{file.name} holds mm_projector.* of type {projector_type}, and there is no model",
        "weight_files": (file, *filter(Path.is_file, [_adapter_file(file.parent / "Vit-lora")])),
        "projector_type": projector_type,
        "base_name": base,
    }


def projector_type_of(names: list[str]) -> str | None:
    """The type of an original projector by the names of its tensors, with any prefix; `None` without a projector."""
    inside = {name.partition("mm_projector.")[2] for name in names if "mm_projector." in name}
    for projector_type, name in (("cluster", "sim_alpha"), ("mlp2x_gelu", "2.weight"), ("linear", "weight")):
        if name in inside:
            return projector_type
    return None


def _recognise_adapter(folder: Path, config: dict | None, adapter_config: dict) -> dict:
    files = [_adapter_file(folder), folder / "non_lora_trainables.bin", _adapter_file(folder / "Vit-lora")]
    fields = {
        "weight_files": tuple(filter(Path.is_file, files)),
        "base_name": adapter_config.get("base_model_name_or_path"),
    }
    if (adapter_config.get("auto_mapping") or {}).get("base_model_class") == "SQLlavaForConditionalGeneration":
        return {"kind": "adapter", "evidence": "adapter_config.json names the class of this library", **fields}
    # A published adapter names AutoModel instead.
    if "multi_modal_projector" in (adapter_config.get("modules_to_save") or []):
        return {"kind": "adapter", "evidence": "adapter_config.json has the projector in modules_to_save", **fields}
    if config is None or not is_original(config):
        raise ValueError(
            _unknown(folder, "it has an adapter_config.json, but no config.json with fields mm_* next to it")
        )
    projector_type, evidence = _projector_of(config)
    kind = "sq_llava_lora" if projector_type == "cluster" else "llava_lora"
    evidence = f"adapter_config.json, and {evidence}"
    return {"kind": kind, "evidence": evidence, "projector_type": projector_type, **fields}


def _adapter_file(folder: Path) -> Path:
    file = folder / "adapter_model.safetensors"
    return file if file.is_file() else folder / "adapter_model.bin"


def _recognise_whole(folder: Path, config: dict) -> dict:
    files = {"weight_files": find_weight_files(folder)}
    model_type = config.get("model_type")
    if model_type == "sq_llava":
        return {"kind": "checkpoint", "evidence": 'model_type "sq_llava" in config.json', **files}
    if model_type == "llava" and "text_config" in config:
        return {"kind": "llava_hf", "evidence": 'model_type "llava" and a text_config in config.json', **files}
    if is_original(config):
        projector_type, evidence = _projector_of(config)
        kind = "sq_llava" if projector_type == "cluster" else "llava"
        evidence = f"{evidence}, and no adapter_config.json"
        return {"kind": kind, "evidence": evidence, "projector_type": projector_type, **files}
    reason = f"its config.json has the model_type {model_type!r} and no fields mm_*"
    raise ValueError(_unknown(folder, f"{reason} (is it a language model or a vision tower?)"))


def is_original(config: dict) -> bool:
    """Returns whether a `config.json` was written by the code of LLaVA, or by code derived from it."""
    return any(name.startswith("mm_") for name in config)


def _projector_of(config: dict) -> tuple[str, str]:
    """The projector type in an original `config.json`, and how it was recognised."""
    if "mm_projector_type" in config:
        return config["mm_projector_type"], f'mm_projector_type "{config["mm_projector_type"]}" in config.json'
    return "linear", "fields mm_* without mm_projector_type in config.json, as in LLaVA before 1.5"


def _unknown(folder: Path, reason: str) -> str:
    return f"{folder} is not a known kind of checkpoint: {reason}. Known kinds: {'; '.join(NAMES.values())}."


def _find(name: str, option: str, download: bool) -> Path:
    folder = require_folder_or_id(name, option)
    if folder is not None:
        return folder
    cached = _find_in_cache(name)
    if cached is not None and not (download and _is_partial(cached)):
        return cached
    if not download:
        raise ValueError(f"{name} ({option}): neither a folder nor in the local cache of the Hub. Download it first.")
    print(f"Downloading {name} from the Hub.", file=sys.stderr)
    with hub_errors(f"{name} ({option}) is not in the cache and could not be downloaded"):
        # Repositories may hold the same weights in both formats: then only the safetensors are downloaded.
        has_safetensors = any(fnmatch(file, "model*.safetensors") for file in HfApi().list_repo_files(name))
        ignored = ["pytorch_model*.bin"] if has_safetensors else None
        return Path(snapshot_download(name, allow_patterns=list(WANTED_FILES), ignore_patterns=ignored))


def _find_if_there(name: str | None) -> Path | None:
    if not name or is_missing_folder(name):
        return None
    return require_folder_or_id(name) or _find_in_cache(name)


def _find_in_cache(hub_id: str) -> Path | None:
    cached = try_to_load_from_cache(hub_id, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def _is_partial(folder: Path) -> bool:
    """Returns whether a repository in the cache lacks weight files."""
    files = find_weight_files(folder) or [*folder.glob("*.bin"), *folder.glob("*.safetensors")]
    return not files or not all(file.is_file() for file in files)
