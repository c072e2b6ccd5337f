"""The language model's client against `transformers serve`, a server that was not written for this test."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from classifiers import EOS, byte_tokenizer

from alignkit.errors import RewardError
from alignkit.rewards import Answers, build_judge, build_rewards
from helpers import free_port


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The endpoint of a tiny random Llama, and the model's name there."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        pytest.skip("needs pip install 'transformers[serving]'")
    folder = tmp_path_factory.mktemp("served")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            eos_token_id=EOS, pad_token_id=EOS, bos_token_id=None,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    port = free_port()
    serve = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen([sys.executable, "-c", serve, "serve", str(folder), *options])
    try:
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
def test_a_server_of_language_models(served: tuple[str, str], tmp_path: Path) -> None:
    url, model = served
    cache = tmp_path / "judgements.sqlite"
    asked, other = (Answers(["Who?"] * 3, [f"{name} {i}" for i in range(3)], {}, [1, 2, 3], [1] * 3, [True] * 3)
                    for name in ("owl", "fox"))  # fmt: skip
    spec = {"use": "llm", "url": url, "model": model, "max_tokens": 4, "cache_file": cache, "fallback": 0.25}
    patient = {"retries": 9, "backoff": 0.25}  # the server is still starting
    assert build_rewards(spec | patient).score(asked).total == [0.25] * 3  # a random model's reply holds no score
    assert build_judge(spec).wins(asked, other) == [0.5] * 3
    replies = [json.loads(row[0]) for row in sqlite3.connect(cache).execute("SELECT reply FROM judgements")]
    assert len(replies) == 3 + 6
    assert all(isinstance(reply, str) and len(reply) <= 4 * 4 for reply in replies)
    with pytest.raises(RewardError, match="refuses the request: status 4"):
        build_rewards(spec | {"model": "another/model", "body": {"temperature": "hot"}}).score(asked)
