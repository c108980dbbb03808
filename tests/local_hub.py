"""A small Hub on this machine, for tests that upload and download.

    with LocalHub() as hub:
        subprocess.run([...], env={**hub.environment("writer"), "HF_HOME": ...})

It has repositories of models, datasets and Spaces with branches and commits; private repositories; uploads of large
files by LFS, which are checked against their hashes; tokens that may write, read, or write elsewhere. It answers the
requests of huggingface_hub, transformers, PEFT and datasets, but has no Xet. Everything is kept in memory.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, parse_qsl, unquote, urlsplit

import pytest
import yaml
from huggingface_hub import HfApi, constants
from huggingface_hub.utils.sha import git_hash


USERS = {
    "writer": {"name": "owner", "orgs": [{"name": "org", "roleInOrg": "write"}], "role": "write"},
    "reader": {"name": "owner", "orgs": [{"name": "org", "roleInOrg": "write"}], "role": "read"},
    "stranger": {"name": "stranger", "orgs": [{"name": "org", "roleInOrg": "read"}], "role": "write"},
}
LIBRARIES = ("transformers", "peft")


class File(NamedTuple):
    """The SHA-256 is the key of its content. `oid` is Git's hash, which the Hub reports for small files."""

    sha256: str
    oid: str
    size: int
    is_lfs: bool


class Repository:
    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, dict[str, File]] = {}
        self.messages: dict[str, str] = {}
        self.branches: dict[str, str] = {}
        self.sdk: str | None = None
        self.variables: dict[str, str] = {}
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        parent = self.branches.get(branch, "")
        content = json.dumps([parent, len(self.commits), message, sorted(files.items())])
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.commits[commit], self.messages[commit] = files, message
        self.branches[branch] = commit
        return commit


