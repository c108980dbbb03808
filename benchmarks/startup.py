"""CPU time until the help, the library or a first answer is there, compared with transformers and TRL.

    python -m benchmarks.startup            # three minutes; writes benchmarks/results/startup.{json,md}

`sq-llava answer` answers with a tiny random model, so that its time is that of the imports. Any program
that runs such a model must at least import one of transformers' own vision-language models.

The result is the CPU time, user and system, of fresh processes that run in turn. So other work on the machine hardly
counts, and reading from a cold disk does not count at all. All figures include the start of Python itself.
"""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import common
from tests import tiny


SCRIPTS = Path(sys.executable).parent
COMMANDS = {
    "`sq-llava --help`": [sys.executable, "-m", "sq_llava", "--help"],
    "`sq-llava evaluate --help`": [sys.executable, "-m", "sq_llava", "evaluate", "--help"],
    "`import sq_llava`": [sys.executable, "-c", "import sq_llava"],
    "`trl --help`": [str(SCRIPTS / "trl"), "--help"],
    "`transformers --help`": [str(SCRIPTS / "transformers"), "--help"],
    "`sq-llava answer`, tiny model": [
        sys.executable,
        "-m",
        "sq_llava",
        "answer",
        "IMAGE",
        "What is it?",
        "--model=MODEL",
    ],
    "`from transformers import LlavaForConditionalGeneration`": [
        sys.executable,
        "-c",
        "from transformers import LlavaForConditionalGeneration",
    ],
    "`import torch, transformers`": [sys.executable, "-c", "import torch, transformers"],
    "`import torch`": [sys.executable, "-c", "import torch"],
    "`python -c pass`": [sys.executable, "-c", "pass"],
}
OURS = "`sq-llava --help`"


def cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def measure(rounds: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        paths = {"IMAGE": f"{folder}/image.png", "--model=MODEL": f"--model={tiny.save_model(Path(folder) / 'model')}"}
        tiny.picture().save(paths["IMAGE"])
        commands = {name: [paths.get(part, part) for part in command] for name, command in COMMANDS.items()}
        for command in commands.values():
            cpu_seconds(command)  # lets Python write its compiled files
        turns = [{name: cpu_seconds(command) for name, command in commands.items()} for _ in range(rounds)]
    return {name: [turn[name] for turn in turns] for name in COMMANDS}


def to_markdown(report: dict) -> str:
    rows = [
        [name, common.with_spread(seconds), common.with_spread(report["ratios"][name])]
        for name, seconds in report["seconds"].items()
    ]
    return common.text(
        "# Start-up",
        "CPU seconds of a fresh process: medians (lowest to highest) of "
        f"{report['rounds']} rounds in which the commands run in turn.",
        common.table(["command", "CPU seconds", f"relative to {OURS}"], rows),
    )


def main():
    arguments = common.parse_arguments(__doc__)
    rounds = 1 if arguments.quick else 3
    times = measure(rounds)
    report = {
        "rounds": rounds,
        "seconds": {name: common.summary(values) for name, values in times.items()},
        "ratios": {name: common.ratio(times, name, OURS) for name in times},
    }
    common.save("startup", report, to_markdown, arguments)


if __name__ == "__main__":
    main()
