"""Runs on conversations: the pinned date, and the settings of conversations."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import alignkit
from alignkit.config import read_yaml
from alignkit.errors import ConfigError, DataError
from alignkit.runs.folder import read_metrics
from helpers import killed_before, make_rows

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def with_template(settings: dict[str, Any], template: str) -> dict[str, Any]:
    """The settings with a tokenizer that has this chat template."""
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    tokenizer.chat_template = template
    return {**settings, "tokenizer": tokenizer}


def conversations(n: int) -> list[dict[str, Any]]:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{k: [{"role": role, "content": row[k]}] for k, role in roles.items()} for row in make_rows("pairs", n)]


def numbers(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_metrics(folder)]


def test_a_run_killed_before_midnight_resumes_after_it(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:

    class Day(datetime.date):
        now = datetime.date(2026, 2, 3)

        @classmethod
        def today(cls) -> datetime.date:
            return cls.now

    monkeypatch.setattr("alignkit.runs.config_file.date", Day)
    settings = with_template(settings, "{{ strftime_now('%d %b %Y') }}: " + PLAIN)
    settings |= {"data": conversations(12), "save_every": 2}
    whole = alignkit.run("dpo", name="whole", **settings)
    with killed_before(4):
        alignkit.run("dpo", name="killed", **settings)
    Day.now = datetime.date(2026, 2, 4)
    killed = alignkit.run("dpo", name="killed", resume=True, **settings)
    assert numbers(killed.folder) == numbers(whole.folder)
    assert read_yaml(killed.folder / "config.yaml")["template_date"] == "2026-02-03"
    session = json.loads((killed.folder / "sessions.json").read_text())[-1]
    assert session["facts"]["reference"]["values_computed"] == 0
    assert session["facts"]["reference"]["values_read"] > 0
    # another run finds the cached values with the same date, and needs its own without
    for date, computed in (("2026-02-03", False), (None, True)):
        other = alignkit.run("dpo", name=f"other-{computed}", template_date=date, **settings)
        session = json.loads((other.folder / "sessions.json").read_text())[-1]
        assert (session["facts"]["reference"]["values_computed"] > 0) is computed
    with pytest.raises(ConfigError, match="template_date was '2026-02-03', is '2026-02-04'"):
        alignkit.run("dpo", name="killed", resume=True, template_date="2026-02-04", **settings)


def test_the_templates_of_reward_models_write_the_date_of_the_run(settings: dict[str, Any]) -> None:
    from alignkit.rewards.models import trees

    dated = with_template(settings, "{{ strftime_now('%Y-%m-%d') }} " + PLAIN)
    seen = set()

    def reward(prompts: Any, completions: Any) -> list[float]:
        (tree,) = trees(dated["tokenizer"], prompts[:1], [completions[:1]])
        seen.add(dated["tokenizer"].decode(tree.prompt)[:10])
        return [float(len(c[0]["content"])) for c in completions]

    rows = [{"prompt": row["prompt"]} for row in conversations(8)]
    own = {"data": rows, "reward": reward, "max_steps": 1, "group_size": 2, "sampling": {"max_new_tokens": 4}}
    alignkit.run("grpo", template_date="2025-02-03", **dated | own)
    assert seen == {"2025-02-03"}


def test_the_settings_of_conversations_reach_the_rows_of_a_run(settings: dict[str, Any]) -> None:
    cutting = "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}{{ mood }}\n{% endfor %}"
    settings = with_template(settings, cutting) | {"max_steps": 1}
    rows = [{"messages": [{"role": "user", "content": "3 ?"}, {"role": "assistant", "content": "<think>1 2</think>4"}]}]
    with pytest.raises(DataError, match="leaves out '1 2' of the answer; on_dropped: keep-by-hand"):
        alignkit.run("sft", name="refused", data=rows * 4, **settings)
    lost = {}
    for how in ("report", "keep-by-hand"):
        result = alignkit.run("sft", name=how, data=rows * 4, on_dropped=how, **settings)
        lost[how] = result.metrics["tokens"] if "tokens" in result.metrics else result.metrics["loss"]
    assert lost["report"] != lost["keep-by-hand"]
    moody = alignkit.run(
        "sft", name="moody", data=rows * 4, on_dropped="report", chat_template_kwargs={"mood": "!"}, **settings
    )
    assert (
        moody.metrics["loss"]
        != alignkit.run("sft", name="plain", data=rows * 4, on_dropped="report", **settings).metrics["loss"]
    )
    with pytest.raises(ConfigError, match=r"reads no 'moood'\. Did you mean 'mood'\?"):
        alignkit.run("sft", name="wrong", data=rows * 4, chat_template_kwargs={"moood": "!"}, **settings)


def test_a_template_that_cuts_sampled_text_does_not_stop_its_scoring() -> None:
    from families import tokenizer_of

    from alignkit.rewards.models import trees

    tokenizer = tokenizer_of("deepseek_r1_distill")
    prompt = [{"role": "user", "content": "2 + 2?"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("Twos.</think>4", "no end of thinking")]
    (tree,) = trees(tokenizer, [prompt], [answers])
    assert [tokenizer.decode(ids) for ids in tree.completions] == [
        "4<｜end▁of▁sentence｜>",
        "no end of thinking<｜end▁of▁sentence｜>",
    ]
