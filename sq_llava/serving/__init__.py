"""An OpenAI-compatible server of one model: `sq-llava serve`."""
