"""Models from parts, adapters merged into plain checkpoints, and the key names of the authors' release.

    >>> model, processor = compose("openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5")
    >>> merge_adapter("runs/sq-llava-7b/stage2", "runs/sq-llava-7b/merged")

What it does not do: convert released checkpoints as a whole.
"""
