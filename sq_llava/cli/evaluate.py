"""`sq-llava evaluate` and `evaluate-questions`: what is asked for on the command line, and the figures."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from sq_llava.cli.options import Device, Dtype, check_model_options, quiet_libraries
from sq_llava.console import console, errors_in_one_line, messages_console
from sq_llava.early_checks import require_folder
from sq_llava.locations import is_missing_folder, require_folder_or_id


JUDGE = {"rich_help_panel": "Judge"}
JudgeModel = Annotated[
    str | None, typer.Option(help="Grades mmvet, llava_bench, ...; its key is in OPENAI_API_KEY.", **JUDGE)
]
JudgeBaseUrl = Annotated[
    str | None, typer.Option(help="Of its OpenAI-compatible server, up to /v1; default: OpenAI's.", **JUDGE)
]
JudgeTemperature = Annotated[float, typer.Option(min=0, help="1 for models that take no other.", **JUDGE)]
JudgeMaxTokens = Annotated[int, typer.Option(min=1, help="Of an answer, thoughts included.", **JUDGE)]
JudgeConcurrency = Annotated[int, typer.Option(min=1, help="Requests at a time.", **JUDGE)]
JudgeAttempts = Annotated[int, typer.Option(min=1, help="Until an answer can be read.", **JUDGE)]
JudgeMaxRequests = Annotated[int | None, typer.Option(min=0, help="Of all runs into --out.", **JUDGE)]
JudgeMaxCost = Annotated[
    float | None, typer.Option(min=0, help="Of all runs into --out, in the unit of the prices.", **JUDGE)
]
JudgePrice = Annotated[float | None, typer.Option(min=0, help="Of a million tokens.", **JUDGE)]
JudgeSwap = Annotated[
    bool, typer.Option("--judge-swap", help="Compare answers in both orders: twice the requests.", **JUDGE)
]


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
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code in another model's folder.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    judge_model: JudgeModel = None,
    judge_base_url: JudgeBaseUrl = None,
    judge_temperature: JudgeTemperature = 0.0,
    judge_max_tokens: JudgeMaxTokens = 1024,
    judge_concurrency: JudgeConcurrency = 8,
    judge_attempts: JudgeAttempts = 3,
    judge_max_requests: JudgeMaxRequests = None,
    judge_max_cost: JudgeMaxCost = None,
    judge_input_price: JudgePrice = None,
    judge_output_price: JudgePrice = None,
    judge_swap: JudgeSwap = False,
) -> None:
    """Score a model on benchmarks. On several GPUs: torchrun --nproc_per_node 8 -m sq_llava evaluate ..."""
    with errors_in_one_line():
        if tasks != "help":
            _check_places(data, against)
            check_model_options(model, device, dtype)
        with messages_console.status("Loading libraries"):
            from sq_llava.checkpoints.convert import VICUNA_SYSTEM_MESSAGE
            from sq_llava.evaluation.run import TASKS, Evaluation

            quiet_libraries()
        if tasks == "help":
            for name, task in sorted(TASKS.items()):
                console.print(f"{name:24}{task.title}", markup=False, highlight=False)
            return
        judge = _judge_settings(
            judge_model,
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
            judge=judge,
        )
        is_whole = _run_and_show(evaluation, against)
    if not is_whole:
        raise typer.Exit(1)


def _check_places(data: str | None, against: str | None) -> None:
    """
    Raises:
        ValueError: for data, or a model to compare with, that is not there.
    """
    if data is None:
        raise ValueError("--data is missing: a folder, a Hub id, or hub for the data sets of the tasks.")
    if data != "hub" and is_missing_folder(data):
        raise ValueError(f"--data {data}: no such folder, and not the id of a data set on the Hub (org/name).")
    if against is not None:
        require_folder_or_id(against, "--against")


def _judge_settings(model: str | None, base_url: str | None, **settings):
    from sq_llava.evaluation.judge import JudgeSettings

    if model is not None:
        return JudgeSettings(model, base_url, **settings)
    if base_url is not None:
        raise ValueError("--judge-base-url needs --judge-model, as its server names the model.")
    return None


def _run_and_show(evaluation, against: str | None) -> bool:
    """Whether every example has an answer, and a grade where a judge was named, in this run and in the other."""
    from sq_llava.evaluation.comparison import check_comparable, compare
    from sq_llava.evaluation.run import evaluate as run

    other, others_results = None if against is None else Path(against), []
    if other is not None and (other / "results.json").is_file():
        check_comparable(other, evaluation)
    elif other is not None:
        other = evaluation.out / "against"
        # One cap holds for both, and what both ask the judge is asked once.
        others_results = run(replace(evaluation, model=against, out=other, judge_folder=evaluation.out))
    results = run(evaluation)
    if not results:  # a process other than the first
        return True
    show(results)
    if other is not None:
        show_differences(compare(other, evaluation.out), evaluation.out / "comparison")
    messages_console.print(f"Wrote {evaluation.out}", markup=False, soft_wrap=True)
    is_whole = _show_what_is_missing(results, evaluation.out)
    return _show_what_is_missing(others_results, other) and is_whole


def show(results) -> None:
    """Prints the figures of all tasks."""
    for result in results:
        if not result.metrics:
            continue
        counts = f"{result.num:,} examples, {result.parsed_share:.1%} parsed, {result.num_failed} failed"
        table = _table(f"{result.task}: {counts}", "value", "standard error", "examples")
        for metric in result.metrics:
            error = "" if metric.standard_error is None else f"{metric.standard_error:.4f}"
            table.add_row(metric.name, f"{metric.value:.4f}", error, f"{metric.num:,}")
        console.print(table)


def show_differences(differences, out: Path) -> None:
    """Prints how far the run is from the one it was compared with."""
    for task in dict.fromkeys(each.task for each in differences):
        table = _table(f"{task}, beside the other", "other", "this run", "difference", "95%", "num")
        for each in differences:
            if each.task == task:
                values = (f"{each.first:.4f}", f"{each.second:.4f}", f"{each.difference:+.4f}")
                table.add_row(each.metric, *values, f"{each.low:+.4f} to {each.high:+.4f}", f"{each.num:,}")
        console.print(table)
    if not differences:
        console.print(f"Nothing to compare: see {out / 'comparison.md'}", markup=False, soft_wrap=True)


def _table(title: str, *names: str) -> Table:
    """Of metrics, whose names take as many lines as they need: figures are never cut off."""
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("metric", overflow="fold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _show_what_is_missing(results, out: Path | None) -> bool:
    """Whether there is nothing to tell but what nobody asked for, as a grade without a judge."""
    is_whole = True
    for result in results:
        if result.missing is not None:
            messages_console.print(f"{out}, {result.task}: {result.missing}", markup=False, soft_wrap=True)
        if result.num_unjudged:
            messages_console.print(
                f"[red]{result.task}: {result.num_unjudged} of {result.num} answers have no grade[/red] and are in no "
                f"figure: see judge_error in {escape(str(out / result.task / 'examples.jsonl'))}.",
                soft_wrap=True,
            )
        if result.num_failed:
            place = escape(str(out / result.task / "examples.jsonl"))
            messages_console.print(
                f"[red]{result.task}: {result.num_failed} examples failed[/red]: see error in {place}.", soft_wrap=True
            )
        is_whole &= not (result.num_failed or (result.judge and (result.missing or result.num_unjudged)))
    return is_whole


def check_images(images: str, image_root: str | None) -> None:
    """
    Raises:
        ValueError: for a folder or file that is not there; `images` may also be the Hub id of a data set.
    """
    if not Path(images).is_file() and is_missing_folder(images):
        raise ValueError(f"{images}: no such folder or file.")
    if image_root is not None:
        require_folder(image_root)


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
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Measure the questions that a model asks: variety, types, whether they need the image and fit it."""
    with errors_in_one_line():
        check_images(images, image_root)
        check_model_options(model, device, dtype)
        if clip is not None:
            require_folder_or_id(clip, "--clip")
        with messages_console.status("Loading libraries"):
            from sq_llava.evaluation.question_run import AskSettings, QuestionEvaluation
            from sq_llava.evaluation.question_run import evaluate_questions as run

            quiet_libraries()
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
