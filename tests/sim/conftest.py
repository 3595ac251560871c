import sys
from pathlib import Path

# Worker processes import the tasks of the tests by name, along the path that they inherit.
sys.path.insert(0, str(Path(__file__).parent))
