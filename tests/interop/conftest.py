"""The daemon of the end-to-end tests, for tests against other people's programs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
