"""A complete SQ-LLaVA in ten minutes on two CPU cores, from data and base models to both stages and an evaluation."""
