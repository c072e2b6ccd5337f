"""What this machine has, what of it a run uses and why, and what is wrong with it: `alignkit doctor`.

probe.py      what a probe finds; what is private in it
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
