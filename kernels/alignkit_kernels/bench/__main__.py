"""`python -m alignkit_kernels.bench`."""

import sys

from alignkit_kernels.bench.run import main

if __name__ == "__main__":
    sys.exit(main())
