"""The tasks: what a task's graph puts out, which class loads its head, and how to tell the task of a model.

Names that the field uses for one task, and the class that loads it, come from optimum's TasksManager. Its guess of a
model's task refuses local folders, so that is done here.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum.exporters.tasks import TasksManager

from onnxpress.errors import SourceError
from onnxpress.exporters.sentence_transformers import has_classifier, is_headed


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task of text models.

    architectures: how the class of such a model ends, as its config.json says. outputs: fields of the model's answer.
    synonyms: names that optimum does not know.
    """

    name: str
    architectures: tuple[str, ...]
    outputs: tuple[str, ...]
    synonyms: tuple[str, ...] = ()

    def auto_class(self, config: Any) -> Any:
        """The transformers class that loads a model with this task's head.

        Without a head, T5's encoder alone, which AutoModel does not load; of a language model that takes images or sound too, the
        class that has it whole, where there is none for its text.
        """
        from transformers import (
            MODEL_FOR_CAUSAL_LM_MAPPING,
            MODEL_FOR_MULTIMODAL_LM_MAPPING,
            MODEL_FOR_TEXT_ENCODING_MAPPING,
            AutoModelForMultimodalLM,
            AutoModelForTextEncoding,
        )

        encoder = getattr(MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None), "__name__", "")
        own = "AutoModel" in (getattr(config, "auto_map", None) or {})
        if self.name == "feature-extraction" and encoder.endswith("EncoderModel") and not own:
            return AutoModelForTextEncoding
        whole = type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
        if self.name == "text-generation" and whole:
            return AutoModelForMultimodalLM
        return TasksManager.get_model_class_for_task(self.name, framework="pt")


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="feature-extraction",
            architectures=("Model",),
            outputs=("last_hidden_state",),
            synonyms=("embeddings",),
        ),
        Task(
            name="text-classification",
            architectures=("ForSequenceClassification",),
            outputs=("logits",),
            synonyms=("sentiment-analysis", "text-ranking"),
        ),
        Task(
            name="token-classification",
            architectures=("ForTokenClassification",),
            outputs=("logits",),
            synonyms=("ner",),
        ),
        Task(
            name="question-answering",
            architectures=("ForQuestionAnswering",),
            outputs=("start_logits", "end_logits"),
        ),
        Task(
            name="fill-mask",
            architectures=("ForMaskedLM", "WithLMHeadModel"),  # XLM's and FlauBERT's
            outputs=("logits",),
        ),
        Task(
            name="text-generation",
            architectures=(
                "ForCausalLM",
                *(f"{name}LMHeadModel" for name in ("GPT2", "OpenAIGPT", "CTRL", "Bert", "XLNet")),
            ),
            outputs=("logits",),
            synonyms=("causal-lm", "chat"),
        ),
    )
}


def find_task(name: str) -> Task:
    """The task of that name or synonym. Raises SourceError."""
    for task in TASKS.values():
        if task.name == name or name in task.synonyms or TasksManager.map_from_synonym(name) == task.name:
            return task
    raise SourceError(f"There is no task {name!r}. onnxpress exports {', '.join(TASKS)}, and plain modules.")


def infer_task(folder: Path, architectures: tuple[str, ...], config: Any = None) -> Task:
    """The task of a folder, from modules.json and the class that was saved; config: transformers'. Raises SourceError.

    Of a model that answers to images or sound too, its text is what is meant.
    """
    import transformers

    if (folder / "modules.json").is_file() and not is_headed(folder):
        return TASKS["text-classification" if has_classifier(folder) else "feature-extraction"]
    _refuse_other_inputs(folder, architectures, config)
    for task in reversed(TASKS.values()):  # heads first: feature-extraction's ending is the least specific
        if any(name.endswith(task.architectures) for name in architectures):
            return task
    if any(name.endswith("ForPreTraining") for name in architectures):
        return TASKS["feature-extraction"]
    others = [name for name in architectures[:1] if hasattr(transformers, name)]  # not a class of somebody's own
    if config is not None and reads_more_than_text(config) and set(others) <= _language_models(config):
        return TASKS["text-generation"]
    found = f"was saved as {', '.join(architectures)}" if architectures else "does not say what it was saved as"
    if config is not None and config.is_encoder_decoder:
        raise SourceError(
            f"The model in {folder} {found}. Models that write a text from a text or from sound (translation, summarization, "
            "transcription) are not exported; what one makes of a text can be, with --task feature-extraction."
        )
    raise SourceError(
        f"The model in {folder} {found}, from which onnxpress cannot tell the task. Say which it is with --task: "
        f"{', '.join(TASKS)}."
    )


def _refuse_other_inputs(folder: Path, architectures: tuple[str, ...], config: Any) -> None:
    """Raise SourceError for models of images or sound alone, and of texts and others side by side, which compare them (CLIP)."""
    import transformers

    made_as = getattr(transformers, architectures[0], None) if architectures else None
    read = getattr(made_as, "main_input_name", "input_ids")
    compares = made_as is not None and "return_loss" in inspect.signature(made_as.forward).parameters
    if made_as is None or config is None or config.is_encoder_decoder or (read == "input_ids" and not compares):
        return
    what = "compares texts with something else" if compares else f"reads {read} and no text"
    raise SourceError(
        f"The model in {folder} ({architectures[0]}) {what}. Give it as a module: onnxpress build package.module:factory, where factory() "
        f"returns the module that you want, or a part of it, and example inputs: (model, (pixel_values,)) of images."
    )


def reads_more_than_text(config: Any) -> bool:
    """Whether a config is that of a language model that takes images or sound beside text."""
    return bool(_language_models(config) and not config.is_encoder_decoder and config.get_text_config() is not config)


def _language_models(config: Any) -> set[str]:
    """The names of the classes that write texts by such a config."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
    return {mapping[type(config)].__name__ for mapping in mappings if type(config) in mapping}


def heads(architectures: tuple[str, ...]) -> tuple[str, ...]:
    """The tasks that a model saved as these classes has trained weights for."""
    found = [task.name for task in TASKS.values() if any(name.endswith(task.architectures) for name in architectures)]
    return tuple(dict.fromkeys(["feature-extraction", *found]))
