"""`alignkit demo`: a closed world, a small model that answers in two styles, and its alignment towards one of them."""

from alignkit.demo.show import run_demo

__all__ = ["run_demo"]
