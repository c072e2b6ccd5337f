"""vLLM itself: `alignkit serve`, what a server answers, and runs that sample by one.

Needs the program `vllm` in the environment variable ALIGNKIT_VLLM; scripts/vllm-cpu makes an environment with it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import alignkit
from alignkit.errors import RolloutError
from alignkit.rollout.sampler import Request, Setup
from alignkit.rollout.sync import Sync
from alignkit.rollout.vllm import Vllm
from alignkit.rollout_settings import Rollout, Sampling
from alignkit.runs.folder import read_metrics
from alignkit.testing import SamplerConformance
from helpers import free_port, make_rows, write_tiny

pytestmark = pytest.mark.slow
PROGRAM = os.environ.get("ALIGNKIT_VLLM", "")
PROMPTS = [[5, 6, 7, 8], [(7 * i) % 290 + 5 for i in range(300)]]
BASE = {"seed": 5, "logprobs": 0, "return_token_ids": True, "ignore_eos": True, "stop_token_ids": [0], "max_tokens": 30}


class Served:
    """A started `alignkit serve`. given: the setting `rollout` that it printed."""

    def __init__(self, folder: Path) -> None:
        model = folder / "model"
        sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
        write_tiny(model, max_position_embeddings=1024, **sizes)
        port = free_port()
        run = {"method": "grpo", "model": str(model), "data": "-", "reward": "numeric", "lora": 8}
        (folder / "run.yaml").write_text(yaml.safe_dump({**run, "max_prompt_tokens": 440}))
        command = ["serve", str(folder / "run.yaml"), "--port", str(port), "--set", "sampling={max_new_tokens: 60}"]
        quiet = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        quiet["VLLM_CPU_KVCACHE_SPACE"] = "1"
        self.model, self.url, self.folder = str(model), f"http://127.0.0.1:{port}", folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "alignkit", *command, "--logs", str(folder / "logs")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | quiet,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.given = yaml.safe_load(line)["rollout"]

    def ask(self, **body: Any) -> Any:
        sent = {"model": self.model, "prompt": PROMPTS[0], **BASE, **body}
        reply = httpx2.post(f"{self.url}/v1/completions", json=sent, timeout=120)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"]

    def begin_anew(self) -> None:
        """Load the weights that the server started with."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": self.model}}
        assert httpx2.post(f"{self.url}/collective_rpc", json=body, timeout=60).status_code == 200
        assert httpx2.post(f"{self.url}/reset_prefix_cache", json={}, timeout=60).json() == {"success": True}

    def sampler(self, model: Any, **settings: Any) -> Vllm:
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        return Vllm(Setup(model, tokenizer, [0], Rollout(**self.given, **settings), self.folder / "run"))

    def group(self) -> list[int]:
        """The processes of the server."""
        every = subprocess.run(
            ["pgrep", "-f", "--", f"--port {self.url.rsplit(':', 1)[1]}"], capture_output=True, text=True
        )
        return [int(pid) for pid in every.stdout.split() if int(pid) != self.process.pid]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    if not Path(PROGRAM).is_file():
        pytest.skip("needs vLLM: set ALIGNKIT_VLLM to its program, which scripts/vllm-cpu installs")
    one = Served(tmp_path_factory.mktemp("vllm"))
    try:
        yield one
    finally:
        one.process.send_signal(signal.SIGTERM)
        one.process.wait(60)


@pytest.fixture
def fresh(served: Served) -> Served:
    served.begin_anew()
    return served


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def moved(model: Any, by: float) -> Any:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * by)
    return model


def off(model: Any, sampler: Vllm, how: Sampling, n: int = 4) -> float:
    """The largest difference of the server's log-probabilities from the trainer's at that temperature, in nats."""
    asked = Request(PROMPTS, how, n=n, seed=3, numbers=(0, 1))
    worst = 0.0
    for prompt, made in zip(PROMPTS, sampler.sample(asked), strict=True):
        assert len(made) == n
        for one in made:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + one.tokens])).logits[0].double()
            ours = (logits / how.temperature).log_softmax(-1)
            for i, (token, logp) in enumerate(zip(one.tokens, one.logps or [], strict=True)):
                worst = max(worst, abs(float(ours[len(prompt) + i - 1, token]) - logp))
    return worst


