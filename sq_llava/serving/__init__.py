"""An OpenAI-compatible server for one model: `sq-llava serve`."""
