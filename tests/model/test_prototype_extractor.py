"""Both prototype extractors: the release's numbers, the equations as loops, half precision, memory."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_sq_llava import PROTOTYPE_EXTRACTORS, SQLlavaForConditionalGeneration, SQLlavaModel
from sq_llava.checkpoints.weights import weight_name
from tests import ROOT
from tests.reference import Part, cluster
from tests.tiny import TINY_CLIP, TINY_LLAMA, tiny_config, tiny_model


# State, input, output and gradients of the authors' code, in float64.
GOLDEN_FILES = sorted((ROOT / "tests" / "files").glob("prototype_released_*.safetensors"))


def name_in_model(key: str) -> str:
    return weight_name(f"mm_projector.{key}").removeprefix("model.")


def read_golden(path, dtype):
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).to(dtype) for name in file.keys()}  # noqa: SIM118
        return tensors, {name: value for name, value in file.metadata().items() if name != "dtype"}


def model_of_golden(tensors, metadata, dtype):
    config = tiny_config(
        vision_config={**TINY_CLIP, "hidden_size": int(metadata["channels"])},
        text_config={**TINY_LLAMA, "hidden_size": int(metadata["channels_out"])},
        prototype_variant="released",
        num_prototypes=int(metadata["prototypes"]),
        num_prototype_iterations=int(metadata["iterations"]),
    )
    model = SQLlavaModel(config).to(dtype)
    released = {
        name_in_model(name.removeprefix("state.")): tensor
        for name, tensor in tensors.items()
        if name.startswith("state.")
    }
    model.load_state_dict({**model.state_dict(), **released}, strict=True)
    return model


def test_there_are_golden_files():
    assert [path.stem for path in GOLDEN_FILES] == ["prototype_released_small", "prototype_released_uneven"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.stem)
def test_released_variant_has_the_outputs_and_gradients_of_the_release(path, dtype, tolerance):
    tensors, metadata = read_golden(path, dtype)
    model = model_of_golden(tensors, metadata, dtype)
    features = tensors["input"].requires_grad_()
    output = model.multi_modal_projector(model.prototype_extractor(features))
    torch.testing.assert_close(output, tensors["output"], atol=tolerance, rtol=tolerance)
    output.backward(tensors["grad_output"])
    torch.testing.assert_close(features.grad, tensors["grad_input"], atol=tolerance, rtol=tolerance)
    names = [name.removeprefix("grad.") for name in tensors if name.startswith("grad.")]
    assert names
    for name in names:
        gradient = model.get_parameter(name_in_model(name)).grad
        torch.testing.assert_close(gradient, tensors[f"grad.{name}"], atol=tolerance, rtol=tolerance, msg=name)


def test_unused_layer_norm_of_a_release_is_dropped_on_loading(tmp_path):
    tensors, metadata = read_golden(GOLDEN_FILES[0], torch.float32)
    assert "state.ln_1.weight" in tensors
    model = model_of_golden(tensors, metadata, torch.float32)
    assert not [name for name in model.state_dict() if "ln_1" in name]

    whole = SQLlavaForConditionalGeneration(model.config)
    names = [f"model.prototype_extractor.ln_1.{name}" for name in ("weight", "bias")]
    whole.save_pretrained(tmp_path, state_dict={**whole.state_dict(), **{name: torch.ones(24) for name in names}})
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(names) <= set(file.keys())
    _, report = SQLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]


def extractor(variant, width=8, num_prototypes=3, num_iterations=2, dtype=torch.float64, seed=0):
    """An extractor with large weights, so that the assignment is far from uniform."""
    torch.manual_seed(seed)
    config = tiny_config(
        vision_config={**TINY_CLIP, "hidden_size": width},
        prototype_variant=variant,
        num_prototypes=num_prototypes,
        num_prototype_iterations=num_iterations,
    )
    module = PROTOTYPE_EXTRACTORS[variant](config).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def linear(module, vector):
    return module.weight @ vector + module.bias


def literal(variant, module, features):
    """The equations written out; for the release, with the tensors of [B, K, N, D] that the authors' code builds."""
    if variant == "paper":
        return paper_by_loops(module, features)
    config = {"num_latents": module.num_prototypes, "iterations": module.num_iterations}
    return cluster(Part(dict(module.named_parameters()), config), features)


