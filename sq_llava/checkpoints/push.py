"""Publishes a checkpoint or an adapter on the Hub, and checks that others can load it.

    sq-llava push runs/demo/model org/name --dry-run
    sq-llava push runs/sq-llava-7b/stage2 org/name                      # merged first
    sq-llava push runs/sq-llava-7b/stage2 org/name-lora --adapter-only --base-model org/base

The steps:

1. The files are collected in a temporary folder (`sq_llava/checkpoints/publication.py`).
2. A process without this library loads that folder. This runs the code in the folder; if it differs from this
   library's, `--trust-remote-code` is needed.
3. The folder is uploaded as a commit. Files that are on the Hub already are not sent again, so the same command
   resumes an interrupted push.
4. The commit is downloaded and compared byte by byte. A second process loads it by its Hub id; its logits must be
   equal to the last bit.
5. A second commit adds the card, with the texts that the model wrote in step 2. The card's examples load the first
   commit; a commit cannot contain its own hash.

The folder's own `README.md` is not published: the card is always generated. If the same model with the same card is
on the Hub already, nothing changes.
"""

import filecmp
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from safetensors.numpy import load_file

from sq_llava.checkpoints.card import EXAMPLE_IMAGE, EXAMPLE_QUESTION, eval_result_files, render_card
from sq_llava.checkpoints.publication import STALE_FILES, Publication
from sq_llava.locations import hub_errors, is_hub_id


TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
PINNED = re.compile(r'revision="([0-9a-f]{40})"')


def check_rights(api: HfApi, repo_id: str, private: bool) -> None:
    """
    Checks that the token may write to a repository, which need not exist yet.

    Raises:
        ValueError: if there is no valid token, it may not write to `repo_id`, or a private repository is wanted but
            the existing one is public.
    """
    with hub_errors("You are not logged in to the Hub. Run `hf auth login`, or set the variable HF_TOKEN"):
        user = api.whoami()
    name = repo_id.partition("/")[0]
    owners = {user["name"], *(org["name"] for org in user.get("orgs", []) if org.get("roleInOrg") != "read")}
    if name not in owners:
        raise ValueError(f"{user['name']} may not write to {name}, only to {', '.join(sorted(owners))}.")
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ValueError("The token can only read. Create one that can write: https://huggingface.co/settings/tokens")
    with hub_errors(f"{repo_id} cannot be written to with this token"):
        try:
            info = api.model_info(repo_id)
            api.auth_check(repo_id, write=True)
        except RepositoryNotFoundError:
            return  # it will be created
    if private and not info.private:
        raise ValueError(f"{repo_id} exists and is public. Remove --private, or change its settings first.")


def _card_files(
    publication: Publication, commit: str, url: str | None, results: dict[str, Any] | None = None, **metadata
) -> dict[str, str]:
    """
    The card, whose examples load a commit, and the files with an evaluation's results; text by file name. With `url`,
    the repository's, the examples load the picture from there.
    """
    example_url = f"{url}/resolve/{commit}/{EXAMPLE_IMAGE}" if url else None
    card = render_card(publication.folder, publication.repo_id, commit, results, example_url=example_url, **metadata)
    entries = eval_result_files(results or {"results": []})
    return {"README.md": str(card)} | {name: yaml.safe_dump(part, sort_keys=False) for name, part in entries.items()}


def check_card(publication: Publication, is_dry_run: bool, **about_model) -> None:
    """
    Writes the card once before the upload and discards it, so that no upload ends without a card.

    Raises:
        ValueError: if it cannot be written, or the Hub refuses its metadata. A dry run does not ask the Hub.
    """
    files = _card_files(publication, "0" * 40, publication.repo_id, **about_model)
    if not is_dry_run:
        with hub_errors("The Hub could not check the metadata of the card"):
            ModelCard(files["README.md"]).validate()


