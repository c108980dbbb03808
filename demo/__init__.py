"""Trains and evaluates a small SQ-LLaVA in about ten minutes on two CPU cores, including data and base models."""