def paper_by_loops(module, features):
    """The paper's equations, for one image, one prototype and one token at a time."""
    images = []
    for tokens in features:
        width = tokens.shape[-1]
        prototypes = list(module.prototypes)
        for _ in range(module.num_iterations):
            assignment = []
            for token in tokens:
                key = linear(module.k, token)
                scores = [linear(module.q, prototype) @ key / width**0.5 for prototype in prototypes]
                assignment.append(torch.stack(scores).softmax(dim=0))
            for index in range(len(prototypes)):
                mass = sum(shares[index] for shares in assignment)
                total = sum(shares[index] * linear(module.v, token) for shares, token in zip(assignment, tokens))
                prototypes[index] = total / mass
        enriched = []
        for token in tokens:
            context = sum(F.cosine_similarity(prototype, token, dim=0) * prototype for prototype in prototypes)
            enriched.append(token + linear(module.z, context / len(prototypes)))
        images.append(torch.stack(enriched))
    return torch.stack(images)


@pytest.mark.parametrize(
    ("batch", "tokens", "num_prototypes", "num_iterations"), [(2, 7, 3, 2), (1, 5, 4, 1), (2, 6, 1, 3), (1, 1, 1, 2)]
)
@pytest.mark.parametrize("variant", PROTOTYPE_EXTRACTORS)
def test_matrix_form_equals_the_equations_written_out(variant, batch, tokens, num_prototypes, num_iterations):
    module = extractor(variant, num_prototypes=num_prototypes, num_iterations=num_iterations)
    features = torch.randn(batch, tokens, 8, dtype=torch.float64)
    upstream = torch.randn_like(features)
    results = []
    for function in (module, partial(literal, variant, module)):
        leaf = features.clone().requires_grad_()
        module.zero_grad()
        output = function(leaf)
        output.backward(upstream)
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        results.append((output, leaf.grad, gradients))
    torch.testing.assert_close(results[0], results[1], atol=1e-10, rtol=1e-10)
    assert not torch.allclose(results[0][0], features)


@pytest.mark.parametrize("variant", PROTOTYPE_EXTRACTORS)
def test_each_iteration_changes_the_result(variant):
    features = torch.randn(2, 7, 8, dtype=torch.float64)
    outputs = [extractor(variant, num_iterations=number)(features) for number in (1, 2, 3)]
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2])


