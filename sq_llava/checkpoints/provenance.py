"""Records where a checkpoint comes from in `provenance.yaml`. Training, merge and push copy it to their results.

    stages:            # training stages, in this order
    - stage: align
      data: [{path: blip_laion_cc_sbu_558k.json}]
      rows: 558128
      steps: 2180
      settings: {learning_rate: 0.002, global_batch_size: 256, ...}
      versions: {torch: 2.13.0, ...}
      text_probe: {path: held_out.jsonl, rows: 300, loss_before: 1.21, loss_after: 1.38}    # if it was measured
    converted_from: liuhaotian/llava-v1.5-7b
    new_extractor: paper       # variant of a new, untrained extractor in a converted LLaVA

The model card shows it. The file holds names and numbers, but no local paths. To repeat a run, you also
need the recipe and the same data.
"""

import re
from importlib.metadata import version
from pathlib import Path
from types import UnionType
from typing import Any

import yaml

from sq_llava.locations import is_hub_id
from sq_llava.output import write_text


PROVENANCE_FILE = "provenance.yaml"
# A record of a hundred stages has about 100 KB.
MOST_BYTES = 2**20
STAGE_FIELDS = {"stage": str, "data": list, "rows": int, "steps": int, "settings": dict, "versions": dict}
# What a stage with `text_probe` also has, as `text_probe`. The loss before may be missing.
TEXT_PROBE_FIELDS = {"path": str, "rows": int, "loss_before": float | None, "loss_after": float}
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
CACHED = re.compile(r"/(?:models|datasets)--([^/]+)/snapshots/[0-9a-f]{40}/?$")

STAGE_SETTINGS = (
    "full_finetuning", "vision_lora_r", "vision_lora_alpha", "vision_lora_dropout", "init_lora_weights", "vision_lr",
    "connector_lr", "packing", "eos_token",
)  # fmt: skip
TRAINING_SETTINGS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim",
    "num_train_epochs", "max_steps", "max_length", "train_sampling_strategy", "seed", "bf16", "fp16",
    "loss_type", "neftune_noise_alpha",
)  # fmt: skip
MODEL_SETTINGS = ("dtype", "load_in_4bit", "load_in_8bit", "use_rslora", "use_dora")
# Stage "align" trains neither questions nor the language model, so these do not apply to it.
INSTRUCT_SETTINGS = ("self_question_ratio", "question_loss_weight")
INSTRUCT_MODEL_SETTINGS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")


def public_name(path: str) -> str:
    """A name that can be published: the Hub id (also of a folder in the cache), or the last part of another path."""
    cached = CACHED.search(path)
    if cached:
        return cached[1].replace("--", "/")
    return path if is_hub_id(path) else Path(path).expanduser().absolute().name


def read_provenance(folder: str | Path) -> dict:
    """
    The content of a checkpoint's `provenance.yaml`; empty if there is none.

    Raises:
        ValueError: if the file is damaged, or a field has another form than in the example above.
    """
    file = Path(folder) / PROVENANCE_FILE
    if not file.is_file():
        return {}
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        provenance = yaml.safe_load(file.read_text(encoding="utf-8"))
        if isinstance(provenance, dict):
            _require_form(provenance)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: {reason}. Restore the file, or delete it.") from error
    if not isinstance(provenance, dict):
        shown = repr(provenance) if isinstance(provenance, str) else f"a {type(provenance).__name__}"
        raise ValueError(f"{file} holds {shown}, not a mapping of fields. Restore the file, or delete it.")
    return provenance


def _require_form(provenance: dict) -> None:
    def require(value: Any, kind: type | UnionType, place: str) -> Any:
        if not isinstance(value, kind):
            # Not repr: a few lines of YAML can name a list of lists with billions of entries.
            raise ValueError(f"{place} is a {type(value).__name__}, not {getattr(kind, '__name__', kind)}")
        return value

    def require_plain(fields: dict, place: str) -> None:
        for name, value in fields.items():
            for each in value if isinstance(value, list) else [value]:
                require(each, str | int | float | None, f"{place}, {name}")

    stages = require(provenance.get("stages", []), list, "stages")
    require_plain({name: value for name, value in provenance.items() if name != "stages"}, "the content")
    for number, stage in enumerate(stages):
        place = f"stages, entry {number}"
        require(stage, dict, place)
        for name, kind in STAGE_FIELDS.items():
            require(stage.get(name), kind, f"{place}, {name}")
        for source in stage["data"]:
            require(require(source, dict, f"{place}, data").get("path"), str, f"{place}, data, path")
            require_plain(source, f"{place}, data")
        require_plain(stage["settings"], f"{place}, settings")
        require_plain(stage["versions"], f"{place}, versions")
        if "text_probe" in stage:
            probe = require(stage["text_probe"], dict, f"{place}, text_probe")
            for name, kind in TEXT_PROBE_FIELDS.items():
                require(probe.get(name), kind, f"{place}, text_probe, {name}")


def write_provenance(folder: str | Path, provenance: dict) -> None:
    if provenance:
        write_text(Path(folder) / PROVENANCE_FILE, yaml.safe_dump(provenance, sort_keys=False, width=119))


def record_stage(
    before: dict, arguments, training_args, model_config, run: dict[str, int], steps: int, text_probe: dict | None
) -> None:
    """
    Writes `provenance.yaml` into the `output_dir` of a training stage: the earlier provenance, and this stage.

    Args:
        before (`dict`): Provenance of the model that the stage started from.
        arguments, training_args, model_config: As returned by `parse_settings`.
        run (`dict[str, int]`): `SQLlavaTrainer.run`: `num_rows`, `rows_per_step`, ...
        steps (`int`): Number of optimizer steps that were done.
        text_probe (`dict`, *optional*): Fields of `TEXT_PROBE_FIELDS`, if losses on text were measured.
    """
    instruct = arguments.stage == "instruct"
    settings = _settings(arguments, STAGE_SETTINGS + (INSTRUCT_SETTINGS if instruct else ()))
    settings |= _settings(training_args, TRAINING_SETTINGS)
    settings |= _settings(model_config, MODEL_SETTINGS + (INSTRUCT_MODEL_SETTINGS if instruct else ()))
    stage = {
        "stage": arguments.stage,
        "data": [
            {"path": public_name(source.path), **_settings(source, ("split", "weight", "num_rows", "instructions"))}
            for source in arguments.datasets
        ],
        "rows": run["num_rows"],
        "steps": steps,
        "settings": {"global_batch_size": run["rows_per_step"], **settings},
        "versions": {package: version(package) for package in PACKAGES},
        **({} if text_probe is None else {"text_probe": text_probe}),
    }
    write_provenance(training_args.output_dir, before | {"stages": [*before.get("stages", []), stage]})


def _settings(source, names: tuple[str, ...]) -> dict:
    """The attributes that are set (not `None`, `False` or an empty list). An enum is replaced by its value."""
    values = {name: getattr(source, name) for name in names}
    values = {name: getattr(value, "value", value) for name, value in values.items()}
    return {name: value for name, value in values.items() if value not in (None, []) and value is not False}
