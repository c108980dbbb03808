"""Generates during training: answers to a small set of questions, and questions that the model asks itself.

At each evaluation the model answers the first question of each row of `generation_datasets`, greedily.
`eval_accuracy` is the share of answers equal to the reference (ignoring case and surrounding whitespace);
`eval_num_answers` is the number of answers. The model also asks questions about the first few images. Everything is
written to `output_dir/generations/step-N.jsonl`, one JSON object a line. The questions and their images also go to
TensorBoard, Weights & Biases or trackio if the run reports there.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from transformers import Trainer
from transformers.integrations import TensorBoardCallback

from processing_sq_llava import SQLlavaProcessor
from sq_llava.data.images import open_image
from sq_llava.inference.assistant import Assistant
from sq_llava.inference.prompts import context_length, token_ids
from sq_llava.resumable.jsonl import write_jsonl


@dataclass
class GenerationCheck:
    """
    Generates answers and questions at each evaluation, writes them to a file, and measures the accuracy.

    Args:
        rows (`datasets.Dataset`): Rows as returned by `sq_llava.data.rows.load_rows`.
        processor ([`SQLlavaProcessor`]): The model's processor.
        num_asked (`int`): Number of images that the model asks questions about.
        max_new_tokens (`int`): Maximum tokens of an answer or a question.
        batch_size (`int`): Number of questions answered at a time.
    """

    rows: datasets.Dataset
    processor: SQLlavaProcessor
    num_asked: int = 4
    max_new_tokens: int = 64
    batch_size: int = 16

    def require_room(self, model) -> None:
        """
        Checks that each prompt leaves room to generate, so that training does not fail at its first evaluation.

        Raises:
            ValueError: if a prompt and `max_new_tokens` together exceed the model's context length.
        """
        for index in range(len(self.rows)):
            prompt, _ = _until_first_answer(self.rows[index]["messages"])
            self._require_room(model, index, prompt, ask=False)
        for index in self._asked():
            self._require_room(model, index, _history(self.rows[index]), ask=True)

    def _require_room(self, model, index: int, messages: list[dict], ask: bool) -> None:
        length, limit = len(token_ids(self.processor, [messages], ask)[0]), context_length(model)
        if length + self.max_new_tokens > limit:
            raise ValueError(
                f"generation_datasets: the prompt of row {self.rows[index]['id']!r} has {length:,} tokens, and up to "
                f"{self.max_new_tokens} are generated. The model's context length is {limit:,}: remove this row."
            )

    def run(self, trainer: Trainer) -> dict[str, float]:
        """
        Generates, writes the file and returns the metrics.

        Every process generates, because a sharded model needs all of them. Only the main process writes.
        """
        assistant = Assistant(trainer.model.eval(), self.processor)
        answers, asked = self.answer(assistant), self.ask(assistant)
        if trainer.is_world_process_zero():
            step = trainer.state.global_step
            folder = Path(trainer.args.output_dir) / "generations"
            folder.mkdir(parents=True, exist_ok=True)
            write_jsonl(folder / f"step-{step}.jsonl", answers + asked)
            report_questions(trainer, [(record["questions"], self._images(record["row_id"])) for record in asked])
        return {
            "eval_accuracy": sum(record["correct"] for record in answers) / len(answers),
            "eval_num_answers": len(answers),
        }

    def answer(self, assistant: Assistant) -> list[dict[str, Any]]:
        """Answers the first question of each row, and compares with the reference."""
        records = []
        for begin in range(0, len(self.rows), self.batch_size):
            rows = [self.rows[index] for index in range(begin, min(begin + self.batch_size, len(self.rows)))]
            prompts = [_until_first_answer(row["messages"]) for row in rows]
            requests = [(row["images"][: _count_images(prompt)], prompt) for row, (prompt, _) in zip(rows, prompts)]
            texts = assistant.answer_batch(requests, self.max_new_tokens)
            for row, (prompt, reference), text in zip(rows, prompts, texts):
                record = {"row_id": row["row_id"], "id": row["id"], "question": _text(prompt[-1])}
                correct = text.strip().casefold() == reference.strip().casefold()
                records.append({**record, "answer": text, "reference": reference, "correct": correct})
        return records

    def ask(self, assistant: Assistant) -> list[dict[str, Any]]:
        """Asks two questions after the first answer of each of the first `num_asked` rows with an image."""
        records = []
        for index in self._asked():
            row = self.rows[index]
            history = _history(row)
            images = row["images"][: _count_images(history)]
            questions = assistant.ask(images, history, 2, max_new_tokens=self.max_new_tokens, seed=0)
            records.append({"row_id": index, "id": row["id"], "questions": questions})
        return records

    def _asked(self) -> list[int]:
        with_image = np.flatnonzero(self.rows.with_format("numpy", columns=["num_images"])[:]["num_images"])
        return with_image[: self.num_asked].tolist()

    def _images(self, index: int) -> list[Image.Image]:
        return [open_image(image) for image in self.rows[index]["images"]]


def _until_first_answer(messages: list[dict]) -> tuple[list[dict], str]:
    index = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:index], _text(messages[index])


def _history(row: dict[str, Any]) -> list[dict]:
    """A row's messages up to and including its first answer."""
    prompt, reference = _until_first_answer(row["messages"])
    return [*prompt, {"role": "assistant", "content": [{"type": "text", "text": reference}]}]


def _text(message: dict) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def _count_images(messages: list[dict]) -> int:
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def report_questions(trainer: Trainer, asked: list[tuple[list[str], list[Image.Image]]]) -> None:
    """Sends the self-questions of each image to the trackers of the run."""
    step = trainer.state.global_step
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            for number, (questions, images) in enumerate(asked):
                callback.tb_writer.add_text(f"self_questions/{number}", "  \n".join(questions), step)
                callback.tb_writer.add_image(
                    f"self_questions/{number}", np.asarray(images[0]), step, dataformats="HWC"
                )
    for name in {"wandb", "trackio"} & set(trainer.args.report_to):
        tracker = importlib.import_module(name)
        pictures = [tracker.Image(images[0], caption="\n".join(questions)) for questions, images in asked]
        tracker.log({f"self_questions/{number}": picture for number, picture in enumerate(pictures)})
