"""Finds the tokenizer files of a model folder, and what the task options need to know about the tokenizer."""

from __future__ import annotations

import atexit
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import transformers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.normalizers import Lowercase, Sequence
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from onnxpress.errors import SourceError
from onnxpress.exporters.json_files import read_json, read_object
from onnxpress.exporters.quiet import quiet
from onnxpress.exporters.sentence_transformers import transformer_config
from onnxpress.exporters.source import stays_inside

# Older forms, which transformers can convert.
_VOCABULARIES = ("vocab.txt", "vocab.json", "*.model")
_COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_PROBES = (
    *("The quick brown fox, 12345 + 67.89!", " leading,  double  and trailing spaces ", "lines\n\n\tand tabs", "don't, can't, I'LL"),
    *("naïve café: “quotes” – 3½ €…", "Привет, мир", "你好,世界。", "こんにちは", "안녕하세요", "مرحبا", "नमस्ते", "👍🏽 👨‍👩‍👧"),
    "def f(x):\n    return x[0]  # CamelCase, snake_case",
)  # fmt: skip
_MOST_ADDED = 100  # tokens that are tried
_NO_LIMIT = 10**6  # transformers writes 1e30 for "none"


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Files to copy into an artifact (tokenizer.json always among them), and facts.

    pads: whether pad_token_id is a token for padding, with which no text ends. max_length is None where the tokenizer sets no limit. special_tokens: how many a text gets. token_types: whether a model is told
    which of two texts a token is of. chats: whether it has a chat template.
    """

    files: tuple[Path, ...]
    pad_token_id: int
    pads: bool
    mask_token: str | None
    max_length: int | None
    special_tokens: int
    token_types: bool
    chats: bool
    notes: tuple[str, ...] = ()


def read_tokenizer(folder: Path, *, trust_remote_code: bool) -> Tokenizer:
    """Read the tokenizer of a folder; an older format is converted to tokenizer.json. Raises SourceError."""
    if not any(any(folder.glob(name)) for name in ("tokenizer.json", *_VOCABULARIES)):
        # transformers would make an empty tokenizer up.
        raise SourceError(
            f"{folder} has no tokenizer: no tokenizer.json, and none of {', '.join(_VOCABULARIES)}. Save the model's "
            f"tokenizer there with tokenizer.save_pretrained(folder)."
        )
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # missing files, garbled JSON, missing optional packages…
        reason = " ".join(str(error).split())[:300]
        packages = ("sentencepiece", "google.protobuf")
        lacking = not all(_is_installed(name) for name in packages)
        if lacking and not (folder / "tokenizer.json").is_file() and any(folder.glob("*.model")):
            reason = "it is in SentencePiece's form alone, which the packages sentencepiece and protobuf read: pip install them."
        raise SourceError(
            f"The tokenizer in {folder} cannot be read: {reason} A text model needs "
            f"tokenizer.json beside its weights (tokenizer.save_pretrained(folder) writes it)."
        ) from error
    if not tokenizer.is_fast:
        raise SourceError(
            f"The tokenizer in {folder} ({type(tokenizer).__name__}) has no fast form, so there is no tokenizer.json "
            f"that could run without transformers. Use a model that has one."
        )
    notes: list[str] = []
    files = [folder / name for name in _COPIED if (folder / name).is_file()]
    others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    of_processor = folder / "chat_template.json"
    outside = next((path for path in (*files, *others, of_processor) if not stays_inside(path, folder)), None)
    if outside is not None:
        raise SourceError(
            f"{outside} is a link that leads out of its folder, and artifacts get no copies of what lies elsewhere: put the file itself there."
        )
    if tokenizer.chat_template is None and of_processor.is_file():
        template = read_object(of_processor).get("chat_template")
        if isinstance(template, str):
            tokenizer.chat_template = template
            notes.append("tokenizer: the chat template is that of chat_template.json")
    lowercase = _wants_lowercase(folder)
    converted = not (folder / "tokenizer.json").is_file()
    otherwise = None if lowercase or converted else _read_otherwise(folder, tokenizer)
    turned = not converted and tokenizer.truncation_side != _truncation_side(folder / "tokenizer.json")
    if lowercase or converted or turned or otherwise is not None or others or notes:
        saved = Path(tempfile.mkdtemp(prefix="onnxpress-tokenizer-"))
        atexit.register(shutil.rmtree, saved, ignore_errors=True)
        with quiet():
            tokenizer.save_pretrained(saved)
        if lowercase:
            _lowercase_first(saved / "tokenizer.json")
        if isinstance(tokenizer.chat_template, dict):
            _join_templates(saved, tokenizer.chat_template)
        files = [saved / name for name in _COPIED if (saved / name).is_file()]
        _set_truncation_side(saved / "tokenizer.json", tokenizer.truncation_side)
        if lowercase:
            notes.append("tokenizer: lower-cases first, as sentence_bert_config.json says")
        elif converted or otherwise is not None:
            notes.append(f"tokenizer: {otherwise or 'converted to tokenizer.json'}")
        if tokenizer.truncation_side == "left":
            notes.append("tokenizer: of texts that are too long the end is read, as tokenizer_config.json says")
    if tokenizer.split_special_tokens:
        notes.append(
            "tokenizer: special tokens that a text spells are read as such; split_special_tokens is not applied"
        )
    limit = int(tokenizer.model_max_length)
    pad = tokenizer.pad_token_id
    return Tokenizer(
        files=tuple(files),
        pad_token_id=int(pad if pad is not None else tokenizer.eos_token_id or 0),
        pads=pad is not None and tokenizer("a")["input_ids"][-1:] != [pad],
        mask_token=tokenizer.mask_token,
        max_length=limit if limit < _NO_LIMIT else None,
        special_tokens=int(tokenizer.num_special_tokens_to_add()),
        token_types=_gives_token_types(tokenizer),
        chats=bool(tokenizer.chat_template),
        notes=tuple(notes),
    )


def _join_templates(folder: Path, templates: Mapping[str, str]) -> None:
    """Put chat templates by name into tokenizer_config.json, as transformers 4 did, in the place of one file each."""
    path = folder / "tokenizer_config.json"
    named = [{"name": name, "template": template} for name, template in templates.items()]
    path.write_text(
        json.dumps({**read_object(path), "chat_template": named}, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    (folder / "chat_template.jinja").unlink(missing_ok=True)


def _truncation_side(path: Path) -> str:
    """Where a tokenizer.json, or what reads it, cuts texts that are too long."""
    truncation = FastTokenizer.from_file(str(path)).truncation or {}
    return str(truncation.get("direction", "right"))


def _set_truncation_side(path: Path, side: str) -> None:
    """The runtime reads it there; the length is its own."""
    tokenizer = FastTokenizer.from_file(str(path))
    if side == "right":
        tokenizer.no_truncation()
    else:
        tokenizer.enable_truncation(512, direction=side)
    tokenizer.save(str(path))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its package
        return False


def _gives_token_types(tokenizer: PreTrainedTokenizerFast) -> bool:
    """What its file says. Its class is not asked: ALBERT's, and others', gave them in transformers 4, and do not in 5."""
    return "token_type_ids" in tokenizer.init_kwargs.get("model_input_names", ("token_type_ids",))


def _read_otherwise(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """In what transformers' tokenizer of a folder is another than the files alone say; None where it is the same.

    transformers 5 builds those of some classes (LlamaTokenizer) anew, and adds tokens that other files than tokenizer.json name.
    """
    files = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    own = FastTokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    for each in (files, own):
        each.no_truncation()
        each.no_padding()
    made = f"as transformers {transformers.__version__} makes it of the folder"
    added, in_file = (
        {str(token): number for number, token in each.get_added_tokens_decoder().items()} for each in (own, files)
    )
    others = [token for token, number in added.items() if in_file.get(token) != number]
    for text in (*_PROBES, *(f"a {token} b{token}c" for token in (others + list(added))[:_MOST_ADDED])):
        found, alone = _ids(own, text), _ids(files, text)
        if found != alone:
            return f"{made}; tokenizer.json alone reads {text!r} otherwise"
        if own.decode(found) != files.decode(found):
            return f"{made}; tokenizer.json alone writes the tokens of {text!r} otherwise"
    config = folder / "tokenizer_config.json"
    declared = read_json(config) if config.is_file() else {}
    for name, token in tokenizer.special_tokens_map.items() if tokenizer.chat_template else ():  # which may name them
        said = declared.get(name)
        if isinstance(token, str) and token != (said.get("content") if isinstance(said, dict) else said):
            return f"{made}, whose tokenizer_config.json names no {name}"
    return None


def _ids(tokenizer: FastTokenizer, text: str) -> list[int]:
    """The tokens of a text; none where it has words that are unknown and the tokenizer has no token for these."""
    try:
        return list(tokenizer.encode(text).ids)
    except Exception:  # the library's own error has no name
        return []


def _wants_lowercase(folder: Path) -> bool:
    return bool(transformer_config(folder).get("do_lower_case"))


def _lowercase_first(path: Path) -> None:
    tokenizer = FastTokenizer.from_file(str(path))
    before = tokenizer.normalizer
    tokenizer.normalizer = Lowercase() if before is None else Sequence([Lowercase(), before])
    tokenizer.save(str(path))
