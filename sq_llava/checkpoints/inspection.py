"""Inspects a folder with a checkpoint: what it is, what it holds and what is missing. Only headers are read.

    sq-llava inspect runs/demo/model
    sq-llava inspect liuhaotian/llava-v1.5-7b --json

It understands plain checkpoints, outputs of training stages, all released kinds (`sq_llava/checkpoints/layouts.py`),
and folders that are incomplete because something was interrupted. It downloads nothing and loads no model.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from transformers.utils import logging

from modeling_sq_llava import SQLlavaForConditionalGeneration
from sq_llava.checkpoints.completeness import checkpoint_faults, step_of
from sq_llava.checkpoints.config_checks import (
    MOST_PARAMETERS,
    at_most_parameters,
    generation_faults,
    one_line,
    processor_faults,
    read_config,
)
from sq_llava.checkpoints.layouts import NAMES, Layout, recognise
from sq_llava.checkpoints.parts import INFIXES, part_of
from sq_llava.checkpoints.prompt_layouts import layout_name
from sq_llava.checkpoints.trust import changed_code, foreign_code
from sq_llava.checkpoints.weight_files import (
    TORCH_NAMES,
    Tensor,
    WeightFile,
    find_weight_files,
    read_headers,
    read_weight_map,
)
from sq_llava.checkpoints.zero3 import loading_whole
from sq_llava.json_text import MOST_BYTES, parse_json, read_json
from sq_llava.resources import CODE_FILES, code_digests


WEIGHT_FILES = (
    "*.safetensors",
    "pytorch_model*.bin",
    "adapter_model.bin",
    "non_lora_trainables.bin",
    "mm_projector.bin",
    "Vit-lora/adapter_model.*",
)
LOADED_WEIGHTS = ("model*.safetensors", "adapter_model.safetensors")
LOADED_CONFIGS = ("*config.json", "tokenizer.json", "model.safetensors.index.json")
TOKENIZER = "a tokenizer (tokenizer.json or tokenizer.model)"
MARKERS = ("user_marker", "vusr_marker", "assistant_marker", "image_aspect_ratio")
TOKEN_IDS = ("image_token_id", "image_token_index", "vusr_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
ADDED_TOKENS = {"<image>": "image_token_id", "[vusr]": "vusr_token_id", "<pad>": "pad_token_id"}


@dataclass
class Inspection:
    """
    The outcome of an inspection.

    Attributes:
        parts (`dict`): Parameters and dtypes of each part of the model. LoRA is counted separately.
        loras (`list[dict]`): Tower, ranks, alphas and file of each LoRA. Ranks are read from the tensors, alphas from
            the configuration.
        foreign_code (`list[str]`): Entries that name code other than this library's. An SQ-LLaVA with such entries is
            not loaded, see `trust.py`.
        missing (`list[str]`): Expected files or settings that are missing.
        faults (`list[str]`): Errors. A folder with faults cannot be used as it is.
    """

    path: str
    kind: str | None = None
    evidence: str = ""
    parts: dict[str, dict] = field(default_factory=dict)
    loras: list[dict] = field(default_factory=list)
    prototypes: dict = field(default_factory=dict)
    markers: dict = field(default_factory=dict)
    token_ids: dict = field(default_factory=dict)
    bases: dict[str, str] = field(default_factory=dict)
    checkpoints: dict[str, str] = field(default_factory=dict)
    code: dict[str, dict] = field(default_factory=dict)
    foreign_code: list[str] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not self.faults and not self.foreign_code

    def to_json(self) -> dict:
        return {"sound": self.sound, **asdict(self)}


def inspect(path: str | Path, base: Path | None = None, only_loaded: bool = False) -> Inspection:
    """
    Inspects a folder.

    Args:
        path: A folder, or the Hub id of a model in the local cache.
        base (`Path`, *optional*): Folder of an adapter's base. Default: the base that the adapter names, if it is on
            this machine.
        only_loaded (`bool`): Skip JSON and weight files that are not read when an SQ-LLaVA or an adapter is loaded.

    Raises:
        ValueError: if there is no such folder, and no such id in the cache.
    """
    folder = _local_folder(str(path))
    inspection = Inspection(str(path))
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    inspection.files = {str(file.relative_to(folder)): file.stat().st_size for file in files}
    configs = _read_configs(folder, inspection, LOADED_CONFIGS if only_loaded else ("*.json", "Vit-lora/*.json"))
    headers = _read_headers(folder, inspection, LOADED_WEIGHTS if only_loaded else WEIGHT_FILES)
    layout = None
    try:
        layout = recognise(str(folder), base)
    except ValueError as error:
        inspection.faults += [] if inspection.faults else [str(error)]
    else:
        inspection.kind, inspection.evidence = layout.kind, layout.evidence
        _describe_bases(layout, inspection)
    _count_parameters(headers, inspection)
    try:
        _describe_lora(headers, configs, inspection)
        _describe_settings(configs, inspection)
    except (AttributeError, KeyError, TypeError) as error:  # a value that is expected to be a list is a number, ...
        inspection.faults.append(f"a JSON file holds a value of a wrong type ({one_line(error)})")
    if inspection.kind in ("checkpoint", "adapter"):
        inspection.foreign_code = foreign_code(folder)
    changed = changed_code(folder)
    inspection.code = {
        name: {"sha256": digest, "as_in_this_library": name not in changed}
        for name, digest in code_digests(folder).items()
    }
    steps = sorted((path for path in folder.iterdir() if step_of(path) is not None), key=step_of)
    inspection.checkpoints = {path.name: "; ".join(checkpoint_faults(path)) or "complete" for path in steps}
    _check_weights(folder, headers, configs, layout, inspection)
    _list_missing(configs, inspection)
    return inspection


def _local_folder(path: str) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"{path} is neither a folder nor an id in the local cache of the Hub. "
            "Correct the path, or download the model first with `hf download`."
        ) from error


def _find(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files that match, sorted. A pipe or a device is no file: reading it could take forever."""
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _read_configs(folder: Path, inspection: Inspection, patterns: Sequence[str]) -> dict[str, dict]:
    """The JSON files that match, by their path in the folder."""
    configs = {}
    for file in _find(folder, patterns):
        name = str(file.relative_to(folder))
        if (num_bytes := file.stat().st_size) > MOST_BYTES:
            inspection.faults.append(f"{name} has {num_bytes:,} bytes, which is too large for a file of settings")
            continue
        try:
            fields = parse_json(file.read_bytes())
        except ValueError:
            inspection.faults.append(f"{name} is not valid JSON: it is cut off or damaged")
            continue
        if isinstance(fields, dict):
            configs[name] = fields
        elif file.name.endswith(("config.json", "index.json")) or name == "tokenizer.json":
            inspection.faults.append(f"{name} holds {str(fields)[:40]!r}, not a JSON object")
    return configs


