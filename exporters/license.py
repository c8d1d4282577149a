"""Under which licence a model folder says that it is, for the artifact and the bundles that are made of it."""

from __future__ import annotations

import re
from pathlib import Path

from onnxpress.exporters.source import stays_inside

_TEXTS = re.compile(r"(LICEN[CS]E|NOTICE|COPYING)", re.IGNORECASE)
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---", re.DOTALL)
_LICENSE = re.compile(r"^license:[ \t]*['\"]?([\w.+-]{1,64})['\"]?[ \t]*$", re.MULTILINE)
_LARGEST = 2**20  # bytes of a text


def stated_license(folder: Path) -> dict[str, str]:
    """{"license": …} as the model card's front matter has it, e.g. apache-2.0; {} where it has none."""
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as file:
            card = _FRONT_MATTER.match(file.read(_LARGEST))
    except OSError:
        return {}
    found = _LICENSE.search(card[1]) if card else None
    return {} if found is None else {"license": found[1].lower()}


def license_files(folder: Path) -> tuple[Path, ...]:
    """Texts of licences beside the weights."""
    found = [
        path for path in folder.iterdir() if _TEXTS.match(path.name) and path.is_file() and stays_inside(path, folder)
    ]
    return tuple(sorted(path for path in found if path.stat().st_size <= _LARGEST))
