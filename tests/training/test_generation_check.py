"""Evaluation during training: losses on held-out rows, accuracy of answers, and self-questions for the trackers."""

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sq_llava.data.rows import load_rows
from sq_llava.data.sources import DataSource
from sq_llava.inference.assistant import Assistant
from sq_llava.training.generation_check import GenerationCheck
from tests import tiny
from tests.runs import train


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def evaluated(parts, tmp_path_factory):
    """A run with 4 rows held out, evaluated after the second and the fourth step."""
    output_dir = tmp_path_factory.mktemp("evaluated")
    recipe = output_dir / "recipe.yaml"
    recipe.write_text(f"generation_datasets: [{{path: {parts / 'train.json'}, num_rows: 5}}]\n")
    evaluation = {"num_eval_rows": 4, "eval_strategy": "steps", "eval_steps": 2, "report_to": "tensorboard"}
    evaluation |= {"max_steps": 4, "save_strategy": "no", "self_question_ratio": 1.0}
    return train(parts, output_dir, config=recipe, **evaluation)


def test_losses_on_answers_and_questions_are_measured_on_rows_not_trained_on(evaluated):
    assert len(evaluated.train_dataset) == 12 and len(evaluated.eval_dataset) == 4
    assert not set(evaluated.train_dataset[:]["row_id"]) & set(evaluated.eval_dataset[:]["row_id"])
    logs = [log for log in evaluated.state.log_history if "eval_loss" in log]
    assert [log["step"] for log in logs] == [2, 4]
    for log in logs:
        assert log["eval_loss_answers"] > 0 and log["eval_loss_questions"] > 0


def test_evaluation_is_the_same_in_any_epoch(evaluated):
    losses = []
    for epoch in (0, 3):
        evaluated.data_collator.epoch.fill_(epoch)
        losses.append(evaluated.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


def test_generations_are_scored_written_and_sent_to_tensorboard(evaluated):
    logs = [log for log in evaluated.state.log_history if "eval_accuracy" in log]
    assert logs[0]["eval_num_answers"] == 5 and 0 <= logs[0]["eval_accuracy"] <= 1
    folder = Path(evaluated.args.output_dir)
    records = [json.loads(line) for line in (folder / "generations" / "step-2.jsonl").read_text().splitlines()]
    answers = [record for record in records if "answer" in record]
    asked = [record for record in records if "questions" in record]
    assert len(answers) == 5 and all(record["reference"].startswith("A dog") for record in answers)
    assert asked and all(len(record["questions"]) == 2 for record in asked)
    events = EventAccumulator(str(next(folder.rglob("events.*")).parent)).Reload()
    assert "self_questions/0" in events.Tags()["images"]
    assert any(tag.startswith("self_questions/0") for tag in events.Tags()["tensors"])


def test_case_and_surrounding_whitespace_of_an_answer_do_not_matter(parts):
    rows = load_rows([DataSource(str(parts / "train.json"), num_rows=6)])
    answers = [row["messages"][1]["content"][0]["text"] for row in rows]
    said = [f" {answers[0].upper()} ", answers[1], answers[2].removesuffix("."), "", answers[4], answers[0]]

    class Scripted:
        def answer_batch(self, requests, max_new_tokens):
            return [said.pop(0) for _ in requests]

    records = GenerationCheck(rows, tiny.tiny_processor(), batch_size=4).answer(Scripted())
    assert [record["correct"] for record in records] == [True, True, False, False, True, False]


def test_asking_does_not_change_the_random_state_of_training(parts):
    rows = load_rows([DataSource(str(parts / "train.json"), num_rows=6)])
    processor = tiny.tiny_processor()
    assistant = Assistant(tiny.tiny_model_for(processor), processor)
    state = torch.random.get_rng_state()
    GenerationCheck(rows, processor).ask(assistant)
    assert torch.equal(state, torch.random.get_rng_state())
