"""Trains and evaluates a complete small SQ-LLaVA in ten minutes on two CPU cores, including data and base models."""
