"""Writes benchmarks/README.md from benchmarks/results/*.md: a section for each benchmark, in the order given here.

    python -m benchmarks.readme

A result that is not there yet is said to be so. It measures nothing.
"""

import ast
import re
from pathlib import Path

from benchmarks import common


ORDER = (
    "train_step",
    "lm_head",
    "batching",
    "memory",
    "ask",
    "generate",
    "prototype_extractor",
    "scaling",
    "image_pipeline",
    "doctor",
    "convert",
    "startup",
    "serving",
    "gpu",
    "ablation",
    "self_training",
    "three_systems",
)
HEAD = """# Benchmarks

<!-- Written by `python -m benchmarks.readme` from results/*.md: change those, or that. -->

Each stands beside a peer in the same run, with models of the same sizes and the same rows: ratios can be compared
between machines, seconds cannot. `(a to b)` behind a median is the lowest and the highest round. `make bench` runs
those that need no GPU, in 13 minutes on two cores, then writes this page; each runs alone as
`python -m benchmarks.NAME`, with `--quick` to see that it works. `gpu` needs a GPU; `serving`, `ablation`,
`self_training` and `three_systems` what `make demo` leaves; `ablation` takes hours. None is a test."""


def what_it_is(name: str) -> str:
    """The first line of the benchmark's docstring."""
    return ast.get_docstring(ast.parse((Path(__file__).parent / f"{name}.py").read_text())).partition("\n")[0]


def section(name: str) -> str:
    result = common.RESULTS / f"{name}.md"
    if not result.is_file():
        return f"## `{name}`\n\n{what_it_is(name)}\n\nNot measured yet: `python -m benchmarks.{name}`."
    text = re.sub(r"^#", "##", result.read_text().strip(), flags=re.MULTILINE)
    text = re.sub(r"\]\((?=[^)/:]+\.png\))", "](results/", text)
    title, _, rest = text.partition("\n")
    return f"{title} (`{name}`)\n\n{rest.strip()}"


def main():
    path = Path(__file__).parent / "README.md"
    path.write_text("\n\n".join([HEAD, *(section(name) for name in ORDER)]) + "\n")
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
