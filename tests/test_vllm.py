"""vLLM servers as a sampler, with a double of the server: what is asked, what is taken, and every kind of failure."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_data_parallel import torchrun
from transformers import AutoModelForCausalLM
from vllm_double import VllmDouble, vllm_double

import alignkit
from alignkit.errors import ConfigError, RolloutError
from alignkit.rewards.limits import GRACE, STOP
from alignkit.rollout.sampler import Request, Sampled, Setup
from alignkit.rollout.vllm import Vllm
from alignkit.rollout.vllm_requests import seed_of
from alignkit.rollout_settings import Rollout, Sampling
from alignkit.runs.folder import read_metrics
from alignkit.testing.world import EOS, tiny_model, tiny_tokenizer
from helpers import make_rows

TOKENIZER = tiny_tokenizer()
PROMPTS = [TOKENIZER(text)["input_ids"] for text in ("hello? what is there", "the fox. ", "a", "b?", "the ")]
ASKED = Request(PROMPTS, Sampling(max_new_tokens=6), n=3, seed=5, numbers=(0, 1, 2, 3, 4))
QUICK = {"retries": 3, "backoff": 0.02, "timeout": 60.0, "sync_timeout": 60.0}
Build = Callable[..., Vllm]


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    """Build samplers over doubles; close them afterwards."""
    with ExitStack() as stack:

        def made(*doubles: VllmDouble, model: Any = None, **settings: Any) -> Vllm:
            given = {"backend": "vllm", "urls": [d.url for d in doubles], **QUICK, **settings}
            model = tiny_model() if model is None else model
            sampler = Vllm(Setup(model, TOKENIZER, [EOS], Rollout(**given), tmp_path / "run"))
            stack.callback(sampler.close)
            return sampler

        yield made


@pytest.fixture
def double() -> Iterator[VllmDouble]:
    with vllm_double(tiny_model(), TOKENIZER) as one:
        yield one


@pytest.fixture
def pair() -> Iterator[list[VllmDouble]]:
    with vllm_double(tiny_model(), TOKENIZER) as one, vllm_double(tiny_model(), TOKENIZER) as two:
        yield [one, two]


def moved(model: Any, by: float = 0.3) -> Any:
    """Move the trained weights, as a step does."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * by)
    return model


def logps_of(model: Any, prompt: list[int], tokens: list[int]) -> list[float]:
    """Each token's log-probability, by a plain forward pass in float64."""
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        logps = exact(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0].log_softmax(-1)
    return [float(logps[len(prompt) + i - 1, token]) for i, token in enumerate(tokens)]


def assert_from(model: Any, made: list[list[Sampled]], asked: Request = ASKED) -> None:
    """All completions of a request are there, with the log-probabilities of this model, bare."""
    assert [len(some) for some in made] == [asked.n] * len(asked.prompts)
    for prompt, some in zip(asked.prompts, made, strict=True):
        for one in some:
            assert one.logps == pytest.approx(logps_of(model, list(prompt), one.tokens), abs=1e-3)
            assert one.ended == (one.tokens[-1] == EOS)
            assert one.ended or len(one.tokens) == asked.sampling.max_new_tokens


# ----------------------------------------------------------------------------------------------- what is asked


def test_completions_come_from_the_weights_of_each_version(build: Build, double: VllmDouble) -> None:
    model = tiny_model()
    sampler = build(double, model=model)
    before = None
    for version in (0, 1, 4):
        sampler.update(version, moved(model))
        assert sampler.version == version
        made = sampler.sample(ASKED)
        assert_from(model, made)
        assert made != before
        before = made
    assert sampler.sample(ASKED) == before  # the same request, the same randomness
    assert len(double.asked("/collective_rpc")) == 3
    assert len(double.asked("/reset_prefix_cache")) == 3


