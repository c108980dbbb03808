"""SQ-LLaVA as a model for lmms-eval, loaded through the entry point `lmms_eval.models`.

    pip install --no-deps lmms-eval==0.7.3
    pip install sacrebleu pytablewriter tenacity loguru
    lmms-eval --model sq_llava --model_args pretrained=runs/demo/model --tasks pope --batch_size 8

`--no-deps` leaves out 48 packages and a CUDA build of torchvision. lmms-eval loads this module at every start, so it
imports nothing large. The model class is in `lmms_eval_model.py`.
"""

from lmms_eval.models.registry_v2 import ModelManifest


MANIFEST = ModelManifest(model_id="sq_llava", chat_class_path="sq_llava.evaluation.lmms_eval_model.SQLlava")
