"""The commands for checkpoints: `sq-llava merge`, `convert`, `inspect` and `push`."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress

from sq_llava.cli.options import AsJson
from sq_llava.console import console, errors_in_one_line, examples, loading, messages_console
from sq_llava.early_checks import require_dtype, require_file, require_folder, require_new_folder
from sq_llava.locations import find_config, require_folder_or_id
from sq_llava.output import new_folder_lock, write_json


if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from sq_llava.checkpoints.publication import Publication


app = typer.Typer()


@app.command(
    epilog=examples(
        "sq-llava merge runs/demo/stage2 --out runs/demo/merged",
        "sq-llava merge runs/sq-llava-7b/stage2 --out runs/sq-llava-7b/merged",
    )
)
def merge(
    adapter: Annotated[str, typer.Argument(help="Adapter folder, written by a training stage.", show_default=False)],
    out: Annotated[str, typer.Option(help="New folder for the plain checkpoint.", show_default=False)],
) -> None:
    """Merge an adapter into its base model.

    The result is a plain checkpoint with processor, code and model card.
    """
    with errors_in_one_line():
        require_folder(adapter)
        require_new_folder(out)
        with loading():
            from sq_llava.checkpoints.load import merge_adapter
        merge_adapter(adapter, out)
        messages_console.print(f"Wrote {out}")


@app.command(
    epilog=examples(
        "LoRA weights of the authors' SQ-LLaVA. base-7b is the folder of their base model:",
        "sq-llava convert sqllava-lora-7b --base base-7b --vision openai/clip-vit-large-patch14-336 --out sq-llava-7b",
        "A whole SQ-LLaVA or LLaVA, saved by the original code:",
        "sq-llava convert llava-v1.5-7b --vision openai/clip-vit-large-patch14-336 --out llava-7b --verify",
        "LoRA weights of an original LLaVA:",
        "sq-llava convert llava-v1.5-7b-lora --base vicuna-7b --vision clip-336 --out llava-7b",
        "A projector from stage 1, to start stage 2 from:",
        "sq-llava convert stage1/mm_projector.bin --base vicuna-7b --vision clip-336 --out stage1-7b",
        "A LLaVA from transformers, as it is or with untrained prototypes:",
        "sq-llava convert llava-hf/llava-1.5-7b-hf --out llava-7b",
        "sq-llava convert llava-hf/llava-1.5-7b-hf --prototypes paper --out start-7b",
    )
)
def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint folder, projector file or Hub id.", show_default=False)],
    out: Annotated[str, typer.Option(help="New folder for the checkpoint.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option(help="Language model: folder or Hub id. Default: the one named in the source, if available."),
    ] = None,
    vision: Annotated[
        str | None,
        typer.Option(help="Vision tower: folder or Hub id. Default: the one named in the source, if available."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Data type: auto (as the language model), float32, bfloat16 or float16.")
    ] = "auto",
    prototypes: Annotated[
        str | None,
        typer.Option(
            help="Add untrained prototypes to a LLaVA. paper: as in the paper. released: as in the released code."
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of a weights file.")] = "5GB",
    verify: Annotated[bool, typer.Option("--verify", help="Compare the result's logits with the source's.")] = False,
    verify_dtype: Annotated[
        str, typer.Option(help="Data type for --verify: float32, bfloat16 or float16.")
    ] = "float32",
    verification_file: Annotated[
        bool, typer.Option("--verification-file", help="With --verify: also write OUT/verification.json.")
    ] = False,
) -> None:
    """Convert a released SQ-LLaVA or LLaVA for this library.

    The result is a plain checkpoint with processor, code and model card.
    """
    with errors_in_one_line(), ExitStack() as locks:
        _check_places(source, base, vision, out)
        require_dtype(dtype, "--dtype")
        require_dtype(verify_dtype, "--verify-dtype", automatic=False)
        locks.enter_context(new_folder_lock(out))
        with loading("Reading names and shapes"):
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


def _check_places(source: str, base: str | None, vision: str | None, out: str) -> None:
    if not Path(source).expanduser().is_file():
        require_folder_or_id(source, "the source")
    for option, given in (("--base", base), ("--vision", vision)):
        if given is not None:
            require_folder_or_id(given, option)
    require_new_folder(Path(out).expanduser())


def _verify_conversion(layout, out: Path, unequal: Path, dtype: str, keep_report: bool) -> None:
    from sq_llava.checkpoints import verify as verification

    with messages_console.status("Comparing with the source"):
        result = verification.verify(layout, out, dtype)
    verification.print_verification(result, console)
    if keep_report:
        write_json(out / "verification.json", result.to_json())
    if not result.passed:
        out.rename(unequal)
        messages_console.print(f"Moved to {unequal}", markup=False, soft_wrap=True)
        raise typer.Exit(1)


@app.command(
    epilog=examples(
        "sq-llava inspect runs/demo/model",
        "sq-llava inspect liuhaotian/llava-v1.5-7b --json > llava.json",
    )
)
def inspect(
    folder: Annotated[str, typer.Argument(help="Folder, or a Hub id that is in the local cache.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Describe a checkpoint: its kind, its parts, and what is missing.

    No weights are read. Exit code 1: the checkpoint is broken or of an unknown kind.
    """
    with errors_in_one_line():
        require_folder_or_id(folder)
        with loading("Reading headers"):
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
        "With a Space that shows the chat page for the model:",
        "sq-llava push runs/demo/model org/name --space",
    )
)
def push(
    folder: Annotated[
        Path, typer.Argument(help="Checkpoint folder, or output folder of a training stage.", show_default=False)
    ],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub: org/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch on the Hub. Default: main.")] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Upload an adapter without merging it, for PEFT.")
    ] = False,
    base_model: Annotated[str | None, typer.Option(help="With --adapter-only: Hub id of the base model.")] = None,
    eval_results: Annotated[
        Path | None, typer.Option(help="results.json of an evaluation, for the model card.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="License for the model card, e.g. apache-2.0.")] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="Language for the model card, e.g. en. Can be repeated.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    no_samples: Annotated[
        bool, typer.Option("--no-samples", help="Do not let the model answer and ask for the model card.")
    ] = False,
    space: Annotated[
        bool, typer.Option("--space", help="Also publish the chat page as a Space of the same name.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Publish and run code that differs from this library's.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show everything, but upload nothing.")] = False,
) -> None:
    """Publish a model on the Hub with a model card, and check that others can load it."""
    with errors_in_one_line():
        require_folder(folder)
        if eval_results is not None:
            require_file(eval_results, "--eval-results")
        if space and revision is not None:
            raise ValueError(f"--space shows the model of the branch main: remove --revision {revision}.")
        find_config(folder)
        from huggingface_hub import HfApi

        from sq_llava.checkpoints import push as publishing
        from sq_llava.checkpoints.card import read_results
        from sq_llava.checkpoints.publication import prepare, print_publication
        from sq_llava.checkpoints.space import check_space

        results = read_results(eval_results) if eval_results else None
        about_model = {"results": results, "license": license, "languages": language or []}
        _check_results_are_of(folder, eval_results, results or {})
        api = None if dry_run else HfApi()
        if api is not None:
            publishing.check_rights(api, repo_id, private)
            if space:
                check_space(api, repo_id)
        with prepare(folder, repo_id, adapter_only, base_model, api, trust_remote_code) as publication:
            print_publication(publication, messages_console)
            publishing.check_card(publication, dry_run, **about_model)
            space_folder = _lay_out_space(publication) if space else None
            with messages_console.status("Loading the model in a new process"):
                samples = publishing.check_loading(publication, with_samples=not no_samples)
            _print_samples(samples)
            if api is None:
                if space:
                    _print_needs(publication, private, "https://huggingface.co")
                messages_console.print("The model loads and answers. Nothing was uploaded.")
                return
            commit = publishing.upload(api, publication, private, revision, message)
            messages_console.print(f"Uploaded as commit {commit}. Downloading it again to compare.", soft_wrap=True)
            publishing.check_published(api, publication, commit)
            url = publishing.publish_card(api, publication, commit, revision, samples=samples, **about_model)
            messages_console.print(f"Published, identical to the local files: {url}", markup=False, soft_wrap=True)
            if space_folder is not None:
                _publish_space(api, publication, space_folder, commit)


def _print_samples(samples: dict | None) -> None:
    if samples is not None:
        messages_console.print(f"For the card, the model answers: {samples['answer']}", markup=False, soft_wrap=True)
        for question in samples["questions"]:
            messages_console.print(f"and asks: {question}", markup=False, soft_wrap=True)


def _lay_out_space(publication: "Publication") -> Path:
    from sq_llava.checkpoints.space import lay_out_space, print_space

    folder = publication.workspace / "space"
    print_space(publication.repo_id, lay_out_space(folder, publication.repo_id), messages_console)
    return folder


def _publish_space(api: "HfApi", publication: "Publication", folder: Path, commit: str) -> None:
    from sq_llava.checkpoints.space import publish_space

    private = bool(api.model_info(publication.repo_id).private)
    url = publish_space(api, publication.repo_id, folder, commit, private)
    messages_console.print(f"Published the Space, which is built now: {url}", markup=False, soft_wrap=True)
    _print_needs(publication, private, api.endpoint)


def _print_needs(publication: "Publication", private: bool, endpoint: str) -> None:
    from sq_llava.checkpoints.space import what_the_space_needs

    settings = f"{endpoint}/spaces/{publication.repo_id}/settings"
    for line in what_the_space_needs(publication.size, private, settings):
        messages_console.print(line, markup=False, soft_wrap=True)


def _check_results_are_of(folder: Path, file: Path | None, results: dict) -> None:
    """
    Raises:
        ValueError: if the results of a plain checkpoint belong to other weights. Adapters are not checked, because
            the results may belong to the merged model.
    """
    recorded = results.get("model_hash")
    if recorded is None or not (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return
    from sq_llava.evaluation.results import hash_of_model

    found = hash_of_model(str(folder))
    if found != recorded:
        raise ValueError(
            f"{file}: model_hash is {recorded}, but {folder} has {found}. The results belong to other weights, or a "
            "JSON file in that folder was changed. Evaluate the model again, or remove --eval-results."
        )
