"""Uses an installed wheel as a user would. `make test-wheel` runs this.

    python -m tests.wheel_checks                          builds a wheel and installs it into a new environment
    python -m tests.wheel_checks --python ENV/bin/python  uses an environment that already has a wheel

The new environment sees the packages of the environment that runs this, but not its sources. Every command runs from
an empty folder with tiny models. The first command that fails ends the checks. The models' texts are not checked.
"""

import argparse
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from tests import tiny
from tests.released import write_llava_hf


ROOT = Path(__file__).parent.parent
SOURCES = (
    "sq_llava",
    "configuration_sq_llava",
    "image_processing_sq_llava",
    "modeling_sq_llava",
    "processing_sq_llava",
    "train_sft",
)
LIST_COMMANDS = """
import typer
from sq_llava.cli.main import app
def names(command, path=()):
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from names(inner, (*path, name))
print(*(" ".join(path) for path in names(typer.main.get_command(app))), sep=chr(10))
"""


def build_wheel(folder: Path, tree: Path = ROOT) -> Path:
    """Builds a wheel from a source distribution: this tests both, and leaves out files of an earlier build."""
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, stdout=subprocess.DEVNULL)
    (sdist,) = folder.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--wheel-dir", folder, sdist], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_environment(folder: Path, wheel: Path) -> Path:
    """Makes an environment with the wheel and with all packages of this one. Returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", wheel], check=True)
    here, there = (
        Path(sysconfig.get_path("purelib", vars={"base": str(base), "platbase": str(base)}))
        for base in (sys.prefix, folder)
    )
    # A .pth file makes the packages of a folder importable, but not the .pth file of the editable install in it.
    (there / "packages.pth").write_text(f"{here}\n")
    for launcher in ("accelerate", "torchrun"):
        script = (Path(sys.prefix) / "bin" / launcher).read_text().partition("\n")[2]
        (python.parent / launcher).write_text(f"#!{python}\n{script}")
        (python.parent / launcher).chmod(0o755)
    return python


@dataclass
class Installed:
    """An environment with a wheel, and the folder that its commands run in."""

    python: Path
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        outer = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        path = f"{self.python.parent}{os.pathsep}{outer['PATH']}"
        return {
            **outer,
            "PATH": path,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.folder / "hf_home"),
            "COLUMNS": "100",
        }

    def run(self, *command, says: str = "") -> str:
        """Runs a command. It must succeed, and its output, which is returned, must contain `says`."""
        command = [str(part) for part in command]
        begin = time.monotonic()
        done = subprocess.run(
            [shutil.which(command[0], path=self.environment["PATH"]), *command[1:]],
            cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        seconds = time.monotonic() - begin
        if done.returncode != 0 or says not in done.stdout:
            raise SystemExit(
                f"FAILED: {' '.join(command)}\n{done.stdout}\nExit code {done.returncode}; expected output: {says!r}"
            )
        print(f"{seconds:5.1f} s  {' '.join(command)[:150]}".replace("\n", " "), flush=True)
        return done.stdout


def check_imports(wheel: Installed) -> None:
    """Checks that the wheel is imported, and not the sources."""
    code = f"from importlib.util import find_spec\nfor name in {SOURCES}: print(find_spec(name).origin)"
    inside = Path(wheel.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for file in wheel.run("python", "-c", code).splitlines():
        if inside not in Path(file).parents:
            raise SystemExit(f"FAILED: {file} is imported, but it is not in {inside}: this is not the wheel.")
        print(f"         {file}", flush=True)


def check_help(wheel: Installed) -> None:
    for command in wheel.run("python", "-c", LIST_COMMANDS).splitlines():
        wheel.run("sq-llava", *command.split(), "--help", says="Usage:")
    for module in ("sq_llava", "train_sft"):
        wheel.run("python", "-m", module, "--help", says="sage:")


def check_files(wheel: Installed) -> None:
    """Checks that recipes and prompts are in the wheel."""
    wheel.run("sq-llava", "recipes", says="tiny/sq-llava-7b/stage1")
    for name in ("sq-llava-7b", "tiny/sq-llava-7b", "tiny/llava-7b"):
        wheel.run("sq-llava", "recipes", "copy", name, says="recipes/accelerate/ddp.yaml")
    for way in ("llava", "captions", "curate", "self"):
        wheel.run("sq-llava", "generate-data", "prompts", way, f"prompts-{way}", says="Wrote")


def check_metrics(wheel: Installed) -> None:
    metric = (
        "import evaluate; from importlib.resources import files; "
        "metric = evaluate.load(str(files('sq_llava.evaluation.metrics_hub') / 'pope.py')); "
        "print(metric.compute(predictions=['Yes.'], references=['yes']))"
    )
    wheel.run("python", "-c", metric, says="'accuracy': 1.0")


def training(recipe: str, **settings) -> list[str]:
    settings |= {"dataset_path": "rows.json", "image_root": "images", "max_steps": 1, "use_cpu": True}
    return ["--config", f"recipes/tiny/{recipe}.yaml", *(f"--{name}={value}" for name, value in settings.items())]


PARTS = {"vision_model_name_or_path": "clip", "text_model_name_or_path": "llama"}


def check_training(wheel: Installed) -> None:
    """Runs both stages and merges the result."""
    wheel.run("sq-llava", "doctor", *training("sq-llava-7b/stage1", **PARTS), says="rows")
    stage1 = training("sq-llava-7b/stage1", **PARTS, output_dir="stage1")
    wheel.run("accelerate", "launch", "--num_processes=1", "-m", "train_sft", *stage1)
    stage2 = training("sq-llava-7b/stage2", model_name_or_path="stage1", output_dir="stage2")
    wheel.run("torchrun", "--nproc_per_node=1", "-m", "train_sft", *stage2)
    wheel.run("sq-llava", "merge", "stage2", "--out", "model", says="Wrote model")


def check_model(wheel: Installed) -> None:
    """Lets the trained models answer and ask, and tries to publish one."""
    wheel.run("sq-llava", "inspect", "model", says="code")
    wheel.run("sq-llava", "push", "model", "org/name", "--dry-run", says="Nothing was uploaded")
    wheel.run("sq-llava", "answer", "images/a.png", "What is it?", "--model=model", "--max-new-tokens=4")
    wheel.run("sq-llava", "ask", "images", "--model=stage2", "--max-new-tokens=4", "--seed=0", says="a.png")
    wheel.run("sq-llava", "prototypes", "images/a.png", "--model=model", "--out=seen.png", says="Wrote seen.png")


def check_full_finetuning(wheel: Installed) -> None:
    """Checks that a conversion and full fine-tuning, which write plain checkpoints, also write a card."""
    wheel.run("sq-llava", "convert", "llava_hf", "--out=converted", says="Wrote converted")
    full = training("llava-7b/scienceqa", model_name_or_path="converted", output_dir="finetuned")
    wheel.run("python", "-m", "train_sft", *full)
    for folder in ("converted", "finetuned"):
        if not (wheel.folder / folder / "README.md").is_file():
            raise SystemExit(f"FAILED: {folder} has no card (README.md).")


@contextmanager
def background(wheel: Installed, *command: str, path: str) -> Iterator[str]:
    """Starts a server and yields its address once `path` answers. Ends the server afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", wheel.folder / f"{port}.log"
    begin = time.monotonic()
    with log.open("w") as output:
        program = shutil.which(command[0], path=wheel.environment["PATH"])
        started = [program, *command[1:], f"--port={port}"]
        server = subprocess.Popen(started, cwd=wheel.folder, env=wheel.environment, stdout=output, stderr=output)
    try:
        while True:
            try:
                urllib.request.urlopen(url + path, timeout=5).read()
                break
            except OSError as error:
                if server.poll() is not None or time.monotonic() - begin > 600:
                    raise SystemExit(f"FAILED: {' '.join(command)}\n{log.read_text()}\n{error}") from error
                time.sleep(0.2)
        print(f"{time.monotonic() - begin:5.1f} s  {' '.join(command)} (until it answers)", flush=True)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def check_serving(wheel: Installed) -> None:
    with background(wheel, "sq-llava", "serve", "model", "--model-name=model", path="/health") as url:
        message = {"role": "user", "content": "What is it?"}
        body = {"model": "model", "messages": [message], "max_tokens": 4, "temperature": 0}
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        reply = json.load(urllib.request.urlopen(request, timeout=60))
        print(f"         the server's reply: {reply['choices'][0]}", flush=True)
    with background(wheel, "sq-llava", "demo", "model", path="/"):
        pass


