"""How weights get to servers: which way is chosen and why, and vLLM's own transfer with a double of its package."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_vllm import ASKED, assert_from, moved
from vllm_double import vllm_double

from alignkit.errors import ConfigError, RolloutError
from alignkit.rollout.sampler import Setup
from alignkit.rollout.sync import ROUTES, choose
from alignkit.rollout.transfer import TransferSync, why_no_transfer
from alignkit.rollout.vllm import Vllm
from alignkit.rollout_settings import Rollout
from alignkit.testing.world import EOS, tiny_model, tiny_tokenizer

ALL = frozenset(ROUTES)
NO_LORA = ALL - {"/v1/load_lora_adapter"}
NO_DEV = frozenset({"/v1/load_lora_adapter"})


@pytest.mark.parametrize(
    ("wanted", "routes", "no_adapter", "no_transfer", "way", "why"),
    [
        ("auto", ALL, None, "no GPU", "adapter", "the adapter alone"),
        ("auto", ALL, None, "", "adapter", "the adapter alone"),
        ("auto", NO_DEV, None, "no GPU", "adapter", "the adapter alone"),
        ("auto", NO_LORA, None, "no GPU", "folder", "no GPU; a server does not load adapters at run time"),
        ("auto", ALL, "the run has no adapter", "no GPU", "folder", "no GPU; the run has no adapter"),
        ("auto", ALL, "the run has no adapter", "", "nccl", "by vLLM's own transfer between GPUs"),
        ("folder", ALL, None, "", "folder", "as `rollout.sync` says"),
        ("ipc", ALL, None, "", "ipc", "as `rollout.sync` says"),
    ],
)
def test_the_way_is_what_both_sides_have(
    wanted: str, routes: frozenset[str], no_adapter: str | None, no_transfer: str, way: str, why: str
) -> None:
    chosen, said = choose(wanted, routes, no_adapter, no_transfer)
    assert chosen == way
    assert why in said


@pytest.mark.parametrize(
    ("wanted", "routes", "no_adapter", "no_transfer", "says"),
    [
        ("nccl", ALL, None, "the policy is on a cpu", "sync: nccl cannot be used: the policy is on a cpu"),
        ("ipc", NO_DEV, None, "", "sync: ipc cannot be used: start the servers with `alignkit serve`"),
        ("adapter", ALL, "vLLM does not serve DoRA", "x", "adapter cannot be used: vLLM does not serve DoRA"),
        ("adapter", NO_LORA, None, "x", "adapter cannot be used: a server does not load adapters at run time"),
        ("folder", NO_DEV, None, "x", "cannot be given weights: it lacks /collective_rpc"),
    ],
)
def test_what_is_not_possible_is_refused_with_the_reason(
    wanted: str, routes: frozenset[str], no_adapter: str | None, no_transfer: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        choose(wanted, routes, no_adapter, no_transfer)


def test_without_a_gpu_or_without_vllm_there_is_no_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the policy is on a cpu" in why_no_transfer(torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alignkit.rollout.transfer.find_spec", lambda name: None)
        assert "this Python has no vLLM" in why_no_transfer(torch.device("cuda"))
    monkeypatch.setattr("alignkit.rollout.transfer.find_spec", lambda name: object())
    assert "this Python's vLLM cannot be imported" in why_no_transfer(torch.device("cuda"))


class Engine:
    """In the place of vLLM's trainer-side engine: it hands the source's weights to the doubles themselves."""

    doubles: list[Any] = []
    infos: list[Any] = []

    def __init__(self, info: Any, client: Any, source: Any) -> None:
        self.info, self.client, self.source = info, client, source
        Engine.infos.append(info)
        client.init_weight_transfer_engine({"rank_offset": 1, "world_size": info.world_size})

    def send_weights(self) -> None:
        about = [(m.name, m.dtype, m.shape) for m in self.source.metadata()]
        sent = dict(self.source)
        assert about == [(n, w.dtype, tuple(w.shape)) for n, w in sent.items()]
        self.client.start_weight_update()
        self.client.update_weights({"names": list(sent)})
        for double in self.doubles:
            double.model.load_state_dict(sent, strict=False)
        self.client.finish_weight_update()


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with the names of vllm.distributed.weight_transfer that are used."""
    parts: dict[str, dict[str, Any]] = {
        "factory": {"WeightTransferTrainerFactory": SimpleNamespace(trainer_init=Engine)},
        "base": {"ParamMeta": lambda name, dtype, shape: SimpleNamespace(name=name, dtype=dtype, shape=shape)},
        "nccl_engine": {"NCCLTrainerInitInfo": SimpleNamespace},
        "clients": {"_json_safe_update_payload": lambda info: info},
    }
    for name in ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, values in parts.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, f"vllm.distributed.weight_transfer.{name}", module)


def test_the_transfer_reaches_all_servers_with_their_own_numbers(fake_vllm: None, tmp_path: Path) -> None:
    """The handshake and the versions, with vLLM's engine replaced; NCCL itself needs GPUs."""
    calls = ["/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"]
    with vllm_double(tiny_model(), tiny_tokenizer()) as one, vllm_double(tiny_model(), tiny_tokenizer()) as two:
        for double, size in ((one, 2), (two, 3)):
            double.more = {**{path: {} for path in calls}, "/get_world_size": {"world_size": size}}
        Engine.doubles, Engine.infos, model = [one, two], [], tiny_model()
        given = Rollout(backend="vllm", urls=[one.url, two.url], sync="folder", retries=0)
        setup = Setup(model, tiny_tokenizer(), [EOS], given, tmp_path)
        sampler = Vllm(setup)
        sampler.sync = TransferSync(tmp_path, 5.0, "nccl", setup, sampler.servers)
        for version in (0, 1):
            sampler.update(version, moved(model))
            assert_from(model, sampler.sample(ASKED))
        assert [info.world_size for info in Engine.infos] == [1 + 2 + 3]  # the group is made once
        offsets = [double.asked(calls[0])[0]["init_info"]["rank_offset"] for double in (one, two)]
        assert offsets == [1, 3]
        assert one.asked("/collective_rpc") == []
        two.more.pop("/update_weights")
        with pytest.raises(RolloutError, match="the weights could not be sent by nccl: HTTPStatusError"):
            sampler.update(2, model)
        sampler.close()
