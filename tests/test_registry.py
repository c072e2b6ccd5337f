"""The registry: broken strangers are reported by name, and never stop the others."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit import registry
from alignkit.errors import ConfigError, PluginError
from alignkit.rewards import Answers, build_judge, build_rewards, check_judge, check_rewards
from helpers import write_plugin

ROOT = Path(__file__).resolve().parents[1]

SOUND = """
    from alignkit import Method, Term, hookimpl

    class Mine(Method):
        name = "{name}"
        data = "text"
        def loss(self, batch, models):
            return {{"nll": Term(-models.policy(batch).logps, over="tokens")}}

    @hookimpl
    def register_methods():
        return [Mine]
"""

SCORING = """
    from alignkit import hookimpl

    class Weighted:
        def __init__(self, factor=1.0):
            self.factor = factor
        def __call__(self, lengths):
            return [self.factor * n for n in lengths]

    def shorter(first, second):
        return [float(len(a) < len(b)) for a, b in zip(first, second)]

    @hookimpl
    def register_rewards():
        return {"weighted": Weighted, "wrong": 3}

    @hookimpl
    def register_judges():
        return {"shorter": shorter}
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a distribution: its entry point, and the code of its module."""
    count = iter(range(100))

    def add(distribution: str, entry: str, code: str, group: str = "alignkit") -> None:
        folder = tmp_path / f"site-{next(count)}"
        monkeypatch.syspath_prepend(write_plugin(folder, entry, code, distribution, group))

    return add


def listed(name: str) -> registry.Plugin:
    (found,) = [p for p in registry.plugins() if p.name == name]
    return found


def test_a_sound_plugin_is_found(install: Install) -> None:
    install("somebodys-method", "mine", SOUND.format(name="mine"))
    assert registry.get("mine").name == "mine"
    plugin = listed("mine")
    assert (plugin.distribution, plugin.version, plugin.problem) == ("somebodys-method", "1.0", None)


def test_two_distributions_with_one_method_name(install: Install) -> None:
    install("first-dist", "mine", SOUND.format(name="mine"))
    install("second-dist", "mine", SOUND.format(name="mine"))
    with pytest.raises(
        PluginError, match="two distributions provide the method 'mine', first-dist and second-dist; uninstall one"
    ):
        registry.get("mine")
    assert "first-dist and second-dist" in (listed("mine").problem or "")


def test_a_plugin_whose_import_raises(install: Install) -> None:
    install("broken-dist", "broken", "raise RuntimeError('no such luck')")
    with pytest.raises(PluginError, match="'broken' of broken-dist cannot be loaded: RuntimeError: no such luck"):
        registry.get("broken")


def test_a_plugin_whose_dependency_is_missing(install: Install) -> None:
    install("broken-dist", "broken", "import a_module_that_nobody_has")
    with pytest.raises(PluginError, match="ModuleNotFoundError: No module named 'a_module_that_nobody_has'"):
        registry.get("broken")


def test_a_misspelt_hook(install: Install) -> None:
    install("misspelt-dist", "mine", SOUND.format(name="mine").replace("def register_methods", "def register_method"))
    with pytest.raises(PluginError, match=r"(?s)'mine' of misspelt-dist: unknown hook 'register_method'.*hookspecs"):
        registry.get("mine")


def test_an_entry_point_without_its_method(install: Install) -> None:
    install("other-dist", "mine", SOUND.format(name="other"))
    with pytest.raises(PluginError, match="'mine' of other-dist provides no method of that name; it provides 'other'"):
        registry.get("mine")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (('data = "text"', 'data = "texts"'), "data = 'texts'; it must be one of text, pairs, unpaired, prompts"),
        (("def loss", "def los"), "does not define loss"),
        (("(Method)", ""), "is not a subclass of alignkit.Method"),
        (('data = "text"', 'data = "text"; uses = frozenset({"critics"})'), "unknown roles"),
        (('data = "text"', 'data = "text"; Config = dict'), "not a subclass of alignkit.MethodConfig"),
    ],
)
def test_a_class_that_breaks_the_contract(install: Install, change: tuple[str, str], problem: str) -> None:
    install("wrong-dist", "mine", SOUND.format(name="mine").replace(*change))
    with pytest.raises(PluginError, match=problem):
        registry.get("mine")


def test_a_setting_that_the_run_already_has(install: Install) -> None:
    code = SOUND.format(name="mine").replace(
        'data = "text"', 'data = "text"; Config = type("Config", (MethodConfig,), {"__annotations__": {"seed": int}})'
    )
    install("clash-dist", "mine", code.replace("import Method,", "import Method, MethodConfig,"))
    with pytest.raises(PluginError, match="has settings that the run already has: seed; rename them"):
        registry.get("mine")


def test_broken_plugins_do_not_stop_the_others(install: Install) -> None:
    install("sound-dist", "mine", SOUND.format(name="mine"))
    install("broken-dist", "broken", "raise SystemError('at import')")
    install("misspelt-dist", "misspelt", SOUND.format(name="misspelt").replace("register_methods", "register_method"))
    install("first-dist", "twice", SOUND.format(name="twice"))
    install("second-dist", "twice", SOUND.format(name="twice"))
    assert registry.get("mine").name == "mine"
    found = {p.name: p for p in registry.plugins()}
    assert found["mine"].problem is None
    assert found["dpo"].problem is None
    for name in ("broken", "misspelt", "twice"):
        assert found[name].method is None
        assert name in (found[name].problem or "")


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(PluginError, match=r"no method is called 'dpoo'; installed: .*dpo.* Did you mean 'dpo'\?"):
        registry.get("dpoo")


# --------------------------------------------------------------------------------------------- rewards and judges


def answers(*completions: str) -> Answers:
    n = len(completions)
    return Answers(["?"] * n, list(completions), {}, [1] * n, [len(c) for c in completions], [True] * n)


def test_a_registered_reward_and_judge_are_used_by_name(install: Install) -> None:
    install("somebodys-rewards", "weighted", SCORING, "alignkit.rewards")
    install("somebodys-judges", "shorter", SCORING, "alignkit.judges")
    assert registry.names(registry.REWARDS) == ["weighted"]
    assert build_rewards({"use": "weighted", "factor": 2, "weight": 10}).score(answers("a", "bcd")).total == [20, 60]
    assert build_judge("shorter").wins(answers("a", "bcd"), answers("xx", "yy")) == [1, 0]
    assert "weighted" not in registry.names()  # rewards are no methods


def test_a_reward_of_a_plugin_is_found_when_it_is_misspelt(install: Install) -> None:
    install("somebodys-rewards", "weighted", SCORING, "alignkit.rewards")
    with pytest.raises(
        ConfigError, match=r"no reward is called 'weigthed'. Did you mean 'weighted'\? Names: .*weighted"
    ):
        check_rewards("weigthed")
    with pytest.raises(
        PluginError, match=r"no reward is called 'weigthed'; installed: weighted. Did you mean 'weighted'\?$"
    ):
        registry.reward("weigthed")
    with pytest.raises(PluginError, match=r"no judge is called 'shorter'; no judge is installed.$"):
        registry.judge("shorter")


def test_broken_rewards_are_reported_by_name(install: Install) -> None:
    install("broken-dist", "broken", "raise RuntimeError('no such luck')", "alignkit.rewards")
    install("misspelt-dist", "misspelt", SCORING.replace("register_rewards", "register_reward"), "alignkit.rewards")
    install("other-dist", "other", SCORING, "alignkit.rewards")
    install("wrong-dist", "wrong", SCORING, "alignkit.rewards")
    install("first-dist", "twice", SCORING, "alignkit.judges")
    install("second-dist", "twice", SCORING, "alignkit.judges")
    for name, says in (
        ("broken", "reward 'broken' of broken-dist cannot be loaded: RuntimeError: no such luck"),
        ("misspelt", r"(?s)reward 'misspelt' of misspelt-dist: unknown hook 'register_reward'.*hookspecs"),
        ("other", "entry point 'other' of other-dist provides no reward of that name; it provides 'weighted', 'wrong'"),
        ("wrong", "reward 'wrong' of wrong-dist must be a function or a class, got int"),
    ):
        with pytest.raises(PluginError, match=says):
            check_rewards(name)
    with pytest.raises(PluginError, match="two distributions provide the judge 'twice', first-dist and second-dist"):
        check_judge("twice")
    check_rewards("exact")  # nobody else is stopped


def test_a_plugin_cannot_take_the_name_of_a_reward_that_ships(install: Install) -> None:
    install("greedy-dist", "exact", SCORING.replace("weighted", "exact"), "alignkit.rewards")
    with pytest.raises(PluginError, match="'exact' is built in, but a plugin provides one of the same name"):
        check_rewards("exact")


def test_first_party_methods_are_those_of_the_projects_own_distributions() -> None:
    projects = [tomllib.loads(p.read_text()) for p in (ROOT / "plugins").glob("*/pyproject.toml")]
    published = {m: p["project"]["name"] for p in projects for m in p["project"]["entry-points"]["alignkit"]}
    assert registry.first_party() == published


def test_an_install_line_is_given_for_the_projects_own_methods_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # an invented name on a package index may belong to anyone
    for invented in ("dpoo", "dto", "zzzz", "DPO", "kahneman"):
        with pytest.raises(PluginError) as error:
            registry.get(invented)
        assert "pip install" not in str(error.value)
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    with pytest.raises(PluginError, match=r"no method is called 'rloo'; .* To add it: pip install alignkit-grpo$"):
        registry.get("rloo")
    with pytest.raises(PluginError, match=r"no method is called 'dpoo'; no method is installed\.$"):
        registry.get("dpoo")
