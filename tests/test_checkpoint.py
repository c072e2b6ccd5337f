"""Checkpoints: whole or absent at any moment, verified when read, exact when resumed."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from alignkit.errors import CheckpointError
from alignkit.models.ranks import part_in_row
from alignkit.runs import checkpoint
from alignkit.runs.parts import LEAST, file_of

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


def write(folder: Path, step: int, keep: int = 10, value: float | None = None) -> Path:
    tensors = {
        "model": {"w": torch.full((100,), float(step if value is None else value))},
        "rng": {"torch": torch.arange(9)},
    }
    return checkpoint.save(folder, step, tensors, {"seen": step}, keep)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def same_bits(a: Tensor, b: Tensor) -> bool:
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


@st.composite
def some_tensor(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    n_bytes = math.prod(shape) * 8
    raw = np.frombuffer(draw(st.binary(min_size=n_bytes, max_size=n_bytes)), np.uint8).copy()  # NaNs and all
    dtype = draw(st.sampled_from(DTYPES))
    bits = torch.from_numpy(raw)
    flat = bits > 127 if dtype == torch.bool else bits.view(dtype) if len(bits) else torch.empty(0, dtype=dtype)
    return flat[: math.prod(shape)].reshape(shape)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(
    groups=st.dictionaries(
        st.sampled_from(["model", "optimizer", "rng"]), st.dictionaries(st.text(max_size=6), some_tensor(), max_size=4)
    ),
    state=st.dictionaries(st.text(), json_values, max_size=4),
    step=st.integers(0, 10**9),
)
def test_round_trip_is_exact(tmp_path, groups, state, step):
    shutil.rmtree(tmp_path)
    groups = {g: {n: t for n, t in ts.items() if n != "__metadata__"} for g, ts in groups.items()}
    path = checkpoint.save(tmp_path, step, groups, state, keep=1)
    loaded = checkpoint.load(tmp_path)
    assert (loaded.step, loaded.path, loaded.state) == (step, path, state)
    assert {g: set(ts) for g, ts in loaded.tensors.items()} == {g: set(ts) for g, ts in groups.items()}
    assert all(same_bits(t, loaded.tensors[g][n]) for g, ts in groups.items() for n, t in ts.items())


def test_tied_and_strided_tensors_come_back(tmp_path):
    weight = torch.randn(50, 40)
    groups = {"model": {"embed": weight, "head": weight, "turned": weight.t(), "row": weight[3]}}
    path = checkpoint.save(tmp_path, 1, groups, {}, keep=1)
    back = checkpoint.load(tmp_path).tensors["model"]
    assert all(torch.equal(back[n], t) for n, t in groups["model"].items())
    assert back["embed"].data_ptr() == back["head"].data_ptr()
    assert (path / "model.safetensors").stat().st_size < 2.5 * weight.nbytes  # embed once, turned, row


def test_names_and_modes(tmp_path):
    path = write(tmp_path / "not" / "yet", 12)
    assert path.name == "step-00000012"
    assert names(path) == ["manifest.json", "model.safetensors", "rng.safetensors", "state.json"]
    assert {stat.S_IMODE(p.stat().st_mode) for p in path.iterdir()} == {0o644}
    assert names(path.parent) == ["step-00000012"]


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 9, 11):
        write(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000011"]
    assert checkpoint.load(tmp_path).step == 11


def test_a_save_never_removes_itself_nor_later_steps(tmp_path):
    write(tmp_path, 20)
    write(tmp_path, 12, keep=1)
    assert names(tmp_path) == ["step-00000012", "step-00000020"]


def test_the_same_step_is_replaced(tmp_path):
    write(tmp_path, 5, value=1)
    path = write(tmp_path, 5, value=2)
    assert names(tmp_path) == ["step-00000005"] == [path.name]
    assert checkpoint.load(tmp_path).tensors["model"]["w"][0] == 2


def test_nothing_there_is_none(tmp_path):
    assert checkpoint.load(tmp_path / "absent") is None
    (tmp_path / ".tmp-step-00000003-1").mkdir()
    (tmp_path / "step-of-mine").mkdir()
    assert checkpoint.load(tmp_path) is None


def test_leftovers_of_dead_runs_go_and_those_of_the_living_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getppid(), os.getpid()):
        (tmp_path / f".tmp-step-00000001-{pid}").mkdir()
    write(tmp_path, 2)
    assert names(tmp_path) == [f".tmp-step-00000001-{os.getppid()}", "step-00000002"]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    file.write_bytes(raw)


def garble(file: Path) -> None:
    file.write_bytes(os.urandom(file.stat().st_size))


FILES = ("manifest.json", "model.safetensors", "rng.safetensors", "state.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [truncate, flip, garble, Path.unlink])
def test_damage_is_named_and_the_one_before_is_used(tmp_path, file, damage):
    write(tmp_path, 1)
    damage(write(tmp_path, 2) / file)
    said: list[str] = []
    assert checkpoint.load(tmp_path, log=said.append).step == 1
    assert len(said) == 1
    assert "step-00000002" in said[0]
    assert file in said[0] or file == "manifest.json"  # a damaged manifest may blame the files that it describes


def test_any_flipped_bit_of_the_manifest_is_noticed_or_harmless(tmp_path):
    write(tmp_path, 1)
    manifest = write(tmp_path, 2) / "manifest.json"
    raw = manifest.read_bytes()
    for at in range(0, len(raw), 3):
        manifest.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1 :])
        loaded = checkpoint.load(tmp_path, log=lambda text: None)
        assert loaded.tensors["model"]["w"][0] == loaded.step == loaded.state["seen"]
        assert set(loaded.tensors) == {"model", "rng"}


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    path = write(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../other"] = manifest["files"]["state.json"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        checkpoint.load(tmp_path, log=lambda text: None)


def test_a_newer_format_is_named(tmp_path):
    path = write(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"version": 2}))
    with pytest.raises(CheckpointError, match="format version 2"):
        checkpoint.load(tmp_path, log=lambda text: None)


def test_all_broken_is_an_error_that_names_each(tmp_path):
    flip(write(tmp_path, 1) / "model.safetensors")
    (write(tmp_path, 2) / "state.json").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"all 2 checkpoints in .* are damaged: state\.json is missing; model\.safetensors has changed",
    ):
        checkpoint.load(tmp_path, log=lambda text: None)


KILLER = """
import os, signal, sys
from pathlib import Path
import torch
from alignkit.runs import checkpoint

