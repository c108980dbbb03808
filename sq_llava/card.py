"""The model card of a checkpoint, from the template `model_card.md` at the top of the source tree.

What it does not do: give scores, which come from an evaluation of the checkpoint at hand.
"""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from modeling_sq_llava import SQLlavaForConditionalGeneration
from processing_sq_llava import SQLlavaProcessor
from sq_llava.adapter import count_parameters


TEMPLATE = Path(__file__).parent.parent / "model_card.md"


def write_card(folder: str, model: SQLlavaForConditionalGeneration, processor: SQLlavaProcessor) -> None:
    """Writes `README.md` into a folder with a plain checkpoint."""
    config = model.config
    towers = {"vision_model": config.vision_config.name_or_path, "text_model": config.text_config.name_or_path}
    # Metadata of the Hub can name models of the Hub only.
    base_models = [name for name in towers.values() if name.count("/") == 1 and not Path(name).exists()]
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=base_models or None,
        tags=["sq-llava", "visual-question-generation", "custom_code"],
    )
    name = Path(folder).resolve().name
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        model_name=name,
        repo_id=f"org/{name}",
        prototype_variant=config.prototype_variant,
        num_prototypes=config.num_prototypes,
        vusr_marker=processor.vusr_marker,
        parameters={part: sum(counts) for part, counts in count_parameters(model).items()},
        **{tower: path.rstrip("/").rpartition("/")[2] or "unknown" for tower, path in towers.items()},
    )
    card.save(Path(folder) / "README.md")
