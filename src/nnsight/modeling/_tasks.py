"""Tasks: the names that pipelines of transformers go by, and the classes of models that do them."""

from __future__ import annotations

import difflib

from ..errors import InputError

_CLASSES: dict[str, tuple[str, ...]] = {
    "audio-classification": ("AutoModelForAudioClassification",),
    "automatic-speech-recognition": ("AutoModelForSpeechSeq2Seq", "AutoModelForCTC"),
    "depth-estimation": ("AutoModelForDepthEstimation",),
    "feature-extraction": ("AutoModel",),
    "fill-mask": ("AutoModelForMaskedLM",),
    "image-classification": ("AutoModelForImageClassification",),
    "image-feature-extraction": ("AutoModel",),
    "image-segmentation": ("AutoModelForImageSegmentation", "AutoModelForSemanticSegmentation"),
    "image-text-to-text": ("AutoModelForImageTextToText",),
    "multiple-choice": ("AutoModelForMultipleChoice",),
    "object-detection": ("AutoModelForObjectDetection",),
    "question-answering": ("AutoModelForQuestionAnswering",),
    "summarization": ("AutoModelForSeq2SeqLM",),
    "text-classification": ("AutoModelForSequenceClassification",),
    "text-generation": ("AutoModelForCausalLM",),
    "text2text-generation": ("AutoModelForSeq2SeqLM",),
    "token-classification": ("AutoModelForTokenClassification",),
    "translation": ("AutoModelForSeq2SeqLM",),
    "video-classification": ("AutoModelForVideoClassification",),
    "zero-shot-audio-classification": ("AutoModel",),
    "zero-shot-classification": ("AutoModelForSequenceClassification",),
    "zero-shot-image-classification": ("AutoModelForZeroShotImageClassification",),
    "zero-shot-object-detection": ("AutoModelForZeroShotObjectDetection",),
}
_OTHER_NAMES = {"ner": "token-classification", "sentiment-analysis": "text-classification"}


def classes_for(task: str | None, auto_class: str | None) -> tuple[str, ...]:
    """The names of the classes to try; none stands for the class that the model was saved from."""
    if task is not None and auto_class is not None:
        raise InputError("Give task=… or auto_class=…, not both: each says which class the model is loaded as.")
    if task is None:
        return (auto_class,) if auto_class else ()
    found = _CLASSES.get(_OTHER_NAMES.get(task, task))
    if found is None:
        close = difflib.get_close_matches(task, [*_CLASSES, *_OTHER_NAMES], n=3, cutoff=0.4)
        near = f" The nearest are: {', '.join(close)}." if close else ""
        raise InputError(f"There is no task {task!r}.{near} auto_class=… takes the name of any class of transformers.")
    return found
