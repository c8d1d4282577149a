import os
import sys
from pathlib import Path

import pytest

# pytest's importlib mode leaves sys.path alone; the helpers beside the tests are imported by name.
sys.path.insert(0, str(Path(__file__).parent))

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _quiet_transformers():
    """Saving tiny models draws progress bars and logs advice; neither is what is tested."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
