"""Private methods of other libraries that this project overrides. A new version may rename or change them.

When a test fails, read the new parent method, adapt our method, and then the table here. For the same reason,
`pyproject.toml` has upper bounds for these libraries.
"""

import inspect
import tomllib

import pytest
from accelerate import FullyShardedDataParallelPlugin
from packaging.requirements import Requirement

import modeling_sq_llava
import processing_sq_llava
from sq_llava.training.trainer import SQLlavaTrainer
from tests import ROOT


OURS = ("modeling_sq_llava", "processing_sq_llava", "configuration_sq_llava", "sq_llava")
CLASSES = [
    SQLlavaTrainer,
    processing_sq_llava.SQLlavaProcessor,
    modeling_sq_llava.SQLlavaPreTrainedModel,
    modeling_sq_llava.SQLlavaModel,
    modeling_sq_llava.SQLlavaForConditionalGeneration,
    modeling_sq_llava.SQLlavaAutoModel,
]
# The parameters of the parent's method, without `self`. `None` means that our method passes them on unchanged.
PARENTS = {
    "SQLlavaTrainer._get_train_sampler": ["train_dataset"],
    "SQLlavaTrainer._get_num_items_in_batch": ["batch_samples", "device"],
    "SQLlavaTrainer._get_grad_norm": ["model", "grad_norm"],
    "SQLlavaTrainer._prepare_for_training": None,
    "SQLlavaTrainer._run_epoch": None,
    "SQLlavaTrainer._save_checkpoint": ["model", "trial"],
    "SQLlavaTrainer._save": ["output_dir", "state_dict"],
    "SQLlavaTrainer._save_rng_state": ["output_dir"],
    "SQLlavaTrainer._load_optimizer_and_scheduler": ["checkpoint"],
    "SQLlavaPreTrainedModel._init_weights": ["module"],
    "SQLlavaForConditionalGeneration._get_logits_processor": None,
    "SQLlavaAutoModel._from_config": ["config", "kwargs"],
}


def parent_methods() -> dict[str, list[str]]:
    """The private methods that our classes override, with the parameters of the other library's method."""
    methods = {}
    for cls in CLASSES:
        for name in vars(cls):
            if name.startswith("_") and not name.startswith("__") and callable(getattr(cls, name)):
                parents = [base for base in cls.__mro__[1:] if base.__module__.partition(".")[0] not in OURS]
                owner = next((base for base in parents if name in vars(base)), None)
                if owner is not None:
                    parameters = inspect.signature(getattr(owner, name)).parameters
                    methods[f"{cls.__name__}.{name}"] = [name for name in parameters if name != "self"]
    return methods


def test_each_private_method_that_is_overridden_is_in_the_table():
    assert parent_methods().keys() == PARENTS.keys()


@pytest.mark.parametrize("method", [name for name, parameters in PARENTS.items() if parameters is not None])
def test_parent_method_has_the_parameters_that_ours_was_written_for(method):
    assert parent_methods()[method] == PARENTS[method]


def test_wrap_policy_is_set_by_a_method_of_the_plugin():
    assert list(inspect.signature(FullyShardedDataParallelPlugin.set_auto_wrap_policy).parameters) == ["self", "model"]


def test_libraries_with_private_methods_of_ours_are_bounded_from_above():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounded = {
        requirement.name
        for requirement in map(Requirement, project["dependencies"])
        if any(specifier.operator == "<" for specifier in requirement.specifier)
    }
    assert bounded >= {"accelerate", "peft", "transformers", "trl"}
