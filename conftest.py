"""Tests run tiny models: one thread is fastest, and several test processes on few cores do not spin on each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch, whose threads read it once
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined; eager stays the choice on a CPU
