import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a tiny model is made here or nowhere
sys.path.insert(0, str(Path(__file__).parent))  # for check.py and what it imports


@pytest.fixture(autouse=True)
def quiet():
    """Silence what transformers says about tiny configurations."""
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)