def _read_headers(folder: Path, inspection: Inspection, patterns: Sequence[str]) -> dict[str, list[Tensor]]:
    """The headers of each weight file. Code in `.bin` files, which are pickles, is not run."""
    headers = {}
    for file in _find(folder, patterns):
        name = str(file.relative_to(folder))
        try:
            headers[name] = WeightFile(file).headers()
        except ValueError as error:
            inspection.faults.append(str(error))
    return headers


def _count_parameters(headers: dict[str, list[Tensor]], inspection: Inspection) -> None:
    parts = {}
    for file, tensors in headers.items():
        # The release holds its ViT-LoRA twice: in Vit-lora, and together with the LoRA of the language model.
        place = " (Vit-lora)" if file.startswith("Vit-lora") else ""
        for tensor in tensors:
            part = ("LoRA of " if ".lora_" in tensor.name else "") + part_of(tensor.name) + place
            counts = parts.setdefault(part, {"parameters": 0, "dtypes": []})
            counts["parameters"] += tensor.num_elements
            if tensor.dtype not in counts["dtypes"]:
                counts["dtypes"].append(tensor.dtype)
    order = [*INFIXES, "other", *parts]
    inspection.parts = {part: parts[part] for part in sorted(parts, key=order.index)}


def _describe_lora(headers: dict[str, list[Tensor]], configs: dict[str, dict], inspection: Inspection) -> None:
    for file, tensors in headers.items():
        config = configs.get(str(Path(file).with_name("adapter_config.json")), {})
        ranks = {}
        for tensor in tensors:
            if ".lora_A." in tensor.name:
                ranks.setdefault(part_of(tensor.name), set()).add(tensor.shape[0])
        for tower, found in ranks.items():
            patterns = config.get("alpha_pattern") or {}
            alphas = {alpha for pattern, alpha in patterns.items() if tower == "vision" and "vision_tower" in pattern}
            alpha = sorted(alphas) or [config.get("lora_alpha")]
            inspection.loras.append({"tower": tower, "ranks": sorted(found), "alphas": alpha, "file": file})


