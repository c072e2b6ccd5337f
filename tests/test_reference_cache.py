"""The reference cache: keyed by meaning, safe for several processes, whole after damage and death."""

from __future__ import annotations

import copy
import os
import sqlite3
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from alignkit.errors import CacheError
from alignkit.reference import keys
from alignkit.reference.cache import LogpCache, default_path
from alignkit.reference.keys import cached_logps, fill, fingerprint, key
from alignkit.types import Completion, Example

REFERENCE = "f" * 64


def example(prompt: list[int], *completions: list[int], trained: list[bool] | None = None) -> Example:
    mask = None if trained is None else torch.tensor(trained)
    parts = tuple(Completion(torch.tensor(c, dtype=torch.int32), mask) for c in completions)
    return Example(torch.tensor(prompt, dtype=torch.int32), parts)


def some_examples(n: int, start: int = 0) -> list[Example]:
    """Pairs of lengths that differ, every one with tokens of its own."""
    made = []
    for i in range(start, start + n):
        length = 1 + (7 * i) % 13
        made.append(example([i, 1], [i] * length, [i, 9] + [3] * (i % 5)))
    return made


class Scorer:
    """Scores each token by its id and place, and remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[list[Example]] = []

    def __call__(self, examples: list[Example]) -> Tensor:
        self.calls.append(list(examples))
        return torch.cat([truth(e) for e in examples])

    @property
    def n_examples(self) -> int:
        return sum(map(len, self.calls))


def truth(e: Example) -> Tensor:
    return torch.cat(
        [-(c.tokens + e.prompt[0] / 7 + torch.arange(len(c.tokens)) / 3)[c.trained_at] for c in e.completions]
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some" / "folder" / "cache.sqlite"


@pytest.fixture
def cache(path: Path):
    with LogpCache(path) as opened:
        yield opened


# The meaning of a value


def test_a_key_tells_apart_what_differs():
    def k(reference: str = REFERENCE, prompt=(1, 2), completion=(3, 4), at=(0, 1)) -> bytes:
        return key(reference, *(torch.tensor(x, dtype=torch.int64) for x in (prompt, completion, at)))

    keys = [
        k(),
        k(reference="e" * 64),
        k(prompt=(1,), completion=(2, 3, 4)),
        k(prompt=(1, 2, 3), completion=(4,)),
        k(prompt=(2, 1)),
        k(completion=(3, 5)),
        k(at=(0,)),
        k(at=(1,)),
        k(completion=(3, 4, 0), at=(1,)),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(one) == 32 for one in keys)
    assert k() == key(REFERENCE, *(torch.tensor(x, dtype=torch.int32) for x in ((1, 2), (3, 4), (0, 1))))


def net() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4, bias=False))
    return made.eval()


def print_of(model: nn.Module, **more: object) -> str:
    return fingerprint(model, **({"dtype": torch.float32} | more))


def test_the_same_model_has_the_same_fingerprint():
    assert print_of(net()) == print_of(copy.deepcopy(net()).requires_grad_(False).train())
    assert len(print_of(net())) == 64


def changed_weight(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model[2].weight[3, 5] = torch.nextafter(model[2].weight[3, 5], torch.tensor(9.0))
    return model


def changed_buffer(model: nn.Module) -> nn.Module:
    model[1].running_mean[2] += 1
    return model


def changed_name(model: nn.Module) -> nn.Module:
    return nn.Sequential(*model, nn.Identity()).append(model.pop(2))


@pytest.mark.parametrize(
    ("change", "settings_"),
    [
        (changed_weight, {}),
        (changed_buffer, {}),
        (changed_name, {}),
        (lambda m: m.bfloat16(), {}),
        (lambda m: m, {"quantisation": "int8"}),
        (lambda m: m, {"dtype": torch.bfloat16}),
        (lambda m: m, {"transforms": {"temperature": 0.7}}),
    ],
)
def test_what_changes_the_values_changes_the_fingerprint(change, settings_):
    assert print_of(change(net()), **settings_) != print_of(net())


def test_shape_is_part_of_the_fingerprint():
    flat, square = nn.Module(), nn.Module()
    flat.w, square.w = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2, 2))
    assert print_of(flat) != print_of(square)


def tiny_llama(**more: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **more))


def test_configuration_counts_where_it_changes_values():
    base = print_of(tiny_llama())
    assert print_of(tiny_llama(rms_norm_eps=1e-3)) != base
    other = tiny_llama(use_cache=False, attention_dropout=0.5)
    other.config.pad_token_id = 3
    assert print_of(other) == base


def test_a_saved_and_loaded_model_keeps_its_fingerprint(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert print_of(type(model).from_pretrained(tmp_path)) == print_of(model)
    assert print_of(type(model).from_pretrained(tmp_path, attn_implementation="eager")) == print_of(model)


def with_adapter(alpha: int = 8, save_head: bool = False) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=alpha,
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        init_lora_weights=False,
        modules_to_save=["lm_head"] if save_head else None,
    )
    return peft.get_peft_model(tiny_llama(), config)


@pytest.mark.parametrize("save_head", [False, True])
def test_a_base_under_switched_off_adapters_is_the_base(save_head):
    base, wrapped = print_of(tiny_llama()), with_adapter(save_head=save_head)
    assert print_of(wrapped, adapters=False) == base
    assert print_of(wrapped) != base
    with wrapped.disable_adapter():
        assert print_of(wrapped) == base
    with torch.no_grad():
        wrapped.get_submodule("base_model.model.model.layers.1.mlp.down_proj.base_layer").weight[0, 0] += 1
    assert print_of(wrapped, adapters=False) != base


def test_an_adapter_is_part_of_the_fingerprint():
    one, other, scaled = with_adapter(), with_adapter(), with_adapter(alpha=16)
    assert print_of(one) == print_of(other)
    assert print_of(scaled) != print_of(one)
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "lora_B" in n)[0, 0] += 1e-3
    assert print_of(other) != print_of(one)


def test_wrappers_do_not_count():
    model = net()
    assert print_of(torch.compile(model)) == print_of(model)


# The store

quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(
    items=st.dictionaries(
        st.binary(min_size=32, max_size=32), st.lists(st.floats(width=32, allow_nan=False), max_size=20), max_size=30
    )
)
def test_values_come_back_bit_for_bit(cache, items):
    tensors = {k: torch.tensor(v, dtype=torch.float32) for k, v in items.items()}
    cache.clear()
    cache.put(tensors, REFERENCE)
    back = cache.get(list(tensors))
    assert set(back) == set(tensors)
    assert all(torch.equal(back[k].view(torch.int32), v.view(torch.int32)) for k, v in tensors.items())
    assert all(v.dtype == torch.float32 for v in back.values())


def test_many_keys_at_once(cache):
    tensors = {i.to_bytes(32, "big"): torch.full((2,), float(i)) for i in range(3000)}
    cache.put(tensors, REFERENCE)
    back = cache.get([*tensors, *tensors, b"absent"])
    assert all(torch.equal(back[k], v) for k, v in tensors.items())
    assert (cache.hits, cache.misses) == (3000, 1)


def test_a_stored_value_stays(cache):
    cache.put({b"k": torch.ones(3)}, REFERENCE)
    cache.put({b"k": torch.zeros(3)}, REFERENCE)
    assert torch.equal(cache.get([b"k"])[b"k"], torch.ones(3))


def test_wal_mode_and_default_place(cache, path, monkeypatch, tmp_path):
    assert sqlite3.connect(path).execute("PRAGMA journal_mode").fetchone() == ("wal",)
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "here.sqlite"))
    assert default_path() == tmp_path / "here.sqlite"
    LogpCache().close()
    assert (tmp_path / "here.sqlite").exists()
    monkeypatch.delenv("ALIGNKIT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".cache/alignkit/reference.sqlite"


def test_info_and_clear(cache, path):
    cache.use("a" * 64, label="tiny, bfloat16")
    cache.put({b"1": torch.ones(3), b"2": torch.ones(2)}, "a" * 64)
    cache.put({b"3": torch.ones(5)}, "b" * 64)
    info = cache.info()
    assert (info["path"], info["entries"]) == (str(path), 3)
    assert info["bytes"] > 3 * 20
    by_name = {r["fingerprint"][0]: r for r in info["references"]}
    assert [by_name["a"][n] for n in ("label", "entries", "bytes")] == ["tiny, bfloat16", 2, 20]
    assert [by_name["b"][n] for n in ("label", "entries", "bytes")] == ["", 1, 20]
    assert by_name["a"]["first_used"][:2] == by_name["a"]["last_used"][:2] == "20"
    with pytest.raises(CacheError, match=r"0 references .* start with 'c'.*aaaaaaaaaaaa"):
        cache.clear("c")
    assert cache.clear("aaa") == 2
    assert set(cache.get([b"1", b"2", b"3"])) == {b"3"}
    assert cache.clear() == 1
    assert cache.info()["references"] == []
    cache.put({b"4": torch.ones(1)}, "a" * 64)
    assert cache.info()["entries"] == 1


def test_clear_gives_the_space_back(cache, path):
    cache.put({i.to_bytes(32, "big"): torch.ones(500) for i in range(1000)}, REFERENCE)
    before = cache.info()["bytes"]
    cache.clear()
    assert cache.info()["bytes"] < before / 20


@pytest.mark.parametrize("content", [b"this is a text file, and a long one at that" * 20, b"short"])
def test_a_file_that_is_no_database(tmp_path, content):
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(CacheError, match=r"is not a reference cache.*ALIGNKIT_CACHE.*if it was a cache.*rm '"):
        LogpCache(tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == content


def test_a_database_of_another_program_is_left_alone(tmp_path):
    with sqlite3.connect(tmp_path / "c") as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    before = (tmp_path / "c").read_bytes()
    with pytest.raises(CacheError, match="another program"):
        LogpCache(tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == before


def test_a_newer_format(path):
    LogpCache(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 2")
    db.close()
    with pytest.raises(CacheError, match=r"format 2, .* reads 1.*pip install"):
        LogpCache(path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot open .*ALIGNKIT_CACHE"):
        LogpCache(tmp_path / "file" / "c.sqlite")


# Damage


def flip(path: Path, where: bytes) -> None:
    raw = bytearray(path.read_bytes())
    assert raw.count(where) == 1
    raw[raw.index(where) + len(where) // 2] ^= 0x04
    path.write_bytes(raw)


def test_a_flipped_byte_is_noticed_named_and_computed_again(path):
    examples, score = some_examples(20), Scorer()
    with LogpCache(path) as cache:
        fill(examples, cache, REFERENCE, score, 1000)
    first = examples[6].completions[0]
    flip(path, truth(examples[6])[: len(first.tokens)].numpy().tobytes())
    again = Scorer()
    with LogpCache(path) as cache:
        with pytest.warns(UserWarning, match=r"damaged values in .*cache\.sqlite: 1 deleted;"):
            values = cached_logps(examples, cache, REFERENCE, again)
        assert torch.equal(values, torch.cat([truth(e) for e in examples]))
        assert again.calls == [[examples[6]]]
        assert cache.verify() == (40, 0)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE logps SET value = substr(value, 1, 6) WHERE rowid = 2",
        "UPDATE logps SET value = 'text' WHERE rowid = 2",
        "UPDATE logps SET value = 1.5 WHERE rowid = 2",
        "UPDATE logps SET checksum = x'00' WHERE rowid = 2",
        "UPDATE logps SET value = (SELECT value FROM logps WHERE rowid = 1),"
        " checksum = (SELECT checksum FROM logps WHERE rowid = 1) WHERE rowid = 2",
    ],
)
def test_verify_counts_and_removes_what_is_damaged(path, cache, damage):
    cache.put({bytes([i]): torch.full((i + 1,), float(i)) for i in range(5)}, REFERENCE)
    with sqlite3.connect(path) as db:
        db.execute(damage)
    db.close()
    assert cache.verify() == (4, 1)
    assert cache.verify() == (4, 0)


# Filling


def test_values_stand_in_the_order_of_the_examples(cache):
    examples, score = some_examples(30), Scorer()
    examples.append(example([5, 6, 7], [1, 2, 3, 4], trained=[False, True, False, True]))
    fill(examples, cache, REFERENCE, score, 64)
    shuffled = examples[::-1]
    values = cached_logps(shuffled, cache, REFERENCE, lambda e: pytest.fail("all of it was filled"))
    assert torch.equal(values, torch.cat([truth(e) for e in shuffled]))
    assert values.dtype == torch.float32


def test_batches_are_sorted_and_about_as_large_as_asked(cache):
    score, seen = Scorer(), []
    fill(some_examples(50), cache, REFERENCE, score, 60, progress=lambda *at: seen.append(at))
    sizes = [e.n_tokens for batch in score.calls for e in batch]
    assert sizes == sorted(sizes, reverse=True)
    totals = [sum(e.n_tokens for e in batch) for batch in score.calls]
    assert max(totals) <= 60
    assert min(totals[:-1]) > 60 - max(sizes)
    assert seen[-1] == (50, 50)
    assert len(seen) == len(score.calls)


def test_an_example_longer_than_a_batch_has_one_to_itself(cache):
    score = Scorer()
    fill([example([1], [2] * 50), example([2], [3])], cache, REFERENCE, score, 8)
    assert [len(batch) for batch in score.calls] == [1, 1]


def test_only_what_is_missing_is_computed(cache):
    examples, score = some_examples(10), Scorer()
    fill(examples, cache, REFERENCE, score, 100)
    more = Scorer()
    fill([*examples, *some_examples(3, start=10)], cache, REFERENCE, more, 100)
    assert more.n_examples == 3
    fill(examples, cache, "e" * 64, more, 100)
    assert more.n_examples == 13


def test_completions_are_looked_up_singly(cache):
    score = Scorer()
    pair = example([1, 2], [3, 4], [5])
    fill([pair], cache, REFERENCE, score, 100)
    unpaired = [example([1, 2], [5]), example([1, 2], [3, 4])]
    assert torch.equal(cached_logps(unpaired, cache, REFERENCE, score), torch.cat([truth(e) for e in unpaired]))
    assert score.n_examples == 1


def test_what_is_stored_wins_over_what_is_computed_beside_it(cache):
    fill([example([1, 2], [5])], cache, REFERENCE, lambda e: torch.full((1,), -0.25), 100)
    pair = example([1, 2], [3, 4], [5])
    for _ in range(2):
        assert cached_logps([pair], cache, REFERENCE, Scorer())[2] == -0.25


def test_equal_examples_are_computed_once(cache):
    score = Scorer()
    fill(some_examples(5) * 3, cache, REFERENCE, score, 1000)
    assert score.n_examples == 5


def test_training_computes_and_stores_what_was_not_filled(cache):
    examples, score = some_examples(6), Scorer()
    fill(examples[:3], cache, REFERENCE, Scorer(), 100)
    for _ in range(2):
        assert torch.equal(cached_logps(examples, cache, REFERENCE, score), torch.cat([truth(e) for e in examples]))
    assert score.calls == [examples[3:]]
    assert cached_logps([], cache, REFERENCE, score).shape == (0,)


def test_values_that_are_not_finite_are_never_stored(cache):
    examples = some_examples(3)

    def broken(asked: list[Example]) -> Tensor:
        values = Scorer()(asked)
        values[0] = torch.nan
        return values

    assert cached_logps(examples, cache, REFERENCE, broken).isnan().sum() == 1
    assert cache.info()["entries"] == 5
    assert cached_logps(examples, cache, REFERENCE, Scorer()).isfinite().all()


def test_a_score_of_the_wrong_length_is_an_error(cache):
    with pytest.raises(RuntimeError):
        cached_logps(some_examples(3), cache, REFERENCE, lambda e: Scorer()(e)[:-1])
    assert cache.info()["entries"] == 0


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_work_whatever_is_there_already(path, world):
    examples, scores = some_examples(41), [Scorer() for _ in range(world)]
    for rank in range(world):  # one after the other, so each finds more in the cache than the last
        with LogpCache(path) as cache:
            fill(examples, cache, REFERENCE, scores[rank], 60, rank=rank, world=world)
    assert sum(s.n_examples for s in scores) == 41
    tokens = [sum(e.n_tokens for batch in s.calls for e in batch) for s in scores]
    assert max(tokens) - min(tokens) <= max(e.n_tokens for e in examples)
    with LogpCache(path) as cache:
        cached_logps(examples, cache, REFERENCE, lambda e: pytest.fail("something was left out"))


FILLER = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("helpers", sys.argv[1])
helpers = importlib.util.module_from_spec(spec)
sys.modules["helpers"] = helpers
spec.loader.exec_module(helpers)
path, rank, world, die_at = sys.argv[2], *map(int, sys.argv[3:6])
score = helpers.Scorer()

def deadly(examples):
    if len(score.calls) == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return score(examples)

sys.stdin.readline()  # all begin together
with helpers.LogpCache(path) as cache:
    helpers.fill(helpers.some_examples(300), cache, helpers.REFERENCE, deadly, 40, rank=rank, world=world)
print(score.n_examples)
"""


