"""Says which part of the model a weight belongs to, by its name in this library, in PEFT or in a released checkpoint.

>>> part_of("base_model.model.model.vision_tower.encoder.layers.0.mlp.fc1.lora_A.weight")
'vision'
>>> part_of("model.mm_projector.sim_alpha"), group_of("model.mm_projector.sim_alpha")
('extractor', 'connector')
"""

# A weight belongs to the first part with an infix that occurs in its name. The authors keep their extractor inside
# mm_projector. The resampler is the Q-Former of BLIP-2.
INFIXES = {
    "vision": ("vision_tower.", "vision_model."),
    "extractor": ("prototype_extractor.", *(f"mm_projector.{name}" for name in ("sim_", "c.", "v.", "f.", "ln_1."))),
    "resampler": ("resampler.",),
    "projector": ("multi_modal_projector.", "mm_projector."),
    "text": ("lm_head.", "language_model.", "model.layers.", "model.embed_tokens.", "model.norm."),
}
# The parts between the two towers are the connector. They share one learning rate.
GROUPS = ("vision", "connector", "text")
CONNECTOR = ("extractor", "resampler", "projector")


def part_of(name: str) -> str:
    """A key of `INFIXES`, or `"other"`."""
    return next((part for part, infixes in INFIXES.items() if any(infix in name for infix in infixes)), "other")


def group_of(name: str) -> str:
    """One of `GROUPS`, or `"other"`."""
    part = part_of(name)
    return "connector" if part in CONNECTOR else part
