"""Checks the data of a recipe before a run spends time on it."""