def _describe_settings(configs: dict[str, dict], inspection: Inspection) -> None:
    config, processor = configs.get("config.json", {}), configs.get("processor_config.json", {})
    if "prototype_variant" in config:
        names = ("prototype_variant", "num_prototypes", "num_prototype_iterations", "projector_type")
        inspection.prototypes = {name: config[name] for name in names if name in config}
        inspection.missing += [f"{name} in config.json: the default is used" for name in names if name not in config]
    elif config.get("mm_projector_type") == "cluster":
        inspection.prototypes = {"prototype_variant": "released", "num_prototypes": config.get("num_latents", 256)}
    inspection.markers = {name: processor[name] for name in MARKERS if name in processor}
    if "user_marker" in processor:
        inspection.markers["prompt_layout"] = layout_name(processor)
    sources = [config, config.get("text_config") or {}, configs.get("generation_config.json", {})]
    for name in TOKEN_IDS:
        values = [source[name] for source in sources if source.get(name) is not None]
        if values:
            inspection.token_ids[name] = values[0]
    added = {token["content"]: token["id"] for token in configs.get("tokenizer.json", {}).get("added_tokens", [])}
    for token, name in ADDED_TOKENS.items():
        if token in added:
            inspection.token_ids[token] = added[token]
            if config.get("model_type") == "sq_llava" and config.get(name) not in (None, added[token]):
                inspection.faults.append(
                    f"{token} has the id {added[token]} in tokenizer.json, but {config[name]} in config.json"
                )


def _describe_bases(layout: Layout, inspection: Inspection) -> None:
    places = {"base": (layout.base_name, layout.base), "vision tower": (layout.vision_name, layout.vision)}
    for role, (name, folder) in places.items():
        if name:
            inspection.bases[role] = str(folder or name)
        if name and folder is None:
            inspection.missing.append(f"the {role}: {name} is neither a folder nor in the local cache of the Hub")


