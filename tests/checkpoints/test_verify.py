"""The comparison of a conversion with its source: equal results pass, and the first layer that differs is named.

Results of all kinds of sources are compared in `test_convert.py`.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from sq_llava.checkpoints.layouts import Layout, recognise
from sq_llava.checkpoints.verify import TOLERANCES, draw_picture, print_verification, verify
from tests import released
from tests.checkpoints.conversions import LORA, MERGED, PROJECTOR, convert_source, load_weights, run_convert
from tests.released import edit_json, edit_weights


@pytest.fixture(scope="module")
def converted(parts, tmp_path_factory) -> tuple[Layout, Path]:
    """The LoRA release, and its conversion."""
    source = LORA(tmp_path_factory.mktemp("lora") / "source", base=parts / "base", vision=parts / "clip")
    conversion = convert_source(source)
    return conversion.layout, conversion.out


@pytest.fixture
def result(converted, tmp_path) -> Path:
    return Path(shutil.copytree(converted[1], tmp_path / "result"))


def change(folder: Path, name: str, by: float = 0.05) -> None:
    """Adds to one number of one weight."""
    edit_weights(folder / "model.safetensors", lambda weights: weights[name].view(-1)[:1].add_(by))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weight", "place"),
    [
        ("model.vision_tower.embeddings.class_embedding", "vision embeddings"),
        ("model.vision_tower.encoder.layers.1.mlp.fc1.weight", "vision layer 1"),
        ("model.prototype_extractor.f.weight", "prototype extractor"),
        ("model.multi_modal_projector.linear_2.bias", "projector"),
        ("model.language_model.layers.0.self_attn.q_proj.weight", "language layer 0"),
        ("model.language_model.layers.1.mlp.down_proj.weight", "language layer 1"),
        ("lm_head.weight", "logits"),
    ],
)
def test_one_changed_number_is_found_and_its_place_named(converted, result, weight, place):
    change(result, weight, by=0.3)
    verification = verify(converted[0], result)
    assert not verification.passed
    assert f"first in {place}: by" in verification.faults[0]


def test_text_only_prompt_passes_where_only_the_vision_side_is_wrong(converted, result):
    change(result, "model.multi_modal_projector.linear_2.bias")
    verification = verify(converted[0], result)
    assert [fault.partition(":")[0] for fault in verification.faults] == ["one image", "two images", "self-question"]


def test_weight_that_is_not_a_number_does_not_pass(converted, result):
    change(result, "model.language_model.norm.weight", by=float("nan"))
    assert len(verify(converted[0], result).faults) == 4


@pytest.mark.parametrize(
    ("file", "alpha", "place"),
    [("Vit-lora/adapter_config.json", 24, "vision layer 0"), ("adapter_config.json", 17, "language layer 0")],
)
def test_lora_of_a_wrong_scale_is_found_in_the_first_layer(lora, file, alpha, place):
    result = convert_source(lora).out
    edit_json(lora / file, lora_alpha=alpha)
    assert f"first in {place}" in verify(recognise(lora), result).faults[0]


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_half_precision_is_compared_with_a_source_rounded_alike(converted, result, stored, compute):
    dtype = getattr(torch, stored)
    edit_weights(result / "model.safetensors", lambda w: w.update({name: t.to(dtype) for name, t in w.items()}))
    verification = verify(converted[0], result, compute)
    assert verification.faults == []
    assert verification.comparisons[0].relative_difference < (2e-3 if compute == "float32" else 2e-2)
    change(result, "model.language_model.layers.0.mlp.down_proj.weight", by=0.5)
    assert "first in language layer 0" in verify(converted[0], result, compute).faults[0]


def test_other_tokens_than_the_source_s_are_found(converted, result):
    edit_json(result / "tokenizer.json", pre_tokenizer=None)
    edit_json(result / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert "but the source's tokenizer gives" in verify(converted[0], result).faults[0]


def test_other_preprocessing_than_the_source_s_is_found(converted, result):
    edit_json(result / "processor_config.json", image_aspect_ratio="crop")
    assert verify(converted[0], result).faults == ["the pixels differ by up to 255.0 of 255 grey levels"]


def test_new_extractor_is_left_out_and_this_is_reported(llava_hf):
    conversion = convert_source(llava_hf, prototypes="released")
    verification = verify(conversion.layout, conversion.out)
    assert verification.passed
    assert any("the prototype extractor is new" in note for note in verification.notes)


def test_source_that_lacks_weights_is_not_compared(llava):
    conversion = convert_source(llava)
    edit_weights(conversion.layout.weight_files[0], lambda weights: weights.pop("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"1 weights are missing .* The source is incomplete"):
        verify(conversion.layout, conversion.out)


def test_model_that_does_not_fit_into_memory_is_refused_with_a_way_out(converted, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    with pytest.raises(ValueError, match=r"this machine has 10.0 kB. Use --verify-dtype bfloat16"):
        verify(*converted)


def test_pictures_are_always_the_same_and_hold_edges_and_gradients():
    picture = draw_picture(320, 200)
    assert picture.size == (320, 200)
    assert list(picture.getdata()) == list(draw_picture(320, 200).getdata())
    assert isinstance(picture, Image.Image)
    assert len(set(picture.getdata())) > 5000


def test_report_says_whether_it_passed_and_how(converted, result):
    change(result, "lm_head.weight")
    console = Console(width=160, record=True)
    verification = verify(converted[0], result)
    print_verification(verification, console)
    text = console.export_text()
    assert "NOT equal" in text
    assert "first in logits" in text
    assert not verification.to_json()["passed"]
    assert len(json.loads(json.dumps(verification.to_json()))["comparisons"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "options"), [(MERGED, ["--dtype", "bfloat16"]), (released.write_llava_hf, ["--prototypes", "paper"])]
)
def test_command_converts_and_compares(write, options, parts, tmp_path):
    vision = ["--vision", parts / "clip"] if write is MERGED else []
    out = tmp_path / "out"
    result = run_convert(
        write(tmp_path / "source"), "--out", out, *options, *vision, "--verify", "--verification-file"
    )
    assert result.exit_code == 0, result.output
    assert "equal" in result.stdout and "NOT equal" not in result.stdout
    assert json.loads((out / "verification.json").read_text())["passed"]


@pytest.mark.slow
@pytest.mark.parametrize("write", [LORA, PROJECTOR])
def test_tower_in_the_base_wins_over_the_given_one_in_source_and_result(write, parts, tmp_path):
    base = released.write_llava(tmp_path / "base", vision=parts / "clip")
    config = json.loads((base / "config.json").read_text())
    del config["model_type"]  # some folders of the original code lack it
    (base / "config.json").write_text(json.dumps(config))
    source = write(tmp_path / "source", base=base, vision="org/another-tower")
    result = run_convert(source, "--base", base, "--vision", parts / "clip", "--out", tmp_path / "out", "--verify")
    assert result.exit_code == 0, result.output
    tower = load_weights(tmp_path / "out")["model.vision_tower.embeddings.class_embedding"]
    inside = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"
    (expected,) = (weights[inside] for weights in map(torch.load, base.glob("*.bin")) if inside in weights)
    assert torch.equal(tower, expected)
    assert f"vision tower of {parts / 'clip'}; the base has its own." in result.stderr
    assert f"The source names the vision tower org/another-tower (mm_vision_tower), but {parts / 'clip'}" in (
        result.stderr
    )
    assert "The base names" not in result.stderr


@pytest.mark.slow
def test_command_ends_with_code_1_where_the_result_differs(lora, tmp_path, monkeypatch):
    monkeypatch.setitem(TOLERANCES, torch.float32, 0.0)
    out = tmp_path / "out"
    result = run_convert(lora, "--out", out, "--verify")
    assert result.exit_code == 1
    assert "NOT equal" in result.output
    assert not out.exists()
    assert f"Moved to {tmp_path / 'out.not-equal'}" in result.stderr
    assert not (tmp_path / "out.not-equal" / "verification.json").exists()
    again = run_convert(lora, "--out", out, "--verify")
    assert again.exit_code == 1
    assert "is left from an earlier conversion" in again.stderr


@pytest.mark.parametrize(
    ("verify_dtype", "message"), [("float32", "Use --verify-dtype bfloat16"), ("int8", "--verify-dtype is 'int8'")]
)
def test_command_writes_nothing_that_it_cannot_verify(llava, tmp_path, monkeypatch, verify_dtype, message):
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    result = run_convert(llava, "--out", tmp_path / "out", "--verify", "--verify-dtype", verify_dtype)
    assert result.exit_code == 1
    assert message in result.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"source"}
