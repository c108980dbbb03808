"""Uses a pushed model without this project: `test_push.py` runs this file in a process of its own.

    python -P tests/hub_checks.py FOLDER

HF_ENDPOINT is a small Hub. FOLDER, the working directory, holds `image.png`, the cards as `model.md` and `lora.md`,
and `expected.pt`. The outcome of each check of `CHECKS` is written to `results.json`.
"""

import re
import runpy
import sys
from pathlib import Path


OUT_OF_REACH = runpy.run_path(str(Path(__file__).with_name("out_of_reach.py")))


def snippets(card):
    return re.findall(r"^```python\n(.*?)^```$", Path(card).read_text(), flags=re.MULTILINE | re.DOTALL)


def assert_code_is_pinned(card):
    """Only code of the commits in the card's examples was run."""
    named = set(re.findall(r'revision="([0-9a-f]{40})"', Path(card).read_text()))
    modules = [name.split(".") for name in sys.modules if name.startswith("transformers_modules.org.")]
    run = {part for module in modules for part in module if re.fullmatch("[0-9a-f]{40}", part)}
    assert run and run <= named, (run, named)


def logits_of(model, expected):
    import torch

    with torch.no_grad():
        return model(**expected["inputs"]).logits


def snippets_of_the_card_run_unchanged(folder, expected):
    import torch

    namespace = {}
    pipeline, first, ask, four_bits, vllm = snippets("model.md")
    assert "ask=True" in ask and "load_in_4bit=True" in four_bits and "vllm" in vllm
    for snippet in (pipeline, first, ask):
        exec(snippet, namespace)
    assert_code_is_pinned("model.md")
    assert torch.equal(logits_of(namespace["model"], expected), expected["second"])
    exec(four_bits, namespace)
    linears = {name: type(module).__name__ for name, module in namespace["model"].named_modules()}
    assert linears["model.language_model.layers.0.self_attn.q_proj"] == "Linear4bit"
    assert "Linear4bit" not in {kind for name, kind in linears.items() if "language_model" not in name}
    compile(vllm, "vllm", "exec")  # vLLM needs its own environment


def snippets_of_an_adapters_card_run_unchanged(folder, expected):
    import torch

    namespace = {}
    for snippet in snippets("lora.md"):
        exec(snippet, namespace)
    assert torch.equal(logits_of(namespace["model"], expected), expected["adapted"])


def automodel_for_peft_finds_the_base_by_itself(folder, expected):
    import torch
    from peft import AutoPeftModel

    model = AutoPeftModel.from_pretrained("org/lora", trust_remote_code=True).eval()
    assert torch.equal(logits_of(model, expected), expected["adapted"])


def newest_and_pinned_revisions_load_their_own_weights(folder, expected):
    import torch
    from transformers import AutoModel

    for revision in ("first", "second"):
        model = AutoModel.from_pretrained("org/model", revision=expected["commits"][revision], trust_remote_code=True)
        assert torch.equal(logits_of(model, expected), expected[revision]), revision
    model = AutoModel.from_pretrained("org/model", trust_remote_code=True)
    assert torch.equal(logits_of(model, expected), expected["second"])
    model = AutoModel.from_pretrained("org/model", revision="candidate", trust_remote_code=True)
    assert torch.equal(logits_of(model, expected), expected["first"])


def private_repository_is_refused_without_a_token(folder, expected):
    from transformers import AutoModel

    try:
        AutoModel.from_pretrained("org/secret", trust_remote_code=True)
    except OSError as error:
        assert "private repository" in str(error), error
    else:
        raise AssertionError("org/secret was loaded")


def nothing_runs_without_trust(folder, expected):
    from transformers import AutoModel, AutoProcessor

    for auto_class in (AutoModel, AutoProcessor):
        try:
            auto_class.from_pretrained("org/model")
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
        else:
            raise AssertionError(f"{auto_class.__name__} loaded without trust_remote_code")


CHECKS = [
    nothing_runs_without_trust,
    snippets_of_the_card_run_unchanged,  # before anything unpinned is loaded
    newest_and_pinned_revisions_load_their_own_weights,
    snippets_of_an_adapters_card_run_unchanged,
    automodel_for_peft_finds_the_base_by_itself,
    private_repository_is_refused_without_a_token,
]


if __name__ == "__main__":
    OUT_OF_REACH["run_checks"](CHECKS, Path(sys.argv[1]))