def check_loading(publication: Publication, with_samples: bool = False) -> dict[str, Any] | None:
    """
    Loads and runs the files to upload in a process without this library. Unless an adapter's base is on the Hub, the
    process has no token and does not reach the Hub.

    Args:
        with_samples (`bool`): Also let the model answer and ask about the example picture, for the card.

    Returns:
        With samples: the model's `answer`, and its `questions`.

    Raises:
        ValueError: if that fails.
    """
    request = {
        "model": str(publication.folder),
        "base": publication.base,
        "base_revision": publication.base_revision,
    }
    samples = publication.workspace / "samples.json"
    if with_samples:
        request["samples"] = str(samples)
    offline = publication.base is None or not is_hub_id(publication.base)
    environment = {"HF_HUB_OFFLINE": "1", **dict.fromkeys(TOKENS)} if offline else {}
    failed = f"{publication.repo_id} cannot be loaded; nothing was uploaded"
    _load_fresh(publication, "local", request, environment, failed)
    return json.loads(samples.read_text()) if with_samples else None


def _load_fresh(
    publication: Publication, name: str, request: dict, environment: dict[str, str | None], failed: str
) -> None:
    """
    Runs `fresh_load.py` in an empty folder.

    Args:
        name (`str`): Name of its output file in the workspace.
        request (`dict`): What to load: `model`, `revision`, `base`, `base_revision`.
        environment: Environment variables to set; those with the value `None` are unset.
        failed (`str`): Start of the error message.
    """
    away = publication.workspace / f"{name}_away"
    environment = {**os.environ, "HF_MODULES_CACHE": str(away / "modules"), **environment}
    away.mkdir()
    request |= {
        "output": str(publication.workspace / name),
        "image": str(publication.folder / EXAMPLE_IMAGE),
        "question": EXAMPLE_QUESTION,
    }
    process = subprocess.run(
        [sys.executable, "-P", str(files("sq_llava.checkpoints") / "fresh_load.py"), json.dumps(request)],
        cwd=away,
        env={name: value for name, value in environment.items() if value is not None},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if process.returncode != 0:
        reason = process.stderr.strip().splitlines()[-1:] or [f"the process ended with code {process.returncode}"]
        raise ValueError(f"{failed}: {reason[0]}")


def upload(
    api: HfApi, publication: Publication, private: bool = False, branch: str | None = None, message: str | None = None
) -> str:
    """
    Uploads everything except the card.

    Returns:
        The commit with the files. If nothing has changed, this is the commit that the present card names.
    """
    repo_id = publication.repo_id
    with hub_errors(f"{repo_id} could not be created"):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if branch is not None:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
    with hub_errors("The upload was interrupted. Run the command again: files that arrived are not sent again"):
        before = api.model_info(repo_id, revision=branch).sha
        there = api.list_repo_files(repo_id, revision=branch)
        stale = [name for name in there if _is_stale(name) and name not in publication.files]
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=publication.folder,
            revision=branch,
            commit_message=message or f"Upload {repo_id.partition('/')[2]}",
            delete_patterns=stale or None,
        ).oid
    if commit == before:
        card = _present_card(api, publication, commit)
        pinned = PINNED.findall(card.content)[-1:] if card else []
        # After an upload that was interrupted before its card, the card names older files.
        if pinned and _model_files(api, publication, pinned[0]) == _model_files(api, publication, commit):
            return pinned[0]
    return commit


def _model_files(api: HfApi, publication: Publication, commit: str) -> dict[str, str] | None:
    """Git hashes of a commit's model files, by name; `None` if there is no such commit."""
    repo_id = publication.repo_id
    with hub_errors(f"{repo_id}, commit {commit}, could not be listed. Run the command again"):
        try:
            entries = list(api.list_repo_tree(repo_id, revision=commit, recursive=True))
        except RevisionNotFoundError:
            return None
    blobs = {entry.path: entry.blob_id for entry in entries if isinstance(entry, RepoFile)}
    return {name: blob for name, blob in blobs.items() if name in publication.files or _is_stale(name)}


def _is_stale(name: str) -> bool:
    """Returns whether a file on the Hub belongs to an earlier model, unless this upload replaces it."""
    return "/" not in name and any(fnmatch(name, pattern) for pattern in STALE_FILES)


