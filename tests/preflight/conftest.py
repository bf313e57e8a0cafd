import sys
from pathlib import Path

for _folder in (Path(__file__).parent, Path(__file__).parents[1] / "methods"):
    sys.path.insert(0, str(_folder))