def test_a_request_says_everything_that_the_servers_defaults_could_change(build: Build, double: VllmDouble) -> None:
    sampler = build(double)
    sampler.update(0, tiny_model())
    how = Sampling(max_new_tokens=5, min_new_tokens=2, temperature=0.5, top_k=7, top_p=0.9, stop=list("vwxyz"))
    sampler.sample(Request(PROMPTS[:2], how, n=2, seed=11, numbers=(40, 41)))
    sampler.sample(Request(PROMPTS[:1], how, n=1, seed=11, numbers=(40,), greedy=True))
    first, second, greedy = double.asked("/v1/completions")[-3:]
    assert {first["seed"], second["seed"]} == {seed_of(11, 40), seed_of(11, 41)}
    assert abs(first["seed"] - second["seed"]) > 1000  # the completions of a prompt take the seeds that follow
    wanted = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_tokens": 2, "max_tokens": 5, "n": 2, "min_p": 0.0}
    wanted |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logprobs": 0}
    wanted |= {"ignore_eos": True, "stop_token_ids": [EOS], "stop": list("vwxy"), "skip_special_tokens": False}
    assert first.items() >= wanted.items()
    assert greedy.items() >= {"temperature": 0.0, "top_k": 0, "top_p": 1.0}.items()


def test_seeds_of_prompts_are_far_apart_and_in_range() -> None:
    seeds = sorted(seed_of(seed, number) for seed in (0, 5, 2**63 - 1) for number in range(300))
    assert seeds[0] >= 0
    assert seeds[-1] < 2**61
    assert min(b - a for a, b in itertools.pairwise(seeds)) >= 2**20


@pytest.mark.parametrize("least", [0, 4])
def test_stop_strings_end_a_completion_as_in_generate(build: Build, double: VllmDouble, least: int) -> None:
    """vLLM looks for none among the first min_tokens tokens, and for four at most."""
    sampler = build(double)
    sampler.update(0, tiny_model())
    stops = ["qq", "zz", "xx", "jj", "e", "a", " "]
    how = Sampling(max_new_tokens=12, min_new_tokens=least, stop=stops)
    made = [s for some in sampler.sample(Request(PROMPTS, how, n=4, seed=1, numbers=range(5))) for s in some]
    for one in made:
        text = TOKENIZER.decode(one.tokens)
        inside = TOKENIZER.decode(one.tokens[:-1])
        assert not any(s in inside for s in stops)
        assert one.ended == (any(s in text for s in stops) or one.tokens[-1] == EOS)
        assert len(one.logps or []) == len(one.tokens)
    assert any(len(one.tokens) < 4 for one in made if one.ended)
    assert sum(one.ended for one in made) > 5


@pytest.mark.parametrize("processed", [False, True])
def test_whether_log_probabilities_are_processed_is_found_out(
    build: Build, double: VllmDouble, processed: bool
) -> None:
    double.processed = processed
    sampler = build(double)
    sampler.update(0, tiny_model())
    assert sampler.processed is processed
    cold = Request(PROMPTS[:1], Sampling(max_new_tokens=3, temperature=0.5), seed=2, numbers=(0,))
    ((one,),) = sampler.sample(cold)
    plain = logps_of(tiny_model(), PROMPTS[0], one.tokens)
    assert (one.logps == pytest.approx(plain, abs=1e-3)) is not processed


def test_servers_of_different_kinds_are_refused(build: Build, pair: list[VllmDouble]) -> None:
    pair[1].processed = True
    with pytest.raises(RolloutError, match="log-probabilities of different kinds"):
        build(*pair).update(0, tiny_model())


def test_a_prompt_that_does_not_fit_is_an_error(build: Build, double: VllmDouble) -> None:
    """vLLM 0.32 would return a completion that is cut short."""
    sampler = build(double)
    sampler.update(0, tiny_model())
    with pytest.raises(RolloutError, match=r"251 tokens and max_new_tokens 6 are more than .* --max-model-len 256"):
        sampler.sample(Request([[5] * 251], Sampling(max_new_tokens=6), numbers=(0,)))


def test_the_work_is_shared(build: Build, pair: list[VllmDouble]) -> None:
    sampler = build(*pair, concurrency=1)
    sampler.update(0, tiny_model())
    many = Request(PROMPTS * 4, ASKED.sampling, seed=3, numbers=range(20))
    made = sampler.sample(many)
    assert_from(tiny_model(), made, many)
    shares = [sum(body["max_tokens"] == 6 for body in one.asked("/v1/completions")) for one in pair]
    assert sum(shares) == 20
    assert min(shares) >= 5


