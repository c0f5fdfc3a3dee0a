"""Makes `fits` importable: the small trainings that these tests share, also with scripts run by other processes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
