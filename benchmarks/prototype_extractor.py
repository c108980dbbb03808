"""Time and memory of the prototype extractors, compared with a literal form that builds [B, K, N, D] tensors.

    python -m benchmarks.prototype_extractor            # writes benchmarks/results/prototype_extractor.{json,md}

The literal form multiplies elementwise and sums wherever a token or a prototype gathers from many others, as the
authors' code does. In the "released" variant these are the aggregation and the spread (its iterations are matrix
products there too); in the "paper" variant each M-step and the spread. Everything else is the same in both forms. The
benchmark first checks that outputs and gradients agree, and then runs both forms in turn, in float32 on the CPU,
without the projector.

Memory is what a pass needs beyond its start, without inputs and weights, in a fresh process for each case. "Allocated"
is the peak of PyTorch's allocations as its profiler sees them. "Resident" is the growth of the process's peak resident
memory, which includes the buffers of the matrix library and what malloc keeps (read from /proc: Linux only).

Not measured: a GPU, half precision, the projector.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import common
from benchmarks.random_models import llama_sizes
from configuration_sq_llava import CLIP_VIT_L_14_336, SQLlavaConfig
from modeling_sq_llava import SQLlavaModel, SQLlavaPaperPrototypeExtractor, SQLlavaReleasedPrototypeExtractor


PASSES = ("forward", "forward+backward")
RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 1e-8, 1e-11


@dataclass(frozen=True)
class Sizes:
    batch: int = 1
    tokens: int = 576
    width: int = 1024
    prototypes: int = 256
    iterations: int = 2


QUICK_SIZES = Sizes(batch=2, tokens=144, width=256, prototypes=64)


def literal_released(extractor: SQLlavaReleasedPrototypeExtractor, x_BND: torch.Tensor) -> torch.Tensor:
    """The released extractor as its authors wrote it."""

    def pool(tokens_BND):
        return F.adaptive_avg_pool1d(tokens_BND.mT, extractor.num_prototypes).mT

    value_BND, feature_BND = extractor.v(x_BND), extractor.f(x_BND)
    centers_BKD, feature_centers_BKD = pool(x_BND), pool(feature_BND)
    value_BND = F.normalize(value_BND, dim=1)
    for _ in range(extractor.num_iterations):
        centers_BKD = extractor.c(centers_BKD)
        assignment_BKN = (F.normalize(centers_BKD, dim=-1) @ value_BND.mT).softmax(dim=1)
        centers_BKD = assignment_BKN @ feature_BND
    cosine_BKN = F.normalize(centers_BKD, dim=-1) @ F.normalize(x_BND, dim=-1).mT
    similarity_BKN = torch.sigmoid(extractor.sim_beta + extractor.sim_alpha * cosine_BKN)
    winner_BKN = torch.zeros_like(similarity_BKN).scatter_(1, similarity_BKN.argmax(dim=1, keepdim=True), 1.0)
    similarity_BKN = similarity_BKN * winner_BKN

    gathered_BKD = (feature_BND.unsqueeze(1) * similarity_BKN.unsqueeze(-1)).sum(dim=2)
    gathered_BKD = (gathered_BKD + feature_centers_BKD) / (winner_BKN.sum(dim=-1, keepdim=True) + 1.0)
    return x_BND + (gathered_BKD.unsqueeze(2) * similarity_BKN.unsqueeze(-1)).sum(dim=1)


def literal_paper(extractor: SQLlavaPaperPrototypeExtractor, z_BND: torch.Tensor) -> torch.Tensor:
    """The paper's equations, with each weighted sum of vectors written out."""
    keys_BND, values_BND = extractor.k(z_BND), extractor.v(z_BND)
    prototypes_BKD = extractor.prototypes.expand(z_BND.shape[0], -1, -1)
    for _ in range(extractor.num_iterations):
        scores_BKN = extractor.q(prototypes_BKD) @ keys_BND.mT
        assignment_BKN = (scores_BKN / z_BND.shape[-1] ** 0.5).softmax(dim=1)
        total_BKD = (assignment_BKN.unsqueeze(-1) * values_BND.unsqueeze(1)).sum(dim=2)
        prototypes_BKD = total_BKD / assignment_BKN.sum(dim=-1, keepdim=True)
    cosine_BKN = F.normalize(prototypes_BKD, dim=-1) @ F.normalize(z_BND, dim=-1).mT
    context_BND = (cosine_BKN.unsqueeze(-1) * prototypes_BKD.unsqueeze(2)).sum(dim=1) / prototypes_BKD.shape[1]
    return z_BND + extractor.z(context_BND)


