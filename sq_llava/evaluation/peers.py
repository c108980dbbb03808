"""The projects whose rules metrics follow, and the versions that these metrics are tested with (`make test-peers`)."""

# Prefix of a metric -> project and version.
PEERS = {
    "llava": "LLaVA 1.2.2",
    "lmms_eval": "lmms-eval 0.7.3",
    "m4c": "EvalAI's normalizer in LLaVA 1.2.2",
    "official": "vqaEval.py of VQA v2",
    "ptb": "pycocoevalcap 1.2",
}


def prefix_of(metric: str) -> str | None:
    """
    The part of a metric's name that names another project; `None` for a metric of this project.

        >>> prefix_of("random/llava/f1"), prefix_of("accuracy")
        ('llava', None)
    """
    return next((part for part in metric.split("/")[:-1] if part in PEERS), None)
