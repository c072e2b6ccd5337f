"""The saved model on the hub: `push_to_hub`."""

from __future__ import annotations

import logging
from pathlib import Path

from alignkit.errors import ConfigError, ModelError, first_line

logger = logging.getLogger(__name__)


def check_upload(repository: str | None, what: str = "push_to_hub") -> None:
    """Raise ConfigError, before anything is trained, for a name that is no repository's, and without a token.

    what: the setting or the command that asks for it.
    """
    if repository is None:
        return
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"{what}: {first_line(error)}; give a name such as 'my-name/my-model'") from None
    if get_token() is None:
        raise ConfigError(f"{what} needs a token of the hub: run `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, repository: str) -> None:
    """Upload a model's folder; a new repository is private. A failure is a warning: the model is saved here."""
    try:
        url = send(folder, repository)
    except ModelError as error:
        logger.warning("%s", error)
        return
    logger.info("uploaded: %s", url)


def send(folder: Path, repository: str, private: bool = True) -> str:
    """Upload a model's folder and return the address of what was uploaded. private: of a repository that is new.

    Raises ModelError with the command that repeats it.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Trained by alignkit"))
    except Exception as error:  # its client raises errors of several libraries
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]  # the hub's own words come last
        command = f"hf upload {repository} {folder}"
        raise ModelError(f"the model could not be uploaded ({said}); upload it by: {command}") from error
