"""`python -m alignkit.compare JOB.json`: one method in its own process."""

import sys
from pathlib import Path

from alignkit.compare.worker import main

if __name__ == "__main__":
    main(Path(sys.argv[1]))
