"""Model cards, and the record of where a checkpoint comes from."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import train_sft
from sq_llava.checkpoints.card import count_saved_parameters, eval_result_files, read_results, render_card, write_card
from sq_llava.checkpoints.load import merge_adapter
from sq_llava.checkpoints.provenance import public_name, read_provenance, write_provenance
from sq_llava.training.adapter import count_parameters
from tests import tiny
from tests.runs import make_parts


pytestmark = pytest.mark.slow


COMMIT = "0123456789abcdef0123456789abcdef01234567"
STAGE = {"stage": "instruct", "data": [{"path": "org/data", "split": "train"}], "rows": 7, "steps": 3}
PROBE = {"path": "t.json", "rows": 7, "loss_before": 1.5, "loss_after": 2.0}
STAGE |= {"settings": {"learning_rate": 0.5}, "versions": {"torch": "2.13.0"}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "model"
    model = tiny.tiny_model()
    model.save_pretrained(folder, max_shard_size="200KB")
    tiny.tiny_processor().save_pretrained(folder)
    return folder


def card_of(checkpoint, provenance: dict | None = None, **settings) -> ModelCard:
    (checkpoint / "provenance.yaml").unlink(missing_ok=True)
    write_provenance(checkpoint, provenance or {})
    return render_card(checkpoint, "org/name", **settings)


def test_parameters_counted_in_the_files_are_the_models(checkpoint):
    counts = {part: sum(numbers) for part, numbers in count_parameters(tiny.tiny_model()).items()}
    assert len(list(checkpoint.glob("*.safetensors"))) > 1
    assert count_saved_parameters(checkpoint) == counts


def test_every_snippet_that_loads_names_the_commit(checkpoint):
    text = str(card_of(checkpoint, revision=COMMIT))
    calls = re.findall(r"(?:from_pretrained|pipeline|snapshot_download)\((.*?)\n *\)", text, flags=re.DOTALL)
    assert len(calls) == 5
    assert all(re.search(rf'"org/name",\n +revision="{COMMIT}"', call) for call in calls)
    assert "revision=" not in re.sub("pin `revision=` to", "", str(card_of(checkpoint)))


def test_examples_in_the_card_of_a_folder_load_that_folder_and_no_hub_id(checkpoint):
    write_card(checkpoint)
    text = (checkpoint / "README.md").read_text()
    assert f"# {checkpoint.name}" in text
    assert text.count('"."') >= 5 and "snapshot_download" not in text
    for snippet in re.findall(r"```python\n(.*?)```", text, re.S):
        compile(snippet, "snippet", "exec")


def test_prose_names_the_q_former_where_there_is_one(checkpoint, tmp_path):
    tiny.tiny_model(tiny.tiny_minigpt4_config()).save_pretrained(tmp_path)
    tiny.tiny_processor(image_seq_length=4).save_pretrained(tmp_path)
    said = "It has a vision encoder, a Q-Former whose 4 queries read the image, a projector and a causal"
    assert said in " ".join(card_of(tmp_path).text.split())
    assert "Q-Former" not in card_of(checkpoint).text


def test_a_stage_without_questions_starts_from_the_weights_of_one_with_questions(tmp_path):
    parts = make_parts(tmp_path / "parts")
    asks = {"num_prototypes": 5, "self_question_ratio": 1.0, **towers(parts)}
    run_stage(parts, tmp_path / "asks", "instruct", asks)
    answers = {"model_name_or_path": tmp_path / "asks", "self_question_ratio": 0.0, "learning_rate": 0.0}
    run_stage(parts, tmp_path / "answers", "instruct", answers)
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("asks", "answers"))
    assert any("embed_tokens" in name for name in before) and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_metadata_names_what_is_on_the_hub(checkpoint):
    local = STAGE | {"data": [{"path": "mine.json"}]}
    card = card_of(
        checkpoint, {"converted_from": "org/llava", "stages": [local, STAGE]}, license="mit", languages=["en"]
    )
    data = card.data.to_dict()
    assert data["base_model"] == ["org/llava"] and data["datasets"] == ["org/data"]
    assert data["license"] == "mit" and data["language"] == ["en"]
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-text-to-text"
    assert "`mine.json`" in card.text and "widget" not in data


def test_widget_asks_about_the_picture(checkpoint):
    data = card_of(checkpoint, example_url="https://host/image.png").data.to_dict()
    assert data["widget"] == [{"text": "What is in this picture?", "src": "https://host/image.png"}]


def test_example_shows_what_the_model_said_as_plain_text(checkpoint):
    samples = {"answer": "A cat | <b>on</b>\n[a mat](x)", "questions": ["Why?", "Where?"]}
    text = card_of(checkpoint, samples=samples).text
    assert "![The example picture](image.png)" in text
    assert "| question | What is in this picture? |\n| its answer | A cat ¦ ‹b›on‹/b› (a mat)(x) |\n" in text
    assert "| it asks | Why? |\n| it asks | Where? |\n\nThe model wrote this" in text
    answers_only = card_of(checkpoint, {"converted_from": "org/llava"} | {"new_extractor": "paper"}, samples=samples)
    assert "| its answer |" in answers_only.text and "it asks" not in answers_only.text
    assert "## Example" not in card_of(checkpoint).text


def test_first_example_of_a_published_card_needs_no_file(checkpoint):
    text = card_of(checkpoint, revision=COMMIT, example_url="https://host/image.png").text
    first = re.search(r"```python\n(.*?)```", text, re.S)[1]
    assert '"url": "https://host/image.png"' in first and "pipeline" in first
    assert '"url": "image.png"' in card_of(checkpoint).text


@pytest.mark.parametrize(
    ("provenance", "says", "asks"),
    [
        ({}, "There is no record of its training", True),
        ({"converted_from": "org/sq", "converted_kind": "a LoRA"}, "converted from `org/sq` (a LoRA)", True),
        ({"converted_from": "org/llava", "new_extractor": "paper"}, "new** and untrained: train this model", False),
        ({"stages": [STAGE | {"stage": "align"}]}, "Stage `align`: 3 steps on 7 rows of `org/data` (train)", False),
        ({"stages": [STAGE]}, "`learning_rate: 0.5` With torch 2.13.0.", True),
        ({"stages": [STAGE | {"text_probe": PROBE}]}, "7 text-only rows of t.json: 1.5 before the stage, 2.0", True),
        ({"converted_from": "x", "new_extractor": "paper", "stages": [STAGE]}, "only in the stages below", True),
    ],
)  # fmt: skip
def test_card_says_where_the_model_comes_from(provenance, says, asks, checkpoint):
    text = " ".join(card_of(checkpoint, provenance).text.split())
    assert says in text
    assert ("not trained to ask" in text) == (not asks)
    assert ("ask=True" in text) == asks


def test_scores_are_those_of_the_evaluation_and_nothing_else(checkpoint, tmp_path):
    assert "None: no evaluation was available" in card_of(checkpoint).text
    entries = [
        {"task": "pope", "metric": "f1", "value": 0.87654, "num": 9000, "dataset_id": "org/POPE", "task_id": "all"},
        {"task": "pope", "metric": "accuracy", "value": 0.5, "num": 9000, "dataset_id": "org/POPE"},
        {"task": "mine", "metric": "accuracy", "value": 1, "num": 12},
    ]
    (tmp_path / "results.json").write_text(json.dumps({"date": "2026-11-21", "command": "run it", "results": entries}))
    results = read_results(tmp_path / "results.json")
    text = card_of(checkpoint, results=results).text
    assert "| pope | f1 | 0.8765 | 9,000 |\n| pope | accuracy | 0.5 | 9,000 |\n| mine | accuracy | 1 | 12 |" in text
    assert "Measured on 2026-11-21 by `run it`." in text
    assert eval_result_files(results) == {
        ".eval_results/pope.yaml": [
            {
                "dataset": {"id": "org/POPE", "task_id": task_id},
                "value": value,
                "date": "2026-11-21",
                "notes": f"{metric}, 9000 examples",
            }
            for task_id, value, metric in (("all", 0.87654, "f1"), ("default", 0.5, "accuracy"))
        ]
    }


def test_result_files_next_to_an_evaluation_s_json_are_published(tmp_path):
    entries = [{"task": "pope", "metric": "llava/mean_f1", "value": 0.5, "num": 9000}]
    (tmp_path / "results.json").write_text(json.dumps({"results": entries}))
    (tmp_path / ".eval_results").mkdir()
    (tmp_path / ".eval_results" / "pope.yaml").write_text("- dataset: {id: org/POPE, task_id: pope}\n  value: 50.0\n")
    assert eval_result_files(read_results(tmp_path / "results.json")) == {
        ".eval_results/pope.yaml": [{"dataset": {"id": "org/POPE", "task_id": "pope"}, "value": 50.0}]
    }


def test_results_of_the_demo_are_read(tmp_path):
    numbers = {"num_test_questions": 9, "test_accuracy": 0.75, "num_blank_questions": 3, "blank_image_accuracy": 0.5}
    (tmp_path / "evaluation.json").write_text(json.dumps(numbers))
    assert read_results(tmp_path / "evaluation.json")["results"] == [
        {"task": "easy-VQA, test", "metric": "accuracy", "value": 0.75, "num": 9},
        {"task": "easy-VQA, blank image", "metric": "accuracy", "value": 0.5, "num": 3},
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"accuracy": 1}, r"results.json has no list `results`"),
        ([{"task": "pope", "metric": "f1", "num": 3}], r"results.json, results, entry 0: value is None"),
    ],
)
def test_results_that_lack_something_are_refused(content, message, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path / "results.json")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("org/name", "org/name"),
        ("/home/me/models/vicuna-7b/", "vicuna-7b"),
        ("./runs/model", "model"),
        ("models/mine/vicuna", "vicuna"),
        (f"/home/me/.cache/huggingface/hub/models--org--my-name/snapshots/{COMMIT}", "org/my-name"),
    ],
)
def test_public_name_has_no_local_path(path, name):
    assert public_name(path) == name


def towers(parts: Path) -> dict:
    return {"vision_model_name_or_path": parts / "clip", "text_model_name_or_path": parts / "llama"}


def run_stage(parts: Path, output_dir: Path, stage: str, start: dict) -> None:
    settings = {
        "stage": stage, "dataset_path": parts / "train.json", "output_dir": output_dir, "learning_rate": 3e-3,
        "vision_lora_r": 2, "lora_r": 2, "per_device_train_batch_size": 4, "max_steps": 1, "use_cpu": True,
        "bf16": False, "save_strategy": "no", "report_to": "none", **start,
    }  # fmt: skip
    train_sft.main([text for name, value in settings.items() for text in (f"--{name}", str(value))])


def test_both_stages_are_recorded_and_carried_into_the_merged_card(tmp_path):
    parts = make_parts(tmp_path / "parts")
    run_stage(parts, tmp_path / "stage1", "align", {"num_prototypes": 5, **towers(parts)})
    run_stage(parts, tmp_path / "stage2", "instruct", {"model_name_or_path": tmp_path / "stage1"})
    stages = read_provenance(tmp_path / "stage2")["stages"]
    assert [stage["stage"] for stage in stages] == ["align", "instruct"]
    assert stages[1]["data"] == [{"path": "train.json"}] and stages[1]["rows"] == 16 and stages[1]["steps"] == 1
    assert stages[1]["settings"]["global_batch_size"] == 4 and stages[1]["settings"]["learning_rate"] == 3e-3
    assert "self_question_ratio" in stages[1]["settings"] and "self_question_ratio" not in stages[0]["settings"]
    assert str(tmp_path) not in (tmp_path / "stage2" / "provenance.yaml").read_text()
    merge_adapter(str(tmp_path / "stage2"), str(tmp_path / "merged"))
    assert str(tmp_path) not in (tmp_path / "merged" / "config.json").read_text()
    assert read_provenance(tmp_path / "merged")["stages"] == stages