class HubError(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message


class LocalHub:
    """
    Attributes:
        repositories (`dict[str, Repository]`): By Hub id; datasets have keys such as "datasets/org/name", Spaces
            "spaces/org/name".
        log (`list[tuple[str, str]]`): Method and path of each request.
        stored (`list[str]`): SHA-256 of each large file that arrived completely, in order.
        hold_after (`int`, *optional*): After this number of large files, the next upload hangs, and `held` is set.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.contents: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.stored: list[str] = []
        self.hold_after: int | None = None
        self.held, self.released = threading.Event(), threading.Event()
        self.lock = threading.Lock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def environment(self, token: str | None = "writer") -> dict[str, str]:
        """Environment variables for a process that uses this as its Hub."""
        variables = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return variables | ({"HF_TOKEN": token} if token else {})

    @contextmanager
    def online(self, token: str = "writer") -> Iterator[HfApi]:
        """Makes this the Hub of this process, which is offline in tests otherwise; `""` for no token."""
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
            patch.setattr(constants, "ENDPOINT", self.url)
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            patch.setattr(constants, "HF_TOKEN_PATH", os.devnull)
            patch.setenv("HF_TOKEN", token)
            yield HfApi(endpoint=self.url)

    def add(self, repo_id: str, folder: Path) -> str:
        """Commits the files of a folder to a model repository, creates it if needed, and returns the commit."""
        return self._commit(repo_id, {file.name: file.read_bytes() for file in folder.iterdir()}, "main", False)

    def add_dataset(self, repo_id: str, files: dict[str, bytes], branch: str = "main", private: bool = False) -> str:
        """Commits files to a dataset, creates it if needed, and returns the commit."""
        return self._commit(f"datasets/{repo_id}", files, branch, private)

    def _commit(self, name: str, files: dict[str, bytes], branch: str, private: bool) -> str:
        stored = {}
        for path, content in files.items():
            sha256 = hashlib.sha256(content).hexdigest()
            self.contents[sha256] = content
            stored[path] = File(sha256, git_hash(content), len(content), path.endswith((".parquet", ".safetensors")))
        return self.repositories.setdefault(name, Repository(private)).commit(branch, stored, "add files")

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        files = repository.commits[repository.branches.get(revision, revision)]
        return {path: self.contents[file.sha256] for path, file in files.items()}


class Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self):
        address = urlsplit(self.path)
        self.path, self.query = unquote(address.path), dict(parse_qsl(address.query))
        self.hub.log.append((self.command, self.path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.user = USERS.get(token)
        try:
            for pattern, method, function in ROUTES:
                match = re.fullmatch(pattern, self.path)
                if match and method == (self.command if self.command != "HEAD" else "GET"):
                    return function(self, body, **match.groupdict())
            raise HubError(404, message=f"{self.command} {self.path} is not implemented here")
        except HubError as error:
            self.send(error.status, {"error": error.message}, {"X-Error-Code": error.code})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, status: int, content: bytes | dict | list, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def repository(self, repo_id: str, write: bool = False) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not self.may_write(repo_id)):
            raise HubError(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if write and not (self.may_write(repo_id) and self.user["role"] == "write"):
            raise HubError(403, message="You have read access only")
        return repository

    def may_write(self, repo_id: str) -> bool:
        orgs = {org["name"] for org in self.user["orgs"] if org["roleInOrg"] == "write"} if self.user else set()
        return self.user is not None and repo_id.split("/")[-2] in {self.user["name"], *orgs}

    def files(self, repository: Repository, revision: str) -> tuple[str, dict[str, File]]:
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise HubError(404, "RevisionNotFound", f"no revision {revision}")
        return commit, repository.commits[commit]

    def who_am_i(self, body):
        if self.user is None:
            raise HubError(401, message="Invalid credentials in Authorization header")
        self.send(200, {**self.user, "type": "user", "auth": {"accessToken": {"role": self.user["role"]}}})

    def create(self, body):
        request = json.loads(body)
        repo_id = f"{request['organization']}/{request['name']}"
        if request.get("type") == "space":
            repo_id = f"spaces/{repo_id}"
        if not self.may_write(repo_id) or self.user["role"] != "write":
            raise HubError(403, message="You may not create that")
        exists = repo_id in self.hub.repositories
        if not exists:
            self.hub.repositories[repo_id] = Repository(request.get("visibility") == "private")
            self.hub.repositories[repo_id].sdk = request.get("sdk")
        self.send(409 if exists else 200, {"url": f"{self.hub.url}/{repo_id}", "id": repo_id})

    def add_variable(self, body, repo_id):
        request = json.loads(body)
        variables = self.repository(repo_id, write=True).variables
        variables[request["key"]] = request["value"]
        self.send(200, {key: {"value": value, "updatedAt": None} for key, value in variables.items()})

    def check(self, body, repo_id):
        self.repository(repo_id, write=True)
        self.send(200, {})

    def info(self, body, repo_id, revision=None):
        repository = self.repository(repo_id)
        commit, files = self.files(repository, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        self.send(200, {"id": repo_id, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []})

    def tree(self, body, repo_id, revision, folder=""):
        _, files = self.files(self.repository(repo_id), revision)
        found = {path: file for path, file in files.items() if not folder or path.startswith(f"{folder}/")}
        if folder and not found:
            raise HubError(404, "EntryNotFound", f"no folder {folder}")
        entries = [self.entry(path, file) for path, file in found.items()]
        if self.query.get("recursive", "true").lower() != "true":
            depth = len(folder.split("/")) if folder else 0
            folders = {"/".join(path.split("/")[: depth + 1]) for path in found if path.count("/") > depth}
            entries = [entry for entry in entries if entry["path"].count("/") == depth]
            entries += [{"type": "directory", "path": path, "oid": git_hash(path.encode())} for path in folders]
        self.send(200, entries)

    def entry(self, path: str, file: File) -> dict:
        entry = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
        if file.is_lfs:
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 130}
        return entry

    def paths_info(self, body, repo_id, revision):
        _, files = self.files(self.repository(repo_id), revision)
        wanted = parse_qs(body.decode())["paths"]
        entries = [self.entry(path, files[path]) for path in wanted if path in files]
        folders = [path for path in wanted if any(file.startswith(f"{path}/") for file in files)]
        entries += [{"type": "directory", "path": path, "oid": git_hash(path.encode())} for path in folders]
        self.send(200, entries)

    def branch(self, body, repo_id, branch):
        repository = self.repository(repo_id, write=True)
        if branch in repository.branches:
            raise HubError(409, message="Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        self.send(200, {})

    def validate(self, body):
        request = json.loads(body)
        text = request["content"]
        metadata = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}
        if request.get("repoType") == "space":
            wrong = metadata.get("sdk") != "gradio" or not {"app_file", "sdk_version"} <= metadata.keys()
        else:
            wrong = metadata["pipeline_tag"] != "image-text-to-text" or metadata["library_name"] not in LIBRARIES
            wrong = wrong or metadata.get("license") not in (None, "apache-2.0", "mit")
        self.send(400 if wrong else 200, {"errors": [{"message": "wrong metadata"}] if wrong else [], "warnings": []})

    def preupload(self, body, repo_id, revision):
        _, files = self.files(self.repository(repo_id, write=True), revision)
        answers = []
        for file in json.loads(body)["files"]:
            there = files.get(file["path"])
            is_lfs = file["path"].endswith((".safetensors", ".png"))
            answer = {"path": file["path"], "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
            if there is not None:
                answer["oid"] = there.sha256 if there.is_lfs else there.oid
            answers.append(answer)
        self.send(200, {"files": answers})

    def lfs_batch(self, body, repo_id):
        self.repository(repo_id, write=True)
        objects = json.loads(body)["objects"]
        for blob in objects:
            if blob["oid"] not in self.hub.contents:
                blob["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{blob['oid']}"}}
        self.send(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body, sha256):
        if hashlib.sha256(body).hexdigest() != sha256:
            raise HubError(400, message="the content does not have that hash")
        with self.hub.lock:
            hold = self.hub.hold_after is not None and len(self.hub.stored) >= self.hub.hold_after
            if not hold:
                self.hub.contents[sha256] = body
                self.hub.stored.append(sha256)
        if hold:
            self.hub.held.set()
            self.hub.released.wait()
            self.close_connection = True
        else:
            self.send(200, {})

    def commit(self, body, repo_id, revision):
        repository = self.repository(repo_id, write=True)
        files = dict(self.files(repository, revision)[1])
        message = ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            elif item["key"] == "file":
                content = base64.b64decode(value["content"])
                sha256 = hashlib.sha256(content).hexdigest()
                self.hub.contents[sha256] = content
                files[value["path"]] = File(sha256, git_hash(content), len(content), False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.contents:
                    raise HubError(400, message=f"{value['path']} was not uploaded")
                oid = git_hash(value["oid"].encode())
                files[value["path"]] = File(value["oid"], oid, value["size"], True)
        commit = repository.commit(revision, files, message)
        self.send(200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit}", "commitOid": commit})

    def resolve(self, body, repo_id, revision, path):
        commit, files = self.files(self.repository(repo_id), revision)
        if path not in files:
            raise HubError(404, "EntryNotFound", f"no file {path}")
        file = files[path]
        etag = file.sha256 if file.is_lfs else file.oid
        self.send(200, self.hub.contents[file.sha256], {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})


REPO = r"(?P<repo_id>(?:datasets/|spaces/)?[\w.-]+/[\w.-]+)"
API = rf"/api/(?:models/|(?=datasets/|spaces/)){REPO}"
ROUTES = [
    (r"/api/whoami-v2", "GET", Handler.who_am_i),
    (r"/api/repos/create", "POST", Handler.create),
    (r"/api/validate-yaml", "POST", Handler.validate),
    (rf"{API}/auth-check/write", "GET", Handler.check),
    (rf"{API}/variables", "POST", Handler.add_variable),
    (API, "GET", Handler.info),
    (rf"{API}/revision/(?P<revision>.+)", "GET", Handler.info),
    (rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "GET", Handler.tree),
    (rf"{API}/paths-info/(?P<revision>[^/]+)", "POST", Handler.paths_info),
    (rf"{API}/branch/(?P<branch>.+)", "POST", Handler.branch),
    (rf"{API}/preupload/(?P<revision>.+)", "POST", Handler.preupload),
    (rf"{API}/commit/(?P<revision>.+)", "POST", Handler.commit),
    (rf"/{REPO}\.git/info/lfs/objects/batch", "POST", Handler.lfs_batch),
    (r"/lfs/(?P<sha256>[0-9a-f]{64})", "PUT", Handler.lfs_put),
    (rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "GET", Handler.resolve),
]
