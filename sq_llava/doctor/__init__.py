"""Checks the data of a recipe before it costs anything."""