def test_serve_prints_the_setting_of_the_run(served: Served) -> None:
    assert served.given == {"backend": "vllm", "urls": [served.url]}
    (about,) = httpx2.get(f"{served.url}/v1/models").json()["data"]
    assert about["max_model_len"] == 500


def test_completions_of_one_request_have_seeds_that_follow(fresh: Served) -> None:
    together = [choice["token_ids"] for choice in fresh.ask(n=3)]
    assert together == [fresh.ask(seed=5 + i)[0]["token_ids"] for i in range(3)]
    assert len({tuple(t) for t in together}) == 3


def test_what_ends_a_completion_is_among_its_tokens(fresh: Served) -> None:
    (likely,) = fresh.ask(logit_bias={"0": 6.0})
    assert likely["finish_reason"] == "stop"
    assert likely["token_ids"].index(0) == len(likely["token_ids"]) - 1
    (late,) = fresh.ask(logit_bias={"0": 6.0}, min_tokens=12)
    assert late["token_ids"].index(0) >= 12
    tokenizer = AutoTokenizer.from_pretrained(fresh.model)
    (stopped,) = fresh.ask(stop=["e", "a", "s"], max_tokens=60)
    assert stopped["finish_reason"] == "stop"
    assert re.search("[eas]", tokenizer.decode(stopped["token_ids"]))
    assert not re.search("[eas]", tokenizer.decode(stopped["token_ids"][:-1]))
    # where stop strings and min_tokens meet, alignkit cuts itself: vLLM would go on
    at_once = len(stopped["token_ids"])
    (on,) = fresh.ask(stop=["e", "a", "s"], max_tokens=60, min_tokens=at_once + 1)
    assert len(on["token_ids"]) > at_once


def test_what_does_not_fit_is_cut_without_an_error(fresh: Served) -> None:
    """So that alignkit checks the lengths itself."""
    (choice,) = fresh.ask(prompt=[5] * 495, stop_token_ids=[])
    assert (len(choice["token_ids"]), choice["finish_reason"]) == (5, "length")


def test_more_prompts_than_one_pass_reads_do_not_end_the_server(fresh: Served) -> None:
    """vLLM 0.32 on a CPU dies of a prompt that it reads in parts, where the request has a seed."""
    model = load(fresh.model)
    sampler = fresh.sampler(model)
    sampler.update(0, model)
    prompts = [[(i * k) % 290 + 5 for k in range(430)] for i in range(1, 13)]  # 5160 tokens, and 2048 in a pass
    made = sampler.sample(Request(prompts, Sampling(max_new_tokens=4), n=2, seed=1, numbers=range(12)))
    assert [len(some) for some in made] == [2] * 12
    assert httpx2.get(f"{fresh.url}/health").status_code == 200
    sampler.close()


def test_whole_weights_are_in_force_after_each_update(fresh: Served) -> None:
    torch.manual_seed(0)
    model = load(fresh.model)
    sampler = fresh.sampler(model)
    for version in range(3):
        sampler.update(version, moved(model, 0.05))
        assert off(model, sampler, Sampling(max_new_tokens=20)) < 0.01  # both in float32
    assert sampler.processed
    assert off(model, sampler, Sampling(max_new_tokens=20, temperature=0.5)) < 0.01
    asked = Request(PROMPTS, Sampling(max_new_tokens=8, top_k=1), n=1, seed=1, numbers=(0, 1))
    assert all(max(map(abs, made.logps or [9.0])) < 1e-5 for (made,) in sampler.sample(asked))
    sampler.close()


@pytest.mark.parametrize("way", ["adapter", "folder"])
def test_adapters_are_in_force_after_each_update(fresh: Served, way: Any) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(fresh.model), config)
    sampler = fresh.sampler(model, sync="auto" if way == "adapter" else way)
    assert sampler.sync.name == way
    for version in range(3):
        sampler.update(version, moved(model, 0.05))
        assert off(model, sampler, Sampling(max_new_tokens=20)) < 0.01
    names = [m["id"] for m in httpx2.get(f"{fresh.url}/v1/models").json()["data"]]
    assert len(names) == (2 if way == "adapter" else 1) or way == "folder"
    sampler.close()


