"""Collects the files that a push publishes: only those that a model needs, without local paths in them.

    with prepare("runs/demo/model", "org/name") as publication:
        print_publication(publication, console)

A temporary folder holds new files, and links to files that are not changed. The upload is in
`sq_llava/checkpoints/push.py`.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from sq_llava.checkpoints.card import EXAMPLE_IMAGE, save_example
from sq_llava.checkpoints.provenance import PROVENANCE_FILE, public_name, read_provenance
from sq_llava.checkpoints.trust import changed_code, foreign_code
from sq_llava.locations import base_of_adapter, fetch_code, hub_errors, is_adapter, is_hub_id
from sq_llava.output import temporary_folder
from sq_llava.resources import CODE_FILES


COMMON_FILES = (
    "processor_config.json", "preprocessor_config.json", "tokenizer*.json", "tokenizer.model", "chat_template.jinja",
    "special_tokens_map.json", "added_tokens.json", PROVENANCE_FILE, "LICENSE*", *CODE_FILES, EXAMPLE_IMAGE,
)  # fmt: skip
# transformers saves named chat templates in this folder.
NAMED_TEMPLATES = "additional_chat_templates"
CHECKPOINT_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# Files of an earlier model in the repository. They are deleted, because they could be loaded instead of the new ones.
STALE_FILES = (*CHECKPOINT_FILES, *ADAPTER_FILES, "pytorch_model*", "adapter_model.bin")
MACHINE_PATH = re.compile(r"(?:/|~|[A-Za-z]:\\)[^\s/\\]+[/\\]\S*")


@dataclass
class Publication:
    """
    The files to upload, and notes about them.

    Attributes:
        workspace (`Path`): Temporary folder for this push.
        folder (`Path`): Folder inside it with exactly the files to upload, or links to them.
        files (`dict[str, int]`): Size in bytes of each file in it.
        left_out (`list[str]`): Files and folders of the source that are not published.
        notes (`list[str]`): Messages for the user.
        base, base_revision (`str`, *optional*): Folder or Hub id of an adapter's base, and its commit.
    """

    repo_id: str
    workspace: Path
    folder: Path
    files: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    base: str | None = None
    base_revision: str | None = None

    @property
    def size(self) -> int:
        return sum(self.files.values())


@contextmanager
def prepare(
    source: str | Path,
    repo_id: str,
    adapter_only: bool = False,
    base_model: str | None = None,
    api: HfApi | None = None,
    trust_remote_code: bool = False,
) -> Iterator[Publication]:
    """
    Collects the files to upload in a temporary folder, which is removed at the end of the `with`.

    Args:
        source: A plain checkpoint, or the output of a training stage.
        adapter_only (`bool`): Publish an adapter as it is, for PEFT. Otherwise it is merged into its base.
        base_model (`str`, *optional*): Hub id of an adapter's base.
        api (`HfApi`, *optional*): Used to find the commit of the base. Without it, no request is sent to the Hub.
        trust_remote_code (`bool`): Publish and run code that differs from this library's.

    Raises:
        ValueError: if the folder cannot be published, for example because of a local path in a configuration.
    """
    source = Path(source).expanduser()
    _check_request(source, repo_id, adapter_only, base_model)
    # These imports load torch and transformers. The errors before them come at once.
    from sq_llava.checkpoints.load import merge_adapter, require_kind, require_whole

    require_kind(source)
    require_whole(source, trust_remote_code=trust_remote_code)
    read_provenance(source)  # may be damaged; it is needed for the card
    with temporary_folder("sq-llava-push-") as workspace:
        publication = Publication(repo_id, workspace, workspace / "publication")
        publication.folder.mkdir()
        if is_adapter(source) and not adapter_only:
            publication.notes.append(
                f"The adapter {source} is merged into its base. To publish it unmerged, use --adapter-only."
            )
            merge_adapter(str(source), str(workspace / "merged"))
            source = workspace / "merged"
        _lay_out(source, publication)
        if adapter_only:
            _name_base(publication, source, base_model, api)
        _refuse_machine_paths(publication)
        if not trust_remote_code:
            _refuse_other_code(publication, source, with_hub=api is not None)
        files = sorted(file for file in publication.folder.rglob("*") if file.is_file())
        publication.files = {file.relative_to(publication.folder).as_posix(): file.stat().st_size for file in files}
        if api is not None:
            _require_space(publication)
        yield publication


def _require_space(publication: Publication) -> None:
    """Requires space for the comparison, which downloads the uploaded files into the workspace."""
    folder = publication.workspace.parent
    free = shutil.disk_usage(folder).free
    if free < publication.size:
        raise ValueError(
            f"{folder} has {decimal(free)} left, but the comparison downloads {decimal(publication.size)}. Free some "
            "space, or set the variable TMPDIR to a folder with more space."
        )


def _check_request(source: Path, repo_id: str, adapter_only: bool, base_model: str | None) -> None:
    for name, given in (("the repository", repo_id), ("--base-model", base_model or "org/base")):
        try:
            validate_repo_id(given)
        except HFValidationError as error:
            raise ValueError(f"{given!r} ({name}) is not a Hub id such as org/name: {error}") from error
        if "/" not in given:
            raise ValueError(f"{given!r} ({name}) is not a Hub id such as org/name: the owner is missing.")
    if not (is_adapter(source) or (source / "config.json").is_file()):
        raise ValueError(f"{source} holds neither config.json nor adapter_config.json. Give a folder with a model.")
    if adapter_only and not is_adapter(source):
        raise ValueError(f"{source} is not an adapter. Remove --adapter-only.")
    if base_model is not None and not adapter_only:
        raise ValueError(
            f"--base-model is {base_model}, but it needs --adapter-only; otherwise the adapter is merged."
        )


def _lay_out(source: Path, publication: Publication) -> None:
    """Links the files to publish. `config.json` is written again without local paths."""
    wanted = COMMON_FILES + (ADAPTER_FILES if is_adapter(source) else CHECKPOINT_FILES)
    for file in sorted(source.iterdir()):
        target = publication.folder / file.name
        if file.is_dir() and file.name == NAMED_TEMPLATES:
            target.mkdir()
            for template in file.glob("*.jinja"):
                (target / template.name).symlink_to(template.resolve())
        elif file.is_dir() or not any(fnmatch(file.name, pattern) for pattern in wanted):
            publication.left_out.append(file.name + "/" * file.is_dir())
        elif file.name == "config.json":
            config = json.loads(file.read_text())
            for part in (config, *(value for value in config.values() if isinstance(value, dict))):
                name = part.get("_name_or_path")
                if name and name != public_name(name):
                    part["_name_or_path"] = public_name(name)
                    publication.notes.append(f"config.json: _name_or_path {name} is published as {public_name(name)}.")
            target.write_text(json.dumps(config, indent=2) + "\n")
        else:
            target.symlink_to(file.resolve())
    if not (publication.folder / EXAMPLE_IMAGE).exists():
        save_example(publication.folder / EXAMPLE_IMAGE)


def _name_base(publication: Publication, source: Path, base_model: str | None, api: HfApi | None) -> None:
    """Writes the Hub id and the commit of the base into an adapter's configuration, and `AutoModel` as its class."""
    publication.base = base_of_adapter(source)
    if base_model is None and not is_hub_id(publication.base):
        raise ValueError(
            f"{source}/adapter_config.json: base_model_name_or_path is {publication.base}, a folder on this machine. "
            "Push that folder first, then give its Hub id as --base-model org/base."
        )
    file = publication.folder / "adapter_config.json"
    config = json.loads(file.read_text())
    name = base_model or publication.base
    config["base_model_name_or_path"] = name
    trained_on = config.get("revision")
    if is_hub_id(publication.base):
        publication.base_revision = trained_on
        trained_on = trained_on if name == publication.base else None  # another repository has other commits
    # The stage wrote a class of this library. AutoPeftModel imports the class that is named here.
    config["auto_mapping"] = {"base_model_class": "AutoModel", "parent_library": "transformers"}
    if api is not None:
        with hub_errors(f"The base {name} was not found on the Hub"):
            newest = api.model_info(name).sha
            config["revision"] = api.model_info(name, revision=trained_on).sha if trained_on else newest
        if config["revision"] != newest:
            publication.notes.append(
                f"The base is {name} at commit {config['revision']}. Its newest commit is {newest}."
            )
        if name == publication.base:
            publication.base_revision = config["revision"]
    file.unlink()  # a link to the source
    file.write_text(json.dumps(config, indent=2) + "\n")


