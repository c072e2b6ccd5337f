"""The model card: accepted as metadata, true to the run, silent about the machine, and its code runs."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

import alignkit
from alignkit.rewards import Answers, build_rewards
from alignkit.runs import card
from alignkit.runs.folder import read_metrics
from helpers import make_rows


@pytest.fixture
def rows_file(tmp_path: Path) -> str:
    path = tmp_path / "my rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows("pairs", 16)))
    return str(path)


def metadata(model: Path) -> dict[str, Any]:
    """The front matter as the hub's library reads it."""
    found: dict[str, Any] = ModelCard.load(model / "README.md").data.to_dict()
    return found


def run_code(model: Path) -> str:
    """Run the card's code in the model's folder and return what it prints."""
    (code,) = re.findall(r"```python\n(.*?)```", (model / "README.md").read_text(), re.DOTALL)
    (model / "code.py").write_text(code)
    said = io.StringIO()
    with contextlib.chdir(model), contextlib.redirect_stdout(said):
        runpy.run_path("code.py")
    return said.getvalue()


def test_a_card_of_dpo_says_what_was_done(settings: dict[str, Any], rows_file: str) -> None:
    result = alignkit.run("dpo", data=rows_file, eval_fraction=0.25, beta=0.3, **settings | {"name": "run"})
    model = result.folder / "model"
    assert metadata(model) == {
        "base_model": Path(settings["model"]).name,
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["alignkit", "dpo"],
    }
    text = (model / "README.md").read_text()
    assert "# Language model by dpo, from tiny0" in text
    assert "for 6 steps on `my rows.jsonl`" in text
    assert "[2305.18290](https://arxiv.org/abs/2305.18290)" in text
    assert "Data: `my rows.jsonl`, 12 rows" in text
    assert "Held out: 4 rows of it" in text
    assert "| `beta` | `0.3` |" in text
    assert "| `learning_rate` | `0.01` |" in text
    first, last = [line for line in read_metrics(result.folder) if "eval/loss" in line]
    for name in ("loss", "rewards/accuracy", "kl"):
        assert f"| `{name}` | {first[f'eval/{name}']:.4g} | {last[f'eval/{name}']:.4g} |" in text
    assert "On held-out rows" in text
    assert "The held-out rows come from the same source as the training rows" in text


def test_no_card_says_where_the_machine_keeps_its_files(settings: dict[str, Any], rows_file: str) -> None:
    reward = alignkit.run("reward", data=rows_file, **settings | {"name": "scores", "max_steps": 1})
    given = settings | {"name": "run", "max_steps": 1, "sampling": {"max_new_tokens": 4}}
    spec = [{"use": str(reward.folder / "model"), "weight": 0.5}, {"use": "length", "max": 5}]
    result = alignkit.run("grpo", data=rows_file, eval_data=rows_file, reward=spec, **given)
    text = (result.folder / "model/README.md").read_text()
    for private in (settings["model"], str(settings["output"]), str(Path(rows_file).parent), str(Path.home())):
        assert private not in text
    assert '"use": "scores", "weight": 0.5' in text
    assert "It was optimised for its reward or judge, which can differ from what people prefer" in text
    assert "of `my rows.jsonl`" in text
    assert metadata(result.folder / "model")["tags"] == ["alignkit", "grpo"]


def test_the_code_of_a_full_model_and_of_an_adapter_runs(settings: dict[str, Any], rows_file: str) -> None:
    whole = alignkit.run("sft", data=rows_file, **settings | {"name": "whole", "max_steps": 1}).folder / "model"
    adapter = (
        alignkit.run("sft", data=rows_file, lora=4, **settings | {"name": "lora", "max_steps": 1}).folder / "model"
    )
    merged = alignkit.run(
        "sft", data=rows_file, lora=4, merge_adapter=True, **settings | {"name": "merged", "max_steps": 1}
    ).folder / "model"  # fmt: skip
    for model in (whole, adapter, merged):
        assert run_code(model).strip()
    about = metadata(adapter)
    assert (about["library_name"], about["base_model_relation"]) == ("peft", "adapter")
    assert about["tags"] == ["alignkit", "sft", "lora"]
    assert "This folder holds an adapter only; its base model is `tiny0`." in (adapter / "README.md").read_text()
    assert metadata(merged)["library_name"] == "transformers"
    assert "trained by LoRA for 1 step " in (merged / "README.md").read_text()


