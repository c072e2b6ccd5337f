"""`python -m alignkit.compare JOB.json`: one method in a process of its own."""

import sys
from pathlib import Path

from alignkit.compare.one import main

if __name__ == "__main__":
    main(Path(sys.argv[1]))
