"""Writes the model card of a checkpoint or an adapter from the template `model_card.md`.

Everything in the card is read from the folder: configurations, headers of the weights, code files, `provenance.yaml`.
This module measures nothing: scores come from the JSON file of an evaluation. Without one, the card says that it has
no scores.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from PIL import Image

from sq_llava.checkpoints.parts import GROUPS, group_of
from sq_llava.checkpoints.provenance import public_name, read_provenance
from sq_llava.checkpoints.weight_files import WeightFile
from sq_llava.json_text import parse_json, read_json_if_there
from sq_llava.locations import is_hub_id
from sq_llava.output import written_whole
from sq_llava.resources import code_digests, find_resource


# Read at import: an installation without the template fails at once, not after hours of work that end with a card.
TEMPLATE = find_resource("model_card.md").read_text(encoding="utf-8")
# Picture for the card's examples. It is published in the repository. A checkpoint may bring its own.
EXAMPLE_IMAGE = "image.png"
EXAMPLE_QUESTION = "What is in this picture?"
# Texts from files must stay texts. These characters would begin a link, a tag or a cell, or end a code span.
INERT = str.maketrans({"`": "'", "<": "‹", ">": "›", "|": "¦", "[": "(", "]": ")"})
INERT_IN_CODE = str.maketrans({"`": "'"})


def write_card(folder: str | Path) -> None:
    """
    Writes the card of a checkpoint that is not published yet as `README.md` into its folder. The card's examples load
    the current folder: an invented Hub id could belong to somebody.
    """
    folder = Path(folder)
    with written_whole(folder / "README.md") as new:
        render_card(folder, ".").save(new)


def render_card(
    folder: str | Path,
    repo_id: str,
    revision: str | None = None,
    results: dict[str, Any] | None = None,
    license: str | None = None,
    languages: Sequence[str] = (),
    example_url: str | None = None,
    samples: dict[str, Any] | None = None,
) -> ModelCard:
    """
    Renders the card of a plain checkpoint or an adapter.

    Args:
        folder: A plain checkpoint, or an adapter that names its base by a Hub id.
        repo_id (`str`): Hub id or folder that the card's examples load.
        revision (`str`, *optional*): The commit that the examples load.
        results (`dict`, *optional*): Scores, as returned by [`read_results`].
        license, languages: Metadata for the Hub. Left out unless given.
        example_url (`str`, *optional*): URL of the example picture, for the Hub's widget and for the first example.
        samples (`dict`, *optional*): What the model said about the picture: its `answer`, and its `questions`.

    Raises:
        ValueError: if a configuration that the card needs is missing.
    """
    folder = Path(folder)
    adapter, config, processor = _read_configs(folder)
    provenance = read_provenance(folder)
    metadata = _metadata(adapter, config, provenance, license, languages, example_url)
    has_extractor = (
        "prototype_extractor" in adapter["modules_to_save"] if adapter else config["prototype_variant"] != "none"
    )
    towers = {name: config.get(f"{name}_config", {}).get("_name_or_path") for name in ("vision", "text")}
    return ModelCard.from_template(
        metadata,
        template_str=TEMPLATE,
        model_name=inert(repo_id.partition("/")[2] or folder.resolve().name),
        repo_id=repo_id,
        revision=revision,
        pin=f',\n    revision="{revision}"' if revision else "",
        adapter=adapter,
        base_is_on_the_hub=bool(adapter) and is_hub_id(adapter["base_model_name_or_path"]),
        config=inert(config),
        towers={name: inert(public_name(path)) if path else "unknown" for name, path in towers.items()},
        vusr_marker=inert(processor["vusr_marker"], INERT_IN_CODE),
        has_extractor=has_extractor,
        asks=_is_trained_to_ask(provenance, has_extractor),
        parameters=count_saved_parameters(folder),
        code=code_digests(folder),
        provenance={**inert(provenance), "stages": [_inert_stage(stage) for stage in provenance.get("stages", [])]},
        no_record=not provenance,
        results=inert(results),
        image=EXAMPLE_IMAGE,
        image_url=example_url,
        samples=inert(samples),
        question=EXAMPLE_QUESTION,
    )


def inert(value: Any, table: dict[int, str] = INERT) -> Any:
    """The same value, with all texts in it on one line and without Markdown, HTML or tables."""
    if isinstance(value, str):
        return " ".join(value.split()).translate(table)
    if isinstance(value, list):
        return [inert(each, table) for each in value]
    if isinstance(value, dict):
        return {inert(name, table): inert(each, table) for name, each in value.items()}
    return value


def _inert_stage(stage: dict) -> dict:
    # The settings are in code spans, and may hold tokens such as <|im_end|>.
    return {**inert(stage), "settings": inert(stage["settings"], INERT_IN_CODE)}


def _read_configs(folder: Path) -> tuple[dict, dict, dict]:
    """The configurations of adapter, model and processor. Either the adapter's or the model's may be missing."""
    names = ("adapter_config.json", "config.json", "processor_config.json")
    adapter, config, processor = (read_json_if_there(folder / name) or {} for name in names)
    if not processor or not (adapter or config):
        missing = "config.json" if processor else "processor_config.json"
        raise ValueError(
            f"{folder}: {missing} is missing, and the card cannot be written without it. Save the model and the "
            "processor there again."
        )
    return adapter, config, processor


def _metadata(
    adapter: dict,
    config: dict,
    provenance: dict,
    license: str | None,
    languages: Sequence[str],
    example_url: str | None,
) -> ModelCardData:
    base_models = [adapter["base_model_name_or_path"]] if adapter else _base_models(config, provenance)
    datasets = [source["path"] for stage in provenance.get("stages", []) for source in stage["data"]]
    return ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text",
        # The Hub's metadata can only name what is on the Hub.
        base_model=[name for name in base_models if is_hub_id(name)] or None,
        datasets=list(dict.fromkeys(name for name in datasets if is_hub_id(name))) or None,
        license=license,
        language=list(languages) or None,
        tags=["sq-llava", "visual-question-generation", "custom_code"],
        widget=[{"text": EXAMPLE_QUESTION, "src": example_url}] if example_url else None,
    )


def save_example(file: Path) -> None:
    """Saves the picture for the card's examples, and for the comparison of logits in a push: a photo of a cat."""
    with Image.open(find_resource("page/photos/cat.jpg")) as photo:
        photo.save(file)


