"""`sq-llava evaluate` and `sq-llava evaluate-questions`: their options and their output."""

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from sq_llava.cli.options import AsJson, OptionsOf, check_model_options, quiet_libraries, takes_options
from sq_llava.console import console, errors_in_one_line, examples, is_first_process, loading, messages_console
from sq_llava.early_checks import require_folder
from sq_llava.evaluation.settings import (
    AGAINST,
    SERVED,
    Evaluation,
    JudgeSettings,
    QuestionEvaluation,
    ServerSettings,
)
from sq_llava.inference.settings import AskSettings, SelfQuestioning
from sq_llava.locations import is_missing_folder, require_folder_or_id
from sq_llava.output import output_lock


SERVER = "Model on a server (needs --base-url)"
JUDGE = "Judge for MM-Vet, LLaVA-Bench, scienceqa_reasoning (needs --judge-model)"

ServerOptions = Annotated[
    dict, OptionsOf(ServerSettings, panel=SERVER, without=("model", "temperature", "top_p", "max_tokens", "attempts"))
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        help="Folder or Hub id of an SQ-LLaVA, or of another model in transformers. With --base-url: its name on "
        "the server. Several times: each gets a folder in --out, and is compared with the first.",
    ),
]
DataPlace = Annotated[
    str | None,
    typer.Option(
        help="Folder of the task's data, folder with a subfolder per task, Hub id of a dataset, or the word "
        "hub for each task's own dataset on the Hub."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(help="Output folder. Default: runs/evaluation/<model>; for several models runs/evaluation."),
]
Against = Annotated[
    str | None,
    typer.Option(help="Another model to load, evaluate and compare with, or the output folder of its evaluation."),
]

DEFAULT_OUT = Path("runs/evaluation")

app = typer.Typer()


@app.command(
    epilog=examples(
        "sq-llava evaluate --tasks help",
        "sq-llava evaluate --model runs/demo/model --tasks easy_vqa --data runs/demo/data",
        "sq-llava evaluate --model org/sq-llava-7b --tasks pope,textvqa --data playground/data/eval --limit 100",
        "sq-llava evaluate --base-url http://127.0.0.1:8000/v1 --model NAME --tasks pope --data playground/data/eval",
        "torchrun --nproc_per_node 8 -m sq_llava evaluate --model org/sq-llava-7b --tasks vqav2 --data hub",
    )
)
@takes_options
def evaluate(
    settings: Annotated[dict, OptionsOf(Evaluation, without=("model",))],
    thinking: Annotated[dict, OptionsOf(SelfQuestioning)],
    server: ServerOptions,
    judge: Annotated[dict, OptionsOf(JudgeSettings, prefix="judge", panel=JUDGE, model=None)],
    tasks: Annotated[str, typer.Option(help="Names of tasks, separated by commas. --tasks help lists them all.")],
    model: Models = None,
    data: DataPlace = None,
    out: Out = None,
    against: Against = None,
) -> None:
    """Score a model on benchmarks.

    Give --model, --tasks and --data.

    On several GPUs: torchrun --nproc_per_node 8 -m sq_llava evaluate ...
    """
    if tasks == "help":
        _list_tasks()
        return
    if not model:
        raise typer.BadParameter("give a folder or a Hub id.", param_hint="'--model'")
    with errors_in_one_line():
        _check_places(data, against)
        _check_server_options(server)
        if server["base_url"] is None:
            for each in model:
                check_model_options(each, **settings)
        with loading():
            from sq_llava.checkpoints.convert import VICUNA_SYSTEM_MESSAGE

            quiet_libraries()
        if settings["system_message"] == "vicuna":
            settings["system_message"] = VICUNA_SYSTEM_MESSAGE
        settings |= {"tasks": [name.strip() for name in tasks.split(",")], "data": data}
        settings |= {"judge": _judge_settings(judge), "thinking": SelfQuestioning(**thinking)}
        evaluations = [
            Evaluation(
                model=each,
                out=folder,
                server=None if server["base_url"] is None else ServerSettings(each, **server),
                **settings,
            )
            for each, folder in output_folders(model, out).items()
        ]
        is_whole = _run_all(evaluations, against)
    if not is_whole:
        raise typer.Exit(1)


def _list_tasks() -> None:
    with loading():
        from sq_llava.evaluation.run import TASKS
    for name, task in sorted(TASKS.items()):
        console.print(f"{name:24}{task.title}", markup=False, highlight=False)


def _check_places(data: str | None, against: str | None) -> None:
    """
    Raises:
        ValueError: if the data, or the model to compare with, does not exist.
    """
    if data is None:
        raise ValueError("--data is missing: give a folder, a Hub id, or hub for the tasks' own datasets.")
    if data != "hub" and is_missing_folder(data):
        raise ValueError(f"--data {data}: no such folder, and not the id of a dataset on the Hub (org/name).")
    if against is not None:
        require_folder_or_id(against, "--against")


def _check_server_options(server: dict) -> None:
    """
    Raises:
        ValueError: if there is an option of a server, but no server.
    """
    changed = (each.name for each in fields(ServerSettings) if server.get(each.name, each.default) != each.default)
    if server["base_url"] is None and (name := next(changed, None)) is not None:
        raise ValueError(f"--{name.replace('_', '-')} needs --base-url, the URL of the server.")


def output_folders(models: Sequence[str], out: Path | None) -> dict[str, Path]:
    """
    Model -> its output folder: `out` itself for one model, and a folder in it for each of several.

        >>> output_folders(["a/model", "b/model"], Path("out"))
        {'a/model': PosixPath('out/a-model'), 'b/model': PosixPath('out/b-model')}
    """
    models = list(dict.fromkeys(models))
    names = [Path(model).name for model in models]
    if len(models) == 1:
        return {models[0]: out or DEFAULT_OUT / names[0]}
    if len(set(names)) < len(names):
        names = [model.strip("/").replace("/", "-") for model in models]
    return {model: (out or DEFAULT_OUT) / name for model, name in zip(models, names)}


def _judge_settings(judge: dict) -> JudgeSettings | None:
    if judge["model"] is not None:
        return JudgeSettings(**judge)
    if judge["base_url"] is not None:
        raise ValueError("--judge-base-url needs --judge-model, the name of the model on that server.")
    return None


def _run_all(evaluations: Sequence[Evaluation], against: str | None) -> bool:
    """
    Evaluates the models, compares each with `against` or else with the first, and writes a table of several models.

    Returns:
        As [`_run_and_show`], for all models.
    """
    first, *others = evaluations
    if not others:
        return _run_and_show(first, against)
    from sq_llava.evaluation.comparison import write_overview

    # The limits of the judge and of the server hold for all models together.
    folders = [each.out for each in evaluations]
    is_whole = _run_and_show(replace(first, others=folders), against)
    other: str | Path | None = against
    if against is None:
        other = first.out
    elif not (Path(against) / "results.json").is_file():
        other = first.out / AGAINST
    for each in others:
        is_whole &= _run_and_show(replace(each, others=folders), other)
    if is_first_process():
        overview = write_overview([each.out for each in evaluations], first.out.parent / "models.md")
        messages_console.print(f"Wrote {overview}", markup=False, soft_wrap=True)
    return is_whole


def _run_and_show(evaluation: Evaluation, against: str | Path | None) -> bool:
    """
    Evaluates, and prints the results.

    Args:
        against (`str` or `Path`, *optional*): A model to evaluate first, or the folder of an evaluation. A `Path` is a
            folder that this command writes: in processes other than the first, its files may not be there yet.

    Returns:
        `True` if every example has an answer, and with a judge also a grade. The same must hold for `against`.
    """
    from sq_llava.evaluation.comparison import check_comparable, compare
    from sq_llava.evaluation.run import evaluate as run
    from sq_llava.llm_client.budget import spent_in

    other, others_results = None if against is None else Path(against), []
    with output_lock(evaluation.out, needed=is_first_process()):
        if isinstance(against, str) and (other / "results.json").is_file():
            check_comparable(other, evaluation)
        elif isinstance(against, str):
            other = evaluation.out / AGAINST
            # The limits of the judge hold for both together.
            folders = [evaluation.out, *evaluation.others]
            others_results = run(replace(evaluation, model=against, server=None, out=other, others=folders))
        results = run(evaluation)
        if not results:  # a process other than the first
            return True
        show(results)
        if other is not None:
            differences = compare(other, evaluation.out, tasks=evaluation.tasks)
            show_differences(differences, evaluation.out / "comparison")
    messages_console.print(f"Wrote {evaluation.out}", markup=False, soft_wrap=True)
    if evaluation.server is not None:
        spent = spent_in(evaluation.journals(SERVED), evaluation.server)
        messages_console.print(f"Server, all runs so far: {spent}.", markup=False, soft_wrap=True)
    is_whole = _show_what_is_missing(results, evaluation.out)
    return _show_what_is_missing(others_results, other) and is_whole


def show(results) -> None:
    """Prints the metrics of all tasks."""
    for result in results:
        if not result.metrics:
            continue
        counts = f"{result.num:,} examples, {result.parsed_share:.1%} parsed, {result.num_failed} failed"
        counts += f", {result.num_unjudged} not graded" if result.num_unjudged else ""
        table = _table(f"{result.task}: {counts}", "value", "standard error", "95% interval", "examples")
        for metric in result.metrics:
            error = "" if metric.standard_error is None else f"{metric.standard_error:.4f}"
            interval = "" if metric.interval is None else "{:.4f} to {:.4f}".format(*metric.interval)
            table.add_row(metric.name, f"{metric.value:.4f}", error, interval, f"{metric.num:,}")
        console.print(table)


def show_questions(figures: dict[str, Any]) -> None:
    """Prints the metrics of a model's questions."""
    from sq_llava.evaluation.question_run import metric_rows

    table = _table("Questions of the model", "value")
    for row in metric_rows(figures):
        table.add_row(*row)
    for name, share in figures["types"].items():
        table.add_row(f"questions of type {name}", f"{share:.1%}")
    clip = figures.get("clip", {})
    for name in [name for name in clip if f"{name}_with_another_image" in clip]:
        about = f"CLIP similarity of {name.replace('_', ' ')}"
        table.add_row(f"{about} and their image", f"{clip[name]:.3f}")
        table.add_row(f"{about} and another image", f"{clip[f'{name}_with_another_image']:.3f}")
    console.print(table)


def show_differences(differences, out: Path) -> None:
    """Prints the differences between this run and the one it is compared with."""
    for task in dict.fromkeys(each.task for each in differences):
        table = _table(
            f"{task}, compared with the other", "other", "this run", "difference", "95% interval", "examples"
        )
        for each in differences:
            if each.task == task:
                values = (f"{each.first:.4f}", f"{each.second:.4f}", f"{each.difference:+.4f}")
                table.add_row(each.metric, *values, each.interval, f"{each.num:,}")
        console.print(table)
    if not differences:
        console.print(f"Nothing to compare: see {out / 'comparison.md'}", markup=False, soft_wrap=True)


def _table(title: str, *names: str) -> Table:
    """A table with a row for each metric. Long names are wrapped, so that numbers are never cut off."""
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("metric", overflow="fold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _show_what_is_missing(results, out: Path | None) -> bool:
    """
    Prints what is missing in the results.

    Returns:
        `True` if the results are complete. Without a judge, no grade is missing.
    """
    is_whole = True
    for judge in [result.judge for result in results if result.judge is not None][-1:]:  # it has the sum of all tasks
        messages_console.print(f"{judge['model']}, all runs so far: {judge['spent']}.", markup=False, soft_wrap=True)
    for result in results:
        if result.missing is not None:
            messages_console.print(f"{out}, {result.task}: {result.missing}", markup=False, soft_wrap=True)
        if result.num_unjudged:
            messages_console.print(
                f"[red]{result.task}: {result.num_unjudged} of {result.num} answers have no grade[/red]. Metrics that "
                f"need one leave them out: see judge_error in {escape(str(out / result.task / 'examples.jsonl'))}.",
                soft_wrap=True,
            )
        if result.num_failed:
            place = escape(str(out / result.task / "examples.jsonl"))
            messages_console.print(
                f"[red]{result.task}: {result.num_failed} examples failed[/red]: see error in {place}.", soft_wrap=True
            )
        is_whole &= not (result.num_failed or (result.judge and (result.missing or result.num_unjudged)))
    return is_whole


def check_asking(images: str, image_root: str | None, clip: str | None, **model: Any) -> None:
    """
    Checks that the images, the model and the CLIP model exist. `images` may also be the Hub id of a dataset.

    Raises:
        ValueError: if one of them does not exist.
    """
    if not Path(images).is_file() and is_missing_folder(images):
        raise ValueError(f"{images}: no such folder or file.")
    if image_root is not None:
        require_folder(image_root)
    check_model_options(**model)
    if clip is not None:
        require_folder_or_id(clip, "--clip")


@app.command(
    epilog=examples(
        "sq-llava evaluate-questions --model org/sq-llava-7b --images photos/ --clip openai/clip-vit-base-patch32",
        "sq-llava evaluate-questions --model runs/demo/model --images runs/demo/data/test.json "
        "--image-root runs/demo/images --truth easy_vqa --limit 10",
    )
)
@takes_options
def evaluate_questions(
    settings: Annotated[dict, OptionsOf(QuestionEvaluation)],
    asking: Annotated[dict, OptionsOf(AskSettings)],
    out: Annotated[Path | None, typer.Option(help="Output folder. Default: runs/questions/<model>.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the questions that a model asks.

    The report shows their variety and types, and how many need the image and fit it.
    """
    with errors_in_one_line():
        check_asking(**settings)
        with loading():
            from sq_llava.evaluation.question_run import evaluate_questions as run

            quiet_libraries()
        out = out or Path("runs/questions") / Path(settings["model"]).name
        figures = run(QuestionEvaluation(out=out, settings=AskSettings(**asking), **settings))
    if figures:
        if as_json:
            print(json.dumps(figures, indent=2))
        else:
            show_questions(figures)
        messages_console.print(f"Wrote {out}", soft_wrap=True)
        if figures["num_failed"]:
            messages_console.print(
                f"[red]{figures['num_failed']} images failed[/red]: see error in {out}/asked-*.jsonl."
            )
            raise typer.Exit(1)