# -------------------------------------------------------------------------------------------------- weights


def test_an_adapter_is_sent_alone_where_the_server_takes_it(build: Build, caplog: Any) -> None:
    model = lora()
    with vllm_double(tiny_model(), TOKENIZER, lora=True) as double:
        sampler = build(double, model=model)
        for version in (0, 1):
            sampler.update(version, moved(model))
            assert_from(model, sampler.sample(ASKED))
        assert double.asked("/collective_rpc") == []
        assert len(double.adapters) == 1  # the one before is unloaded
        assert [b["lora_name"] for b in double.asked("/v1/unload_lora_adapter")] == [
            double.asked("/v1/load_lora_adapter")[0]["lora_name"]
        ]
        double.restart()  # it knows no adapter: it gets it again
        assert_from(model, sampler.sample(ASKED))


@pytest.mark.parametrize("adapter", [False, True])
def test_other_weights_of_the_same_number_of_steps_are_sent_too(build: Build, adapter: bool) -> None:
    """As where early stopping takes the best ones back."""
    model = lora() if adapter else tiny_model()
    with vllm_double(tiny_model(), TOKENIZER, lora=adapter) as double:
        sampler = build(double, model=model)
        sampler.update(3, model)
        sampler.version = None
        sampler.update(3, moved(model, 0.05))
        assert_from(model, sampler.sample(ASKED))


def test_an_adapter_that_no_server_takes_is_sent_merged(build: Build, caplog: Any) -> None:
    model = lora()
    with vllm_double(tiny_model(), TOKENIZER, lora=True) as double, caplog.at_level(logging.WARNING):
        double.faults.append("adapter refused*")
        sampler = build(double, model=model)
        before = {name: p.clone() for name, p in model.named_parameters()}
        sampler.update(0, model)
        assert "weights: through a folder, merged, because no server takes the adapter" in caplog.text
        assert_from(model, sampler.sample(ASKED))
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "lora_only"}])
def test_merged_weights_are_those_of_the_policy(build: Build, double: VllmDouble, more: dict[str, Any]) -> None:
    model = moved(lora(**more), 0.05)
    sampler = build(double, model=model, sync="folder")
    sampler.update(0, model)
    assert_from(model, sampler.sample(ASKED))


def lora(**more: Any) -> Any:
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **more)
    return moved(peft.get_peft_model(tiny_model(), config), 0.1)


def test_the_folder_is_whole_and_goes_when_it_is_not_needed(build: Build, double: VllmDouble, tmp_path: Path) -> None:
    place = tmp_path / "run" / "weights-for-servers"
    (place / "alignkit-of-a-killed-session-0").mkdir(parents=True)
    model = tiny_model()
    sampler = build(double, model=model)
    for version in range(3):
        sampler.update(version, moved(model))
        (folder,) = place.iterdir()
        assert folder.name.endswith(f"-{version}")
        assert torch.equal(load_file(folder / "model.safetensors")["lm_head.weight"], model.lm_head.weight)
        assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == model.config.vocab_size
    sampler.close()
    assert list(place.iterdir()) == []


def test_a_stale_prefix_cache_is_found(build: Build, double: VllmDouble) -> None:
    """vLLM 0.32 answers prompts that it has read from the cache of the old weights until `reset_prefix_cache`."""
    model = tiny_model()
    sampler = build(double, model=model)
    sampler.update(0, model)
    double.faults.append("reset lies*")
    with pytest.raises(RolloutError, match=r"has other weights in force than it was given.*stale prefix cache"):
        sampler.update(1, moved(model))
    assert sampler.version is None
    double.faults.clear()
    sampler.update(1, model)
    assert_from(model, sampler.sample(ASKED))


