"""From SmolLM2-135M-Instruct to an SQ-LLaVA: a real language model, trained in both stages on a CPU."""
