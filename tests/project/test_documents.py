"""The commands and snippets of README.md and docs/ work as they are printed.

Each document is walked in a folder that looks like a checkout after `make demo`, with the quick demo's model. Fences
with the word `not-run` are left out; `NOT_RUN` is the one list of why.
"""

import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import ROOT
from tests.processes import free_port
from tests.warm_python import warm_python


DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# What is not run here, and why.
NOT_RUN = {
    r"\bmake ": "sets up an environment, or is this suite or the demo itself",
    r"\bpip install": "needs the package registry",
    r"\borg/|\bopenai/|-7b\b|-13b\b": "needs the Hub, or weights of billions of parameters",
    r"\bhf download": "needs the Hub",
    r"gpt-4o": "needs a paid server",
    r"\bsrun\b": "needs Slurm",
    r"\bvllm serve\b": "vLLM needs its own environment",
    r"\bRECIPE\b|\bsetting_table > ": "has a placeholder, or would write into the checkout",
    r"NotFoundError": "shows an error",
}
LANGUAGES = {"bash", "python", "json", "yaml", "text", "math", "mermaid", "bibtex"}
PROGRAMS = {
    "python": "",
    "sq-llava": "-m sq_llava",
    "accelerate": "-m accelerate.commands.accelerate_cli",
    "torchrun": "-m torch.distributed.run",
}
# Imported once for all commands: they would take most of the time of the walk.
MODULES = (
    "train_sft", "sq_llava.inference.assistant", "sq_llava.evaluation.run", "sq_llava.generation.self_generation",
    "sq_llava.serving.app", "sq_llava.checkpoints.convert", "sq_llava.checkpoints.push", "accelerate.commands.launch",
)  # fmt: skip
SERVER = re.compile(r"sq-llava (?:serve|demo) \S+")


@dataclass
class Fence:
    language: str
    is_run: bool
    text: str
    line: int


def fences_of(document: Path) -> list[Fence]:
    fences, lines = [], document.read_text().splitlines()
    begin = None
    for number, line in enumerate(lines, start=1):
        if line.strip().startswith("```"):
            if begin is None:
                begin = number
                continue
            language, *words = lines[begin - 1].strip().removeprefix("```").split() or [""]
            assert language in LANGUAGES, f"{document.name}, line {begin}: a fence in {language!r}"
            assert words in ([], ["not-run"]), f"{document.name}, line {begin}: {words}"
            fences.append(Fence(language, not words, "\n".join(lines[begin : number - 1]), begin))
            begin = None
    assert begin is None, f"{document.name}, line {begin}: a fence without an end"
    return fences


def name_of(document: Path) -> str:
    return document.stem


@pytest.fixture
def checkout(tmp_path, quick_demo) -> Path:
    """A folder like a checkout after `make setup` and `make demo`."""
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("runs", "build", "dist"):
            (tmp_path / entry.name).symlink_to(entry)
    shutil.copytree(quick_demo, tmp_path / "runs" / "demo", copy_function=os.link)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, arguments in PROGRAMS.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {warm_python(*MODULES)} {arguments} "$@"\n')
        (programs / name).chmod(0o755)
    (programs / "activate").write_text(f"export PATH={programs}:$PATH\n")
    return tmp_path


class Walk:
    """Runs fences in a checkout. Servers that they start run until the end."""

    def __init__(self, checkout: Path):
        self.checkout, self.port, self.servers = checkout, free_port(), []
        path = f"{checkout / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self.environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}

    def command_of(self, script: str) -> list[str]:
        return ["bash", "-euo", "pipefail", "-c", script]

    def run(self, script: str, where: str) -> None:
        script = script.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
        if SERVER.search(script):
            port = free_port() if self.servers else self.port
            return self.serve(SERVER.sub(rf"exec \g<0> --port {port}", script), port)
        done = subprocess.run(
            self.command_of(script), cwd=self.checkout, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{where}:\n{script}\n\n{done.stdout[-5000:]}"

    def serve(self, script: str, port: int) -> None:
        command = self.command_of(script)
        server = subprocess.Popen(command, cwd=self.checkout, env=self.environment, stdin=subprocess.DEVNULL)
        self.servers.append(server)
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/docs", timeout=5).read()
                return
            except urllib.error.HTTPError:
                return  # it answers
            except OSError:
                assert server.poll() is None and time.monotonic() < end, f"no server: {script}"
                time.sleep(0.2)

    def end(self) -> None:
        for server in self.servers:
            server.terminate()
            server.wait(30)


@pytest.mark.walk
@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_and_snippets_work_as_printed(document, checkout):
    """The commands come first, each fence by itself; then all Python of the document, as one script."""
    fences = [fence for fence in fences_of(document) if fence.is_run]
    walk = Walk(checkout)
    try:
        for fence in fences:
            if fence.language == "bash":
                walk.run(fence.text, f"{document.name}, line {fence.line}")
        snippets = [fence.text for fence in fences if fence.language == "python"]
        if snippets:
            (checkout / "snippets.py").write_text("\n\n".join(snippets).replace(":8000", f":{walk.port}"))
            walk.run("python snippets.py", f"{document.name}, its Python")
    finally:
        walk.end()


@pytest.mark.walk
def test_commands_in_the_tiny_recipes_of_minigpt4_work_as_printed(checkout):
    walk = Walk(checkout)
    for recipe in sorted((ROOT / "recipes/tiny/minigpt4-7b").glob("*.yaml")):
        commands = re.findall(r"^#   (python .+)$", recipe.read_text(), re.M)
        assert commands, f"{recipe.name} names no command"
        for command in commands:
            walk.run(command, recipe.name)
    assert (checkout / "runs/tiny/minigpt4-7b/stage2/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_data_of_documents_is_well_formed(document):
    for fence in fences_of(document):
        if fence.language == "json":
            json.loads(fence.text)


def test_each_fence_that_is_not_run_has_a_reason_and_each_reason_a_fence():
    left = set(NOT_RUN)
    for document in DOCUMENTS:
        for fence in fences_of(document):
            if not fence.is_run:
                reasons = {pattern for pattern in NOT_RUN if re.search(pattern, fence.text)}
                assert reasons, f"{document.name}, line {fence.line}: not run, and no reason in NOT_RUN"
                left -= reasons
    assert not left


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_no_command_stands_outside_of_a_fence(document):
    inside = {line for fence in fences_of(document) for line in fence.text.splitlines()}
    commands = re.compile(r" {4,}(sq-llava|make|python|accelerate|torchrun|pip) ")
    outside = [line for line in document.read_text().splitlines() if commands.match(line) and line not in inside]
    assert not outside


def anchors_of(document: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_to_files_and_headings_that_are_there(document):
    for link in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", document.read_text()):
        path, _, anchor = "".join(link).partition("#")
        if "://" not in path:
            target = document.parent / path if path else document
            assert target.exists(), f"{document.name}: {path}"
            assert not anchor or anchor in anchors_of(target), f"{document.name}: {path}#{anchor}"
