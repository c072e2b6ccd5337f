"""`alignkit push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """\b
Examples:
  alignkit push runs/dpo-001 my-name/my-model
  alignkit push runs/dpo-001 my-org/our-model --public"""


def push(
    run: Annotated[str, typer.Argument(help="A run's folder, or the folder of a model or an adapter")],
    repository: Annotated[str, typer.Argument(help="The hub's repository, such as my-name/my-model")],
    public: Annotated[bool, typer.Option("--public", help="A new repository is public, not private")] = False,
) -> None:
    """Upload a run's model with its card to the hub. A repository that exists gets a new commit."""
    from alignkit.errors import ConfigError
    from alignkit.insight.model_paths import model_folder
    from alignkit.runs.upload import check_upload, send

    folder = Path(model_folder(run)).expanduser()
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ConfigError(f"'{run}' holds no saved model; give the folder of a finished run, or of a model")
    check_upload(repository, "alignkit push")
    typer.echo(f"uploaded: {send(folder, repository, private=not public)}")
