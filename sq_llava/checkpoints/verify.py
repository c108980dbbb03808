"""Verifies a converted checkpoint: runs source and result on the same prompts and compares them.

    sq-llava convert sqllava-lora-7b --base vicuna-7b --out sq-llava-7b --verify

The source is run by other code than the result (`sq_llava/checkpoints/reference_models.py`), and the conversion's
table of names is not used. It compares token ids (with the source's own tokenizer file), pixels (with CLIP's own
preprocessing) and logits. The prompts have one image, two images, no image, and a question by the model. If logits
differ, it names the first layer with a difference. Generated texts and batches are not compared.
"""

import os
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from tokenizers import Tokenizer
from torch import nn
from transformers import CLIPImageProcessorPil

from modeling_sq_llava import SQLlavaForConditionalGeneration
from processing_sq_llava import SQLlavaProcessor
from sq_llava.checkpoints.inspection import quiet_transformers
from sq_llava.checkpoints.layouts import Layout
from sq_llava.checkpoints.reference_models import Precision, Prompt, keep_language_states, run_original, stored_dtype
from sq_llava.checkpoints.weight_files import read_headers


# Largest allowed difference of logits, relative to the largest logit. In half precision, sums depend on their order.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
# Minimum tolerance for a result stored in half precision: merged LoRA can be rounded up in one and down in the other.
ROUNDED_TOLERANCE = 2e-3
# In grey levels of 255: PIL and torchvision can differ by a rounding in each of two steps.
PIXEL_TOLERANCE = 2.0
TEXTS = ("What animal is this?\nA dog, two cats, 365 mice.", "Überall 猫 🐈  and  \t spaces")


@dataclass(frozen=True)
class Comparison:
    """Logits of source and result for one prompt."""

    prompt: str
    num_tokens: int
    num_images: int
    largest_difference: float
    largest_logit: float
    same_argmax: float  # share of positions, 0 to 1

    @property
    def relative_difference(self) -> float:
        return self.largest_difference / self.largest_logit


@dataclass
class Verification:
    """
    The outcome of a comparison.

    Attributes:
        dtype (`str`): Dtype in which both were run.
        tolerance (`float`): Largest allowed `relative_difference`.
        pixel_difference (`float`): Largest difference of pixels, in grey levels of 255.
        faults (`list[str]`): Differences beyond the tolerance; empty if it passed.
        notes (`list[str]`): Parts that were not compared, and the reasons.
    """

    source: str
    result: str
    dtype: str
    tolerance: float
    pixel_difference: float
    comparisons: list[Comparison] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.faults

    def to_json(self) -> dict:
        return {"passed": self.passed, **asdict(self)}


def verify(layout: Layout, folder: str | Path, dtype: str = "float32") -> Verification:
    """
    Runs source and result on the same prompts and compares token ids, pixels and logits.

    Args:
        layout ([`~sq_llava.checkpoints.layouts.Layout`]): The source, from `recognise`.
        folder: The converted checkpoint.
        dtype (`str`): Dtype in which both are run. Use `"bfloat16"` for models that do not fit into memory in float32;
            its tolerance is larger.

    Raises:
        ValueError: if there is not enough memory, or the source is incomplete.
    """
    folder = Path(folder)
    require_memory(folder, sum(tensor.num_elements for tensor in read_headers(folder)), dtype)
    # transformers would report the weights of other parts of the source as unexpected.
    with quiet_transformers(), warnings.catch_warnings(action="ignore", category=FutureWarning):
        return _verify(layout, folder, getattr(torch, dtype))


def _verify(layout: Layout, folder: Path, dtype: torch.dtype) -> Verification:
    processor = SQLlavaProcessor.from_pretrained(folder)
    precision = Precision(compute=dtype, stored=stored_dtype(folder))
    tolerance = TOLERANCES[dtype] if precision.exact else max(TOLERANCES[dtype], ROUNDED_TOLERANCE)
    prompts, pixel_difference, notes = _make_prompts(layout, processor)
    verification = Verification(
        str(layout.path), str(folder), str(dtype).removeprefix("torch."), tolerance, pixel_difference, notes=notes
    )
    if pixel_difference > PIXEL_TOLERANCE:
        verification.faults.append(f"the pixels differ by up to {pixel_difference:.1f} of 255 grey levels")
    _check_tokens(layout, processor, verification)
    expected = run_original(layout, prompts, precision)
    found = _run_result(folder, prompts, expected, dtype, verification.notes)
    _compare(verification, prompts, expected, found)
    return verification