def start(path: Path, rank: int, world: int, die_at: int = -1) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", FILLER, __file__, path, *map(str, (rank, world, die_at))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(list(map(str, arguments)), text=True, env=environment, **pipes)


@pytest.mark.parametrize("world", [2, 1], ids=["a share each", "both all of it"])
def test_two_processes_fill_one_new_cache_at_once(path, world):
    running = [start(path, rank % world, world) for rank in range(2)]
    outputs = [p.communicate("go\n", timeout=120) for p in running]
    assert [p.returncode for p in running] == [0, 0], outputs
    computed = sum(int(out) for out, _ in outputs)
    assert computed == 300 if world == 2 else 300 <= computed <= 600
    with LogpCache(path) as cache, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.verify() == (600, 0)
        examples = some_examples(300)
        values = cached_logps(examples, cache, REFERENCE, lambda e: pytest.fail("not all was filled"))
        assert torch.equal(values, torch.cat([truth(e) for e in examples]))


def test_a_new_file_opened_by_many_at_once(tmp_path):
    for attempt in range(10):
        barrier = threading.Barrier(8)

        def open_it(barrier=barrier, file=tmp_path / f"{attempt}.sqlite") -> int:
            barrier.wait()
            with LogpCache(file) as cache:
                return cache.info()["entries"]

        with ThreadPoolExecutor(8) as pool:
            assert [f.result() for f in [pool.submit(open_it) for _ in range(8)]] == [0] * 8


