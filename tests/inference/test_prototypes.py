"""The prototype picture: the extractor's assignment of tokens, and what is painted from it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F
from typer.testing import CliRunner

from modeling_sq_llava import PROTOTYPE_EXTRACTORS
from sq_llava.cli.main import app
from sq_llava.inference import prototypes
from sq_llava.inference.assistant import Assistant
from sq_llava.inference.prototypes import OPACITY, SHADE, PrototypeMap, colour_of_rank, look, paint
from sq_llava.training.adapter import LoraSize, add_adapter
from tests.assistants import tiny_assistant
from tests.tiny import TINY_SIGLIP, picture, tiny_config, tiny_model


WHITE = (255, 255, 255)


def blend(colour: tuple[int, int, int], opacity: int) -> np.ndarray:
    """A colour over white."""
    return 255 + (np.array(colour) - 255) * opacity / 255


@pytest.mark.parametrize("variant", PROTOTYPE_EXTRACTORS)
def test_output_of_the_extractor_follows_from_its_assignment(variant):
    extractor = tiny_model(tiny_config(prototype_variant=variant)).model.prototype_extractor
    tokens = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assignment = extractor.assignment(tokens)  # [B, K, N]
        if variant == "paper":
            centres = (assignment @ extractor.v(tokens)) / assignment.sum(dim=-1, keepdim=True)
            cosine = F.normalize(centres, dim=-1) @ F.normalize(tokens, dim=-1).mT
            expected = tokens + extractor.z(cosine.mT @ centres / assignment.shape[1])
        else:
            features = extractor.f(tokens)
            members = (assignment > 0).sum(dim=-1, keepdim=True)
            pooled = F.adaptive_avg_pool1d(features.mT, assignment.shape[1]).mT
            expected = tokens + assignment.mT @ ((assignment @ features + pooled) / (members + 1))
        torch.testing.assert_close(extractor(tokens), expected)


def test_paper_shares_each_token_among_the_prototypes_and_released_gives_it_to_one():
    tokens = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shared, given_to_one = (
            tiny_model(tiny_config(prototype_variant=variant)).model.prototype_extractor.assignment(tokens)
            for variant in ("paper", "released")
        )
    torch.testing.assert_close(shared.sum(dim=1), torch.ones(2, 9))
    assert ((given_to_one > 0).sum(dim=1) == 1).all()


def test_assignment_of_half_precision_features_is_computed_in_float32():
    extractor = tiny_model().model.prototype_extractor
    assert extractor.assignment(torch.randn(1, 9, 32).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("variant", PROTOTYPE_EXTRACTORS)
@pytest.mark.parametrize("vision", [{}, {"vision_feature_select_strategy": "full"}])
def test_each_token_has_the_colour_of_its_prototype(variant, vision):
    assistant = tiny_assistant(prototype_variant=variant, **vision)
    image = picture(width=90, height=90)
    seen = look(assistant, image)

    pixels = assistant.processor.image_processor(image, return_tensors="pt")["pixel_values"]
    model = assistant.model.model
    with torch.no_grad():
        assignment = model.prototype_extractor.assignment(model.get_vision_features(pixels))[0]
    painted = np.array(paint(Image.new("RGB", image.size, WHITE), seen))
    rank_of = {prototype: rank for rank, prototype in enumerate(seen.shares)}
    for token, prototype in enumerate(assignment.argmax(dim=0)[-9:].tolist()):
        row, column = divmod(token, 3)
        cell = painted[30 * row : 30 * (row + 1), 30 * column : 30 * (column + 1)]
        assert np.abs(cell - blend(colour_of_rank(rank_of[prototype]), OPACITY)).max() <= 1


def test_prototypes_of_an_adapter_are_those_that_it_trained():
    assistant = tiny_assistant()
    before = look(assistant, picture()).best
    size = LoraSize(rank=2, alpha=4, dropout=0.0)
    adapted = Assistant(add_adapter(assistant.model, size, size, train_vusr=False).eval(), assistant.processor)
    np.testing.assert_array_equal(look(adapted, picture()).best, before)
    for name, parameter in adapted.model.named_parameters():
        if "prototype_extractor" in name and parameter.requires_grad:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    assert (look(adapted, picture()).best != before).any()


def test_siglip_tokens_fill_the_square():
    seen = look(tiny_assistant(vision_config=TINY_SIGLIP, vision_feature_select_strategy="full"), picture())
    assert seen.best.shape == (3, 3)


def test_prototypes_that_are_not_chosen_are_shaded():
    seen = PrototypeMap(np.array([[0, 1], [1, 1]]), True, {1: 0.75, 0: 0.25})
    painted = np.array(paint(Image.new("RGB", (20, 20), WHITE), seen, [0]))
    np.testing.assert_allclose(painted[5, 5], blend(colour_of_rank(1), OPACITY), atol=1)
    np.testing.assert_allclose(painted[15, 15], blend(SHADE[:3], SHADE[3]), atol=1)


def test_padding_is_cut_from_the_picture_and_from_the_shares():
    # The square's upper and lower quarter are padding.
    best = np.arange(16).reshape(4, 4)
    seen = PrototypeMap(best, True, prototypes.shares_of(best, True, (80, 40)))
    assert seen.shares == dict.fromkeys(range(4, 12), 0.125)
    painted = paint(Image.new("RGB", (80, 40), WHITE), seen)
    assert painted.size == (80, 40)
    for prototype in range(4, 12):
        centre = (20 * (prototype % 4) + 10, 20 * (prototype // 4 - 1) + 10)
        np.testing.assert_allclose(painted.getpixel(centre), blend(colour_of_rank(prototype - 4), OPACITY), atol=1)


def test_what_was_cropped_away_is_not_painted():
    seen = PrototypeMap(np.zeros((3, 3), dtype=int), False, {0: 1.0})
    painted = np.array(paint(Image.new("RGB", (80, 40), WHITE), seen))
    outside = np.r_[0:20, 60:80]
    assert (painted[:, outside] == 255).all()
    assert (painted[:, 20:60] != 255).any(axis=-1).all()


@given(width=st.integers(1, 300), height=st.integers(1, 300), seed=st.integers(0, 99), pads=st.booleans())
def test_every_pixel_under_the_tokens_is_painted_and_the_shares_are_the_areas(width, height, seed, pads):
    best = np.random.default_rng(seed).integers(0, 5, (3, 3))
    seen = PrototypeMap(best, pads, prototypes.shares_of(best, pads, (width, height)))
    assert sum(seen.shares.values()) == pytest.approx(1)
    assert list(seen.shares.values()) == sorted(seen.shares.values(), reverse=True)
    left, top, side = prototypes.square_in((width, height), pads)
    painted = np.array(paint(Image.new("RGB", (width, height), WHITE), seen))
    covered = painted[max(top, 0) : top + side, max(left, 0) : left + side]
    assert (covered != 255).any(axis=-1).all()
    assert not (covered == blend(SHADE[:3], SHADE[3]).astype(int)).all(axis=-1).any()


def test_model_without_prototypes_is_refused():
    with pytest.raises(ValueError, match=r"prototype_variant in its .* is 'none'"):
        look(tiny_assistant(prototype_variant="none"), picture())


def test_command_paints_the_picture_in_its_own_size(tmp_path, monkeypatch):
    monkeypatch.setattr("sq_llava.inference.assistant.load", lambda *args: tiny_assistant())
    picture(width=50, height=30).save(tmp_path / "in.png")
    (tmp_path / "config.json").touch()
    settings = ["--model", str(tmp_path), "--top", "2", "--out", str(tmp_path / "seen.png")]
    result = CliRunner().invoke(app, ["prototypes", str(tmp_path / "in.png"), *settings])
    assert result.exit_code == 0
    assert result.stdout.count("prototype ") == 2
    assert Image.open(tmp_path / "seen.png").size == (50, 30)


def test_command_writes_only_png(tmp_path):
    result = CliRunner().invoke(app, ["prototypes", "in.png", "--model", "any", "--out", str(tmp_path / "seen.jpg")])
    assert result.exit_code == 1
    assert "must end in .png" in result.stderr