@loading_whole()
def _check_weights(
    folder: Path,
    headers: dict[str, list[Tensor]],
    configs: dict[str, dict],
    layout: Layout | None,
    inspection: Inspection,
) -> None:
    if not headers and not inspection.checkpoints:
        inspection.faults.append("there is no readable weight file")
    for index in (name for name in configs if name.endswith(".index.json")):
        try:
            places = read_weight_map(folder / index)
        except ValueError as error:
            inspection.faults += [str(error)] if str(error) not in inspection.faults else []
            continue
        absent = sorted(set(places.values()) - inspection.files.keys())
        if absent:
            inspection.faults.append(f"{index} lists {len(absent)} files that are missing: {', '.join(absent)}")
        there = {(tensor.name, file) for file, tensors in headers.items() for tensor in tensors}
        lost = sorted(name for name, file in places.items() if file in headers and (name, file) not in there)
        if lost:
            inspection.faults.append(f"{index}: {len(lost)} weights are not in the listed files: {lost[0]}, ...")
    if headers and not inspection.faults:
        if inspection.kind == "checkpoint":
            files = {file: tensors for file, tensors in headers.items() if file.startswith("model")}
            inspection.faults += faults_of_weights(configs["config.json"], files)
        elif inspection.kind == "adapter" and layout.base is not None:
            inspection.faults += faults_of_adapter(folder, layout.base, headers)
    if not inspection.faults and inspection.kind in ("checkpoint", "adapter"):
        inspection.faults += generation_faults(configs.get("generation_config.json", {}))
        if inspection.kind == "checkpoint" or layout.base is not None:
            config = read_json((folder if inspection.kind == "checkpoint" else layout.base) / "config.json")
            # Older checkpoints have the settings of the images in a file of their own.
            images = {"image_processor": configs.get("preprocessor_config.json")}
            settings = images | configs.get("processor_config.json", {})
            inspection.faults += processor_faults(settings, read_config(config))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turns off the log and the progress bars of transformers: the caller reports the same in its own way."""
    verbosity, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_bars:
            logging.enable_progress_bar()


def faults_of_weights(config: dict, headers: dict[str, list[Tensor]]) -> list[str]:
    """
    Checks the weights of a plain checkpoint: which are missing, superfluous or of a wrong shape for `config.json`.

    transformers loads tensors on the meta device and reports the differences. So its own rules apply for tied weights,
    fused experts and old names.

    Args:
        config: Content of `config.json`.
        headers: Headers of the weights, by file.
    """
    if "transformers_weights" in config:
        return ["config.json: transformers_weights names other files of weights, which is not supported: remove it"]
    shapes = {tensor.name: tensor for tensors in headers.values() for tensor in tensors}
    weights = {
        name: torch.empty(tensor.shape, dtype=getattr(torch, TORCH_NAMES.get(tensor.dtype, "float32")), device="meta")
        for name, tensor in shapes.items()
    }
    try:
        with quiet_transformers(), at_most_parameters(2 * len(shapes) + 1_000):
            _, report = SQLlavaForConditionalGeneration.from_pretrained(
                None,
                config=read_config({name: value for name, value in config.items() if name != "quantization_config"}),
                state_dict=weights,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except RuntimeError:  # transformers names these weights only in its log
        return ["weights of experts, which are fused when they are loaded, are missing or of a wrong shape"]
    except Exception as error:  # for wrong values, models of transformers raise errors of many kinds
        return [f"no model can be made from config.json: {one_line(error).removeprefix('config.json: ')}"]
    if "quantization_config" in config:
        # A quantizer has other names and shapes. The weights that it skipped are compared.
        exact = [each for each in report["mismatched_keys"] if shapes[each[0]].dtype in TORCH_NAMES]
        return _describe_differences((), exact, (), "config.json")
    return _describe_differences(
        report["missing_keys"], report["mismatched_keys"], report["unexpected_keys"], "config.json"
    )


def _describe_differences(missing: Iterable, mismatched: Iterable, unexpected: Iterable, config: str) -> list[str]:
    return [
        *(f"{name} is missing: {config} requires it, but it is in no file" for name in sorted(missing)),
        *(
            f"{name} has the shape {list(found)}, but {config} requires {list(wanted)}"
            for name, found, wanted in sorted(mismatched)
        ),
        *(f"{name} is in a file, but has no place in the model of {config}" for name in sorted(unexpected)),
    ]


def faults_of_adapter(folder: Path, base: Path, headers: dict[str, list[Tensor]]) -> list[str]:
    """Like [`faults_of_weights`], for an adapter: by its `adapter_config.json` and the configuration of its base."""
    if not (base / "config.json").is_file():
        return [f"its base {base} holds no config.json"]
    fields, settings = read_json(base / "config.json"), read_json(folder / "adapter_config.json")
    if fields.get("model_type") != "sq_llava":
        return [f"its base {base} has the model_type {fields.get('model_type')!r}, not 'sq_llava'"]
    if settings.get("peft_type") != "LORA":
        return [f"adapter_config.json: peft_type is {settings.get('peft_type')!r}, but this library has LORA only"]
    try:
        weights = _weights_of_adapter(folder, base, fields)
    except Exception as error:  # for wrong values, PEFT and transformers raise errors of many kinds
        return [f"no adapter can be made from adapter_config.json and {base / 'config.json'}: {one_line(error)}"]
    wanted = {name: tuple(weight.shape) for name, weight in weights.items()}
    found = {tensor.name: tensor.shape for tensors in headers.values() for tensor in tensors}
    both = wanted.keys() & found.keys()
    mismatched = [(name, found[name], wanted[name]) for name in both if wanted[name] != found[name]]
    return _describe_differences(
        wanted.keys() - found.keys(), mismatched, found.keys() - wanted.keys(), "adapter_config.json"
    )


def _weights_of_adapter(folder: Path, base: Path, config: dict) -> dict[str, torch.Tensor]:
    """The weights that an adapter should have, on the meta device. `config`: content of the base's `config.json`."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict  # see `load_checkpoint`

    peft_config = PeftConfig.from_pretrained(folder)
    peft_config.init_lora_weights = False  # some initialisations compute with the weights of the base
    files, most = find_weight_files(base), MOST_PARAMETERS
    if files and all(file.is_file() for file in files):  # else it is not downloaded yet
        most = 6 * sum(1 for _ in read_headers(base)) + 1_000
    with torch.device("meta"), at_most_parameters(most):
        model = SQLlavaForConditionalGeneration(read_config(config))
        model.name_or_path = peft_config.base_model_name_or_path
        adapted = get_peft_model(model, peft_config)
    return get_peft_model_state_dict(adapted, save_embedding_layers=False)


