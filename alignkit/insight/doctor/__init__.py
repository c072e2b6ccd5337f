"""`alignkit doctor`: what this machine has, which parts of it a run uses and why, and what is wrong with it.

probe.py      facts and troubles, without private data
versions.py   versions, against what alignkit and its plugins need
devices.py    processors, memory, GPUs
kernels.py    the kernels of each device
attention.py  the attention of a Llama
plugins.py    methods, rewards, judges, listeners
disks.py      free space and permissions
diagnosis.py  examine(): all of it, as text and as JSON
"""

from alignkit.insight.doctor.diagnosis import Diagnosis, examine

__all__ = ["Diagnosis", "examine"]