@pytest.mark.parametrize("lora", [None, 4])
def test_the_code_of_a_reward_model_says_the_reward(lora: int | None, settings: dict[str, Any], rows_file: str) -> None:
    given = settings | {"name": "run", "max_steps": 3, "lora": lora}
    model = alignkit.run("reward", data=rows_file, **given).folder / "model"
    assert metadata(model)["pipeline_tag"] == "text-classification"
    assert "reward-model" in metadata(model)["tags"]
    text = (model / "README.md").read_text()
    assert "# Reward model by reward, from tiny0" in text
    assert "Its scores of answers to different prompts are not comparable" in text
    said = float(run_code(model))
    if lora is None:
        rewards = build_rewards(str(model), torch.device("cpu"))
        answers = Answers(
            prompts=["Your prompt"], completions=[" An answer."], columns={}, rows=[0], lengths=[3], ended=[True]
        )
        assert said == pytest.approx(rewards.score(answers).total[0], abs=1e-5)


def test_the_code_of_a_preference_model_says_what_the_judge_says(settings: dict[str, Any], rows_file: str) -> None:
    from alignkit.rewards import build_judge

    given = settings | {"name": "run", "max_steps": 3, "pairwise": True}
    model = alignkit.run("reward", data=rows_file, **given).folder / "model"
    assert "# Preference model by reward" in (model / "README.md").read_text()

    def answers(text: str) -> Answers:
        return Answers(prompts=["Your prompt"], completions=[text], columns={}, rows=[0], lengths=[3], ended=[True])

    judge = build_judge(str(model), torch.device("cpu"))
    expected = judge.wins(answers(" An answer."), answers(" Another one."))[0]
    assert float(run_code(model)) == pytest.approx(expected, abs=1e-5)


def test_a_chat_model_is_asked_by_its_template(settings: dict[str, Any], tiny: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    rows = [
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "yes"}]} for i in range(8)
    ]
    result = alignkit.run("sft", data=rows, tokenizer=tokenizer, **settings | {"max_steps": 1})
    text = (result.folder / "model/README.md").read_text()
    assert "apply_chat_template" in text
    assert "on `<list>`" in text
    assert "No rows were held out" in text
    run_code(result.folder / "model")


def test_the_papers_are_those_of_the_method() -> None:
    from alignkit import registry

    expected = {
        "dpo": ["2305.18290"], "ipo": ["2310.12036"], "orpo": ["2403.07691"],
        "kto": ["2402.01306"], "bco": ["2404.04656"],
        "simpo": ["2405.14734"], "cpo": ["2401.08417"], "nash": ["2312.00886"], "sft": [],
        "grpo": ["2402.03300"], "rloo": ["2402.14740"], "reinforce": ["2501.03262"], "online_dpo": ["2402.04792"],
        "ppo": ["1707.06347", "1909.08593", "2203.02155"], "reward": ["2203.02155", "2307.09288", "2312.09244"],
    }  # fmt: skip
    assert sorted(expected) == registry.names()
    assert {name: card.papers(registry.get(name)) for name in expected} == expected


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("meta/llama-3", "meta/llama-3"),
        ("gpt2", "gpt2"),
        ("/data/models/base", "base"),
        ("/data/runs/sft-001/model", "sft-001"),
        ("../base", "base"),
        ("a/b/rows.jsonl", "rows.jsonl"),
        ("~/base", "base"),
        ("<list>", "<list>"),
        (["/data/a.jsonl.gz", {"path": "org/pairs:train", "columns": {}}], "a.jsonl.gz, org/pairs:train"),
        ([{"prompt": "q"}], "<list>"),
        ({"no": "path"}, "<dict>"),
        ({"path": "/data/shards/*.jsonl"}, "*.jsonl"),
    ],
)
def test_places_are_named_by_their_last_part_and_hub_names_whole(value: object, said: str) -> None:
    assert card.place(value) == said


