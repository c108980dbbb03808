"""Metrics of the benchmarks as scripts for the Hugging Face library `evaluate`:

import evaluate
from importlib.resources import files
evaluate.load(str(files("sq_llava.evaluation.metrics_hub") / "pope.py"))
"""
