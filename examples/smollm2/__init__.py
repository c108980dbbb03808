"""SmolLM2-135M-Instruct learns to see: a real language model, trained in both stages on a CPU."""
