import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for cases.py

# Triton is made for Linux; there its absence is an error. (A folder of the name triton, here on the
# search path, would be imported in its place.)
without_triton = sys.platform != "linux" and find_spec("triton") is None
collect_ignore = ["kernels"] if without_triton else []
