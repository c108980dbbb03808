"""`sq-llava evaluate` and `evaluate-questions`: what is asked for on the command line, and the figures."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from sq_llava.console import console, errors_in_one_line, messages_console


JUDGE = {"rich_help_panel": "Judge"}


def evaluate(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="SQ-LLaVA folder or Hub id, or another VLM's.", show_default=False),
    ],
    tasks: Annotated[str, typer.Option(help="Names, with commas; help lists them.", show_default=False)],
    data: Annotated[
        str | None,
        typer.Option(help="Folder with a task's data, or with one for each; a Hub id; hub: the tasks' own."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: runs/evaluation/<model>.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many examples of each task, spread evenly.")] = None,
    split: Annotated[str | None, typer.Option(help="Of the data; default: what the paper's figure is of.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time, on each process.")] = 8,
    system_message: Annotated[
        str | None,
        typer.Option(help="vicuna: as the authors evaluate released checkpoints; or a text. Default: the model's."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another model, or the folder of an evaluation: compare with it, in pairs.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu; default: the first of these there is.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code in another model's folder.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    judge_model: Annotated[
        str | None, typer.Option(help="Grades mmvet, llava_bench, ...; its key is in OPENAI_API_KEY.", **JUDGE)
    ] = None,
    judge_base_url: Annotated[
        str | None, typer.Option(help="Of its OpenAI-compatible server, up to /v1; default: OpenAI's.", **JUDGE)
    ] = None,
    judge_temperature: Annotated[float, typer.Option(min=0, help="1 for models that take no other.", **JUDGE)] = 0.0,
    judge_max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, thoughts included.", **JUDGE)] = 1024,
    judge_concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.", **JUDGE)] = 8,
    judge_attempts: Annotated[int, typer.Option(min=1, help="Until an answer can be read.", **JUDGE)] = 3,
    judge_max_requests: Annotated[int | None, typer.Option(min=0, help="Of all runs into --out.", **JUDGE)] = None,
    judge_max_cost: Annotated[
        float | None, typer.Option(min=0, help="Of all runs into --out, in the unit of the prices.", **JUDGE)
    ] = None,
    judge_input_price: Annotated[float | None, typer.Option(min=0, help="Of a million tokens.", **JUDGE)] = None,
    judge_output_price: Annotated[float | None, typer.Option(min=0, help="Of a million tokens.", **JUDGE)] = None,
    judge_swap: Annotated[
        bool, typer.Option("--judge-swap", help="Compare answers in both orders: twice the requests.", **JUDGE)
    ] = False,
) -> None:
    """Score a model on benchmarks. On several GPUs: torchrun --nproc_per_node 8 -m sq_llava.cli evaluate ..."""
    with errors_in_one_line():
        with messages_console.status("Loading libraries"):
            from transformers.utils import logging

            from sq_llava.convert import VICUNA_SYSTEM_MESSAGE
            from sq_llava.evaluation.comparison import compare
            from sq_llava.evaluation.judge import JudgeSettings
            from sq_llava.evaluation.run import TASKS, Evaluation
            from sq_llava.evaluation.run import evaluate as run

            logging.set_verbosity_error()
            logging.disable_progress_bar()
        if tasks == "help":
            for name, task in sorted(TASKS.items()):
                console.print(f"{name:24}{task.title}", markup=False, highlight=False)
            return
        if data is None:
            raise ValueError("--data is missing: a folder, a Hub id, or hub for the data sets of the tasks.")
        if judge_model is None and judge_base_url is not None:
            raise ValueError("--judge-base-url needs --judge-model, as its server names the model.")
        judge = judge_model and JudgeSettings(
            model=judge_model,
            base_url=judge_base_url,
            temperature=judge_temperature,
            max_tokens=judge_max_tokens,
            concurrency=judge_concurrency,
            attempts=judge_attempts,
            max_requests=judge_max_requests,
            max_cost=judge_max_cost,
            input_price=judge_input_price,
            output_price=judge_output_price,
            swap=judge_swap,
        )
        evaluation = Evaluation(
            model=model,
            tasks=[name.strip() for name in tasks.split(",")],
            data=data,
            out=out or Path("runs/evaluation") / Path(model).name,
            split=split,
            limit=limit,
            batch_size=batch_size,
            system_message=VICUNA_SYSTEM_MESSAGE if system_message == "vicuna" else system_message,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            seed=seed,
            judge=judge or None,
        )
        other = None if against is None else Path(against)
        if other is not None and not (other / "results.json").is_file():
            other = evaluation.out / "against"
            run(replace(evaluation, model=against, out=other))
        results = run(evaluation)
        differences = compare(other, evaluation.out) if results and other is not None else []
    if results:
        show(results)
    if differences:
        show_differences(differences)
    if results:
        messages_console.print(f"Wrote {evaluation.out}", soft_wrap=True)
    for result in results:
        if result.missing is not None:
            messages_console.print(f"{result.task}: {escape(result.missing)}", soft_wrap=True)
        if result.num_unjudged:
            messages_console.print(
                f"[red]{result.task}: {result.num_unjudged} of {result.num} answers have no grade[/red] and are in no "
                "figure: see judge_error in examples.jsonl.",
                soft_wrap=True,
            )
    num_failed = sum(result.num_failed for result in results)
    if num_failed:
        messages_console.print(f"[red]{num_failed} examples failed[/red]: see error in examples.jsonl.")
    if num_failed or any(result.judge and (result.missing or result.num_unjudged) for result in results):
        raise typer.Exit(1)


def show_differences(differences) -> None:
    """Prints how far the run is from the one it was compared with."""
    table = Table("task", "metric", "the other", "this run", "difference", "95%", "examples")
    for each in differences:
        interval = f"{each.low:+.4f} to {each.high:+.4f}"
        values = (f"{each.first:.4f}", f"{each.second:.4f}", f"{each.difference:+.4f}", interval)
        table.add_row(each.task, each.metric, *values, str(each.num))
    console.print(table)


def evaluate_questions(
    model: Annotated[str, typer.Option("--model", "-m", help="SQ-LLaVA folder or Hub id.", show_default=False)],
    images: Annotated[
        str, typer.Option(help="Folder of images, or a data set in a layout of training.", show_default=False)
    ],
    image_root: Annotated[str | None, typer.Option(help="Of the data set's image paths.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: runs/questions/<model>.")] = None,
    num_questions: Annotated[int, typer.Option("--num-questions", "-n", min=1, help="For each image.")] = 4,
    after: Annotated[str | None, typer.Option(help="What it answers first; default: it describes the image.")] = None,
    clip: Annotated[str | None, typer.Option(help="A whole CLIP: measure how close texts are to their image.")] = None,
    truth: Annotated[str | None, typer.Option(help="easy_vqa: count the questions whose premise is true.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many images, spread evenly.")] = None,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the questions' sampling.")] = 1.2,
    top_k: Annotated[int, typer.Option(min=1, help="Of the questions' sampling.")] = 300,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of the questions' sampling.")] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a question, and of an answer.")] = 64,
    seed: Annotated[int, typer.Option(help="For the same questions again.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images asked about together.")] = 4,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu; default: the first of these there is.")] = None,
) -> None:
    """Measure the questions that a model asks: variety, types, whether they need the image and fit it."""
    with errors_in_one_line():
        with messages_console.status("Loading libraries"):
            from transformers.utils import logging

            from sq_llava.evaluation.question_run import AskSettings, QuestionEvaluation
            from sq_llava.evaluation.question_run import evaluate_questions as run

            logging.set_verbosity_error()
            logging.disable_progress_bar()
        settings = AskSettings(num_questions, after, temperature, top_k, top_p, max_new_tokens, seed)
        out = out or Path("runs/questions") / Path(model).name
        figures = run(
            QuestionEvaluation(model, images, out, settings, image_root, limit, clip, truth, dtype, device, batch_size)
        )
    if figures:
        console.print_json(data=figures)
        messages_console.print(f"Wrote {out}", soft_wrap=True)
        if figures["num_failed"]:
            messages_console.print(f"[red]{figures['num_failed']} images failed[/red]: see error in asked-*.jsonl.")
            raise typer.Exit(1)


def show(results) -> None:
    """Prints the figures of all tasks."""
    table = Table("task", "metric", "value", "standard error", "examples", "parsed", "failed")
    for result in results:
        for number, metric in enumerate(result.metrics):
            error = "" if metric.standard_error is None else f"{metric.standard_error:.4f}"
            shared = (f"{result.parsed_share:.1%}", str(result.num_failed)) if number == 0 else ("", "")
            name = result.task if number == 0 else ""
            table.add_row(name, metric.name, f"{metric.value:.4f}", error, str(metric.num), *shared)
    console.print(table)
