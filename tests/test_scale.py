"""Every command of docs/scale.md runs, with two processes for each node, on gloo; all nodes are this machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_readme import blocks
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_double import vllm_double

from alignkit.runs.folder import read_metrics
from helpers import free_port, make_rows, write_tiny

pytestmark = pytest.mark.slow

SMALL = "--set device=cpu --set max_steps=2 --set batch_size=4 --set learning_rate=1e-4 --set save_every=1"
SRUN = """#!/bin/bash
for node in 0 1; do SLURM_NODEID=$node ALIGNKIT_CACHE=$PWD/slurm-$node.sqlite "$@" & done
wait -n && wait -n
"""


def smaller(text: str) -> str:
    """The commands with two processes for a node, the nodes on this machine, and few steps."""
    text = text.replace("--nproc_per_node=8", "--nproc_per_node=2").replace("node-0", "127.0.0.1")
    text = text.replace("29500", str(free_port()))
    return re.sub(r"(-m alignkit run \w+)", rf"\1 {SMALL}", text)


@pytest.fixture
def place(tmp_path: Path, write_rows: object) -> Path:
    write_tiny(tmp_path / "MODEL", max_position_embeddings=512)
    write_rows(make_rows("pairs", 12), "prefs.jsonl")  # type: ignore[operator]
    prompts = [{"prompt": row["prompt"], "answer": "2"} for row in make_rows("text", 8)]
    write_rows(prompts, "prompts.jsonl")  # type: ignore[operator]
    for name, text in (("scontrol", "#!/bin/bash\necho 127.0.0.1\n"), ("srun", SRUN)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def bash(text: str, place: Path, node: int = 0) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(place / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "ALIGNKIT_CACHE": str(place / f"{node}.sqlite")}
    env |= {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "-"}
    pipe = subprocess.PIPE
    return subprocess.Popen(["bash", "-ec", text], cwd=place, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def ended(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    return said


def by_servers(text: str, place: Path) -> None:
    """Run the commands about servers: no vLLM is here to be started, and a double answers in its place."""
    run = {"method": "grpo", "model": "MODEL", "data": "prompts.jsonl", "reward": "numeric", "device": "cpu"}
    run |= {"max_steps": 2, "batch_size": 4, "group_size": 2, "sampling": {"max_new_tokens": 6}}
    (place / "run.yaml").write_text(yaml.safe_dump(run))
    serve, trained = text.splitlines()
    refused = bash(serve, place)
    assert "vLLM is not installed here: pip install vllm, or name the program" in refused.communicate(timeout=120)[0]
    model = AutoModelForCausalLM.from_pretrained(place / "MODEL")
    with vllm_double(model, AutoTokenizer.from_pretrained(place / "MODEL")) as double:
        trained = re.sub(r"urls: \[.*\]", f"urls: [{double.url}]", trained).replace("node=6", "node=2")
        ended(bash(trained, place))
        assert len(double.asked("/collective_rpc")) == 2


def test_every_command_of_the_page_on_scale_runs(place: Path) -> None:
    alone, servers, nodes, slurm, resume = (text for _, text in blocks("docs/scale.md"))
    for line in alone.splitlines():
        ended(bash(smaller(line), place))
    by_servers(servers, place)
    both = [bash(line, place, node) for node, line in enumerate(smaller(nodes).splitlines())]
    assert len(both) == 2
    for process in both:
        ended(process)
    ended(bash(smaller(slurm), place))
    sharded = place / "runs" / "sharded"
    before = read_metrics(sharded)
    shutil.rmtree(sharded / "model")
    shutil.rmtree(sharded / "checkpoints" / "step-00000002")
    assert "step-00000001" in ended(bash(smaller(resume), place))
    for other in (before, *(read_metrics(place / "runs" / name) for name in ("plain", "nodes", "slurm"))):
        for x, y in zip(read_metrics(sharded), other, strict=True):
            assert x["loss"] == pytest.approx(y["loss"], abs=1e-5)
    assert {p.parents[1].name for p in place.glob("runs/*/model/model.safetensors")} == {
        "plain", "sharded", "online", "nodes", "slurm", "grpo-001",
    }  # fmt: skip
