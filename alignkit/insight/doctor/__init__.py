"""What this machine has, what of it is in use and why, and what is wrong with it: `alignkit doctor`.

parts.py         a part of what is found, guarded; what is private in it
software.py      versions, and whether libraries work
machine.py       processors, memory, GPUs
container.py     what a container leaves of them
computing.py     kernels and attention
installed.py     plugins
kept.py          the reference cache, disks
surroundings.py  environment variables, the terminal
examined.py      all of it, as text and as JSON
"""

from alignkit.insight.doctor.examined import Diagnosis, examine
from alignkit.insight.doctor.parts import Asked

__all__ = ["Asked", "Diagnosis", "examine"]