def count_saved_parameters(folder: Path) -> dict[str, int]:
    """Number of parameters in a folder's `.safetensors` files, for vision tower, connector and text."""
    counts = dict.fromkeys(GROUPS, 0)
    for file in sorted(folder.glob("*.safetensors")):
        for tensor in WeightFile(file).headers():
            counts[group_of(tensor.name)] += tensor.num_elements
    return counts


def read_results(file: str | Path) -> dict[str, Any]:
    """
    Reads the JSON file of an evaluation. Its `results` is a list of `{"task", "metric", "value", "num"}`; other fields
    say what was run. The file that `python -m demo.evaluate` writes is read, too.

    Returns:
        The content of the file, and as `eval_results` the files `.eval_results/*.yaml` from the same folder.

    Raises:
        ValueError: if there are no results, or an entry lacks one of the four fields.
    """
    try:
        content = parse_json(Path(file).read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}). Give the results.json of an evaluation.") from error
    if not isinstance(content, dict):
        content = {"results": content}
    elif "test_accuracy" in content:
        content = {"results": list(_demo_results(content)), "command": "python -m demo.evaluate"}
    if not isinstance(content.get("results"), list) or not content["results"]:
        raise ValueError(f"{file} has no list `results`. Give the results.json of an evaluation.")
    for number, entry in enumerate(content["results"]):
        for name, kind in (("task", str), ("metric", str), ("value", (int, float)), ("num", int)):
            value = entry.get(name) if isinstance(entry, dict) else None
            if not isinstance(value, kind):
                raise ValueError(f"{file}, results, entry {number}: {name} is {value!r}. Run the evaluation again.")
    # `sq-llava evaluate` writes these next to results.json.
    beside = sorted((Path(file).parent / ".eval_results").glob("*.yaml"))
    return {
        **content,
        "eval_results": {f".eval_results/{path.name}": yaml.safe_load(path.read_text()) for path in beside},
    }


def _demo_results(content: dict[str, Any]):
    for task, value, num in (("test", "test", "test"), ("blank image", "blank_image", "blank")):
        num = content[f"num_{num}_questions"]
        yield {"task": f"easy-VQA, {task}", "metric": "accuracy", "value": content[f"{value}_accuracy"], "num": num}


def eval_result_files(results: dict[str, Any]) -> dict[str, list[dict]]:
    """
    The files `.eval_results/*.yaml` that the Hub reads (https://huggingface.co/docs/hub/eval-results), one for each
    task. They come from the evaluation itself, or from entries in its JSON that have a `dataset_id`: the Hub cannot
    show other scores. The card lists all scores.
    """
    files: dict[str, list[EvalResultEntry]] = {}
    for entry in results["results"]:
        if "dataset_id" in entry:
            result = EvalResultEntry(
                dataset_id=entry["dataset_id"],
                task_id=entry.get("task_id", "default"),
                value=entry["value"],
                dataset_revision=entry.get("dataset_revision"),
                date=results.get("date"),
                notes=f"{entry['metric']}, {entry['num']} examples",
            )
            files.setdefault(entry["task"], []).append(result)
    named = {f".eval_results/{task}.yaml": eval_result_entries_to_yaml(entries) for task, entries in files.items()}
    return {**results.get("eval_results", {}), **named}


def _is_trained_to_ask(provenance: dict, has_extractor: bool) -> bool:
    """`False` if the provenance shows a converted LLaVA, or a model that was never trained on self-questions."""
    if not provenance:
        return True
    is_released_sq_llava = "converted_from" in provenance and has_extractor and "new_extractor" not in provenance
    return is_released_sq_llava or any(
        stage["stage"] == "instruct" and stage["settings"].get("self_question_ratio") != 0
        for stage in provenance.get("stages", [])
    )


def _base_models(config: dict, provenance: dict) -> list[str]:
    if "converted_from" in provenance and is_hub_id(provenance["converted_from"]):
        return [provenance["converted_from"]]
    return [config[tower].get("_name_or_path", "") for tower in ("vision_config", "text_config")]
