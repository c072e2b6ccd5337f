"""Settings of sampling that contradict each other are refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from alignkit.config import validated
from alignkit.errors import ConfigError
from alignkit.rollout_settings import Sampling


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"stop": [""]}, "stop: an empty text would end every completion at once"),
        ({"stop": ["END", ""]}, "stop: an empty text"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9 and max_new_tokens 8"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        validated(Sampling, given)


def test_completions_of_one_length_are_fine() -> None:
    assert validated(Sampling, {"min_new_tokens": 8, "max_new_tokens": 8, "stop": ["END"]}).min_new_tokens == 8
