"""The `sq-llava` command.

    sq-llava ask image.png --model runs/demo/model -n 5
    sq-llava answer image.png "what color is the shape?" --model runs/demo/model
    sq-llava chat image.png --model runs/demo/model
    sq-llava merge runs/demo/stage2 --out runs/demo/model
    sq-llava convert llava-hf/llava-1.5-7b-hf --out llava-7b
    sq-llava doctor --config recipes/sq-llava-7b/stage2.yaml
    sq-llava inspect runs/demo/model
    sq-llava push runs/demo/model org/name --dry-run
    sq-llava evaluate --model runs/demo/model --tasks easy_vqa --data runs/demo/data
    sq-llava generate-data llava captions.json --model gpt-4o --out runs/coco
    sq-llava serve runs/demo/model
    sq-llava demo runs/demo/model

Results go to standard output, progress and errors to standard error. Exit codes: 0 fine, 1 wrong input or no
such model (of the doctor: errors in the data; of inspect: a broken folder), 2 wrong usage, 130 stopped by Ctrl-C.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, track

from sq_llava import __version__
from sq_llava.cli.chat import chat
from sq_llava.cli.evaluate import evaluate, evaluate_questions
from sq_llava.cli.generate_data import app as generate_data
from sq_llava.cli.options import (
    Device,
    Dtype,
    LoadIn4Bit,
    LoadIn8Bit,
    MaxNewTokens,
    Model,
    Seed,
    Temperature,
    TopK,
    TopP,
    check_model_options,
    load_model,
)
from sq_llava.cli.page import app as page_commands
from sq_llava.cli.recipes import app as recipes
from sq_llava.cli.serve import serve
from sq_llava.console import console, errors_in_one_line, examples, messages_console
from sq_llava.early_checks import (
    find_images,
    require_dtype,
    require_file,
    require_folder,
    require_model,
    require_new_folder,
    require_recipe,
)
from sq_llava.locations import require_folder_or_id


# torch and transformers are imported inside the commands: `--help` answers at once.

app = typer.Typer(
    help="SQ-LLaVA: a vision-language model that asks as well as it answers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Images = Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        console.print(__version__)
        raise typer.Exit


@app.command(
    epilog=examples(
        "sq-llava ask dog.png --model org/sq-llava-7b -n 5",
        "sq-llava ask photos/ --model runs/demo/model --seed 0 --json > questions.json",
        'sq-llava ask shape.png --model runs/demo/model --after "what color is the shape?"',
    )
)
def ask(
    images: Images,
    model: Model,
    num_questions: Annotated[int, typer.Option("--num-questions", "-n", min=1, help="Questions for each image.")] = 1,
    after: Annotated[
        str | None, typer.Option(help="Let the model answer this first; default: it describes the image.")
    ] = None,
    temperature: Temperature = 1.2,
    top_k: TopK = 300,
    top_p: TopP = 0.95,
    max_new_tokens: MaxNewTokens = 300,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: LoadIn4Bit = False,
    load_in_8bit: LoadIn8Bit = False,
    as_json: AsJson = False,
) -> None:
    """Let the model ask questions about each image."""
    with errors_in_one_line():
        files, assistant = _open(images, model, device, dtype, load_in_4bit, load_in_8bit)

        results = []
        for file in _track(files, "Asking"):
            history = None
            if after is not None:
                first = assistant.answer(file, after, max_new_tokens=max_new_tokens)
                history = [{"role": "user", "content": after}, {"role": "assistant", "content": first}]
            questions = assistant.ask(file, history, num_questions, temperature, top_k, top_p, max_new_tokens, seed)
            results.append({"image": str(file), "questions": questions})
        _show(results, as_json, lambda result: "\n".join(f"  {question}" for question in result["questions"]))


@app.command(
    epilog=examples(
        'sq-llava answer dog.png "What is the dog doing?" --model org/sq-llava-7b',
        'sq-llava answer photos/ "What is it?" --model runs/demo/model --json',
    )
)
def answer(
    images: Images,
    question: Annotated[str, typer.Argument(help="The question, asked of each image.", show_default=False)],
    model: Model,
    max_new_tokens: MaxNewTokens = 512,
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: LoadIn4Bit = False,
    load_in_8bit: LoadIn8Bit = False,
    as_json: AsJson = False,
) -> None:
    """Answer a question about each image, greedily."""
    with errors_in_one_line():
        files, assistant = _open(images, model, device, dtype, load_in_4bit, load_in_8bit)

        results = [
            {"image": str(file), "answer": assistant.answer(file, question, max_new_tokens)}
            for file in _track(files, "Answering")
        ]
        _show(results, as_json, lambda result: f"  {result['answer']}")


app.command(epilog=examples("sq-llava chat dog.png --model org/sq-llava-7b"))(chat)


@app.command(epilog=examples("sq-llava merge runs/sq-llava-7b/stage2 --out runs/sq-llava-7b/merged"))
def merge(
    adapter: Annotated[str, typer.Argument(help="Folder that a training stage wrote.", show_default=False)],
    out: Annotated[str, typer.Option(help="Folder for the plain checkpoint.", show_default=False)],
) -> None:
    """Merge an adapter into its base: a plain checkpoint, with processor, code and card."""
    with errors_in_one_line():
        require_folder(adapter)
        require_new_folder(out)
        from sq_llava.checkpoints.load import merge_adapter

        merge_adapter(adapter, out)
        messages_console.print(f"Wrote {out}")


@app.command(
    epilog=examples(
        "A LoRA of the authors' SQ-LLaVA, on its base:",
        "sq-llava convert sqllava-lora-7b --base base-7b --vision openai/clip-vit-large-patch14-336 --out sq-llava-7b",
        "A whole SQ-LLaVA or LLaVA of the original code:",
        "sq-llava convert llava-v1.5-7b --vision openai/clip-vit-large-patch14-336 --out llava-7b --verify",
        "The LoRA of an original LLaVA:",
        "sq-llava convert llava-v1.5-7b-lora --base vicuna-7b --vision clip-336 --out llava-7b",
        "A projector that stage 1 trained, to go on with stage 2:",
        "sq-llava convert stage1/mm_projector.bin --base vicuna-7b --vision clip-336 --out stage1-7b",
        "A LLaVA of transformers, as it is, and as a start of training with prototypes:",
        "sq-llava convert llava-hf/llava-1.5-7b-hf --out llava-7b",
        "sq-llava convert llava-hf/llava-1.5-7b-hf --prototypes paper --out start-7b",
    )
)
def convert(
    source: Annotated[str, typer.Argument(help="Folder, file of a projector, or a Hub id.", show_default=False)],
    out: Annotated[str, typer.Option(help="New folder for the checkpoint.", show_default=False)],
    base: Annotated[
        str | None, typer.Option(help="Language model: folder or Hub id. Default: as the source names it, if here.")
    ] = None,
    vision: Annotated[
        str | None, typer.Option(help="Vision tower: folder or Hub id. Default: as the source names it, if here.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (as the language model), float32, bfloat16 or float16.")] = "auto",
    prototypes: Annotated[
        str | None, typer.Option(help="Put a new extractor into a LLaVA: paper or released.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of a file of weights.")] = "5GB",
    verify: Annotated[bool, typer.Option("--verify", help="Then compare the logits with the source's.")] = False,
    verify_dtype: Annotated[str, typer.Option(help="float32, or bfloat16 if the memory is short.")] = "float32",
    verification_file: Annotated[
        bool, typer.Option("--verification-file", help="With --verify: write OUT/verification.json as well.")
    ] = False,
) -> None:
    """Convert a released SQ-LLaVA or LLaVA: a whole checkpoint, with processor, code and card."""
    with errors_in_one_line():
        if not Path(source).expanduser().is_file():
            require_folder_or_id(source, "the source")
        for option, given in (("--base", base), ("--vision", vision)):
            if given is not None:
                require_folder_or_id(given, option)
        require_new_folder(Path(out).expanduser())
        require_dtype(dtype, "--dtype")
        require_dtype(verify_dtype, "--verify-dtype", automatic=False)
        with messages_console.status("Reading names and shapes"):
            from transformers.utils import logging

            from sq_llava.checkpoints import convert as conversion
            from sq_llava.checkpoints.layouts import recognise

            logging.set_verbosity_error()
            layout = recognise(source, base, vision, download=True)
            planned = conversion.plan(layout, out, dtype, prototypes, max_shard_size)
            if verify:
                from sq_llava.checkpoints import verify as verification

                verification.require_memory(out, planned.size // planned.model.dtype.itemsize, verify_dtype)
                unequal = verification.unequal_name(out)
        for line in conversion.describe(planned):
            messages_console.print(line, markup=False, soft_wrap=True)
        with Progress(console=messages_console, transient=True) as progress:
            conversion.write(planned, progress)
        messages_console.print(f"Wrote {out}", markup=False, soft_wrap=True)
        if verify:
            _verify_conversion(layout, planned.out, unequal, verify_dtype, verification_file)


def _verify_conversion(layout, out: Path, unequal: Path, dtype: str, keep_report: bool) -> None:
    from sq_llava.checkpoints import verify as verification

    with messages_console.status("Comparing with the source"):
        result = verification.verify(layout, out, dtype)
    verification.print_verification(result, console)
    if keep_report:
        (out / "verification.json").write_text(json.dumps(result.to_json(), indent=2) + "\n")
    if not result.passed:
        out.rename(unequal)
        messages_console.print(f"Moved to {unequal}", markup=False, soft_wrap=True)
        raise typer.Exit(1)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog=examples(
        "sq-llava doctor --config recipes/sq-llava-7b/stage2.yaml",
        "sq-llava doctor --config recipe.yaml --dataset_path mine.json --image_root images --json > findings.json",
        "sq-llava doctor --config recipe.yaml --fix mended",
    ),
)
def doctor(
    context: typer.Context,
    config: Annotated[str | None, typer.Option(help="Recipe; any setting of it may follow, and wins.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Look at so many rows, spread evenly; default: at all.")
    ] = None,
    images: Annotated[bool, typer.Option(help="Open the image files.")] = True,
    lengths: Annotated[bool, typer.Option(help="Count the tokens.")] = True,
    fix: Annotated[Path | None, typer.Option(help="New folder for the rows without errors.")] = None,
    num_proc: Annotated[int | None, typer.Option(min=1, help="Processes; default: one for each core.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check the data of a recipe: every row, image header and length. Exit code 1: there are errors."""
    with errors_in_one_line():
        if config is not None:
            require_recipe(config)
        if fix is not None:
            require_new_folder(fix)
            if limit is not None:
                raise ValueError("--fix is given with --limit, which looks at some rows only: leave --limit out.")
        with messages_console.status("Opening the data"):
            from sq_llava.doctor.check import data_check, examine
            from sq_llava.doctor.report import print_preview, print_report, write_sound_rows
            from sq_llava.training.settings import parse_settings

            # Nothing is trained: a recipe for GPUs can be checked anywhere.
            settings = [*(["--config", config] if config else []), *context.args, "--use_cpu", "true"]
            recipe = parse_settings(settings)
            check = data_check(*recipe, read_images=images, measure_lengths=lengths)
        with Progress(console=messages_console, transient=True) as progress:
            report = examine(check, progress, limit, num_proc)
        if as_json:
            print(json.dumps(report.to_json(), indent=2))
        else:
            print_report(report, console)
            if images:
                print_preview(check, report, recipe[1].seed, console)
        if fix is not None:
            entries = write_sound_rows(check, report, fix)
            messages_console.print(
                f"Wrote {fix}. Its sources, in the order of the recipe's:", markup=False, soft_wrap=True
            )
            for entry in entries:
                messages_console.print(f"  - {json.dumps(entry)}", markup=False, soft_wrap=True)
    if report.num_errors:
        raise typer.Exit(1)


