"""The loss on text-only prompts before and after training."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional as F

import train_sft
from sq_llava.training.text_probe import METRIC, read_text_probe
from tests.runs import assert_equal_runs, history, train


ROWS = [
    {"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It, and more of it."}]},
    {"prompt": "What is two and two?", "completion": "Four."},
    {"conversations": [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hello to you, too."}] * 2},
]


def write_probe(folder: Path, *more: dict) -> Path:
    file = folder / "probe.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, *more]))
    return file


def measured(output_dir: Path) -> dict[int, list[float]]:
    """The losses on text at each step."""
    losses = {}
    for entry in history(output_dir):
        if METRIC in entry:
            losses.setdefault(entry["step"], []).append(entry[METRIC])
    return losses


def mean_loss(trainer, rows: list[dict]) -> float:
    """The mean loss of an answer token, from the logits of one row at a time."""
    losses = []
    for row in rows:
        batch = trainer.data_collator([row])
        with torch.no_grad():
            logits = trainer.model.eval()(input_ids=batch["input_ids"]).logits
        losses.append(F.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="none", ignore_index=-100))
        losses[-1] = losses[-1][batch["labels"][0, 1:] != -100]
    return torch.cat(losses).mean().item()


@pytest.mark.slow
def test_loss_on_text_is_measured_before_the_first_step_and_after_the_last(parts, tmp_path, capsys):
    probe = write_probe(tmp_path)
    trainer = train(parts, tmp_path / "probed", text_probe=probe, per_device_eval_batch_size=2)
    rows = read_text_probe(str(probe))
    after = mean_loss(trainer, rows)
    with trainer.model.disable_adapter():
        before = mean_loss(trainer, rows)
    losses = measured(tmp_path / "probed")
    assert losses == {0: [pytest.approx(before, rel=1e-4)], 3: [pytest.approx(after, rel=1e-4)]} and before != after
    [stage] = yaml.safe_load((tmp_path / "probed" / "provenance.yaml").read_text())["stages"]
    recorded = {"loss_before": round(losses[0][0], 4), "loss_after": round(losses[3][0], 4)}
    assert stage["text_probe"] == {"path": "probe.jsonl", "rows": 3} | recorded
    assert (
        f"Loss on text_probe: path probe.jsonl, rows 3, loss_before {recorded['loss_before']}"
        in capsys.readouterr().out
    )
    train(parts, tmp_path / "plain")
    assert_equal_runs(tmp_path / "plain", tmp_path / "probed")


@pytest.mark.slow
def test_loss_on_text_is_measured_with_each_evaluation_and_not_again_after_a_resume(parts, tmp_path):
    settings = {"text_probe": write_probe(tmp_path), "save_steps": 1, "resume": True}
    settings |= {"num_eval_rows": 2, "eval_strategy": "steps", "eval_steps": 2}
    first = train(parts, tmp_path / "run", max_steps=3, **settings)
    before = measured(tmp_path / "run")
    assert before.keys() == {0, 2, 3}
    assert all(f"eval_{name}" in first.state.log_history[-4] for name in ("loss_answers", "text_probe_loss"))
    train(parts, tmp_path / "run", max_steps=4, **settings)
    after = measured(tmp_path / "run")
    assert after.keys() == {0, 2, 3, 4} and all(len(losses) == 1 for losses in after.values())
    assert all(after[step] == losses for step, losses in before.items())


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"image": "a.png", "prompt": "<image>\nWhat is it?", "completion": "A dog."},
            r"row 3 \(id ''\) has the image",
        ),
        ({"question": "What is it?", "reply": "A dog."}, "row 3: "),
        ({"prompt": "What is it?", "completion": ""}, "row 3: .*all answers are empty"),
    ],
    ids=["image", "unknown fields", "no answer"],
)
def test_faulty_row_is_named_before_the_model_is_loaded(row, says, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(train_sft, "load_base", lambda *args: pytest.fail("a model was loaded"))
    probe = write_probe(tmp_path, row)
    for doctor in ("off", "sample"):
        with pytest.raises(ValueError, match=rf"probe\.jsonl, {says}"):
            train(parts, tmp_path / "run", text_probe=probe, doctor=doctor)


def test_row_with_a_control_token_is_named_before_training(parts, tmp_path):
    probe = write_probe(tmp_path, {"prompt": "What is </s>?", "completion": "The end."})
    with pytest.raises(ValueError, match=r"text_probe, .*probe\.jsonl: Row 3 .*</s>"):
        train(parts, tmp_path / "run", text_probe=probe, doctor="off")


def test_stage_that_leaves_the_language_model_as_it_is_has_no_probe(parts, tmp_path):
    with pytest.raises(ValueError, match=r"text_probe is .* in stage align"):
        train(parts, tmp_path, stage="align", text_probe=write_probe(tmp_path))
