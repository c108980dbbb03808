"""The proof of a conversion: it passes what is equal, and names the layer where what is not begins to differ."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, LlamaTokenizer
from typer.testing import CliRunner

from configuration_sq_llava import SQLlavaConfig
from modeling_sq_llava import SQLlavaForConditionalGeneration
from processing_sq_llava import SQLlavaProcessor
from sq_llava.checkpoints.layouts import Layout, recognise
from sq_llava.checkpoints.verify import TOLERANCES, draw_picture, print_verification, verify
from sq_llava.cli.main import app
from tests import released
from tests.reference import Part, Reference, read_reference


NUM_ROWS = 512


def merged(part: Part) -> dict[str, torch.Tensor]:
    """The weights of a tower with its LoRA added."""
    weights = dict(part.weights)
    for name, down in (part.lora.weights if part.lora else {}).items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            up = part.lora.weights[f"{module}.lora_B.weight"]
            weights[f"{module}.weight"] = weights[f"{module}.weight"] + part.lora.scale * up @ down
    return weights


def build(reference: Reference, tokenizer: Path, images: Path, folder: Path) -> Path:
    """A checkpoint of this library with the weights of a reference: a conversion that is not the library's."""
    kind = reference.projector.config["mm_projector_type"]
    processor = SQLlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(images),
        LlamaTokenizer.from_pretrained(tokenizer),
        image_seq_length=9,
        text_prefix=" ",
        vusr_marker="VUSER:",
    )
    config = SQLlavaConfig(
        vision_config={**released.VISION, "model_type": "clip_vision_model"},
        text_config={**released.TEXT, "model_type": "llama", "vocab_size": NUM_ROWS},
        image_token_id=processor.image_token_id,
        vusr_token_id=None,
        num_prototypes=5,
        prototype_variant="released" if kind == "cluster" else "none",
    )
    weights = {f"model.vision_tower.{name}": tensor for name, tensor in merged(reference.vision).items()}
    for name, tensor in merged(reference.llm).items():
        if tensor.shape[0] == released.TEXT["vocab_size"]:
            tensor = torch.cat([tensor, tensor.mean(0, keepdim=True).expand(NUM_ROWS - len(tensor), -1)])
        weights[name.replace("model.", "model.language_model.", 1)] = tensor
    for name, tensor in reference.projector.weights.items():
        layer, _, parameter = name.removeprefix("mlp.").partition(".")
        linear = {"0": "linear_1", "2": "linear_2"}.get(layer)
        name = f"multi_modal_projector.{linear}.{parameter}" if linear else f"prototype_extractor.{name}"
        weights[f"model.{name}"] = tensor
    model = SQLlavaForConditionalGeneration(config)
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[Path, Path]:
    """A base and a tower."""
    root = tmp_path_factory.mktemp("parts")
    return released.write_language_model(root / "base"), released.write_clip(root / "clip")


def write_source(kind: str, folder: Path, parts: tuple[Path, Path], **options) -> tuple[Layout, Reference, Path]:
    """A released checkpoint as it is recognised, its reference, and where its tokenizer is."""
    base, vision = parts
    if kind == "llava_hf":
        folder = released.WRITERS[kind](folder, **options)
        return recognise(str(folder)), read_reference(folder), folder
    if kind in ("sq_llava", "llava"):
        folder = released.WRITERS[kind](folder, vision=vision, **options)
        return recognise(str(folder)), read_reference(folder, vision=vision), folder
    folder = released.WRITERS[kind](folder, base=base, vision=vision, **options)
    return recognise(str(folder)), read_reference(folder, base, vision), base


@pytest.fixture(scope="module")
def lora(parts, tmp_path_factory) -> tuple[Layout, Path]:
    """The LoRA release, and what it is converted to."""
    root = tmp_path_factory.mktemp("lora")
    layout, reference, tokenizer = write_source("sq_llava_lora", root / "source", parts)
    return layout, build(reference, tokenizer, layout.vision, root / "result")


@pytest.fixture
def result(lora, tmp_path) -> Path:
    return Path(shutil.copytree(lora[1], tmp_path / "result"))


