"""Runs an evaluation: reads and checks the data of all tasks, generates answers, scores them, writes the results.

sq-llava evaluate --model runs/demo/model --tasks easy_vqa --data runs/demo/data --out runs/demo/evaluation
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import set_seed

from sq_llava.evaluation import (
    captions,
    easy_vqa,
    gqa,
    llava_bench,
    mmbench,
    mmvet,
    pope,
    scienceqa,
    textvqa,
    vizwiz,
    vqav2,
)
from sq_llava.evaluation.answering import ANSWERS, AnswerSettings, Model, answer_examples
from sq_llava.evaluation.judge import Judge
from sq_llava.evaluation.other_models import OtherModel, load_any
from sq_llava.evaluation.reading import Data, evenly_spaced
from sq_llava.evaluation.report import save_pictures, write_report
from sq_llava.evaluation.results import (
    TaskResult,
    environment,
    hash_of_all,
    hash_of_code,
    hash_of_model,
    hashes_of_examples,
    write_examples,
    write_results,
)
from sq_llava.evaluation.served_model import ServedModel
from sq_llava.evaluation.settings import JUDGED, SERVED, Evaluation
from sq_llava.evaluation.task import Example, Record, Score, Task, summarize
from sq_llava.inference.asking_first import AsksFirst
from sq_llava.inference.processes import join_processes
from sq_llava.llm_client.client import ChatStopped
from sq_llava.output import output_lock
from sq_llava.resumable.resume import read_lines
from sq_llava.resumable.run_note import RunNote


# A batch for a server has this many times as many requests as it gets at once. Few of them then wait for the slowest.
NUM_ROUNDS = 8
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        captions.COCO_TASK,
        captions.FLICKR30K_TASK,
        captions.NOCAPS_TASK,
        captions.CONCEPTUAL_TASK,
        easy_vqa.TASK,
        gqa.TASK,
        llava_bench.TASK,
        llava_bench.COCO_TASK,
        mmbench.TASK,
        mmbench.CN_TASK,
        mmbench.CN_LMMS_EVAL_TASK,
        mmvet.TASK,
        mmvet.LMMS_EVAL_TASK,
        pope.TASK,
        scienceqa.TASK,
        scienceqa.ALL_TASK,
        scienceqa.REASONING_TASK,
        textvqa.TASK,
        textvqa.NO_OCR_TASK,
        vizwiz.TASK,
        vqav2.TASK,
    )
}


def evaluate(evaluation: Evaluation) -> list[TaskResult]:
    """
    Runs an evaluation and writes its folder. `sq_llava/evaluation/results.py` lists the files.

    Returns:
        One result per task; an empty list on all processes but the first.

    Raises:
        ValueError: If the data of a task is missing or wrong, if `out` holds answers of a different run, or if another
            process writes into `out`. Raised before the model is loaded.
    """
    tasks = [find_task(name) for name in dict.fromkeys(evaluation.tasks)]
    state, device = join_processes(evaluation.device)
    with output_lock(evaluation.out, needed=state.is_main_process):
        return _evaluate(evaluation, tasks, state, device)


def _evaluate(evaluation: Evaluation, tasks: Sequence[Task], state: PartialState, device: str) -> list[TaskResult]:
    examples = {task.name: read_examples(task, evaluation) for task in tasks}
    judge = None
    if evaluation.judge is not None and state.is_main_process:
        judge = Judge(evaluation.judge, evaluation.journals(JUDGED))
    hashes = {name: hashes_of_examples(each) for name, each in examples.items()}
    about = describe(evaluation, {name: hash_of_all(each) for name, each in hashes.items()})
    note = RunNote(evaluation.out, about, IDENTITY)
    for name, each in hashes.items():
        read_lines(evaluation.out / name, ANSWERS, list(each), hashes=each)  # raises before the model is loaded
    before = earlier_results(evaluation.out, about)
    set_seed(evaluation.seed)
    model = load_model(evaluation, state, device)
    batch_size = evaluation.batch_size
    if evaluation.server is not None:
        batch_size = NUM_ROUNDS * evaluation.server.concurrency
    answered = []
    for task in tasks:
        settings = AnswerSettings(task.max_new_tokens, batch_size, evaluation.system_message)
        folder = evaluation.out / task.name
        answered.append(
            answer_examples(model, examples[task.name], folder, settings, task.title, note, hashes[task.name])
        )
    if not state.is_main_process:
        return []
    note.write()
    # The judge runs after all answers: other processes would time out if they had to wait for it.
    results = [assess(task, records, evaluation, about, judge) for task, records in zip(tasks, answered)]
    write_results(results, evaluation.out, about, before)
    for task in tasks:
        save_pictures(task, examples[task.name], evaluation.out / task.name)
    write_report(evaluation.out, TASKS)
    return results


def load_model(evaluation: Evaluation, state: PartialState, device: str) -> Model:
    """
    The model that answers.

    Raises:
        ValueError: If the checkpoint is wrong, or if several processes would use one server.
        ConnectionError: If no server answers.
    """
    if evaluation.server is None:
        model = load_any(evaluation.model, evaluation.dtype, device, evaluation.trust_remote_code)
        if not evaluation.thinking.self_questions:
            return model
        if isinstance(model, OtherModel):
            raise ValueError(f"--self-questions needs an SQ-LLaVA, but {evaluation.model} is another model.")
        return AsksFirst(model, evaluation.thinking, evaluation.seed)
    if state.num_processes > 1:
        raise ValueError("--base-url: start one process, without torchrun. --concurrency sends requests in parallel.")
    return ServedModel(evaluation.server, evaluation.journals(SERVED))


def assess(
    task: Task, records: Sequence[Record], evaluation: Evaluation, about: dict[str, Any], judge: Judge | None
) -> TaskResult:
    """Scores the records of a task. Writes `examples.jsonl` and the submission."""
    folder = evaluation.out / task.name
    submission = None if task.write_submission is None else task.write_submission(records, folder)
    missing = None
    if task.score is not None:
        records = [replace(record, score=score(task, record)) for record in records]
    if task.judge is not None and judge is not None:
        try:
            scores = task.judge(records, judge, folder)
            records = [replace(record, score=each) for record, each in zip(records, scores)]
        except ChatStopped as stop:
            missing = str(stop)
    metrics = summarize(task, records)
    if not metrics and missing is None:
        missing = f"scored by a server: upload {submission}"
        if task.judge is not None:
            missing = "graded by a judge: set --judge-model"
            if judge is not None:
                missing = f"the judge graded no example. Error of the first: {records[0].score.judge_error}"
    write_examples(records, folder)
    scores = [record.score for record in records if record.score is not None]
    return TaskResult(
        task=task.name,
        data=evaluation.data,
        data_hash=about["data_hashes"][task.name],
        num=len(records),
        num_failed=sum(record.error is not None for record in records),
        parsed_share=sum(each.is_parsed for each in scores) / len(records),
        metrics=metrics,
        missing=missing,
        judge=judge.report() if judge is not None and task.judge is not None else None,
        num_unjudged=sum(each.judge_error is not None for each in scores),
    )


def find_task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"--tasks {name}: unknown task. Choose from: {', '.join(sorted(TASKS))}.")
    return TASKS[name]


def read_examples(task: Task, evaluation: Evaluation) -> list[Example]:
    """
    The examples of a task; at most `limit`, evenly spaced.

    Raises:
        ValueError: If there are none, if two have the same id, or if only some have a reference.
    """
    examples = task.read(Data.locate(evaluation.data, task.name, task.hub_id, evaluation.split, task.folder))
    place = f"{task.name}, {evaluation.data}"
    if not examples:
        raise ValueError(f"{place}: has no examples. Check --data and --split.")
    [(id, count)] = Counter(example.id for example in examples).most_common(1)
    if count > 1:
        raise ValueError(f"{place}: has {count} examples with the id {id!r}. Ids must be unique.")
    unanswered = [example.id for example in examples if example.reference is None]
    if 0 < len(unanswered) < len(examples):
        raise ValueError(
            f"{place}: {len(unanswered)} of {len(examples)} examples have no reference, such as {unanswered[0]!r}. "
            "Either all examples of a split need one, or none (then a server scores them)."
        )
    return choose_examples(task, examples, evaluation.limit)


def choose_examples(task: Task, examples: Sequence[Example], limit: int | None) -> Sequence[Example]:
    """At most `limit` examples, evenly spaced. If the task scores units, whole units with about `limit` examples."""
    if limit is None or task.score_unit is None:
        return evenly_spaced(examples, limit)
    units = list(dict.fromkeys(map(task.unit, examples)))
    chosen = set(evenly_spaced(units, max(1, round(limit * len(units) / len(examples)))))
    return [example for example in examples if task.unit(example) in chosen]


def score(task: Task, record: Record) -> Score:
    """The score of an answer. A failed example scores 0 in every metric."""
    if record.error is None:
        return task.score(record.example, record.answer)
    return Score(dict.fromkeys(task.score(record.example, "").values, 0.0), is_parsed=False)


def describe(evaluation: Evaluation, data_hashes: dict[str, str]) -> dict[str, Any]:
    """The fields of `results.json` that are needed to repeat the run."""
    asks_itself = evaluation.thinking.self_questions > 0
    return {
        "model": evaluation.model,
        # Nobody knows which weights a server has.
        "model_hash": hash_of_model(evaluation.model) if evaluation.server is None else None,
        "server": evaluation.server and evaluation.server.base_url,
        "extra_body": evaluation.server and evaluation.server.extra_body,
        "code_hash": hash_of_code(),
        "data_hashes": data_hashes,
        "split": evaluation.split,
        "limit": evaluation.limit,
        "batch_size": evaluation.batch_size,
        "system_message": evaluation.system_message,
        "dtype": evaluation.dtype,
        "seed": evaluation.seed,
        # Without self-questions, answers are greedy and do not depend on the seed.
        "self_questioning": f"{evaluation.thinking}, seed {evaluation.seed}" if asks_itself else None,
        **environment(),
    }


# A run resumes from the answers in its folder only if these fields are equal. Each answer has the hash of its example.
IDENTITY = ("model_hash", "model", "server", "extra_body", "system_message", "dtype", "self_questioning")


def earlier_results(out: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """`results.json` of an earlier run into the same folder with the same model and settings, if there is one."""
    path = out / "results.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    return before if all(name in before and before[name] == about[name] for name in IDENTITY) else None