folder, tensors = Path(sys.argv[1]), {"model": {"w": torch.full((5000,), 2.0)}, "rng": {"torch": torch.arange(9)}}
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod")
real_save, real_fsync = checkpoint.save_file, os.fsync
count, deadly = 0, 0

def point():
    global count
    count += 1
    if count == deadly:
        os.kill(os.getpid(), signal.SIGKILL)

def hook(event, arguments):
    if armed and event in EVENTS and str(folder) in str(arguments[0]):
        point()

def save_file(named, path):
    Path(path).write_bytes(b"half a file")
    point()
    real_save(named, path)
    point()

def fsync(descriptor):
    point()
    real_fsync(descriptor)
    point()

def child(at):
    global armed, deadly
    armed, deadly = True, at
    checkpoint.save_file, os.fsync = save_file, fsync
    checkpoint.save(folder, STEP, tensors, {"seen": STEP}, keep=1)
    armed = False
    (folder / "count").write_text(str(count))
    os._exit(0)

armed = False
sys.addaudithook(hook)
STEP = int(sys.argv[2])

def run(at):
    for p in folder.iterdir():
        checkpoint.shutil.rmtree(p) if p.is_dir() else p.unlink()
    checkpoint.save(folder, 1, {"model": {"w": torch.full((5000,), 1.0)}, "rng": {}}, {"seen": 1}, keep=1)
    pid = os.fork()
    if pid == 0:
        child(at)
    status = os.waitpid(pid, 0)[1]
    return os.WIFSIGNALED(status)