@pytest.mark.parametrize("by", [0.3, 0.01])
def test_weights_that_were_not_loaded_are_found(build: Build, double: VllmDouble, by: float) -> None:
    """Also after a small step, whose effect is less than the tolerance."""
    model = tiny_model()
    sampler = build(double, model=model)
    sampler.update(0, model)
    sampler._known._usual = 1e-4  # of a server in float32
    double.faults.append("reload lies")
    with pytest.raises(RolloutError, match=r"other weights in force.*nats from those before the last update"):
        sampler.update(1, moved(model, by))


def test_a_cache_in_use_is_reset_again(build: Build, double: VllmDouble) -> None:
    double.faults += ["reset refused"] * 2
    sampler = build(double)
    sampler.update(0, tiny_model())
    assert len(double.asked("/reset_prefix_cache")) == 3
    double.faults.append("reset refused*")
    with pytest.raises(RolloutError, match=r"no vLLM server could be given.*prefix cache could not be emptied within"):
        build(double, sync_timeout=0.3).update(0, tiny_model())


def test_a_server_that_takes_no_weights_is_refused_at_once(build: Build) -> None:
    with vllm_double(tiny_model(), TOKENIZER, dev=False) as double:
        with pytest.raises(ConfigError, match=r"cannot be given weights.*start the servers with `alignkit serve`"):
            build(double)


def test_a_server_that_returns_other_log_probabilities_than_before_is_named(build: Build, double: VllmDouble) -> None:
    """One that was restarted without its option would be corrected as if it had it."""
    sampler, model = build(double), tiny_model()
    sampler.update(0, model)
    double.processed = not double.processed
    with pytest.raises(RolloutError, match="log-probabilities of different kinds"):
        sampler.update(1, model)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")], ids=repr
)
def test_a_disk_that_is_full_is_an_error_with_the_way_out(
    build: Build, double: VllmDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    sampler, model = build(double), tiny_model()
    sampler.update(0, model)
    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(RolloutError, match=r"cannot be written to .*No space left.*set rollout.sync_folder"):
        sampler.update(1, model)
    assert list((tmp_path / "run" / "weights-for-servers").iterdir()) == []


# -------------------------------------------------------------------------------------------------- failures

ONCE = ["500", "drop", "fewer", "no logprobs", "mixed up", "restart before", "restart after"]


@pytest.mark.parametrize("fault", ONCE)
def test_one_server_that_fails_once_is_asked_again(build: Build, double: VllmDouble, fault: str) -> None:
    model = tiny_model()
    sampler = build(double, model=model)
    sampler.update(3, moved(model))
    want = sampler.sample(ASKED)
    double.faults.append(fault)
    assert sampler.sample(ASKED) == want
    assert double.faults == []
    assert_from(model, want)


@pytest.mark.parametrize("fault", ["500*", "drop*", "fewer*", "no logprobs*", "hang*"])
def test_another_server_takes_over(build: Build, pair: list[VllmDouble], fault: str, caplog: Any) -> None:
    model = tiny_model()
    sampler = build(*pair, model=model, timeout=60.0)
    sampler.update(1, moved(model))
    if fault == "hang*":
        sampler.settings = sampler.settings.model_copy(update={"timeout": 3.0})
    pair[0].faults.append(fault)
    with caplog.at_level(logging.WARNING):
        assert_from(model, sampler.sample(ASKED))
    assert f"the vLLM server at {pair[0].url} failed" in caplog.text


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("500*", "status 500.*EngineCore encountered an issue"),
        ("drop*", "RemoteProtocolError"),
        ("fewer*", "2 completions came back, not 3"),
        ("no logprobs*", "a completion is incomplete"),
        ("hang*", r"no reply to /v1/completions within 0.2 s"),
        ("restart after*", "changed their weights while they sampled.*had other weights after its answers"),
    ],
)
def test_where_no_server_is_left_the_error_says_why(build: Build, double: VllmDouble, fault: str, says: str) -> None:
    sampler = build(double, timeout=60.0, retries=1)
    sampler.update(0, tiny_model())
    if fault == "hang*":
        sampler.settings = sampler.settings.model_copy(update={"timeout": 0.2})
    double.faults.append(fault)
    with pytest.raises(RolloutError, match=f"(?s){says}"):
        sampler.sample(ASKED)


