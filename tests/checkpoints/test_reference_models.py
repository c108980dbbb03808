"""The models that conversions are compared with: the authors' projector has the numbers of the authors' code.

All other parts are models of transformers and PEFT. `test_convert.py` compares all kinds of sources with them.
"""

import torch
from safetensors.torch import load_file

from sq_llava.checkpoints.reference_models import run_projector
from tests import ROOT


def test_projector_has_the_output_of_the_authors_code():
    golden = load_file(ROOT / "tests" / "files" / "prototype_released_small.safetensors")
    tensors = {name.removeprefix("state."): tensor.float() for name, tensor in golden.items()}
    output = run_projector(tensors, tensors["input"], num_prototypes=9)["projector"]
    torch.testing.assert_close(output, tensors["output"], atol=1e-5, rtol=1e-5)