def test_hub_names_of_data_are_metadata_and_local_ones_are_not(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    mixed = ["/data/pairs.jsonl", {"path": "org/other", "name": "en"}, "org/pairs:en:train[:5]"]
    for data, expected in (
        ("org/pairs", ["org/pairs"]),
        ("org/pairs:test", ["org/pairs"]),
        ("/data/pairs.jsonl", None),
        ("<list>", None),
        (mixed, ["org/other", "org/pairs"]),
    ):
        settings = {"method": "dpo", "model": "org/base", "data": data, "beta": 0.1}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        card.write(tmp_path / "model", tmp_path)
        about = metadata(tmp_path / "model")
        assert about.get("datasets") == expected
        assert about["base_model"] == "org/base"
        for name in (about["base_model"], *about.get("datasets", [])):
            validate_repo_id(name)


def test_a_card_is_written_of_whatever_stands_in_the_settings(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    settings = {"method": "of-a-stranger", "model": "a: b\n# <b>|x|", "data": "d", "beta": "`|`", "lambda_": [1, None]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    alarm = {"step": 3, "name": "kl_high", "message": "step 3: kl 16\nis above 15"}
    (tmp_path / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    card.write(tmp_path / "model", tmp_path)
    text = (tmp_path / "model/README.md").read_text()
    assert metadata(tmp_path / "model")["base_model"] == "a: b\n# <b>|x|"
    assert "\n# <b>" not in text.split("---", 2)[2]
    assert "None were logged." in text
    assert "- Alarm `kl_high`: step 3: kl 16 is above 15." in text
    assert "| `lambda_` | `[1, null]` |" in text


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            [{"step": 0, "eval/loss": 0.5, "epoch": 1}, {"step": 1, "kl": 1}, {"step": 2, "kl": 2, "eval/loss": 0.25}],
            "On held-out rows:\n\n| metric | before | after |\n|---|---:|---:|\n| `loss` | 0.5 | 0.25 |\n"
            "| `kl` * | 1 | 2 |\n\n"
            "\\* measured in training, at its first and at its last logged step, not on held-out rows\n",
        ),
        (
            [{"step": 1, "loss": 0.5}],
            "## Results\n\n| metric | value |\n|---|---:|\n| `loss` * | 0.5 |\n\n"
            "\\* measured in training, not on held-out rows\n",
        ),
        (
            [{"step": 0, "eval/loss": 0.5}],
            "On held-out rows:\n\n| metric | value |\n|---|---:|\n| `loss` | 0.5 |\n\n##",
        ),
        ([{"step": 1, "loss": 10**400}], "| `loss` * | inf |"),
    ],
)
def test_results_say_what_was_measured_where_and_how_often(lines: list[Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"method": "dpo", "model": "org/base", "data": "org/pairs"}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "sessions.json").write_text('[{"facts": {"parameters": 1}, "environment": {"torch": "2"}}]')
    card.write(tmp_path / "model", tmp_path)
    assert said in (tmp_path / "model/README.md").read_text()


def test_endpoints_of_rewards_are_not_told(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    reward = {"use": "llm", "url": "http://10.0.0.7:8000/v1", "key_env": "MY_KEY", "model": "judge"}
    settings = {"method": "grpo", "model": "org/base", "data": "org/prompts", "reward": [reward]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    card.write(tmp_path / "model", tmp_path)
    text = (tmp_path / "model/README.md").read_text()
    assert "10.0.0.7" not in text
    assert "MY_KEY" not in text
    assert '"model": "judge", "use": "llm"' in text


def test_a_model_is_saved_even_where_its_card_cannot_be_written(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(model: Path, run: Path) -> None:
        raise OSError("no space for words")

    monkeypatch.setattr(card, "write", broken)
    result = alignkit.run("sft", data=make_rows("text", 8), **settings | {"max_steps": 1})
    assert (result.folder / "model/model.safetensors").is_file()
    assert "the model card could not be written: no space for words" in caplog.text
