"""`python -m alignkit`, which launchers such as torchrun need."""

from alignkit.cli import main

main()
