"""SQ-LLaVA around the code of a checkpoint: data, training, inference, checkpoints, and the `sq-llava` command."""

__version__ = "0.1.0"
