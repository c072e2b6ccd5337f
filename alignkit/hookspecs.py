"""What a plugin can hook into. A plugin is a module named by an entry point in the group `alignkit`:

    [project.entry-points.alignkit]
    mine = "my_module"              # the entry point's name is the method's name

and the module implements the hooks below with `alignkit.hookimpl`.
"""

from __future__ import annotations

from typing import Any

import pluggy

hookspec = pluggy.HookspecMarker("alignkit")
hookimpl = pluggy.HookimplMarker("alignkit")


@hookspec
def register_methods() -> list[type[Any]]:  # type: ignore[empty-body]
    """Return the method classes (`alignkit.Method`) that this module brings."""
