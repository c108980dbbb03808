"""`sq-llava evaluate`: what is asked for on the command line, and the table of figures."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sq_llava.console import console, errors_in_one_line, messages_console


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
) -> None:
    """Score a model on benchmarks. On several GPUs: torchrun --nproc_per_node 8 -m sq_llava.cli evaluate ..."""
    with errors_in_one_line():
        with messages_console.status("Loading libraries"):
            from transformers.utils import logging

            from sq_llava.evaluation.answering import VICUNA_SYSTEM_MESSAGE
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
        )
        results = run(evaluation)
    if results:
        show(results)
        messages_console.print(f"Wrote {evaluation.out}", soft_wrap=True)
    num_failed = sum(result.num_failed for result in results)
    if num_failed:
        messages_console.print(f"[red]{num_failed} examples failed[/red]: see error in examples.jsonl.")
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