def _list_missing(configs: dict[str, dict], inspection: Inspection) -> None:
    """Adds the files that a folder of this kind should have."""
    names = inspection.files.keys()
    is_ours = configs.get("config.json", {}).get("model_type") == "sq_llava"
    is_stage = inspection.kind == "adapter"
    is_whole = "config.json" in names and not {"adapter_config.json", "mm_projector.bin"} & names
    if is_ours or is_stage:
        # Checkpoints that are older than this library's own image processor do not have its file.
        is_older = "image_processing_sq_llava" not in str(configs.get("processor_config.json"))
        of_processor = [name for name in CODE_FILES if "processing" in name and not (is_older and "image" in name)]
        code = [name for name in CODE_FILES if "processing" not in name] if is_ours else []
        inspection.missing += [name for name in ("processor_config.json", *code, *of_processor) if name not in names]
    if is_whole and "generation_config.json" not in names:
        inspection.missing.append("generation_config.json")
    if (is_whole or is_stage) and not {"tokenizer.json", "tokenizer.model"} & names:
        inspection.missing.append(TOKENIZER)


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Prints the kind of the folder, a table of its parts, its settings, and what is missing or broken."""
    what = NAMES[inspection.kind] if inspection.kind else "unknown"
    console.print(f"{inspection.path}: {what}", style="bold", markup=False, highlight=False)
    if inspection.evidence:
        console.print(f"  recognised by: {inspection.evidence}", markup=False, highlight=False)
    console.print(f"  {len(inspection.files)} files, {decimal(sum(inspection.files.values()))}")
    if inspection.parts:
        console.print(_table_of_parts(inspection))
    for title, lines in _facts(inspection).items():
        if lines:
            style = {"missing": "yellow", "broken": "red", "not this library's code": "red"}.get(title)
            console.print(title, style=style or "bold")
            for line in lines:
                console.print(f"  {line}", style=style, markup=False, highlight=False, soft_wrap=True)


def _table_of_parts(inspection: Inspection) -> Table:
    table = Table("part", "dtype")
    table.add_column("parameters", justify="right")
    for part, counts in inspection.parts.items():
        table.add_row(part, ", ".join(counts["dtypes"]), f"{counts['parameters']:,}")
    table.add_section()
    table.add_row("all", "", f"{sum(counts['parameters'] for counts in inspection.parts.values()):,}")
    return table


def _facts(inspection: Inspection) -> dict[str, list[str]]:
    """Lines for each title. A title without lines is not printed."""

    def pairs(facts: dict) -> list[str]:
        return [f"{name}: {value}" for name, value in facts.items()]

    return {
        "LoRA": [
            f"{lora['tower']}: rank {', '.join(map(str, lora['ranks']))}, alpha {', '.join(map(str, lora['alphas']))} "
            f"({lora['file']})"
            for lora in inspection.loras
        ],
        "prototypes": pairs(inspection.prototypes),
        "markers": pairs(inspection.markers),
        "token ids": pairs(inspection.token_ids),
        "based on": pairs(inspection.bases),
        "checkpoints": pairs(inspection.checkpoints),
        "code": [
            f"{name}: {'as in this library' if code['as_in_this_library'] else 'NOT as in this library'}, "
            f"SHA-256 {code['sha256']}"
            for name, code in inspection.code.items()
        ],
        "not this library's code": inspection.foreign_code,
        "missing": inspection.missing,
        "broken": inspection.faults,
    }
