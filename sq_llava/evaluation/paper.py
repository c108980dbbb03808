"""Results from the SQ-LLaVA paper (https://arxiv.org/abs/2403.11299), for comparison in reports. This project did not
measure them.
"""

TASKS = ("vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mmbench", "mmbench_cn", "llava_bench", "mmvet")
FIGURES = {
    "LLaVA-1.5-7B": (78.5, 62.0, 50.0, 66.8, 58.2, 85.9, 64.3, 58.3, 65.4, 31.1),
    "LLaVA-1.5-7B-LoRA": (79.1, 63.0, 47.8, 68.4, 58.2, 86.4, 66.1, 58.9, 67.9, 30.2),
    "SQ-LLaVA-7B, LLaVA data": (79.2, 62.8, 54.0, 68.9, 58.6, 87.7, 66.2, 58.1, 66.3, 32.5),
    "ShareGPT4V-7B": (80.6, 63.3, 57.2, 68.4, 60.4, 86.8, 68.8, 62.2, 72.6, 37.6),
    "SQ-LLaVA-7B, ShareGPT4V data": (80.3, 63.7, 55.3, 70.5, 60.5, 87.2, 66.6, 60.0, 74.3, 37.6),
    "LLaVA-1.5-13B": (80.0, 63.3, 53.6, 71.6, 61.3, 85.9, 67.7, 63.6, 72.5, 36.1),
    "SQ-LLaVA-13B, ShareGPT4V data": (81.3, 65.0, 58.2, 71.5, 61.9, 87.4, 68.5, 62.5, 80.7, 39.7),
}


def figures_of(task: str) -> dict[str, float]:
    """The paper's results for a task, by model. Empty if the paper does not report the task."""
    if task not in TASKS:
        return {}
    return {model: figures[TASKS.index(task)] for model, figures in FIGURES.items()}
