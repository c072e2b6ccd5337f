"""The saved model on the hub: `push_to_hub`."""

from __future__ import annotations

import logging
from pathlib import Path

from alignkit.errors import ConfigError, first_line

logger = logging.getLogger(__name__)


def check_upload(repository: str | None) -> None:
    """Raise ConfigError, before anything is trained, for a name that is no repository's, and without a token."""
    if repository is None:
        return
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"push_to_hub: {first_line(error)}; give a name such as 'my-name/my-model'") from None
    if get_token() is None:
        raise ConfigError("push_to_hub needs a token of the hub: run `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, repository: str) -> None:
    """Upload a model's folder; a new repository is private. A failure is a warning: the model is saved here."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        url = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Trained by alignkit")
    except Exception as error:  # its client raises errors of several libraries
        command = f"hf upload {repository} {folder}"
        logger.warning("the model could not be uploaded (%s); upload it by: %s", first_line(error), command)
        return
    logger.info("uploaded: %s", url)
