"""The loss of a step from its last hidden states: TRL's fused head on all positions, or on labelled positions only.

    python -m benchmarks.lm_head            # writes benchmarks/results/lm_head.{json,md}, under 90 seconds

Four forms of the same loss run forward and backward to the hidden states. The head is frozen, as under LoRA:

    stock      TRL's fused head as its trainer runs it on a CPU: in tiles, on all positions
    ours       the same on the labelled positions, as `SQLlavaTrainer` does
    logits     cross entropy of all logits at once, as a model's own forward pass computes it
    labelled   cross entropy of the logits of the labelled positions at once

The benchmark first checks that they agree. Memory is the peak of what PyTorch allocates in one pass, without inputs
and weights. Not measured: a GPU, where TRL's kernel selects the labelled positions itself; the rest of a step.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as TILE

from benchmarks import common


def fused(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The call in trl/trainer/utils.py, with the outputs that TRL's trainer asks for."""
    outputs = ("log_probs", "entropy", "is_top1")
    targets = labels.clamp(min=0)
    log_probs = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, TILE, None, 1.0, outputs)[0]
    return -log_probs.masked_fill(labels == -100, 0).sum()


def at_once(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")


def on_labelled(loss: Callable) -> Callable:
    return lambda hidden, weight, labels: loss(hidden[labels != -100], weight, labels[labels != -100])


FORMS = {"stock": fused, "ours": on_labelled(fused), "logits": at_once, "labelled": on_labelled(at_once)}


def make_inputs(vocabulary: int, width: int, positions: int, num_labels: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    labels = torch.full((positions,), -100)
    labelled = torch.randperm(positions, generator=generator)[:num_labels]
    labels[labelled] = torch.randint(vocabulary, (num_labels,), generator=generator)
    return hidden.requires_grad_(), weight, labels


def run(form: str, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    hidden.grad = None
    loss = FORMS[form](hidden, weight, labels)
    loss.backward()
    return loss.detach(), hidden.grad


def time_case(vocabulary: int, width: int, positions: int, share: float, rounds: int) -> dict:
    inputs = make_inputs(vocabulary, width, positions, round(share * positions))
    expected = run("logits", *inputs)
    for form in FORMS:
        torch.testing.assert_close(run(form, *inputs), expected, rtol=1e-4, atol=1e-5)
    times = common.interleave({form: partial(run, form, *inputs) for form in FORMS}, rounds)
    row = {"vocabulary": vocabulary, "positions": positions, "share": share, "width": width}
    row["seconds"] = {form: common.summary(seconds) for form, seconds in times.items()}
    return row | {"times_faster": {form: common.ratio(times, form, "ours") for form in FORMS}}


def memory_of_cases(vocabularies: tuple[int, ...], width: int, positions: int, num_labels: int) -> list[dict]:
    rows = []
    for vocabulary in vocabularies:
        inputs = make_inputs(vocabulary, width, positions, num_labels)
        row = {"vocabulary": vocabulary, "positions": positions, "labels": num_labels, "width": width}
        row["mebibytes"] = {
            form: common.allocated_peak(partial(run, form, *inputs)) / common.MEBIBYTE for form in FORMS
        }
        rows.append(row)
    return rows


def to_markdown(report: dict) -> str:
    forms = ["stock: TRL, all positions", "all logits", "labelled logits", "ours: TRL, labelled"]
    order = ("stock", "logits", "labelled", "ours")
    times = [
        [
            f"{row['vocabulary']:,}",
            f"{row['share']:.0%}",
            *(f"{row['seconds'][form]['median']:.3f} s" for form in order),
            f"**{common.with_spread(row['times_faster']['stock'])}**",
        ]
        for row in report["times"]
    ]
    memory = [
        [f"{row['vocabulary']:,}", *(f"{row['mebibytes'][form]:,.0f} MiB" for form in order)]
        for row in report["memory"]
    ]
    first, sizes = report["times"][0], report["memory"][0]
    return common.text(
        "# The loss of the head: all positions, or labelled positions only",
        "TRL's fused head works in tiles: `stock` runs it on all positions, `ours` on the labelled ones only. The "
        "other two columns compute the logits of all or of the labelled positions at once.",
        f"Seconds forward and backward for {first['positions']:,} positions of width {first['width']} in float32, "
        f"medians of {report['rounds']} rounds. The last column says how many times faster ours is than "
        "stock, with the lowest and the highest round:",
        common.table(["vocabulary", "labelled", *forms, "stock / ours"], times, left=0),
        f"Peak of the memory that one pass allocates, with {sizes['labels']:,} labels in {sizes['positions']:,} "
        "positions:",
        common.table(["vocabulary", *forms], memory, left=0),
    )


def main():
    arguments = common.parse_arguments(__doc__)
    width, positions, rounds = (64, 96, 1) if arguments.quick else (256, 128, 2)
    vocabularies = (8_000, 32_064) if arguments.quick else (32_064, 151_936)
    report = {"rounds": rounds, "times": []}
    for vocabulary in vocabularies:
        for share in (0.05, 0.15, 0.5):
            print(f"time: vocabulary {vocabulary:,}, {share:.0%} labelled", flush=True)
            report["times"].append(time_case(vocabulary, width, positions, share, rounds))
    print("memory", flush=True)
    sizes = (312, 250) if arguments.quick else (1250, 1000)
    report["memory"] = common.in_fresh_process(memory_of_cases, vocabularies, 64, *sizes)
    common.save("lm_head", report, to_markdown, arguments)


if __name__ == "__main__":
    main()
