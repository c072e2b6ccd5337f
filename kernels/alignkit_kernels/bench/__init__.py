"""The operations compared with eager PyTorch and rivals, in one run: `python -m alignkit_kernels.bench`.

A contender is checked against float64 first; a wrong one is not timed. Times are medians of rounds in which the
contenders take turns. Floors are FLOP or bytes divided by the rates of the device.
"""

from alignkit_kernels.bench.run import main

__all__ = ["main"]
