"""What the benchmarks share: their options, runs in turn, ratios within a round, the machine, the saved result.

    from benchmarks import common
    arguments = common.parse_arguments(__doc__)
    times = common.interleave({"peer": run_peer, "project": run_project}, rounds=5)
    report = {"times": times, "times_faster": common.ratio(times, "peer", "project")}
    common.save("name", report, markdown, arguments)

This is not a benchmark itself: `python -m benchmarks.NAME` runs one, `make bench` all that need no GPU.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch


RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "pillow")


def parse_arguments(doc: str, **options: int | str) -> argparse.Namespace:
    """
    Args:
        doc: the benchmark's docstring, which is its help.
        options: further ones with their defaults: `rows=1000` is the option `--rows`, `tiny=False` a switch.

    Returns:
        `quick`, `output_dir`, the further options, and `machine`, which is `machine()` before any work.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small, under a minute: print, write nothing")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="default: benchmarks/results")
    for name, default in options.items():
        kind = {"action": "store_true"} if default is False else {"type": type(default), "default": default}
        parser.add_argument(f"--{name.replace('_', '-')}", **kind, help="default: %(default)s")
    arguments = parser.parse_args()
    arguments.machine = machine()
    return arguments


def interleave(
    functions: dict[str, Callable[[], object]], rounds: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """
    Seconds of each function in each round, after a warm-up of each (unless the like has run before): what else the
    machine does meets all of them, so ratios within a round hold where seconds do not.
    """
    for function in functions.values() if warm_up else ():
        function()
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds_of(function))
    return times


def seconds_of(function: Callable[[], object]) -> float:
    """Wall seconds of one call, the work that it left to a GPU included."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(values: list[float]) -> dict[str, float]:
    """The median, and the lowest and highest value as its spread."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(times: dict[str, list[float]], of: str, to: str) -> dict[str, float]:
    """The `summary` of `of / to` within each round: by how much `to` is faster than `of`."""
    return summary([one / other for one, other in zip(times[of], times[to], strict=True)])


def with_spread(values: dict[str, float], form: str = ".3g") -> str:
    """A `summary` for a table: `1.52 (1.49 to 1.60)`."""
    return f"{values['median']:{form}} ({values['low']:{form}} to {values['high']:{form}})"


def in_fresh_process(function: Callable, *arguments):
    """What `function` of a module returns in a process of its own, for peaks of memory and first calls."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def resident_bytes(field: str) -> int:
    """`VmRSS`, this process's resident memory, or `VmHWM`, its peak since the start or `begin_peak`. Linux only."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def begin_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def machine() -> dict[str, str | int | float]:
    """Hardware, versions, and the load: the processes that wanted a core in the minute before."""
    facts = {
        "cores": os.cpu_count(),
        "cpu": processor_name(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
    return facts | {package: version(package) for package in PACKAGES}


def processor_name() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()


def made_by(name: str, facts: dict) -> str:
    """The line of a result that says how it was made and on what."""
    command = " ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
    gpu = f"{facts['gpu']} ({facts['gpu_memory_gib']} GiB), " if "gpu" in facts else ""
    versions = ", ".join(f"{package} {facts[package]}" for package in PACKAGES)
    return (
        f"Made by `{command}` on {gpu}{facts['cores']} cores of {facts['cpu']} ({facts['vector_instructions']}, "
        f"{facts['threads']} threads of torch, {facts['memory_gib']} GiB); the load was {facts['load']} before. "
        f"{versions}, Python {facts['python']}."
    )


def to_json(value, depth: int = 2) -> str:
    """JSON with one line for each record, which is what stands `depth` levels deep or holds no further level."""
    parts = list(value.values() if isinstance(value, dict) else value) if isinstance(value, dict | list) else []
    if depth == 0 or not any(isinstance(part, dict | list) for part in parts):
        return json.dumps(value)
    lines = [to_json(part, depth - 1) for part in parts]
    if isinstance(value, list):
        return "[\n" + ",\n".join(lines) + "\n]"
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {line}" for name, line in zip(value, lines)) + "\n}"


def save(name: str, report: dict, markdown: str, arguments: argparse.Namespace) -> None:
    """
    Prints the result and, unless `--quick`, writes `NAME.json` and `NAME.md` to the output folder, with the command
    and the machine: in the report as `command` and `machine`, in the markdown below its first line, the title.
    """
    title, _, rest = markdown.strip().partition("\n")
    line = made_by(name, arguments.machine)
    markdown = f"{title}\n\n{line}\n\n{rest.lstrip()}\n"
    print(f"\n{markdown}")
    if arguments.quick:
        return
    report = {"command": line.split("`")[1], "machine": arguments.machine} | report
    write(arguments.output_dir, name, report, markdown)


def write(folder: Path, name: str, report: dict, markdown: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(to_json(report) + "\n")
    path.with_suffix(".md").write_text(markdown)
    print(f"Written to {path} and .md")
