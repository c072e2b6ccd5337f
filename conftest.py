"""Tests run tiny models: one thread is fastest, and several test processes on few cores do not spin on each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
