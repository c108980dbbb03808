"""Which part of the model a weight belongs to, by its name in any layout: this library's, PEFT's, or a released one.

>>> part_of("base_model.model.model.vision_tower.encoder.layers.0.mlp.fc1.lora_A.weight")
'vision'
>>> part_of("model.mm_projector.sim_alpha"), group_of("model.mm_projector.sim_alpha")
('extractor', 'connector')
"""

# The first infix that is in a name decides. The authors' projector (mm_projector) holds their extractor, and the
# resampler is the Q-Former of BLIP-2.
INFIXES = {
    "vision": ("vision_tower.", "vision_model."),
    "extractor": ("prototype_extractor.", *(f"mm_projector.{name}" for name in ("sim_", "c.", "v.", "f.", "ln_1."))),
    "resampler": ("resampler.",),
    "projector": ("multi_modal_projector.", "mm_projector."),
    "text": ("lm_head.", "language_model.", "model.layers.", "model.embed_tokens.", "model.norm."),
}
# The parts between the two towers make the connector; it has one learning rate.
GROUPS = ("vision", "connector", "text")
CONNECTOR = ("extractor", "resampler", "projector")


def part_of(name: str) -> str:
    """One of `INFIXES`; `"other"` for a weight of none of these parts."""
    return next((part for part, infixes in INFIXES.items() if any(infix in name for infix in infixes)), "other")


def group_of(name: str) -> str:
    """The tower that a weight belongs to, or the connector: one of `GROUPS`."""
    part = part_of(name)
    return "connector" if part in CONNECTOR else part
