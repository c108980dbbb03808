"""How long `sq-llava --help` and `import sq_llava` take, beside the commands of transformers and TRL.

    python -m benchmarks.startup            # a minute; writes benchmarks/results/startup.{json,md}
    python -m benchmarks.startup --quick    # one round, writes nothing

Seconds are of the processor, user and system, in fresh processes that run in turn: what else the machine does hardly
counts, and reading from a cold disk does not count at all. The start of Python itself is in all of them.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path

from benchmarks import common


SCRIPTS = Path(sys.executable).parent
COMMANDS = {
    "`sq-llava --help`": [sys.executable, "-m", "sq_llava", "--help"],
    "`sq-llava evaluate --help`": [sys.executable, "-m", "sq_llava", "evaluate", "--help"],
    "`import sq_llava`": [sys.executable, "-c", "import sq_llava"],
    "`trl --help`": [str(SCRIPTS / "trl"), "--help"],
    "`transformers --help`": [str(SCRIPTS / "transformers"), "--help"],
    "`import torch, transformers`": [sys.executable, "-c", "import torch, transformers"],
    "`python -c pass`": [sys.executable, "-c", "pass"],
}
OURS = "`sq-llava --help`"


def processor_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def measure(rounds: int) -> dict[str, list[float]]:
    for command in COMMANDS.values():
        processor_seconds(command)  # writes what Python compiles
    turns = [{name: processor_seconds(command) for name, command in COMMANDS.items()} for _ in range(rounds)]
    return {name: [turn[name] for turn in turns] for name in COMMANDS}


def to_markdown(report: dict) -> str:
    lines = [
        "# Start-up",
        "",
        f"Seconds of the processor in a fresh process: medians of {report['rounds']} rounds in which the commands run "
        "in turn, with the lowest and highest.",
        "",
        f"| command | seconds | times as long as {OURS} |",
        "|---|--:|--:|",
    ]
    for name, seconds in report["seconds"].items():
        lines.append(f"| {name} | {common.with_spread(seconds)} | {common.with_spread(report['ratios'][name])} |")
    return "\n".join(lines)


def main():
    arguments = common.parse_arguments(__doc__)
    rounds = 1 if arguments.quick else 3
    times = measure(rounds)
    report = {
        "rounds": rounds,
        "seconds": {name: common.summary(values) for name, values in times.items()},
        "ratios": {name: common.ratio(times, name, OURS) for name in times},
    }
    common.save("startup", report, to_markdown(report), arguments)


if __name__ == "__main__":
    main()