def _refuse_machine_paths(publication: Publication) -> None:
    for file in publication.folder.iterdir():
        if file.name.endswith(("config.json", "index.json")):
            content = json.loads(file.read_text())
        elif file.name == PROVENANCE_FILE:
            content = read_provenance(publication.folder)
        else:
            continue
        for place, text in _texts(content, file.name):
            if MACHINE_PATH.fullmatch(text):
                raise ValueError(f"{place} is {text}, a path on this machine. Replace it by a name, or remove it.")


def _refuse_other_code(publication: Publication, source: Path, with_hub: bool) -> None:
    """Refuses code that is not this library's: the checks of the upload run that of the folder and of its base."""
    for name, folder in {str(source): source, **_fetch_bases(publication, with_hub)}.items():
        changed = [f"{folder / file} differs from this library's code" for file in changed_code(folder)]
        if found := foreign_code(folder) + changed:
            raise ValueError(
                f"{name}: {'; '.join(found)}. Loading the model would run this code. Merge or convert the model "
                "again, or give --trust-remote-code if you trust it."
            )


def _fetch_bases(publication: Publication, with_hub: bool) -> dict[str, Path]:
    """
    The folders of the bases that the checks load, by name: the one that an adapter was trained on, and with a Hub the
    one that the published adapter names. Only code and JSON files of a base on the Hub are downloaded.
    """
    if publication.base is None:
        return {}
    bases = {publication.base: fetch_code(publication.base, publication.base_revision)}
    if is_hub_id(publication.base):
        publication.base_revision = bases[publication.base].name  # load the commit that is checked
    config = json.loads((publication.folder / "adapter_config.json").read_text())
    name = config["base_model_name_or_path"]
    if with_hub and name not in bases:
        bases[name] = fetch_code(name, config["revision"])
    return bases


def _texts(content: Any, place: str) -> Iterator[tuple[str, str]]:
    """All texts in nested lists and dictionaries, each with its place, such as "config.json, text_config, name"."""
    if isinstance(content, str):
        yield place, content
    elif isinstance(content, dict):
        for name, value in content.items():
            yield from _texts(value, f"{place}, {name}")
    elif isinstance(content, list):
        for value in content:
            yield from _texts(value, place)


def print_publication(publication: Publication, console: Console) -> None:
    """Prints a table of the files to upload, and what is left out."""
    table = Table("file", "size", title=f"To {publication.repo_id}")
    table.columns[1].justify = "right"
    for name, size in publication.files.items():
        table.add_row(escape(name), f"{size:,}")
    table.add_row("[bold]total[/bold], without README.md", f"[bold]{publication.size:,}[/bold]")
    console.print(table)
    if publication.left_out:
        console.print("Not uploaded: " + ", ".join(publication.left_out), markup=False, soft_wrap=True)
    for note in publication.notes:
        console.print(note, markup=False, soft_wrap=True)