assert not run(0)
total = int((folder / "count").read_text())
survived = 0
for i in range(20):
    assert run(1 + i * (total - 1) // 19), "was to be killed"
    loaded = checkpoint.load(folder, log=lambda text: None)
    assert loaded.step in (1, STEP), loaded.step
    assert loaded.state["seen"] == loaded.step
    assert loaded.tensors["model"]["w"].unique().tolist() in ([1.0], [2.0])
    assert (loaded.tensors["model"]["w"][0] == 2) == bool(loaded.tensors["rng"]), "a mixture"
    checkpoint.save(folder, STEP + 1, tensors, {"seen": STEP + 1}, keep=1)
    assert [p.name for p in folder.iterdir()] == [f"step-{STEP + 1:08d}"], list(folder.iterdir())
    survived += 1
print(total, survived)
"""


@pytest.mark.parametrize("step", [2, 1], ids=["next step", "same step again"])
def test_killed_at_20_points_of_a_save(tmp_path, step):
    done = subprocess.run(
        [sys.executable, "-c", KILLER, tmp_path, str(step)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    total, survived = map(int, done.stdout.split())
    assert total >= 20
    assert survived == 20


def test_space_is_checked_before_a_byte_is_written(tmp_path, monkeypatch):
    write(tmp_path, 1)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    monkeypatch.setattr(checkpoint, "save_file", lambda *a: pytest.fail("it wrote"))
    with pytest.raises(CheckpointError, match=r"needs 9\.0 MB, 1\.0 MB are free") as caught:
        checkpoint.save(tmp_path, 2, {"model": {"w": torch.zeros(2_000_000)}}, {}, keep=1)
    assert str(tmp_path) in str(caught.value)
    assert names(tmp_path) == ["step-00000001"]


def test_a_disk_that_fills_up_in_the_middle(tmp_path):
    write(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        groups = {"a": {"w": torch.zeros(10)}, "model": {"w": torch.zeros(250_000)}}
        with pytest.raises(CheckpointError, match=r"step 2 .* needs 2\.\d MB, .* MB are free") as caught:
            checkpoint.save(tmp_path, 2, groups, {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(tmp_path) in str(caught.value)
    assert names(tmp_path) == ["step-00000001"]
    assert checkpoint.load(tmp_path).step == 1


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write(tmp_path / "file" / "run", 1)


def test_state_that_is_not_json_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 1, {}, {"a": object()}, keep=1)
    assert names(tmp_path) == []


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), *np.random.rand(2), np.random.randn(), *torch.rand(2).tolist()]


@quick
@given(seed=st.integers(0, 2**32 - 1), advance=st.integers(0, 700))
def test_random_generators_go_on_exactly(tmp_path, seed, advance):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for _ in range(advance):
        draws()
    random.gauss(0, 1)  # leaves the second of a pair in the state
    np.random.randn()
    tensors, state = checkpoint.rng_state()
    checkpoint.save(tmp_path, 1, {"rng": tensors}, {"rng": state}, keep=1)
    expected = draws()
    draws()
    loaded = checkpoint.load(tmp_path)
    checkpoint.set_rng_state(loaded.tensors["rng"], loaded.state["rng"])
    assert draws() == expected


@pytest.mark.parametrize("part", ["torch", "numpy", "python"])
def test_garbage_for_a_generator_is_an_error(part):
    good, state = checkpoint.rng_state()
    tensors = {"torch": torch.zeros(3, dtype=torch.uint8)} if part == "torch" else good
    with pytest.raises(CheckpointError, match="random generators"):
        checkpoint.set_rng_state(tensors, state | ({part: [1, [2], 3]} if part != "torch" else {}))
    checkpoint.set_rng_state(good, state)


class Net(nn.Module):
    """Two layers, of which one may be frozen; one that no loss ever reaches; and one tied to the second."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(2, 2)
        self.tied = nn.Linear(8, 2)
        self.tied.weight = self.second.weight
        self.first.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) * self.tied.bias


def trainer(frozen: bool, name: str):
    torch.manual_seed(3)
    net = Net(frozen)
    others = [p for n, p in net.named_parameters() if "second" not in n and p.requires_grad]
    groups = [{"params": net.second.parameters(), "lr": 0.02}, {"params": others}]
    kinds = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9)),
        "sgd": lambda: torch.optim.SGD(groups, lr=0.1),
        "momentum": lambda: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    }
    return net, kinds[name]()


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        net(x).square().sum().backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.7  # as schedulers do
    optimizer.zero_grad()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["adamw", "sgd", "momentum"])