def test_a_killed_fill_loses_its_current_batch_at_most(path):
    process = start(path, 0, 1, die_at=7)
    process.communicate("go\n", timeout=120)
    assert process.returncode == -9
    whole = Scorer()
    with LogpCache(path.with_name("other")) as other:
        fill(some_examples(300), other, REFERENCE, whole, 40)
    rest = Scorer()
    with LogpCache(path) as cache:
        fill(some_examples(300), cache, REFERENCE, rest, 40)
        assert cache.verify() == (600, 0)
    assert rest.n_examples == 300 - sum(map(len, whole.calls[:7]))


def test_a_fill_hashes_each_completion_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hashed, key_of = [], keys.key

    def counted(*parts: Any) -> bytes:
        hashed.append(parts)
        return key_of(*parts)

    monkeypatch.setattr(keys, "key", counted)
    rows = [
        Example(torch.tensor([i], dtype=torch.int32), (Completion(torch.tensor([9, i], dtype=torch.int32)),))
        for i in (1, 2, 2, 3)
    ]

    def score(examples: list[Example]) -> torch.Tensor:
        return torch.cat([c.tokens.float() for e in examples for c in e.completions])

    with LogpCache(tmp_path / "c.sqlite") as cache:
        keys.fill(rows, cache, "f", score, batch_tokens=3)
        assert len(hashed) == len(rows)
        found = keys.cached_logps(rows, cache, "f", score)
    assert found.tolist() == [9, 1, 9, 2, 9, 2, 9, 3]
