"""Code that the benchmarks share: options, timing, memory, tables, and how a result is saved.

    from benchmarks import common
    arguments = common.parse_arguments(__doc__)
    times = common.interleave({"peer": run_peer, "project": run_project}, rounds=5)
    report = {"times": times, "times_faster": common.ratio(times, "peer", "project")}
    common.save("name", report, to_markdown, arguments)

This module is not a benchmark. `python -m benchmarks.NAME` runs one benchmark. `make bench` runs all that need neither
a GPU nor the output of `make demo`.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "pillow")
MEBIBYTE = 2**20


def parse_arguments(doc: str, **options: tuple[int | str | bool, str]) -> argparse.Namespace:
    """
    Args:
        doc: The benchmark's docstring, which is shown as its help.
        options: Further options, each with its default and its help. `rows=(1000, "Number of rows.")` becomes
            `--rows`; an option with the default `False` becomes a switch.

    Returns:
        `quick`, `output_dir`, the further options, and `machine`: `machine()` as it was before the run.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Small sizes, under a minute; prints, writes nothing.")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="Folder for the result: %(default)s.")
    for name, (default, text) in options.items():
        kind = {"action": "store_true"} if default is False else {"type": type(default), "default": default}
        parser.add_argument(f"--{name.replace('_', '-')}", **kind, help=f"{text} Default: %(default)s.")
    arguments = parser.parse_args()
    arguments.machine = machine()
    os.environ["KINETO_LOG_LEVEL"] = "6"  # PyTorch's profiler would print when it starts and stops
    return arguments


def interleave(
    functions: dict[str, Callable[[], object]], rounds: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """
    Runs the functions in turn and measures each call. Other work on the machine slows all of them alike, so ratios
    within a round are reliable even where the seconds are not.

    Args:
        functions: The functions by name, each called once in every round.
        rounds: Number of rounds.
        warm_up: Call each function once first, without measuring it.

    Returns:
        The seconds of each function, one number for each round.
    """
    for function in functions.values() if warm_up else ():
        function()
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds_of(function))
    return times


def seconds_of(function: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, including the work that it started on a GPU."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(values: list[float]) -> dict[str, float]:
    """The median, the lowest and the highest value."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(times: dict[str, list[float]], of: str, to: str) -> dict[str, float]:
    """The `summary` of `of / to` within each round: how many times faster `to` is than `of`."""
    return summary([one / other for one, other in zip(times[of], times[to], strict=True)])


def with_spread(values: dict[str, float], form: str = ".3g") -> str:
    """A `summary` as text for a table: `1.52 (1.49 to 1.60)`."""
    return f"{values['median']:{form}} ({values['low']:{form}} to {values['high']:{form}})"


def in_fresh_process(function: Callable, *arguments):
    """Calls `function` in a new process and returns its result. Peaks of memory then start at zero."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def resident_bytes(field: str) -> int:
    """This process's resident memory (`VmRSS`), or its peak since `begin_peak` or the start (`VmHWM`). Linux only."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def begin_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def allocated_peak(function: Callable[[], object]) -> int:
    """The largest number of bytes that PyTorch has allocated and not yet freed while a function runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def machine() -> dict[str, str | int | float]:
    """Hardware, versions, and the load average of the last minute."""
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


def table(header: list[str], rows: Iterable[list], left: int = 1) -> str:
    """A markdown table. Its first `left` columns are aligned to the left, the others to the right."""
    lines = [" | ".join(map(str, row)) for row in (header, *rows)]
    lines = [f"| {line} |" for line in lines]
    return "\n".join([lines[0], "|" + "---|" * left + "--:|" * (len(header) - left), *lines[1:]])


def text(*blocks: str) -> str:
    """Markdown of several blocks: paragraphs, tables, headings."""
    return "\n\n".join(blocks)


def to_json(value, depth: int = 2) -> str:
    """JSON with one line for each record. A record is `depth` levels deep, or holds no list or object."""
    parts = list(value.values() if isinstance(value, dict) else value) if isinstance(value, dict | list) else []
    if depth == 0 or not any(isinstance(part, dict | list) for part in parts):
        return json.dumps(value)
    lines = [to_json(part, depth - 1) for part in parts]
    if isinstance(value, list):
        return "[\n" + ",\n".join(lines) + "\n]"
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {line}" for name, line in zip(value, lines)) + "\n}"


def document(report: dict, to_markdown: Callable[[dict], str]) -> str:
    """The markdown of a saved report, with the command and the machine below its title."""
    title, _, rest = to_markdown(report).partition("\n")
    facts, lines = report.get("machine"), [title, rest.strip()]
    if facts is not None:
        gpu = f"{facts['gpu']} ({facts['gpu_memory_gib']} GiB), " if "gpu" in facts else ""
        versions = ", ".join(f"{package} {facts[package]}" for package in PACKAGES)
        line = f"Measured with `{report['command']}` on {gpu}{facts['cores']} cores of {facts['cpu']} "
        line += f"({facts['vector_instructions']}, {facts['threads']} torch threads, {facts['memory_gib']} GiB of "
        line += f"memory). Load average before the run: {facts['load']}. {versions}, Python {facts['python']}."
        lines.insert(1, line)
    return text(*lines) + "\n"


def save(
    name: str,
    report: dict,
    to_markdown: Callable[[dict], str],
    arguments: argparse.Namespace,
    draw: Callable[[dict, Path], None] | None = None,
) -> None:
    """
    Prints a result and, unless `--quick` is given, writes `NAME.json`, `NAME.md` and perhaps a plot `NAME.png`.

    Args:
        name: Name of the benchmark's module.
        report: What was measured. `command` and `machine` are added to it.
        to_markdown: Makes the markdown of the report; its first line is the title.
        arguments: As `parse_arguments` returned them.
        draw: Draws the report into a file.
    """
    command = " ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
    report = {"command": command, "machine": arguments.machine} | report
    markdown = document(report, to_markdown)
    print(f"\n{markdown}")
    if not arguments.quick:
        write(arguments.output_dir, name, report, markdown)
        if draw is not None:
            draw(report, arguments.output_dir / f"{name}.png")


def write(folder: Path, name: str, report: dict, markdown: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(to_json(report) + "\n")
    path.with_suffix(".md").write_text(markdown)
    print(f"Written: {path} and {path.with_suffix('.md')}")