def write_parts(folder: Path) -> None:
    """Writes towers, a LLaVA in transformers' layout, pictures and rows."""
    disable_progress_bar()
    tiny.save_towers(folder)
    write_llava_hf(folder / "llava_hf")
    (folder / "images").mkdir()
    for number, name in enumerate(("a.png", "b.png")):
        tiny.picture(number).save(folder / "images" / name)
    turns = [("human", "<image>\nWhat?"), ("gpt", "A dog."), ("human", "Where?"), ("gpt", "In the grass.")]
    row = {"image": "a.png", "conversations": [{"from": role, "value": text} for role, text in turns]}
    (folder / "rows.json").write_text(json.dumps([row] * 8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="Python of an environment with a wheel. Default: make one.")
    arguments = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sq-llava-wheel-") as folder:
        folder = Path(folder)
        python = arguments.python
        if python is None:
            (folder / "dist").mkdir()
            wheel_file = build_wheel(folder / "dist")
            print(f"{time.monotonic() - begin:5.1f} s  built {wheel_file.name}", flush=True)
            python = make_environment(folder / "environment", wheel_file)
        wheel = Installed(python.absolute(), folder / "away")
        wheel.folder.mkdir()
        check_imports(wheel)
        check_files(wheel)
        write_parts(wheel.folder)
        for together in (
            (check_training, check_full_finetuning, check_metrics),
            (check_model, check_serving, check_help),
        ):
            with ThreadPoolExecutor(2) as pool:
                for done in [pool.submit(check, wheel) for check in together]:
                    done.result()
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"All commands work from the wheel: {time.monotonic() - begin:.0f} s, "
        f"{cpu.ru_utime + cpu.ru_stime:.0f} CPU seconds"
    )


if __name__ == "__main__":
    main()