def require_memory(folder: str | Path, num_parameters: int, dtype: str) -> None:
    """
    Checks before a conversion and before a comparison that a model of this size fits into memory.

    Raises:
        ValueError: if it does not fit in `dtype`, or this dtype cannot be used.
    """
    known = [str(known).removeprefix("torch.") for known in TOLERANCES]
    if dtype not in known:
        raise ValueError(f"--verify-dtype is {dtype!r}: choose one of {', '.join(known)}.")
    needed = num_parameters * getattr(torch, dtype).itemsize
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.9 * memory:
        raise ValueError(
            f"{folder}: {num_parameters:,} parameters need {decimal(needed)} in {dtype}, but this machine has "
            f"{decimal(memory)}. Use --verify-dtype bfloat16, or verify on a larger machine."
        )


def unequal_name(folder: str | Path) -> Path:
    """
    The new name of a result that differs from its source, so that nobody uses it by mistake.

    Raises:
        ValueError: if this folder exists already.
    """
    folder = Path(folder).expanduser().absolute()
    unequal = folder.with_name(f"{folder.name}.not-equal")
    if unequal.exists():
        raise ValueError(f"{unequal} is left from an earlier conversion. Move it away.")
    return unequal


def draw_picture(width: int, height: int) -> Image.Image:
    """Shapes on a colour gradient, with edges and smooth areas to test the preprocessing. Always the same picture."""
    red = Image.linear_gradient("L").resize((width, height))
    green = Image.linear_gradient("L").rotate(90).resize((width, height))
    image = Image.merge("RGB", (red, green, Image.new("L", (width, height), 96)))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 8, height // 8, width // 2, height // 2), fill="crimson")
    draw.polygon([(width * 3 // 4, height // 3), (width - 4, height - 8), (width // 2, height - 8)], fill="navy")
    draw.line((0, height - 1, width - 1, 0), fill="white", width=3)
    return image


def _make_prompts(layout: Layout, processor: SQLlavaProcessor) -> tuple[list[Prompt], float, list[str]]:
    """
    Makes the prompts, with pixels from CLIP's own preprocessing.

    Returns:
        The prompts; the largest difference to the pixels of `processor`, in grey levels; and notes.
    """
    wide, tall = draw_picture(320, 200), draw_picture(150, 400)

    def user(text: str, *images: Image.Image) -> dict:
        parts = [{"type": "image", "image": image} for image in images]
        return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}

    describe = "Can you describe the image in detail?"
    described = {"role": "assistant", "content": "A red circle and a blue triangle on a coloured ground."}
    conversations = {
        "one image": ([user("What shape is on the left?", wide)], [wide], False),
        "two images": ([user("What do these two have in common?", tall, wide)], [tall, wide], False),
        "text only": ([user("Why is the sky blue?")], [], False),
        "self-question": ([user(describe, tall), described], [tall], True),
    }
    notes = []
    if processor.vusr_token_id is not None:
        del conversations["self-question"]
        notes.append("the self-question is left out: the marker [vusr] is new, and the source does not know it")
    if layout.kind == "llava_hf":
        notes.append("both get Vicuna's prompts and padded images; the source's own processor would differ")
    prompts, pixel_difference = [], 0.0
    for name, (messages, images, ask) in conversations.items():
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, ask=ask, tokenize=True, return_dict=True, return_tensors="pt"
        )
        pixel_values = None
        if images:
            pixel_values = _original_pixels(layout, images)
            differences = (inputs["pixel_values"] - pixel_values).abs().amax(dim=(0, 2, 3))
            levels = 255 * differences * torch.tensor(processor.image_processor.image_std)
            pixel_difference = max(pixel_difference, levels.max().item())
        prompts.append(Prompt(name, inputs["input_ids"], pixel_values, processor.image_token_id))
    return prompts, pixel_difference, notes


def _original_pixels(layout: Layout, images: list[Image.Image]) -> torch.Tensor:
    """Like LLaVA's `process_images`: pads with the mean colour if the source does so, then processes as CLIP does."""
    image_processor = CLIPImageProcessorPil.from_pretrained(layout.vision_folder)
    if layout.aspect_ratio == "pad":
        colour = tuple(int(255 * mean) for mean in image_processor.image_mean)
        images = [_expand_to_square(image, colour) for image in images]
    return image_processor(images, return_tensors="pt")["pixel_values"]


def _expand_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _check_tokens(layout: Layout, processor: SQLlavaProcessor, verification: Verification) -> None:
    """Compares with the source's tokenizer file, read by SentencePiece or tokenizers without transformers."""
    folder = layout.text_folder
    if (folder / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        encode = SentencePieceProcessor(str(folder / "tokenizer.model")).encode
    else:
        original = Tokenizer.from_file(str(folder / "tokenizer.json"))

        def encode(text: str) -> list[int]:
            return original.encode(text, add_special_tokens=False).ids

    for text in (processor.system_message, *TEXTS):
        expected = encode(text)
        ids = processor.tokenizer(text, add_special_tokens=False).input_ids
        if ids != expected:
            verification.faults.append(
                f"the text {text!r} has the token ids {ids[:8]}..., but the source's tokenizer gives {expected[:8]}..."
            )
    # The original code tokenizes text after an image separately.
    expected = encode("\n" + TEXTS[0])
    after_image = f"{processor.image_token}{processor.text_prefix}\n{TEXTS[0]}"
    ids = processor.tokenizer(after_image, add_special_tokens=False).input_ids[1:]
    if layout.kind != "llava_hf" and ids != expected:
        verification.faults.append(
            f"text after an image has the token ids {ids[:8]}..., but the authors' code gives {expected[:8]}... "
            f"(text_prefix is {processor.text_prefix!r})"
        )


@torch.inference_mode()
def _run_result(
    folder: Path, prompts: list[Prompt], expected: list[dict], dtype: torch.dtype, notes: list[str]
) -> list[dict[str, torch.Tensor]]:
    model = SQLlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    inner = model.model
    if model.config.prototype_variant != "none" and not any("prototype extractor" in stages for stages in expected):
        inner.prototype_extractor = nn.Identity()
        notes.append("the prototype extractor is new: the result is run without it, because the source has none")
    places = {layer: f"vision layer {index}" for index, layer in enumerate(inner.vision_tower.encoder.layers)}
    places |= {inner.prototype_extractor: "prototype extractor", inner.multi_modal_projector: "projector"}
    stages = [{} for _ in prompts]
    for prompt, found in zip(prompts, stages):

        def keep(module: nn.Module, inputs: tuple, output, found=found) -> None:
            found[places[module]] = output[0] if isinstance(output, tuple) else output

        def keep_inputs(module: nn.Module, inputs: tuple, found=found) -> None:
            found["vision embeddings"] = inputs[0]

        handles = [module.register_forward_hook(keep) for module in places]
        handles.append(inner.vision_tower.encoder.layers[0].register_forward_pre_hook(keep_inputs))
        outputs = model(
            input_ids=prompt.input_ids, pixel_values=prompt.pixel_values, output_hidden_states=True, use_cache=False
        )
        keep_language_states(found, outputs)
        for handle in handles:
            handle.remove()
    return stages


def _compare(verification: Verification, prompts: list[Prompt], expected: list[dict], found: list[dict]) -> None:
    for prompt, source, result in zip(prompts, expected, found):
        source_logits, result_logits = source["logits"].float(), result["logits"].float()
        num_rows = source_logits.shape[-1]
        result["logits"] = result_logits = result_logits[..., :num_rows]  # further rows are new
        comparison = Comparison(
            prompt.name,
            prompt.input_ids.shape[1],
            prompt.num_images,
            largest_difference=(source_logits - result_logits).abs().max().item(),
            largest_logit=source_logits.abs().max().item(),
            same_argmax=(source_logits.argmax(-1) == result_logits.argmax(-1)).float().mean().item(),
        )
        verification.comparisons.append(comparison)
        # `not <=` also fails for NaN.
        if not comparison.relative_difference <= verification.tolerance:
            verification.faults.append(
                f"{prompt.name}: the logits differ by up to {comparison.largest_difference:.2g}, "
                f"{first_difference(source, result, verification.tolerance)}"
            )


def first_difference(source: dict[str, torch.Tensor], result: dict[str, torch.Tensor], tolerance: float) -> str:
    """Names the first output, in the order of computation, that differs between source and result, and by how much."""
    for place, expected in source.items():
        if place not in result:
            return f"and the result has no output of {place}"
        found = result[place].float()
        if found.shape != expected.shape:
            return f"first in {place}: the shape is {list(found.shape)}, not {list(expected.shape)}"
        difference, largest = (found - expected.float()).abs().max().item(), expected.float().abs().max().item()
        if not difference <= tolerance * largest:
            return f"first in {place}: by {difference:.2g}, where the largest value is {largest:.2g}"
    raise ValueError("Source and result do not differ.")


def print_verification(verification: Verification, console: Console) -> None:
    """Prints a table of the logits, then notes, differences and the outcome."""
    table = Table(title=f"{verification.result} compared with {verification.source}, in {verification.dtype}")
    for column in ("prompt", "tokens", "images", "difference", "relative", "same argmax"):
        table.add_column(column, justify="left" if column == "prompt" else "right")
    for row in verification.comparisons:
        table.add_row(
            row.prompt,
            str(row.num_tokens),
            str(row.num_images),
            f"{row.largest_difference:.2g}",
            f"{row.relative_difference:.2g}",
            f"{row.same_argmax:.1%}",
        )
    console.print(table)
    console.print(
        f"Tolerance: {verification.tolerance:g} of the largest logit. Pixels differ by up to "
        f"{verification.pixel_difference:.2g} of 255 grey levels (tolerance {PIXEL_TOLERANCE:g}).",
        soft_wrap=True,
    )
    for note in verification.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    for fault in verification.faults:
        console.print(f"differs: {fault}", style="red", markup=False, soft_wrap=True)
    console.print("equal" if verification.passed else "NOT equal", style="green" if verification.passed else "red")