def change(folder: Path, name: str, by: float = 0.05) -> None:
    """Adds to one number of one weight."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights[name].view(-1)[0] += by
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", released.WRITERS)
def test_each_layout_passes(kind, parts, tmp_path):
    layout, reference, tokenizer = write_source(kind, tmp_path / "source", parts)
    assert layout.kind == kind
    if kind == "projector":  # its source crops
        config = {**layout.config, "image_aspect_ratio": "pad"}
        (layout.path / "config.json").write_text(json.dumps(config))
        layout = recognise(str(layout.path))
    verification = verify(layout, build(reference, tokenizer, layout.vision or layout.path, tmp_path / "result"))
    assert verification.faults == []
    assert [row.num_images for row in verification.comparisons] == [1, 2, 0, 1]
    assert verification.tolerance == TOLERANCES[torch.float32]
    for row in verification.comparisons:
        assert row.relative_difference < 5e-5
        assert row.same_argmax == 1.0
        assert row.largest_logit > 1
    assert verification.pixel_difference == 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"vision_lora": "folder"}, {"vision_lora": None}, {"use_rslora": True}], ids=str)
def test_lora_release_passes_wherever_its_vision_lora_stands(options, parts, tmp_path):
    layout, reference, tokenizer = write_source("sq_llava_lora", tmp_path / "source", parts, **options)
    assert verify(layout, build(reference, tokenizer, layout.vision, tmp_path / "result")).passed


def test_vision_lora_that_stands_among_the_lora_of_the_language_model_only_passes(parts, tmp_path):
    options = {"vision_lora": "inside", "vision_rank": 8}
    layout, reference, tokenizer = write_source("sq_llava_lora", tmp_path / "source", parts, **options)
    assert verify(layout, build(reference, tokenizer, layout.vision, tmp_path / "result")).passed


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
def test_one_changed_number_is_found_and_its_place_named(lora, result, weight, place):
    change(result, weight, by=0.3)
    verification = verify(lora[0], result)
    assert not verification.passed
    assert f"first in {place}: by" in verification.faults[0]


def test_text_only_prompt_passes_where_only_the_vision_side_is_wrong(lora, result):
    change(result, "model.multi_modal_projector.linear_2.bias")
    verification = verify(lora[0], result)
    assert [fault.partition(":")[0] for fault in verification.faults] == ["one image", "two images", "self-question"]


def test_weight_that_is_not_a_number_does_not_pass(lora, result):
    change(result, "model.language_model.norm.weight", by=float("nan"))
    assert len(verify(lora[0], result).faults) == 4


def test_vision_lora_applied_twice_is_found_in_the_first_vision_layer(parts, tmp_path):
    layout, reference, tokenizer = write_source("sq_llava_lora", tmp_path / "source", parts)
    reference.vision.lora.scale *= 2
    verification = verify(layout, build(reference, tokenizer, layout.vision, tmp_path / "result"))
    assert "first in vision layer 0" in verification.faults[0]


def test_wrong_lora_scale_is_found_in_the_first_language_layer(parts, tmp_path):
    layout, reference, tokenizer = write_source("sq_llava_lora", tmp_path / "source", parts)
    reference.llm.lora.scale *= 1.05
    verification = verify(layout, build(reference, tokenizer, layout.vision, tmp_path / "result"))
    assert [fault.partition(":")[0] for fault in verification.faults][2] == "text only"
    assert "first in language layer 0" in verification.faults[2]


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_half_precision_is_compared_with_a_source_rounded_alike(lora, tmp_path, stored, compute):
    layout, whole = lora
    result = Path(shutil.copytree(whole, tmp_path / "result"))
    weights = load_file(whole / "model.safetensors")
    rounded = {name: tensor.to(getattr(torch, stored)) for name, tensor in weights.items()}
    save_file(rounded, result / "model.safetensors", metadata={"format": "pt"})
    verification = verify(layout, result, compute)
    assert verification.faults == []
    assert verification.comparisons[0].relative_difference < (2e-3 if compute == "float32" else 2e-2)
    change(result, "model.language_model.layers.0.mlp.down_proj.weight", by=0.5)
    assert "first in language layer 0" in verify(layout, result, compute).faults[0]


def test_other_tokens_than_the_source_s_are_found(lora, result):
    tokenizer = json.loads((result / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = None
    (result / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((result / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (result / "tokenizer_config.json").write_text(json.dumps(config))
    assert "by the source's tokenizer" in verify(lora[0], result).faults[0]


def test_other_preprocessing_than_the_source_s_is_found(lora, result):
    file = result / "processor_config.json"
    config = json.loads(file.read_text())
    config["image_aspect_ratio"] = "crop"
    file.write_text(json.dumps(config))
    assert verify(lora[0], result).faults == ["the pixels differ by up to 255.0 of 255 grey levels"]


def test_new_extractor_is_left_out_and_said(parts, tmp_path):
    layout, reference, tokenizer = write_source("llava_hf", tmp_path / "source", parts)
    cluster = released.write_projector(tmp_path / "projector", base=parts[0], vision=parts[1])
    extractor = read_reference(cluster, *parts).projector
    mlp = {f"mlp.{name}": tensor for name, tensor in reference.projector.weights.items()}
    started = Part({**extractor.weights, **mlp}, extractor.config)
    result = build(Reference(reference.vision, started, reference.llm), tokenizer, layout.path, tmp_path / "result")
    config = json.loads((result / "config.json").read_text())
    (result / "config.json").write_text(json.dumps({**config, "projector_hidden_act": "gelu"}))
    verification = verify(layout, result)
    assert verification.passed
    assert any("the prototype extractor is new" in note for note in verification.notes)


def test_source_that_lacks_weights_is_not_compared(parts, tmp_path):
    layout, reference, tokenizer = write_source("llava", tmp_path / "source", parts)
    result = build(reference, tokenizer, layout.vision, tmp_path / "result")
    file = layout.weight_files[0]
    weights = torch.load(file, weights_only=True)
    del weights["model.layers.0.mlp.up_proj.weight"]
    torch.save(weights, file)
    with pytest.raises(ValueError, match=r"1 weights are not in its files .* the source is not complete"):
        verify(layout, result)


def test_model_that_does_not_fit_into_the_memory_is_refused_with_the_way_out(lora, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    with pytest.raises(ValueError, match=r"this machine has 10.0 kB: verify in bfloat16"):
        verify(lora[0], lora[1])


def test_pictures_are_the_same_at_each_call_and_hold_edges_and_gradients():
    picture = draw_picture(320, 200)
    assert picture.size == (320, 200)
    assert list(picture.getdata()) == list(draw_picture(320, 200).getdata())
    assert isinstance(picture, Image.Image)
    assert len(set(picture.getdata())) > 5000


def test_report_says_whether_it_passed_and_how(lora, result):
    change(result, "lm_head.weight")
    console = Console(width=160, record=True)
    verification = verify(lora[0], result)
    print_verification(verification, console)
    text = console.export_text()
    assert "NOT equal" in text
    assert "first in logits" in text
    assert not verification.to_json()["passed"]
    assert len(json.loads(json.dumps(verification.to_json()))["comparisons"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "options"),
    [
        (released.write_sq_llava_lora, []),
        (released.write_sq_llava_merged, ["--dtype", "bfloat16"]),
        (released.write_llava_hf, ["--prototypes", "paper"]),
    ],
)
def test_command_converts_and_compares(write, options, parts, tmp_path):
    source, out = write(tmp_path / "source"), tmp_path / "out"
    if write is not released.write_llava_hf:
        options = [*options, "--vision", str(parts[1])]
    if write is released.write_sq_llava_lora:
        options = [*options, "--base", str(parts[0])]
    arguments = ["convert", str(source), "--out", str(out), *options, "--verify", "--verification-file"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads((out / "verification.json").read_text())["passed"]


@pytest.mark.slow
@pytest.mark.parametrize("write", [released.write_sq_llava_lora, released.write_projector])
def test_tower_in_the_base_comes_before_the_given_one_in_source_and_result(write, parts, tmp_path):
    base = released.write_llava(tmp_path / "base", vision=parts[1])
    config = json.loads((base / "config.json").read_text())
    del config["model_type"]  # as a folder of the original code may lack it
    (base / "config.json").write_text(json.dumps(config))
    source = write(tmp_path / "source", base=base, vision="org/another-tower")
    arguments = ["--base", str(base), "--vision", str(parts[1]), "--out", str(tmp_path / "out"), "--verify"]
    result = CliRunner().invoke(app, ["convert", str(source), *arguments], env={"COLUMNS": "500"})
    tower = load_file(tmp_path / "out" / "model.safetensors")["model.vision_tower.embeddings.class_embedding"]
    inside = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"
    assert any(
        torch.equal(tower, torch.load(file)[inside]) for file in base.glob("*.bin") if inside in torch.load(file)
    )
    assert result.exit_code == 0, result.output
    assert f"vision tower of {parts[1]}; the base has its own." in result.stderr
    assert f"The source names the vision tower org/another-tower (mm_vision_tower), but {parts[1]}" in result.stderr
    assert "The base names" not in result.stderr


@pytest.mark.slow
def test_command_ends_with_code_1_where_the_result_differs(parts, tmp_path, monkeypatch):
    monkeypatch.setitem(TOLERANCES, torch.float32, 0.0)
    source, out = released.write_sq_llava_lora(tmp_path / "source"), tmp_path / "out"
    arguments = ["--base", str(parts[0]), "--vision", str(parts[1]), "--verify"]
    result = CliRunner().invoke(app, ["convert", str(source), "--out", str(out), *arguments])
    assert result.exit_code == 1
    assert "NOT equal" in result.output
    assert not out.exists()
    assert f"Moved to {tmp_path / 'out.not-equal'}" in result.stderr.replace("\n", "")
    assert not (tmp_path / "out.not-equal" / "verification.json").exists()
    again = CliRunner().invoke(app, ["convert", str(source), "--out", str(out), *arguments])
    assert again.exit_code == 1
    assert "is there from an earlier conversion" in " ".join(again.stderr.split())


@pytest.mark.parametrize(
    ("verify_dtype", "message"),
    [("float32", "verify in bfloat16"), ("int8", "--verify-dtype is 'int8': give")],
)
def test_command_writes_nothing_that_it_cannot_verify(parts, tmp_path, monkeypatch, verify_dtype, message):
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    source = released.write_llava(tmp_path / "source", vision=parts[1])
    arguments = ["--out", str(tmp_path / "out"), "--verify", "--verify-dtype", verify_dtype]
    result = CliRunner().invoke(app, ["convert", str(source), *arguments])
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert {file.name for file in tmp_path.iterdir()} == {"source"}
