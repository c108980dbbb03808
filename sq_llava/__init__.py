"""SQ-LLaVA around the Hub trio: data, training, inference, checkpoints, and the `sq-llava` command."""

__version__ = "0.1.0"
