"""Resolves what the user named as a model: a folder, one inside an installed package, a hub id, a factory, a module."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from onnxpress.errors import SourceError
from onnxpress.stopping import end_if_told

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "README.md"]
_WANTED_FILES += ["LICENSE*", "LICENCE*", "COPYING*", "NOTICE*"]
_UNWANTED_FILES = ["onnx/*", "openvino/*", "*checkpoint-*"]
_UNWANTED_FILES += ["original/*", "consolidated*"]  # the weights once more, in forms of their makers


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """A folder with config.json and safetensors weights."""

    name: str
    folder: Path


@dataclass(frozen=True, kw_only=True)
class ModuleSource:
    """A module with example inputs: a tuple (in the order of forward's parameters) or a dict by parameter name.

    dynamic_axes names the axes that may vary, {input: {axis: name}}; None leaves that to be found out.
    """

    name: str
    module: torch.nn.Module
    example: tuple[torch.Tensor, ...] | Mapping[str, torch.Tensor]
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = field(default=None)


def resolve(
    source: object,
    *,
    revision: str | None = None,
    example_inputs: object = None,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
) -> FolderSource | ModuleSource:
    """Find a model. Raises SourceError."""
    if isinstance(source, torch.nn.Module):
        if example_inputs is None:
            raise SourceError(
                f"A {type(source).__name__} was given without example inputs. Give example_inputs too: a tuple of "
                f"tensors, or a dict by parameter name."
            )
        return _module((source, example_inputs, dynamic_axes), name=type(source).__name__)
    if example_inputs is not None or dynamic_axes is not None:
        raise SourceError("example_inputs and dynamic_axes go with a torch.nn.Module, not with a model that is named.")
    if isinstance(source, Path):
        _refuse_revision(source, revision)
        return _folder(source, name=_name(source))
    if not isinstance(source, str):
        raise SourceError(
            f"A {type(source).__name__} was given as model; give a folder, a hub id, 'package.module:factory', or "
            f"a torch.nn.Module."
        )
    if source.startswith("package:"):
        folder = _package_folder(source.removeprefix("package:"))
        _refuse_revision(source, revision)
        return _folder(folder, name=folder.name)
    path = Path(source).expanduser()
    if path.exists():
        _refuse_revision(source, revision)
        return _folder(path, name=_name(path))
    if is_factory(source):
        return _module(_call(source), name=source.rpartition(":")[2])
    if _HUB_ID.fullmatch(source) and ".." not in source:
        return _folder(_download(source, revision), name=source.rpartition("/")[2])
    raise SourceError(f"There is no folder {source}, and it is not a hub id either. Check the path.")


def _name(folder: Path) -> str:
    """A folder's; of one in the hub's cache (models--OWNER--NAME/snapshots/REVISION), the model's."""
    resolved = folder.resolve()
    kept = resolved.parent.parent.name if resolved.parent.name == "snapshots" else ""
    return kept.rpartition("--")[2] if kept.startswith("models--") else resolved.name


def is_factory(source: str) -> bool:
    """Whether a source is the name of a function that makes the model: finding it runs code."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", source) is not None and not Path(source).exists()


def stays_inside(path: Path, folder: Path) -> bool:
    """Whether a file of a model folder is in it, or a link into the hub's cache: others' files are not copied into artifacts."""
    home = folder.resolve()
    return any(path.resolve().is_relative_to(root) for root in (home, home.parent.parent / "blobs"))


def _refuse_revision(source: object, revision: str | None) -> None:
    if revision is not None:
        raise SourceError(
            f"The revision {revision!r} was asked for; {source} is here as it is: revisions are of hub ids."
        )


def _folder(folder: Path, *, name: str) -> FolderSource:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise SourceError(f"{folder} {what}; give the folder of a model, the one with config.json in it.")
    if not (folder / "config.json").is_file():
        raise SourceError(
            f"{folder} has no config.json, so it is not the folder of a transformers model. Models are saved with "
            f"model.save_pretrained(folder)."
        )
    if not any(folder.glob("*.safetensors")):
        pickled = [
            path.name
            for pattern in ("*model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt")
            for path in sorted(folder.glob(pattern))
        ]
        if pickled:
            raise SourceError(
                f"The weights in {folder} are pickled ({pickled[0]}), and reading a pickle runs code from it. "
                f"onnxpress reads safetensors only: load the model in transformers, if you trust it, and convert it to "
                f"safetensors with model.save_pretrained(folder)."
            )
        raise SourceError(
            f"{folder} has no weights: no file there ends in .safetensors, and pickled ones (.bin, .pt) are not read. Download the model again, or "
            f"another revision of it."
        )
    return FolderSource(name=name, folder=folder)


def _package_folder(name: str) -> Path:
    """NAME/FOLDER: a folder inside an installed Python package, which is found but not imported."""
    package, _, inside = name.partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise SourceError(
            f"package:{name} names a folder of the Python package {package!r}, which is not installed: pip install it."
        )
    return Path(found.submodule_search_locations[0]) / inside


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # only here: most builds need no hub

    try:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=_WANTED_FILES, ignore_patterns=_UNWANTED_FILES)
        )
    except Exception as error:  # the hub's client, its HTTP library and the disk each have errors of their own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SourceError(
            f"{hub_id} is no folder here, and could not be had from the hub: {reason}. Check the spelling and the "
            f"network, or download the model and give its folder."
        ) from error


def _call(source: str) -> object:
    package, _, factory = source.partition(":")
    here = os.getcwd()  # noqa: PTH109  sys.path holds strings
    added = here not in sys.path
    if added:  # console scripts, other than `python -m`, do not look for modules in the current folder
        sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(package), factory)()
    except SystemExit as error:
        end_if_told()
        raise SourceError(
            f"{source} could not be called: {package} ends the program (exit code {error.code}). Where it is a script that reads its own "
            'command line or trains, put that under `if __name__ == "__main__":`.'
        ) from error
    except Exception as error:  # whatever the user's own code raises
        raise SourceError(
            f"{source} could not be called: {type(error).__name__}: {error}. Give package.module:factory, where "
            f"factory() returns (module, example_inputs)."
        ) from error
    finally:
        if added:
            sys.path.remove(here)


def _module(given: Any, *, name: str) -> ModuleSource:
    parts = tuple(given) if isinstance(given, tuple) else ()
    expected = "(module, example_inputs) or (module, example_inputs, dynamic_axes)"
    if len(parts) not in (2, 3) or not isinstance(parts[0], torch.nn.Module):
        raise SourceError(f"{name} gives {type(given).__name__}; onnxpress takes {expected}.")
    module, example = parts[0], parts[1]
    if isinstance(example, torch.Tensor):
        example = (example,)
    tensors = list(example.values()) if isinstance(example, Mapping) else list(example)
    if not tensors or not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise SourceError(
            f"The example inputs of {name} are not all tensors; give a tuple of tensors or a dict by name."
        )
    return ModuleSource(
        name=name,
        module=module,
        example=dict(example) if isinstance(example, Mapping) else tuple(example),
        dynamic_axes=parts[2] if len(parts) == 3 else None,
    )
