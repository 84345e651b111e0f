"""Make the recordings importable, whichever way pytest is called."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