def _present_card(api: HfApi, publication: Publication, revision: str | None) -> ModelCard | None:
    """The card in the repository; `None` if there is none."""
    with hub_errors(f"The card of {publication.repo_id} could not be read. Run the command again"):
        try:
            file = hf_hub_download(
                publication.repo_id, "README.md", revision=revision, cache_dir=publication.workspace / "card",
                endpoint=api.endpoint, token=api.token,
            )  # fmt: skip
        except EntryNotFoundError:
            return None
    return ModelCard(Path(file).read_text(), ignore_metadata_errors=True)


def check_published(api: HfApi, publication: Publication, commit: str) -> None:
    """
    Downloads a commit, and loads it by its Hub id in a process without this library.

    Raises:
        ValueError: if a byte or a logit differs from the local files.
    """
    cache = publication.workspace / "cache"
    with hub_errors(f"{publication.repo_id}, commit {commit}, could not be downloaded. Run the command again"):
        snapshot = snapshot_download(
            publication.repo_id, revision=commit, cache_dir=cache, endpoint=api.endpoint, token=api.token
        )
    for name in publication.files:
        file = Path(snapshot) / name
        if not (file.is_file() and filecmp.cmp(file, publication.folder / name, shallow=False)):
            raise ValueError(
                f"{publication.repo_id}, commit {commit}: {name} differs from the file that was sent. The card still "
                "names the previous commit, if there is one. Delete the file on the Hub and run the command again."
            )
    request = {"model": publication.repo_id, "revision": commit}
    if publication.base is not None:
        config = json.loads((publication.folder / "adapter_config.json").read_text())
        request |= {"base": config["base_model_name_or_path"], "base_revision": config["revision"]}
    environment = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0"}
    where = f"{publication.repo_id}, commit {commit}"
    _load_fresh(publication, "published", request, environment, f"{where}, cannot be loaded from the Hub")
    here, there = (load_file(publication.workspace / name) for name in ("local", "published"))
    if not all(np.array_equal(here[name], there[name]) for name in here):
        difference = np.abs(here["logits"] - there["logits"]).max()
        reason = "Does its base on the Hub differ from the local one?" if publication.base else "Run it again."
        raise ValueError(f"{where}: the logits differ from the local ones by up to {difference:.2g}. {reason}")


def publish_card(
    api: HfApi,
    publication: Publication,
    commit: str,
    branch: str | None = None,
    results: dict[str, Any] | None = None,
    license: str | None = None,
    languages: Sequence[str] = (),
    samples: dict[str, Any] | None = None,
) -> str:
    """
    Uploads the card, whose examples load `commit`, and an evaluation's results.

    With `samples`, which [`check_loading`] returns, the card shows what the model answered and asked.
    License and languages of the present card are kept unless others are given. Result files of an earlier model, or of
    an earlier evaluation when new results are given, are deleted.

    Returns:
        The URL of the repository.
    """
    repo_id = publication.repo_id
    url = f"{api.endpoint}/{repo_id}"
    present = _present_card(api, publication, branch)
    if present is not None:
        license, languages = license or present.data.license, languages or present.data.language or ()
    with hub_errors(f"{repo_id} could not be read. Run the command again"):
        picture_is_public = not api.model_info(repo_id).private
    about = {"license": license, "languages": languages, "samples": samples}
    files = _card_files(publication, commit, url if picture_is_public else None, results, **about)
    is_new = present is None or commit not in PINNED.findall(present.content)
    with hub_errors("The model is on the Hub, but its card is not. Run the command again"):
        there = api.list_repo_files(repo_id, revision=branch) if is_new or results is not None else []
        outdated = [name for name in there if fnmatch(name, ".eval_results/*.yaml") and name not in files]
        api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, content.encode()) for name, content in files.items()),
                *(CommitOperationDelete(name) for name in outdated),
            ],
            commit_message=f"Card of {commit[:8]}",
            revision=branch,
        )
    return url