@pytest.mark.parametrize("asks", ["other ranks", "a signal"])
@pytest.mark.parametrize("fault", ["hang*", "reload hangs*"])
def test_a_hanging_server_is_not_waited_for_longer_than_others_wait(
    build: Build, double: VllmDouble, fault: str, asks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = build(double)
    sampler.update(0, tiny_model())
    double.faults.append(fault)
    says = "5 s after a signal asked the run to stop"
    if asks == "a signal":
        monkeypatch.setattr(STOP, "at", time.monotonic() - GRACE + 0.3)
    else:
        says = "after 0.3 s, and the other ranks wait no longer; lower rollout.timeout"
        monkeypatch.setattr(type(sampler.setup.ranks), "patience", 0.3)
    with pytest.raises(RolloutError, match=f"the vLLM servers had not answered {says}"):
        sampler.sample(ASKED) if fault == "hang*" else sampler.update(1, tiny_model())


def test_a_server_that_cannot_be_given_weights_is_left_out_and_comes_back(
    build: Build, pair: list[VllmDouble], caplog: Any
) -> None:
    model = tiny_model()
    sampler = build(*pair, model=model)
    pair[1].faults.append("reload fails")
    with caplog.at_level(logging.WARNING):
        sampler.update(0, moved(model))
        assert "could not be given the weights, and others go on" in caplog.text
        assert_from(model, sampler.sample(ASKED))  # the second one is given them when it is needed
    assert pair[1].version == pair[0].version
    pair[0].faults.append("reload hangs*")
    pair[1].faults.append("reload fails*")
    sampler.settings = sampler.settings.model_copy(update={"sync_timeout": 0.2})
    sampler.sync.seconds = 0.2
    with pytest.raises(RolloutError, match=r"(?s)no vLLM server could be given the weights.*within 0.2 s.*status 500"):
        sampler.update(1, moved(model))


def test_weights_are_sent_again_where_no_server_takes_them(build: Build, pair: list[VllmDouble], caplog: Any) -> None:
    """A network that was away for a moment, or a server that restarts."""
    model = tiny_model()
    sampler = build(*pair, model=model)
    for one in pair:
        one.faults += ["reload fails", "reload fails"]
    sampler.update(0, moved(model))
    assert_from(model, sampler.sample(ASKED))
    assert [len(one.asked("/collective_rpc")) for one in pair] == [3, 3]
    for one in pair:
        one.faults.append("reload fails*")
    with pytest.raises(RolloutError, match="no vLLM server could be given the weights"):
        sampler.update(1, moved(model))
    assert [len(one.asked("/collective_rpc")) for one in pair] == [3 + 4, 3 + 4]  # the first time and 3 retries


def test_a_url_of_nothing_is_an_error_that_says_what_to_type(build: Build, double: VllmDouble) -> None:
    url = double.url
    with pytest.raises(
        ConfigError,
        match=r"set rollout.servers: 1, and the run starts one, or .* `alignkit serve`",
    ):
        build()
    double.server.server_close()
    with pytest.raises(RolloutError, match=rf"{url} does not answer: .*Connect.*start it with `alignkit serve`"):
        build(double)


# ------------------------------------------------------------------------------------------------------ in a run


def reds(completions: list[str], **_: Any) -> list[float]:
    return [text.count("red") - 0.01 * len(text) for text in completions]


@pytest.fixture
def served(tiny: str, settings: dict[str, Any]) -> Iterator[tuple[VllmDouble, dict[str, Any]]]:
    """A double that serves the run's model, and settings of a run."""
    from transformers import AutoTokenizer

    rows = [{"prompt": r["prompt"]} for r in make_rows("text", 10)]
    with vllm_double(AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)) as double:
        rollout = {"backend": "vllm", "urls": [double.url], **QUICK}
        more = {"data": rows, "reward": reds, "group_size": 3, "max_steps": 4, "sampling": {"max_new_tokens": 6}}
        yield double, settings | more | {"rollout": rollout, "batch_size": 4}


