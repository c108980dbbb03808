"""The shape of the code base: what may import what, and what the code of a checkpoint may depend on."""

import ast
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
# What travels with each checkpoint.
HUB_CODE = ["configuration_sq_llava", "image_processing_sq_llava", "processing_sq_llava", "modeling_sq_llava"]
# A module imports only from modules that stand before it.
ORDER = [
    *HUB_CODE,
    "sq_llava.resources",
    "sq_llava.stopping",
    "sq_llava.console",
    "sq_llava.locations",
    "sq_llava.early_checks",
    "sq_llava.appended_lines",
    "sq_llava.chat_journal",
    "sq_llava.chat_replies",
    "sq_llava.chat_client",
    "sq_llava.run_note",
    "sq_llava.images",
    "sq_llava.messages",
    "sq_llava.self_questioning",
    "sq_llava.row_layouts",
    "sq_llava.sources",
    "sq_llava.data",
    "sq_llava.lengths",
    "sq_llava.batching",
    "sq_llava.packing",
    "sq_llava.adapter",
    "sq_llava.provenance",
    "sq_llava.fresh_load",
    "sq_llava.card",
    "sq_llava.layouts",
    "sq_llava.completeness",
    "sq_llava.recovery",
    "sq_llava.inspection",
    "sq_llava.checkpoint",
    "sq_llava.publishing",
    "sq_llava.weights",
    "sq_llava.convert",
    "sq_llava.originals",
    "sq_llava.verify",
    "sq_llava.prefix_cache",
    "sq_llava.sampling",
    "sq_llava.inference",
    "sq_llava.model_options",
    "sq_llava.chat_command",
    "sq_llava.monitoring",
    "sq_llava.trainer",
    "sq_llava.doctor",
    "sq_llava.doctor_report",
    "sq_llava.setting_table",
    "sq_llava.settings",
    "sq_llava.base",
    "sq_llava.planning",
    "sq_llava.evaluation.metrics",
    "sq_llava.evaluation.caption_metrics",
    "sq_llava.evaluation.caption_statistics",
    "sq_llava.evaluation.judge",
    "sq_llava.evaluation.paper",
    "sq_llava.evaluation.reading",
    "sq_llava.evaluation.task",
    "sq_llava.evaluation.short_answers",
    "sq_llava.evaluation.options",
    "sq_llava.evaluation.captions",
    "sq_llava.evaluation.easy_vqa",
    "sq_llava.evaluation.gqa",
    "sq_llava.evaluation.llava_bench",
    "sq_llava.evaluation.mmbench",
    "sq_llava.evaluation.mmvet",
    "sq_llava.evaluation.pope",
    "sq_llava.evaluation.scienceqa_ensemble",
    "sq_llava.evaluation.scienceqa",
    "sq_llava.evaluation.textvqa",
    "sq_llava.evaluation.vizwiz",
    "sq_llava.evaluation.vqav2",
    "sq_llava.evaluation.progress",
    "sq_llava.evaluation.answering",
    "sq_llava.evaluation.lmms_eval_plugin",
    "sq_llava.evaluation.lmms_eval_model",
    "sq_llava.evaluation.results",
    "sq_llava.evaluation.report",
    "sq_llava.evaluation.run",
    "sq_llava.evaluation.comparison",
    "sq_llava.evaluation.metrics_hub.captions",
    "sq_llava.evaluation.metrics_hub.pope",
    "sq_llava.evaluation.metrics_hub.vqa_accuracy",
    "sq_llava.evaluation.question_metrics",
    "sq_llava.evaluation.questions",
    "sq_llava.evaluation.question_run",
    "sq_llava.evaluation.command",
    "sq_llava.generation.rows",
    "sq_llava.generation.asking",
    "sq_llava.generation.scenes",
    "sq_llava.generation.text_rules",
    "sq_llava.generation.turns",
    "sq_llava.generation.llava",
    "sq_llava.generation.judging",
    "sq_llava.generation.filters",
    "sq_llava.generation.scoring",
    "sq_llava.generation.self_generation",
    "sq_llava.generation.captions",
    "sq_llava.generation.review_sheet",
    "sq_llava.generation.describing",
    "sq_llava.generation.curate",
    "sq_llava.generation.options",
    "sq_llava.generation.self_command",
    "sq_llava.generation.command",
    "sq_llava.recipe_command",
    "sq_llava.serving.schema",
    "sq_llava.serving.images",
    "sq_llava.serving.decoding",
    "sq_llava.serving.engine",
    "sq_llava.serving.metrics",
    "sq_llava.serving.chat",
    "sq_llava.serving.app",
    "sq_llava.serving.command",
    "sq_llava.prototypes",
    "sq_llava.page.dialogue",
    "sq_llava.page.layout",
    "sq_llava.page.command",
    "train_sft",
    "sq_llava.cli",
    "app",
]


def path_of(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def imports(module: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path_of(module).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def test_every_module_has_its_place_in_the_order():
    files = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in (ROOT / "sq_llava").rglob("*.py")
        if not file.stem.startswith("__")
    }
    assert files == {module for module in ORDER if module.startswith("sq_llava.")}


@pytest.mark.parametrize("module", ORDER)
def test_module_imports_only_from_earlier_ones(module):
    earlier = ORDER[: ORDER.index(module)]
    ours = {name for name in imports(module) if name.split(".")[0] in {"sq_llava", "train_sft", "demo", *HUB_CODE}}
    assert ours - {"sq_llava", "sq_llava.evaluation", "sq_llava.generation", "sq_llava.serving", *earlier} == set()


@pytest.mark.parametrize("module", HUB_CODE)
def test_code_of_a_checkpoint_needs_only_torch_transformers_and_pil(module):
    allowed = {"torch", "transformers", "PIL", *HUB_CODE, *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imports(module)} <= allowed


@pytest.mark.parametrize("file", [*ROOT.glob("*.py"), *ROOT.glob("sq_llava/**/*.py"), *ROOT.glob("demo/*.py")])
def test_module_says_what_it_does(file):
    assert ast.get_docstring(ast.parse(file.read_text())), f"{file.name} has no docstring"
