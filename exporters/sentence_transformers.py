"""What a sentence-transformers folder declares: its steps, how the first reads texts, what is put before them and done to scores."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from onnxpress.errors import ConversionError, SourceError
from onnxpress.exporters.json_files import read_json, read_object
from onnxpress.manifest import Json

OWN = "sentence_transformers."  # how the types of its own steps begin
# Options of the tokenizer that change no answer, whatever they are, and where they are true.
_PADS, _USUAL = ("padding", "return_tensors"), ("truncation", "add_special_tokens")
# What its Transformer step takes of a model, and what it calls that, where it says so.
_OUTPUTS = (None, "last_hidden_state", "logits")
_GIVEN_ON = (None, "token_embeddings", "scores", "causal_logits")


def declared_steps(folder: Path) -> list[tuple[str, str]]:
    """Type and folder of each step of modules.json. Raises SourceError."""
    path = folder / "modules.json"
    try:
        steps = [(str(step["type"]), str(step.get("path", ""))) for step in read_json(path)]
    except (TypeError, KeyError, AttributeError):
        steps = []
    places = [PurePosixPath(place) for _, place in steps]
    if not steps or any(place.is_absolute() or ".." in place.parts for place in places):
        raise SourceError(
            f"{path} is no list of steps, each with a type and a path inside of the folder. Download the model again."
        )
    return steps


def check_first_step(folder: Path) -> None:
    """Raise ConversionError where sentence-transformers reads texts in another way than the tokenizer and the model in a folder do."""
    if not (folder / "modules.json").is_file():
        return
    name, _ = declared_steps(folder)[0]
    declared = transformer_config(folder)
    ways = _fields(declared.get("modality_config"))
    text = _fields(ways.get("text"))
    options = _fields(declared.get("processing_kwargs"))
    given = {name: value for part in ("common", "text") for name, value in _fields(options.get(part)).items()}
    asked = [name for name, value in given.items() if name not in _PADS and not (name in _USUAL and value is True)]
    if not name.startswith(OWN) or name.rpartition(".")[2] != "Transformer":
        wrong = f"begins with a step of type {name}"
    elif "message" in ways:
        wrong = "makes a message of each text, by the tokenizer's chat template"
    elif text.get("method_output_name") not in _OUTPUTS or declared.get("module_output_name") not in _GIVEN_ON:
        wrong = f"takes {text.get('method_output_name')} of the model for {declared.get('module_output_name')}"
    elif asked:
        wrong = f"has the tokenizer called with {', '.join(asked)}"
    else:
        return
    raise ConversionError(
        f"sentence-transformers' model in {folder} {wrong}, which onnxpress does not; export the encoder alone (a copy of the folder without "
        "modules.json) if that is what you want."
    )


def transformer_config(folder: Path) -> dict[str, Any]:
    """What sentence-transformers' file says of a folder's first step; nothing where there is none. Raises SourceError."""
    kinds = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
    paths = (folder / f"sentence_{kind}_config.json" for kind in kinds)
    return next((read_object(path) for path in paths if path.is_file()), {})


def declared_length(folder: Path) -> int | None:
    """How many tokens of a text sentence-transformers reads, where it says so."""
    length = transformer_config(folder).get("max_seq_length")
    return length if type(length) is int and length > 0 else None


def has_classifier(folder: Path) -> bool:
    """Whether the folder's last step is a classifier's: a Dense one, with a config.json that says what its numbers mean."""
    if not (folder / "modules.json").is_file() or read_json(folder / "config.json").get("problem_type") is None:
        return False
    return declared_steps(folder)[-1][0].endswith(".Dense")


def is_headed(folder: Path) -> bool:
    """Whether a folder's only step is a transformers model with a head of its own: a cross-encoder, for instance."""
    wanted = transformer_config(folder).get("transformer_task", "feature-extraction")
    return len(declared_steps(folder)) == 1 and bool(wanted != "feature-extraction")


def declared_activation(folder: Path, config: Any) -> str | None:
    """The class of torch.nn that sentence-transformers applies to a cross-encoder's answers; None where none is declared.

    config: transformers', where it was declared before sentence-transformers 6. Other code than torch's is not run there either.
    """
    path = folder / "config_sentence_transformers.json"
    older = getattr(config, "sentence_transformers", None)
    declared = (
        (read_object(path).get("activation_fn") if path.is_file() else None)
        or (older.get("activation_fn") if isinstance(older, dict) else None)
        or getattr(config, "sbert_ce_default_activation_function", None)
    )
    return declared.rpartition(".")[2] if isinstance(declared, str) and declared.startswith("torch.") else None


def declared_prompts(folder: Path) -> dict[str, Json]:
    """What sentence-transformers puts before texts, by names, and the one that it takes where none is named."""
    declared = folder / "config_sentence_transformers.json"
    config = read_object(declared) if declared.is_file() else {}
    prompts = {name: text for name, text in _fields(config.get("prompts")).items() if isinstance(text, str)}
    default = config.get("default_prompt_name")
    known = isinstance(default, str) and default in prompts
    return {**({"prompts": prompts} if prompts else {}), **({"default_prompt": default} if known else {})}


def _fields(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