@pytest.mark.parametrize("done", [0, 1, 3])
def test_training_goes_on_bitwise_after_a_round_trip(tmp_path, frozen, name, done):
    net, optimizer = trainer(frozen, name)
    train(net, optimizer, range(done))
    tensors, layout = checkpoint.optimizer_state(net, optimizer)
    checkpoint.save(tmp_path, done, {"model": net.state_dict(), "optimizer": tensors}, {"optimizer": layout}, keep=1)
    parameters_with_state = len(optimizer.state)
    train(net, optimizer, range(done, 6))  # the save itself must not disturb the run that goes on

    loaded = checkpoint.load(tmp_path)
    again, fresh = trainer(frozen, name)
    again.load_state_dict(loaded.tensors["model"])
    checkpoint.set_optimizer_state(again, fresh, loaded.tensors["optimizer"], loaded.state["optimizer"])
    assert len(fresh.state) == parameters_with_state
    train(again, fresh, range(done, 6))

    straight, untouched = trainer(frozen, name)
    train(straight, untouched, range(6))
    for n, p in straight.state_dict().items():
        assert torch.equal(p, net.state_dict()[n]), f"{n}: the save disturbed the run"
        assert torch.equal(p, again.state_dict()[n]), f"{n}: the resumed run differs"


def test_optimizer_state_of_another_model_is_refused():
    net, optimizer = trainer(False, "adamw")
    train(net, optimizer, range(2))
    tensors, layout = checkpoint.optimizer_state(net, optimizer)
    other = nn.ModuleDict({"second": nn.Linear(8, 2)})
    fresh = torch.optim.AdamW(other.parameters())
    with pytest.raises(CheckpointError, match=r"3 parameters .* 'first.bias'"):
        checkpoint.set_optimizer_state(other, fresh, tensors, layout)


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
    ),
    max_leaves=10,
)


@quick
@given(tree=st.dictionaries(st.text(max_size=4), trees, max_size=4))
def test_optimizer_trees_round_trip_through_json(tree):
    tensors, layout = checkpoint.flatten_optimizer(tree)
    back = checkpoint.unflatten_optimizer(tensors, json.loads(json.dumps(layout)))
    assert repr(back) == repr(tree)


def test_tensors_in_optimizer_trees_keep_apart_where_paths_collide():
    tree = {"a": {"b/c": torch.tensor(1.0)}, "a/b": {"c": torch.tensor(2.0)}}
    tensors, layout = checkpoint.flatten_optimizer(tree)
    assert checkpoint.unflatten_optimizer(tensors, layout) == tree
    assert len(tensors) == 2


def test_strange_values_in_an_optimizer_are_refused():
    with pytest.raises(CheckpointError, match="'optimizer/a/0' is a set"):
        checkpoint.flatten_optimizer({"a": [{1}]})


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=30), st.integers(1, 8))
def test_parts_of_a_rank_are_spread_over_files_that_none_fills_with_more_than_its_share(sizes, ranks):
    tensors = {str(i): torch.empty(size, device="meta") for i, size in enumerate(sizes)}
    found = file_of(tensors, ranks)
    assert list(found) == list(tensors)
    assert [*found.values()] == sorted(found.values())
    assert 1 <= min(found.values()) <= max(found.values()) <= LEAST + 1
    most = 4 * sum(sizes) / ranks / LEAST
    for number in set(found.values()):
        inside = [4 * size / ranks for name, size in zip(tensors, sizes, strict=True) if found[name] == number]
        assert sum(inside) <= most + max(inside)  # a tensor is not split


def test_files_hold_at_most_a_gibibyte_of_a_rank():
    tensors = {str(i): torch.empty(2**28, device="meta") for i in range(40)}  # 40 GiB
    found = file_of(tensors, 2)
    assert [*found.values()].count(1) == 2
    assert max(found.values()) == 20


@pytest.mark.parametrize(("ranks", "files"), [(2, 16), (3, 10), (4, 3)])
def test_every_file_is_summed_by_one_rank(ranks, files):
    parts = [part_in_row(range(files), rank, ranks) for rank in range(ranks)]
    assert [i for part in parts for i in part] == list(range(files))