EXTRACTORS = {"released": SQLlavaReleasedPrototypeExtractor, "paper": SQLlavaPaperPrototypeExtractor}
LITERAL_FORMS = {"released": literal_released, "paper": literal_paper}


def make_extractor(variant: str, sizes: Sizes) -> nn.Module:
    torch.manual_seed(0)
    config = SQLlavaConfig(
        vision_config={**CLIP_VIT_L_14_336, "hidden_size": sizes.width},
        prototype_variant=variant,
        num_prototypes=sizes.prototypes,
        num_prototype_iterations=sizes.iterations,
    )
    extractor = EXTRACTORS[variant](config)
    if variant == "paper":
        nn.init.normal_(extractor.prototypes)
    return extractor


def make_function(variant: str, form: str, extractor: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return extractor if form == "project" else lambda features: LITERAL_FORMS[variant](extractor, features)


def run_pass(function: Callable, extractor: nn.Module, which: str, features: torch.Tensor, upstream: torch.Tensor):
    """One forward pass without gradients, or a forward and a backward pass down to the features and all weights."""
    if which == "forward":
        with torch.no_grad():
            return function(features), []
    extractor.zero_grad()
    features = features.detach().requires_grad_()
    output = function(features)
    output.backward(upstream)
    return output.detach(), [features.grad, *(parameter.grad for parameter in extractor.parameters())]


def check_agreement(variant: str, sizes: Sizes):
    """
    Raises an AssertionError unless both forms give the same output and gradients. This is checked in float64: in
    float32, rounding decides which prototype a token between two prototypes goes to.
    """
    extractor = make_extractor(variant, sizes).double()
    features, upstream = torch.randn(2, 1, sizes.tokens, sizes.width, dtype=torch.float64)
    project, literal = (
        run_pass(make_function(variant, form, extractor), extractor, "forward+backward", features, upstream)
        for form in ("project", "literal")
    )
    torch.testing.assert_close(project, literal, rtol=RELATIVE_TOLERANCE, atol=ABSOLUTE_TOLERANCE)


def time_case(variant: str, which: str, sizes: Sizes, repeats: int) -> dict[str, float]:
    """Seconds. In each round the literal form runs once, and this project's form three times before and after it."""
    extractor = make_extractor(variant, sizes)
    features, upstream = torch.randn(2, sizes.batch, sizes.tokens, sizes.width)

    def seconds(form):
        function = make_function(variant, form, extractor)
        return common.seconds_of(lambda: run_pass(function, extractor, which, features, upstream))

    seconds("project")  # warm-up
    rounds = []
    for _ in range(repeats):
        before = [seconds("project") for _ in range(3)]
        literal = seconds("literal")
        rounds.append((statistics.median(before + [seconds("project") for _ in range(3)]), literal))
    project, literal = (statistics.median(times) for times in zip(*rounds))
    return {
        "project_seconds": project,
        "literal_seconds": literal,
        "times_faster": statistics.median(literal / project for project, literal in rounds),
    }


def memory_of_case(variant: str, form: str, which: str, sizes: Sizes, threads: int) -> dict[str, float]:
    """Mebibytes. Call it in a fresh process: memory that malloc kept from an earlier pass would hide the growth."""
    torch.set_num_threads(threads)
    tiny = Sizes(batch=1, tokens=8, width=16, prototypes=4)
    small, large = (make_extractor(variant, each) for each in (tiny, sizes))
    warm_up = torch.randn(2, tiny.batch, tiny.tokens, tiny.width)
    run_pass(make_function(variant, form, small), small, which, *warm_up)
    features, upstream = torch.randn(2, sizes.batch, sizes.tokens, sizes.width)
    function = make_function(variant, form, large)

    common.begin_peak()
    start = common.resident_bytes("VmRSS")
    run_pass(function, large, which, features, upstream)
    resident = common.resident_bytes("VmHWM") - start
    large.zero_grad()
    allocated = common.allocated_peak(lambda: run_pass(function, large, which, features, upstream))
    return {"allocated": allocated / common.MEBIBYTE, "resident": resident / common.MEBIBYTE}


def measure_memory(variant: str, which: str, sizes: Sizes) -> dict[str, float]:
    row = {}
    for form in ("project", "literal"):
        measured = common.in_fresh_process(memory_of_case, variant, form, which, sizes, torch.get_num_threads())
        row |= {f"{form}_{kind}_mib": mebibytes for kind, mebibytes in measured.items()}
    for kind in ("allocated", "resident"):
        row[f"times_less_{kind}"] = row[f"literal_{kind}_mib"] / row[f"project_{kind}_mib"]
    return row


def time_beside_vision(batch: int, repeats: int) -> dict[str, float]:
    """Seconds of CLIP ViT-L/14-336 up to the layer that SQ-LLaVA reads, and of the extractors on its features."""
    torch.manual_seed(0)
    unused = llama_sizes(64, inner=64, layers=1, heads=2, vocabulary=64)
    config = SQLlavaConfig(text_config=unused, image_token_id=62, vusr_token_id=63)
    model = SQLlavaModel(config).eval()
    extractors = {variant: make_extractor(variant, Sizes()) for variant in EXTRACTORS}
    pixel_values = torch.randn(batch, 3, 336, 336)
    with torch.no_grad():
        features = model.get_vision_features(pixel_values)
        functions = {variant: partial(extractor, features) for variant, extractor in extractors.items()}
        times = common.interleave({"vision": partial(model.get_vision_features, pixel_values), **functions}, repeats)
    row = {"batch": batch, "vision_layers": config.num_vision_layers_used}
    row["vision_seconds"] = statistics.median(times["vision"])
    for variant in extractors:
        row[f"{variant}_seconds"] = statistics.median(times[variant])
        row[f"{variant}_share"] = common.ratio(times, variant, "vision")["median"]
    return row


def to_markdown(report: dict) -> str:
    sizes, vision = report["sizes"], report["vision"]
    header, times = ["variant", "pass", "literal", "project"], []
    memory = {"allocated": [], "resident": []}
    for row in report["rows"]:
        name = [row["variant"], row["pass"]]
        seconds = [f"{row['literal_seconds']:.2f} s", f"{row['project_seconds']:.3f} s"]
        times.append([*name, *seconds, f"**{row['times_faster']:.1f}x**"])
        for kind, rows in memory.items():
            sizes_of = [f"{row[f'{form}_{kind}_mib']:,.0f} MiB" for form in ("literal", "project")]
            rows.append([*name, *sizes_of, f"**{row[f'times_less_{kind}']:.1f}x**"])
    shares = [
        [variant, f"{vision[f'{variant}_seconds']:.3f} s", f"{vision[f'{variant}_share']:.1%}"]
        for variant in EXTRACTORS
    ]
    return common.text(
        "# Prototype extractor: this project's form and the literal form",
        "The literal form builds `[B, K, N, D]` tensors, as the authors' code does. Medians of "
        f"{report['repeats']} rounds in which both forms run in turn. B={sizes['batch']}, N={sizes['tokens']}, "
        f"D={sizes['width']}, K={sizes['prototypes']}, T={sizes['iterations']}, float32, without the projector. On a "
        "busy machine the ratios are more reliable than the seconds.",
        common.table([*header, "faster"], times, left=2),
        "Memory that PyTorch allocates in a pass, at its peak:",
        common.table([*header, "less"], memory["allocated"], left=2),
        "Growth of the process's peak resident memory in a pass:",
        common.table([*header, "less"], memory["resident"], left=2),
        "Checked first: outputs and all gradients of both forms agree for one image in float64 "
        f"(rtol {RELATIVE_TOLERANCE:.0e}, atol {ABSOLUTE_TOLERANCE:.0e}).",
        f"A forward pass of CLIP ViT-L/14-336 ({vision['vision_layers']} layers, B={vision['batch']}) takes "
        f"{vision['vision_seconds']:.2f} s. The extractor takes:",
        common.table(["variant", "time", "share of the vision pass"], shares),
    )


def main():
    arguments = common.parse_arguments(__doc__, repeats=(2, "Number of rounds."))
    sizes, repeats = (QUICK_SIZES, 1) if arguments.quick else (Sizes(), arguments.repeats)
    report = {"sizes": asdict(sizes), "repeats": repeats, "rows": []}
    for variant in EXTRACTORS:
        print(f"{variant}: checking that both forms agree", flush=True)
        check_agreement(variant, sizes)
        for which in PASSES:
            print(f"{variant}, {which}: measuring time and memory", flush=True)
            row = {"variant": variant, "pass": which, **time_case(variant, which, sizes, repeats)}
            report["rows"].append(row | measure_memory(variant, which, sizes))
    print("measuring the vision tower", flush=True)
    report["vision"] = time_beside_vision(1 if arguments.quick else sizes.batch, repeats)
    common.save("prototype_extractor", report, to_markdown, arguments)


if __name__ == "__main__":
    main()
