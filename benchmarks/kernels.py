"""The kernels compared with eager PyTorch, torch.compile, TRL, Liger and cut-cross-entropy, in one run.

    python benchmarks/kernels.py --json kernels.json --png kernels.png
    python benchmarks/kernels.py --tiny              tiny shapes, in seconds: does everything run?

Large shapes in bfloat16 on a GPU, small ones in float32 on a CPU; `--help` lists the options. The same as
`alignkit bench kernels` and `python -m alignkit_kernels.bench`.
"""

import sys

from alignkit_kernels.bench import main

if __name__ == "__main__":
    sys.exit(main())
