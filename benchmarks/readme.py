"""Writes results/*.md from results/*.json, and benchmarks/README.md from those: one section for each benchmark.

    python -m benchmarks.readme

It measures nothing: after a change of words in a benchmark's `to_markdown`, the numbers stay as they were measured.
"""

import ast
import json
import re
from importlib import import_module
from pathlib import Path

from benchmarks import common


ORDER = (
    "train_step", "shared_images", "sharing_accuracy", "lm_head", "batching", "memory", "ask", "generate",
    "prototype_extractor", "scaling", "image_pipeline", "doctor", "convert", "startup", "serving", "gpu", "launchers",
    "asking_first", "ablation", "scenes", "self_training", "three_systems",
)  # fmt: skip
HEAD = """# Benchmarks

<!-- Written by `python -m benchmarks.readme`. Do not edit: change `to_markdown` of a benchmark instead. -->

Most benchmarks compare this project with another library in the same run, on the same rows and with models of the
same sizes. So you can compare ratios between machines, but not seconds. `1.5 (1.4 to 1.6)` is the median with the
lowest and the highest round. In each round, all variants run one after the other.

`python -m benchmarks.NAME` runs one benchmark, and `--quick` makes it a short trial. `make bench` runs all those that
need neither a GPU nor the demo, in 13 minutes on two cores, and then writes this page. `gpu` needs a GPU, `launchers`
the environment of `make test-deepspeed`. `shared_images` takes half an hour. `sharing_accuracy`, `serving`,
`asking_first`, `ablation`, `self_training` and `three_systems` need the output of `make demo`. `ablation` and `scenes`
take hours."""


def what_it_is(name: str) -> str:
    """The first line of the benchmark's docstring."""
    return ast.get_docstring(ast.parse((Path(__file__).parent / f"{name}.py").read_text())).partition("\n")[0]


def markdown_of(name: str) -> str:
    """The markdown of a saved result."""
    report = json.loads((common.RESULTS / f"{name}.json").read_text())
    return common.document(report, import_module(f"benchmarks.{name}").to_markdown)


def section(name: str) -> str:
    result = common.RESULTS / f"{name}.md"
    if not result.is_file():
        return f"## `{name}`\n\n{what_it_is(name)}\n\nNot measured yet. The command is `python -m benchmarks.{name}`."
    text = re.sub(r"^#", "##", result.read_text().strip(), flags=re.MULTILINE)
    text = re.sub(r"\]\((?=[^)/:]+\.png\))", "](results/", text)
    title, _, rest = text.partition("\n")
    return f"{title} (`{name}`)\n\n{rest.strip()}"


def main():
    for file in common.RESULTS.glob("*.json"):
        file.with_suffix(".md").write_text(markdown_of(file.stem))
    path = Path(__file__).parent / "README.md"
    path.write_text("\n\n".join([HEAD, *(section(name) for name in ORDER)]) + "\n")
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