@app.command(
    epilog=examples(
        "sq-llava inspect runs/sq-llava-7b/merged",
        "sq-llava inspect liuhaotian/llava-v1.5-7b --json > what.json",
    )
)
def inspect(
    folder: Annotated[
        str, typer.Argument(help="A folder, or a Hub id that is in the local cache.", show_default=False)
    ],
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint is, holds and lacks; no weights are read. Exit code 1: it is broken, or not known."""
    with errors_in_one_line():
        require_folder_or_id(folder)
        with messages_console.status("Reading headers"):
            from sq_llava.checkpoints import inspection

            found = inspection.inspect(folder)
        if as_json:
            print(json.dumps(found.to_json(), indent=2))
        else:
            inspection.print_inspection(found, console)
    if not found.sound:
        raise typer.Exit(1)


@app.command(
    epilog=examples(
        "sq-llava push runs/demo/model org/name --dry-run",
        "sq-llava push runs/sq-llava-7b/stage2 org/name --private --eval-results results.json",
        "sq-llava push runs/sq-llava-7b/stage2 org/name-lora --adapter-only --base-model org/base",
    )
)
def push(
    folder: Annotated[Path, typer.Argument(help="Checkpoint, or the output of a stage.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(help="Where to: org/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Create it private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; default: main.")] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="An adapter as it is, for PEFT; default: merged.")
    ] = False,
    base_model: Annotated[str | None, typer.Option(help="With --adapter-only: Hub id of its base.")] = None,
    eval_results: Annotated[Path | None, typer.Option(help="JSON of an evaluation, for the card.")] = None,
    license: Annotated[str | None, typer.Option(help="For the card, such as apache-2.0.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="For the card, such as en; can be repeated.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code of the folder that is not this library's.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show all, send nothing.")] = False,
) -> None:
    """Publish a model on the Hub, with a card, and prove that others can load it."""
    with errors_in_one_line():
        require_folder(folder)
        if eval_results is not None:
            require_file(eval_results, "--eval-results")
        require_model(str(folder))
        from huggingface_hub import HfApi

        from sq_llava.checkpoints import push as publishing
        from sq_llava.checkpoints.card import read_results
        from sq_llava.checkpoints.publication import prepare, print_publication

        results = read_results(eval_results) if eval_results else None
        about_model = {"results": results, "license": license, "languages": language or []}
        _check_results_are_of(folder, eval_results, results or {})
        api = None if dry_run else HfApi()
        if api is not None:
            publishing.check_rights(api, repo_id, private)
        with prepare(folder, repo_id, adapter_only, base_model, api, trust_remote_code) as publication:
            print_publication(publication, messages_console)
            publishing.check_card(publication, dry_run, **about_model)
            with messages_console.status("Loading it in a fresh process"):
                publishing.check_loading(publication)
            if api is None:
                messages_console.print("It loads, and answers. Nothing was sent.")
                return
            commit = publishing.upload(api, publication, private, revision, message)
            messages_console.print(f"Uploaded as commit {commit}. It is fetched again, and compared.", soft_wrap=True)
            publishing.check_published(api, publication, commit)
            url = publishing.publish_card(api, publication, commit, revision, **about_model)
        messages_console.print(f"Published, equal to the last bit: {url}", markup=False, soft_wrap=True)


def _check_results_are_of(folder: Path, file: Path | None, results: dict) -> None:
    """Of an adapter, others may have been evaluated than the one that goes up: it, or what it is merged to."""
    recorded = results.get("model_hash")
    if recorded is None or not (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return
    from sq_llava.evaluation.results import hash_of_model

    found = hash_of_model(str(folder))
    if found != recorded:
        raise ValueError(
            f"{file}: model_hash is {recorded}, but {folder} has {found}: the results are of other weights, or a JSON "
            "file in that folder has changed since: evaluate it, or leave --eval-results out."
        )


app.command(
    epilog=examples(
        "sq-llava evaluate --model runs/demo/model --tasks easy_vqa --data runs/demo/data",
        "sq-llava evaluate --model org/sq-llava-7b --tasks pope,textvqa --data playground/data/eval --limit 100",
        "torchrun --nproc_per_node 8 -m sq_llava evaluate --model org/sq-llava-7b --tasks vqav2 --data hub",
    )
)(evaluate)
app.command(
    epilog=examples(
        "sq-llava evaluate-questions --model org/sq-llava-7b --images photos/ --clip openai/clip-vit-base-patch32",
        "sq-llava evaluate-questions --model runs/demo/model --images runs/demo/data/test.json --truth easy_vqa "
        '--image-root IMAGES --after "what color is the shape?"',
    )
)(evaluate_questions)
app.command(
    epilog=examples(
        "sq-llava serve runs/demo/model",
        "SECRET=... sq-llava serve org/sq-llava-7b --host 0.0.0.0 --api-key-env SECRET",
    )
)(serve)
app.add_typer(page_commands)
app.add_typer(generate_data)
app.add_typer(recipes)


def _open(images: list[Path], model: str, device: str | None, dtype: str, load_in_4bit: bool, load_in_8bit: bool):
    """The image files and the [`Assistant`], once what is wrong with either has been told: cheap checks first."""
    files = find_images(images)
    check_model_options(model, device, dtype)
    from sq_llava.data.images import require_whole_images

    require_whole_images(files)
    return files, load_model(model, device, dtype, load_in_4bit, load_in_8bit)


def _track(files: list[Path], description: str):
    return track(files, description, console=messages_console, transient=True, disable=len(files) == 1)


def _show(results: list[dict], as_json: bool, text_of) -> None:
    if as_json:
        json.dump(results, sys.stdout, indent=2, ensure_ascii=False)
        print()
        return
    for result in results:
        if len(results) > 1:
            console.print(result["image"], style="bold", markup=False)
        console.print(text_of(result), markup=False, highlight=False)
