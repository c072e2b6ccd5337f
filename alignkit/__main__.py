"""`python -m alignkit` is `alignkit`; this is what `torchrun -m alignkit` starts."""

from alignkit.cli.app import main

if __name__ == "__main__":
    main()
