"""The command line of the feature cache.

    sq-llava cache-features --config recipe.yaml --vision_lora_r 0 --output features --max-size 200GB

The work is done by `sq_llava/feature_building.py`, which is imported inside, so that `--help` answers at once.
"""

from pathlib import Path
from typing import Annotated

import typer

from sq_llava.console import errors_in_one_line, messages_console
from sq_llava.early_checks import require_recipe
from sq_llava.run_note import command_line


def cache_features(
    context: typer.Context,
    config: Annotated[str | None, typer.Option(help="Recipe; any setting of it may follow, and wins.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder; default: the recipe's feature_cache.")] = None,
    max_size: Annotated[str | None, typer.Option(help="Most that the folder may take, such as 200GB.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that the tower is given at a time.")] = 32,
) -> None:
    """Run the frozen vision tower once over all images of a recipe, for training to read the features."""
    with errors_in_one_line():
        if config is not None:
            require_recipe(config)
        from sq_llava import feature_building
        from sq_llava.settings import parse_settings

        max_bytes = None if max_size is None else feature_building.parse_size(max_size)
        recipe = parse_settings([*(["--config", config] if config else []), *context.args])
        folder = output or recipe[0].feature_cache
        if folder is None:
            raise ValueError("Neither --output nor the recipe's feature_cache says where to write: give one of them.")
        command = command_line()
        feature_building.build(recipe, Path(folder), max_bytes, batch_size, command, messages_console)
