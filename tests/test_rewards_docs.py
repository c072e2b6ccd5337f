"""The page about rewards says what the code does."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml
from classifiers import write_classifier

from alignkit.rewards import Answers, build_rewards, check_judge, check_rewards
from alignkit.rewards.spec import JUDGE, REWARD

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_yaml_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JUDGE_KEY", "x")
    for name in "abc":
        write_classifier(tmp_path / "runs" / f"reward-{name}" / "model")
    read = [yaml.safe_load(block) for block in blocks("yaml")]
    assert [list(settings) for settings in read] == [["reward"], ["reward"], ["reward"], ["judge"]]
    for settings in read[:3]:
        check_rewards(settings["reward"])
    check_judge(read[3]["judge"])


def test_the_functions_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    function, plugin = blocks("python")
    Path("of_the_page.py").write_text(function)
    Path("plugin_of_the_page.py").write_text(plugin)
    asked = Answers(
        ["?", "?"], ["it is 4", "it  is 5"], {"answer": ["4", "4"], "level": [1, 2]}, [1, 2], [3, 3], [True] * 2
    )
    assert build_rewards("of_the_page:reward").score(asked).total == [1.0, 0.0]
    assert build_rewards({"use": "plugin_of_the_page:Fluency", "strictness": 3}).score(asked).total == [0.0, -3.0]


def test_everything_that_ships_is_named_with_its_options() -> None:
    ships = PAGE.split("\n## What ships\n")[1].split("\n## ")[0]
    table = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", ships, re.MULTILINE))
    assert sorted(table) == sorted(REWARD.built_in)
    for name, cls in REWARD.built_in.items():
        where = PAGE.split("## Language models")[1] if name == "llm" else table[name]
        assert [o for o in cls.model_fields if not re.search(rf"\b{o}\b", where)] == [], name
    assert all(re.search(rf"\b{o}\b", PAGE) for o in JUDGE.built_in["llm"].model_fields)
