"""`sq-llava generate-data curate`: its options and its output."""

from pathlib import Path
from typing import Annotated

import typer

from sq_llava.cli.generate_data import SERVER, DryRun, ShardOption, end_run, print_estimate, print_reasons
from sq_llava.cli.options import OptionsOf, check_model_options, quiet_libraries, takes_options
from sq_llava.console import console, errors_in_one_line, examples, loading
from sq_llava.early_checks import require_file, require_folder
from sq_llava.generation.rows import Shard
from sq_llava.generation.settings import PROMPTS, CurateSettings, DescribeSettings, PromptFolder
from sq_llava.llm_client.settings import ChatSettings
from sq_llava.output import command_line


REPAIR = "Repair of the descriptions (needs --repair-model)"
# Settings of the describing server that also apply to the repairing one.
SHARED = ("temperature", "top_p", "max_tokens", "attempts", "concurrency", "timeout")

app = typer.Typer()


@app.command(
    epilog=examples(
        "sq-llava generate-data curate photos --describer org/sq-llava-7b --out described",
        "sq-llava generate-data curate photos --model gpt-4o --repair-model gpt-4o-mini --max-requests 10000 "
        "--repair-max-requests 5000 --out described",
        "After a review in described/review.html, which saves decisions.json:",
        "sq-llava generate-data curate photos --describer org/sq-llava-7b --out described --decisions decisions.json",
        "On several machines, each with its own server:",
        "sq-llava generate-data curate photos --model NAME --base-url http://127.0.0.1:8000/v1 --out /shared/photos "
        "--shard 3/8",
    )
)
@takes_options
def curate(
    settings: Annotated[dict, OptionsOf(CurateSettings)],
    local: Annotated[dict, OptionsOf(DescribeSettings)],
    server: Annotated[dict, OptionsOf(ChatSettings, panel=SERVER, model=None)],
    repair: Annotated[
        dict,
        OptionsOf(
            ChatSettings,
            "repair",
            panel=REPAIR,
            without=(*SHARED, "base_url", "max_tokens_field", "image_tokens"),
            model=None,
        ),
    ],
    repair_base_url: Annotated[
        str | None, typer.Option(help="URL of the server for repairs. Default: --base-url.", rich_help_panel=REPAIR)
    ] = None,
    repair_max_tokens_field: Annotated[
        str | None,
        typer.Option(
            help="Like --max-tokens-field, for the server for repairs. Default: --max-tokens-field.",
            rich_help_panel=REPAIR,
        ),
    ] = None,
    describer: Annotated[
        str | None, typer.Option(help="SQ-LLaVA that describes: folder or Hub id. For a model on a server: --model.")
    ] = None,
    prompts: PromptFolder = PROMPTS / "curate",
    shard: ShardOption = None,
    dry_run: DryRun = False,
) -> None:
    """Make detailed descriptions of images.

    A model describes each image. Another model can repair the texts. Rules filter them, and a person checks them.
    """
    with errors_in_one_line():
        _check_curation(settings, local, server, describer, prompts)
        with loading():
            from sq_llava.generation import curate as curating

            quiet_libraries()
        run = CurateSettings(shard=Shard.parse(shard), **settings)
        repair |= {name: server[name] for name in SHARED} | {
            "base_url": repair_base_url or server["base_url"],
            "max_tokens_field": repair_max_tokens_field or server["max_tokens_field"],
        }
        models = _models(run, describer, local, server, repair, prompts, dry_run)
        if dry_run:
            _print_estimates(*curating.estimate(run, *models))
            return
        made = curating.curate(run, *models, command_line())
    _show_curated(made, run.out)


def _models(
    run: CurateSettings,
    describer: str | None,
    local: dict,
    server: dict,
    repair: dict,
    prompts: Path,
    reads_only: bool,
) -> tuple:
    """The model that describes, and the one that repairs, if there is one."""
    from sq_llava.generation.curate import ANSWERS, REPAIRS
    from sq_llava.generation.describing import LocalDescriber, Prompts, Repairer, ServerDescriber
    from sq_llava.llm_client.client import ChatClient

    texts = Prompts.read(prompts)

    def client(journal: str, **chat) -> ChatClient:
        return ChatClient(ChatSettings(**chat), run.out / run.shard.name(journal), reads_only=reads_only)

    if describer is None:
        looks = ServerDescriber(client(ANSWERS, **server), texts, local["short"])
    else:
        journal = run.out / run.shard.name("descriptions.jsonl")
        looks = LocalDescriber(describer, DescribeSettings(**local), texts, journal)
    if repair["model"] is None:
        return looks, None
    return looks, Repairer(client(REPAIRS, option_prefix="--repair-", **repair), texts)


def _print_estimates(num_images: int, num_left: int, estimates: dict) -> None:
    console.print(f"{num_left:,} of {num_images:,} images are not described yet.", highlight=False)
    for name, estimate in estimates.items():
        console.print(f"{name}:", highlight=False, markup=False)
        print_estimate(estimate)


def _check_curation(settings: dict, local: dict, server: dict, describer: str | None, prompts: Path) -> None:
    if (describer is None) == (server["model"] is None):
        raise ValueError("Give either --describer (a model on this machine) or --model (a model on a server).")
    require_folder(settings["images"])
    if settings["decisions"] is not None:
        require_file(settings["decisions"], "--decisions")
    require_folder(prompts)
    if describer is not None:
        check_model_options(describer, local["device"], local["dtype"])


def _show_curated(made, out: Path) -> None:
    """Prints what was made of the images. Exit code 1: something is missing."""
    counts = f"{made.num_images:,} images, {made.num_continued:,} described in two steps, {made.num_kept:,} kept"
    if made.num_refused:
        console.print(
            f"{made.num_refused:,} descriptions stay as they were, because their repair was refused.", highlight=False
        )
    left_out = "Left out:" if made.reasons else "None was left out."
    console.print(f"{counts}, {made.num_checked:,} of these checked by a person. {left_out}", highlight=False)
    print_reasons(made.reasons)
    end_run(out, made.num_failed, made.num_open, made.stopped, made.spent)