def said(folder: Path, name: str = "completions.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_run_samples_by_a_server_and_resumes_after_its_death(
    served: tuple[VllmDouble, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    double, given = served
    monkeypatch.setenv("KEY_OF_THE_SERVER", "sk-very-secret")
    double.key = "sk-very-secret"
    given["rollout"]["key_env"] = "KEY_OF_THE_SERVER"
    whole = alignkit.run("grpo", **given, name="whole")
    assert [line["step"] for line in read_metrics(whole.folder)] == [1, 2, 3, 4]
    assert all(line["seconds/sync"] > 0 for line in read_metrics(whole.folder))
    real, steps = double.answer, []

    def dies(path: str, body: Any) -> Any:
        steps.append(path == "/collective_rpc" and body is not None)
        return (500, {"error": f"dead {double.key}"}) if sum(steps) > 2 else real(path, body)

    monkeypatch.setattr(double, "answer", dies)
    with pytest.raises(RolloutError, match=r"(?s)no vLLM server.*dead \[key\].*Stopped after step 2; continue with"):
        alignkit.run("grpo", **given, name="parts")
    monkeypatch.setattr(double, "answer", real)
    double.restart()
    parts = alignkit.run("grpo", **given, name="parts", resume=True)
    assert said(whole.folder) == said(parts.folder)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    for folder in (whole.folder, parts.folder):
        for file in folder.rglob("*"):
            assert not file.is_file() or b"sk-very-secret" not in file.read_bytes(), file
        assert not list((folder / "weights-for-servers").iterdir())


def test_the_best_weights_are_sent_before_they_are_evaluated(served: tuple[VllmDouble, dict[str, Any]]) -> None:
    """Early stopping loads other weights at the same number of steps."""
    double, given = served
    more = {"max_steps": 6, "eval_every": 1, "patience": 2, "eval_fraction": 0.3, "learning_rate": 0.5}
    folder = alignkit.run("grpo", **given | more).folder
    lines = [line for line in read_metrics(folder) if "eval/reward/mean" in line]
    best = max(lines[:-1], key=lambda line: line["eval/reward/mean"])
    assert lines[-1]["eval/reward/mean"] == pytest.approx(best["eval/reward/mean"])
    reloads = double.asked("/collective_rpc")
    assert len(reloads) == lines[-1]["step"] + 2  # steps 0 to the last, and the best weights again
    assert math.isfinite(lines[-1]["eval/reward/mean"])
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("dies", "fsdp"), [(False, False), (True, False), (False, True)])
def test_two_processes_share_the_servers_and_end_together(
    served: tuple[VllmDouble, dict[str, Any]], tmp_path: Path, dies: bool, fsdp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one sends the weights; each asks for its prompts. Where sending fails, both end with a checkpoint."""
    double, given = served
    real, reloads = double.answer, []

    def counted(path: str, body: Any) -> Any:
        reloads.extend([path] if path == "/collective_rpc" and body is not None else [])
        return (500, {"error": "dead"}) if dies and len(reloads) > 2 else real(path, body)

    monkeypatch.setattr(double, "answer", counted)
    rows = [{"prompt": r["prompt"], "answer": "7"} for r in make_rows("text", 8)]
    run = given | {
        "method": "grpo",
        "data": "rows.jsonl",
        "reward": "numeric",
        "name": "two",
        "max_steps": 4,
        "fsdp": fsdp,
    }
    run |= {"output": str(tmp_path / "runs"), "cache_file": str(tmp_path / "cache.sqlite")}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run["data"] = str(tmp_path / "rows.jsonl")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    done = torchrun(["run", str(tmp_path / "run.yaml")])
    folder = tmp_path / "runs" / "two"
    if dies:
        assert "no vLLM server could be given the weights" in done.stderr
        assert "rank 0: no vLLM server could be given the weights" in done.stderr  # as the other one says it
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
        return
    assert done.returncode == 0, done.stderr
    assert len(reloads) == 4
    prompts = [{line["prompt"] for line in lines} for lines in (said(folder), said(folder, "completions-1.jsonl"))]
    assert len(said(folder)) == len(said(folder, "completions-1.jsonl")) == 4 * 2 * 3
    assert all(prompts)
