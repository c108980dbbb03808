"""The checks of `remote_code_checks.py` with older versions of transformers: run by `make test-versions`.

    python -m tests.transformers_versions --dir runs/versions

installs each version into DIR/<version>, and lets it load, run and save checkpoints that this transformers wrote.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.remote_code_checks import CHECKS
from tests.test_remote_code import write_checkpoints


VERSIONS = ["5.16.1", "5.17.0", "5.18.0", "5.19.0"]
# Before 5.18, AutoImageProcessor itself needs torchvision, which is not there; AutoProcessor does not.
NEEDS_TORCHVISION = {(version, "image_processor_gives_the_same_pixels") for version in ("5.16.1", "5.17.0")}


def install(version: str, target: Path) -> None:
    """Installs a version of transformers and all that it needs, unless it is there; torch is the environment's."""
    if not target.is_dir():
        part = target.with_name(f"{version}.part")
        shutil.rmtree(part, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(part)]
        subprocess.run([*command, f"transformers=={version}"], check=True)
        part.rename(target)


def failures(target: Path, folder: Path) -> dict[str, str]:
    """Tracebacks of the checks that fail with what is installed in `target`."""
    away = folder / "away"
    away.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(target.absolute()),
        "HF_HOME": str(folder / "hf_home"),
        "HF_MODULES_CACHE": str(folder / "hf_modules"),
        "HF_HUB_OFFLINE": "1",
    }
    script = Path(__file__).with_name("remote_code_checks.py")
    command = [sys.executable, "-P", str(script), str(folder)]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command, cwd=away, env=environment, check=True, **quiet)
    results = json.loads((folder / "results.json").read_text())
    return {check: traceback for check, traceback in results.items() if traceback}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/versions"))
    args = parser.parse_args()
    all_passed = True
    for version in VERSIONS:
        args.dir.mkdir(parents=True, exist_ok=True)
        install(version, args.dir / version)
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoints(Path(folder))
            failed = failures(args.dir / version, Path(folder))
        needs_torchvision = {check for check in failed if (version, check) in NEEDS_TORCHVISION}
        passed = f"transformers {version}: {len(CHECKS) - len(failed)} of {len(CHECKS)} checks pass"
        print(passed + "".join(f"; {check} needs torchvision" for check in needs_torchvision), flush=True)
        for check in failed.keys() - needs_torchvision:
            all_passed = False
            print(f"{check}:\n{failed[check]}", flush=True)
    raise SystemExit(0 if all_passed else 1)


if __name__ == "__main__":
    main()