def test_a_stale_prefix_cache_is_found(fresh: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = load(fresh.model)
    sampler = fresh.sampler(model)
    sampler.update(0, model)

    async def nothing(*_: Any) -> None:
        return

    monkeypatch.setattr(Sync, "_empty_cache", nothing)
    with pytest.raises(RolloutError, match="other weights in force than it was given"):
        sampler.update(1, moved(model, 0.1))
    monkeypatch.undo()
    sampler.update(1, model)
    assert off(model, sampler, Sampling(max_new_tokens=4)) < 0.01
    sampler.close()


def test_weights_of_a_strange_server_are_found(fresh: Served) -> None:
    """Another run sends its weights to the same server."""
    torch.manual_seed(0)
    model, other = load(fresh.model), moved(load(fresh.model), 0.1)
    one, two = fresh.sampler(model), fresh.sampler(other, sync_folder=fresh.folder / "other")
    one.update(0, model)
    two.update(0, other)
    assert off(model, one, Sampling(max_new_tokens=4)) < 0.01  # it is given them again
    for sampler in (one, two):
        sampler.close()


class TestVllmItself(SamplerConformance):
    """The suite of samplers with a real server, in float32."""

    tolerance = 0.01

    @pytest.fixture(autouse=True)
    def _served(self, fresh: Served) -> None:
        self.served = fresh

    def build(self, setup: Setup) -> Vllm:
        return Vllm(replace(setup, settings=Rollout(**self.served.given)))

    def model(self) -> Any:
        return load(self.served.model)

    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.served.model)

    def ends(self) -> list[int]:
        return [0]


def reds(completions: list[str], **_: Any) -> list[float]:
    return [text.count("red") - 0.01 * len(text) for text in completions]


def run_of(served: Served, folder: Path, **more: Any) -> Any:
    rows = [{"prompt": r["prompt"]} for r in make_rows("text", 12)]
    given = {"model": served.model, "output": folder, "cache_file": folder / "cache.sqlite", "data": rows}
    given |= {"batch_size": 4, "max_steps": 3, "learning_rate": 1e-3, "device": "cpu", "reward": reds, "group_size": 4}
    given |= {"sampling": {"max_new_tokens": 16}, "save_every": 1}
    return alignkit.run("grpo", **given | {"rollout": {**served.given, "retries": 1, "backoff": 0.1}} | more)


@pytest.mark.parametrize("lora", [None, 8])
def test_a_run_by_a_server(fresh: Served, tmp_path: Path, lora: int | None) -> None:
    folder = run_of(fresh, tmp_path, lora=lora).folder
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 3]
    said = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert len(said) == 3 * 4 * 4
    assert all(line["tokens"] == 16 or line["ended"] for line in said)


@pytest.mark.parametrize("lora", [None, 8])
def test_a_run_starts_and_ends_a_server_of_its_own(served: Served, tmp_path: Path, lora: int | None) -> None:
    own = {"backend": "vllm", "servers": 1, "program": PROGRAM}
    found = run_of(served, tmp_path, lora=lora, rollout=own, max_prompt_tokens=100)
    assert [line["step"] for line in read_metrics(found.folder)] == [1, 2, 3]
    assert all(line["rollout/kl"] < 0.01 for line in read_metrics(found.folder))
    (log,) = (found.folder / "servers").iterdir()
    port = int(log.stem.removeprefix("vllm-"))
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"http://127.0.0.1:{port}/health")


def test_a_server_that_is_killed_ends_the_run_with_a_checkpoint(served: Served, tmp_path: Path) -> None:
    """The last test: afterwards there is no server. `alignkit serve` ends with it, and says so."""
    served.begin_anew()
    calls: list[int] = []

    def killing(completions: list[str], **_: Any) -> list[float]:
        calls.append(len(completions))
        if len(calls) == 3:  # of two steps, and the one before the run
            for pid in served.group():
                os.kill(pid, signal.SIGKILL)
        return reds(completions)

    with pytest.raises(RolloutError, match=r"(?s)no vLLM server.*Stopped after step \d; continue with: alignkit run"):
        run_of(served, tmp_path, reward=killing, max_steps=4, name="run")
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    assert served.process.wait(60) == 2
    assert served.process.stderr is not None
    assert "ended with exit code" in served.process.stderr.read()
    time.sleep(0.5)
    assert served.group() == []
