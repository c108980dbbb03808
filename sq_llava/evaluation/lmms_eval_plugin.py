"""SQ-LLaVA as a model of lmms-eval: what its entry point `lmms_eval.models` loads.

    pip install --no-deps lmms-eval==0.7.3
    pip install sacrebleu pytablewriter tenacity loguru
    lmms-eval --model sq_llava --model_args pretrained=runs/demo/model --tasks pope --batch_size 8

`--no-deps`, as it would bring 48 packages and a CUDA build of torchvision. Its own list of models is read at every
start, so nothing heavy is imported here: the model is in `lmms_eval_model.py`.
"""

from lmms_eval.models.registry_v2 import ModelManifest


MANIFEST = ModelManifest(model_id="sq_llava", chat_class_path="sq_llava.evaluation.lmms_eval_model.SQLlava")
