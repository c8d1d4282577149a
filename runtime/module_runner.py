"""The runner of task "module": named arrays in, named arrays out."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxpress.manifest import Arrays, Runnable


class ModuleRunner:
    """Answers named arrays."""

    task = "module"

    def __init__(self, session: Runnable) -> None:
        self.session = session

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Answer one batch. Raises InputError where an input does not fit the signature."""
        return self.session.run(feeds)