@pytest.mark.parametrize("variant", PROTOTYPE_EXTRACTORS)
def test_an_image_in_a_batch_gives_what_it_gives_alone(variant):
    module = extractor(variant)
    features = torch.randn(3, 7, 8, dtype=torch.float64)
    alone = torch.cat([module(image[None]) for image in features])
    torch.testing.assert_close(module(features), alone, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("bias", ["random bias", "no bias"])
@pytest.mark.parametrize("variant", PROTOTYPE_EXTRACTORS)
def test_more_prototypes_than_tokens_and_blank_images_stay_finite(variant, bias):
    module = extractor(variant, num_prototypes=9, dtype=torch.float32)
    if bias == "no bias":
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.zeros_(parameter)
    for features in (torch.randn(1, 4, 8), torch.zeros(1, 4, 8), 1e4 * torch.randn(1, 4, 8)):
        module.zero_grad()
        features.requires_grad_()
        output = module(features)
        output.sum().backward()
        for tensor in (output, features.grad, *(parameter.grad for parameter in module.parameters())):
            assert tensor.isfinite().all()


def test_prototype_far_from_all_tokens_has_the_output_and_gradients_of_the_equations():
    """Its share of each token is too small for float32, but the mean of the values is not."""
    exact = extractor("paper", num_prototypes=4, num_iterations=1)
    torch.nn.init.constant_(exact.k.bias, 60.0)
    scores = exact.q(exact.prototypes) @ exact.k.bias / 8**0.5
    assert scores.max() - scores.min() > 150
    module = deepcopy(exact).float()
    features, upstream = torch.randn(1, 5, 8, dtype=torch.float64), torch.randn(1, 5, 8, dtype=torch.float64)
    paper_by_loops(exact, features).backward(upstream)
    module(features.float()).backward(upstream.float())
    for (name, expected), found in zip(exact.named_parameters(), module.parameters()):
        torch.testing.assert_close(found.grad, expected.grad.float(), atol=1e-2, rtol=1e-2, msg=name)
    torch.testing.assert_close(
        module(features.float()).double(), paper_by_loops(exact, features), atol=1e-3, rtol=1e-3
    )


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns, forward and backward."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            if isinstance(output, torch.Tensor):
                self.numel = max(self.numel, output.numel())
        return outputs


@pytest.mark.parametrize("variant", PROTOTYPE_EXTRACTORS)
def test_no_tensor_has_the_size_of_images_times_prototypes_times_tokens_times_channels(variant):
    images, prototypes, tokens, channels = 2, 16, 40, 32
    module = extractor(variant, width=channels, num_prototypes=prototypes, dtype=torch.float32)
    features = torch.randn(images, tokens, channels, requires_grad=True)
    with LargestTensor() as largest:
        module(features).sum().backward()
    # At most four times the features, which is less than [K, N, D] of one image.
    assert images * tokens * channels <= largest.numel <= 4 * images * tokens * channels
    with LargestTensor() as largest:
        literal("released", extractor("released", channels, prototypes), features.double())
    assert largest.numel == images * prototypes * tokens * channels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", PROTOTYPE_EXTRACTORS)
def test_clustering_runs_in_float32_inside_a_half_precision_model(variant, dtype):
    half = extractor(variant, width=32, num_prototypes=5, dtype=dtype)
    full = extractor(variant, width=32, num_prototypes=5, dtype=torch.float32)
    full.load_state_dict(half.state_dict())  # the same rounded weights
    features = torch.randn(2, 40, 32).to(dtype)
    output, expected = half(features), full(features.float())
    assert output.dtype == dtype
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(output.float(), expected, rtol=unit, atol=unit / 100)
    # If it clustered in half precision, many values would be off by more than the rounding of the result.
    rounded_inside = literal(variant, half, features)
    assert ((rounded_inside - expected).abs() > unit * expected.abs() + unit / 100).float().mean() > 0.3


@pytest.mark.parametrize("variant", PROTOTYPE_EXTRACTORS)
def test_clustering_ignores_autocast(variant):
    module = extractor(variant, dtype=torch.float32)
    features = torch.randn(2, 7, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(features)
    assert torch.equal(output, module(features))


@pytest.mark.parametrize("variant", PROTOTYPE_EXTRACTORS)
def test_every_weight_of_the_extractor_learns(variant):
    module = extractor(variant)
    module(torch.randn(2, 7, 8, dtype=torch.float64)).pow(2).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_new_weights_follow_the_configuration_of_their_part():
    vision_config = {**TINY_CLIP, "hidden_size": 64, "initializer_range": 0.1}
    text_config = {**TINY_LLAMA, "initializer_range": 0.3}
    fields = {"vision_config": vision_config, "text_config": text_config, "initializer_range": 0.05}
    paper = tiny_model(tiny_config(**fields, num_prototypes=50)).model
    for module in (paper.prototype_extractor.q, paper.prototype_extractor.z, paper.multi_modal_projector.linear_1):
        assert 0.045 < module.weight.std() < 0.055
        assert not module.bias.any()
    assert 0.9 < paper.prototype_extractor.prototypes.std() < 1.1
    assert 0.28 < paper.language_model.layers[0].mlp.up_proj.weight.std() < 0.32
    released = tiny_model(tiny_config(**fields, prototype_variant="released")).model
    assert released.prototype_extractor.sim_alpha.item() == 1.0
    assert released.prototype_extractor.sim_beta.item() == 0.0
