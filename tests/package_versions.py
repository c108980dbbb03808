"""Tests this library with the oldest and the newest packages that it allows. `make test-versions` runs this.

    python -m tests.package_versions                  # all versions
    python -m tests.package_versions oldest           # one of them
    python -m tests.package_versions 5.17.0           # only a checkpoint, with this version of transformers

`oldest` has the lower bound of each requirement in `pyproject.toml`. `newest` has the newest versions that the bounds
allow. `pinned` is the environment that runs this. Each gets a wheel, and then

- loads a checkpoint through its remote code and generates in every way (`tests/remote_code_checks.py`);
- runs a user's commands (`tests/wheel_checks.py`): both stages, merge, answer, ask, serve.

A checkpoint's code runs with its user's transformers, which may be older than training needs. So two older versions
load and run a checkpoint, too. The environments stay in `--dir` and take 6 GB each.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import torch
from packaging.requirements import Requirement

from tests.model.test_remote_code import write_checkpoints
from tests.remote_code_checks import CHECKS
from tests.wheel_checks import ROOT, build_wheel


CHECKPOINT_ONLY = ["5.16.1", "5.17.0"]
# Before 5.18, AutoImageProcessor needs torchvision, which is not installed. AutoProcessor does not need it.
NEEDS_TORCHVISION = {(version, "image_processor_gives_the_same_pixels") for version in CHECKPOINT_ONLY}
EXTRAS = ["metrics", "page", "tracking"]


def lower_bounds() -> list[str]:
    """`name==version` with the lower bound of each requirement, including those of the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [
        *project["dependencies"],
        *(name for extra in EXTRAS for name in project["optional-dependencies"][extra]),
    ]
    bounds = []
    for requirement in map(Requirement, listed):
        versions = {specifier.operator: specifier.version for specifier in requirement.specifier}
        bounds.append(f"{requirement.name}=={versions['>=']}")
    return bounds


def make_environment(folder: Path, wheel: Path, constraints: list[str]) -> Path:
    """Installs the wheel into an environment, which is made if it does not exist. Returns its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(constraints))
        file.flush()
        subprocess.run([*pip, "--upgrade", f"{wheel}[{','.join(EXTRAS)}]", "--constraint", file.name], check=True)
    subprocess.run([*pip, "--no-deps", "--force-reinstall", wheel], check=True)
    return python


def make_packages(folder: Path, version: str) -> Path:
    """Installs a version of transformers and its requirements into a folder. Torch is this environment's."""
    if not folder.is_dir():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", part, f"transformers=={version}"]
        subprocess.run(command, check=True)
        part.rename(folder)
    return folder


def check_checkpoint(name: str, python: Path, packages: Path | None = None) -> bool:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_checkpoints(folder)
        away = folder / "away"
        away.mkdir()
        environment = {
            **os.environ,
            "HF_HOME": str(folder / "hf_home"),
            "HF_MODULES_CACHE": str(folder / "hf_modules"),
            "HF_HUB_OFFLINE": "1",
        }
        if packages is not None:
            environment["PYTHONPATH"] = str(packages.absolute())
        script = Path(__file__).with_name("remote_code_checks.py")
        command = [python.absolute(), "-P", script, folder]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(command, cwd=away, env=environment, check=True, **quiet)
        results = json.loads((folder / "results.json").read_text())
    failed = {check: traceback for check, traceback in results.items() if traceback}
    known = {check for check in failed if (name, check) in NEEDS_TORCHVISION}
    passed = f"{name}: {len(CHECKS) - len(failed)} of {len(CHECKS)} checks of a checkpoint pass"
    print(passed + "".join(f"; {check} needs torchvision" for check in known), flush=True)
    for check in failed.keys() - known:
        print(f"{check}:\n{failed[check]}", flush=True)
    return failed.keys() == known


def check_user_commands(name: str, python: Path | None) -> bool:
    """Runs a user's commands with this Python. Without one, `tests.wheel_checks` makes a new environment."""
    command = [sys.executable, "-m", "tests.wheel_checks", *(() if python is None else ("--python", python))]
    is_fine = subprocess.run(command, cwd=ROOT).returncode == 0
    print(f"{name}: the commands of a user {'work' if is_fine else 'FAIL'}", flush=True)
    return is_fine


def check(name: str, folder: Path, wheel: Path) -> bool:
    if name == "pinned":
        return check_checkpoint(name, Path(sys.executable)) & check_user_commands(name, None)
    if name not in ("oldest", "newest"):
        return check_checkpoint(name, Path(sys.executable), make_packages(folder / f"transformers-{name}", name))
    python = make_environment(folder / name, wheel, lower_bounds() if name == "oldest" else [])
    versions = "import torch, transformers, trl; print(torch.__version__, transformers.__version__, trl.__version__)"
    print(f"{name}: torch, transformers, TRL", end=" ", flush=True)
    subprocess.run([python, "-c", versions], check=True)
    return check_checkpoint(name, python) & check_user_commands(name, python)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*CHECKPOINT_ONLY, "oldest", "pinned", "newest"], help="Versions.")
    parser.add_argument("--dir", type=Path, default=Path("runs/versions"), help="Folder for the environments.")
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # as in the processes that load the checkpoints
    with tempfile.TemporaryDirectory() as folder:
        wheel = build_wheel(Path(folder))
        passed = [check(name, args.dir, wheel) for name in args.names]
    raise SystemExit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
