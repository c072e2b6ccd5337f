"""Settings of rollouts: what contradicts itself is refused without its secrets, and old names go on to work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import alignkit
from alignkit.config import RunConfig, gathered, read_yaml, split, write_yaml
from alignkit.errors import ConfigError, PluginError
from alignkit.method import MethodConfig
from alignkit.rollout_settings import Rollout
from alignkit.runs.folder import read_metrics
from helpers import make_rows, write_plugin

RUN = {"method": "grpo", "model": "m", "data": "d"}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"urls": ["http://a:1"]}, "rollout: urls has an effect with backend: vllm only"),
        ({"sync": "folder"}, "rollout: sync has an effect with backend: vllm only"),
        ({"backend": "vllm", "urls": ["http://me:secret@a:1"]}, "urls: number 1 contains a user or a password"),
        ({"backend": "vllm", "urls": ["http://a:1", "a:2"]}, "urls: number 2 must be http:// or https://"),
        ({"backend": "vllm", "urls": ["http://a:1/v1"]}, "urls: number 1 must be http.*without .* and /v1"),
        ({"backend": "vllm", "urls": ["http://a:1", "http://a:1/"]}, "urls: an address is given twice"),
        ({"backend": "vllm", "options": {"x": 1}}, "options are for a plugin's sampler, not for vllm"),
        ({"backends": "vllm"}, "unknown setting 'rollout.backends'. Did you mean 'rollout.backend'"),
    ],
)
def test_what_cannot_be_is_refused_without_showing_a_secret(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        split({**RUN, "rollout": given}, MethodConfig)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("given", [{"sampling": {"backend": "continuous"}}, {"sampling.backend": "continuous"}])
def test_the_earlier_name_of_the_backend_means_the_same(given: dict[str, Any]) -> None:
    config, _ = split({**RUN, **given}, MethodConfig)
    assert config.rollout == Rollout(backend="continuous")
    assert "backend" not in config.describe()["sampling"]
    assert gathered({**given, "rollout": {"backend": "continuous"}})["rollout"] == {"backend": "continuous"}
    with pytest.raises(ConfigError, match=r"sampling.backend: continuous is the earlier name of rollout.backend"):
        split({**RUN, **given, "rollout": {"backend": "generate"}}, MethodConfig)


@pytest.mark.parametrize("asked", [{"stop": ["."]}, {"min_new_tokens": 2}])
def test_continuous_batching_lacks_two_settings(asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"does not support `{next(iter(asked))}`.*use backend: generate"):
        split({**RUN, "sampling": asked, "rollout": {"backend": "continuous"}}, MethodConfig)


def test_vllm_is_not_asked_for_a_temperature_that_it_refuses() -> None:
    with pytest.raises(ConfigError, match=r"vLLM samples at temperatures up to 2; lower sampling.temperature"):
        split({**RUN, "sampling": {"temperature": 2.5}, "rollout": {"backend": "vllm"}}, MethodConfig)


def reds(completions: list[str], **_: Any) -> list[float]:
    return [float(text.count("red")) for text in completions]


def run(settings: dict[str, Any], **more: Any) -> Path:
    rows = [{"prompt": r["prompt"]} for r in make_rows("text", 8)]
    given = settings | {"data": rows, "reward": reds, "group_size": 2, "sampling": {"max_new_tokens": 4}, "name": "run"}
    return alignkit.run("grpo", **given | {"max_steps": 2, "save_every": 1} | more).folder


def test_a_run_of_an_earlier_version_goes_on(settings: dict[str, Any]) -> None:
    folder = run(settings, max_steps=2, stop_on=[])
    file = folder / "config.yaml"
    saved = read_yaml(file)
    backend = saved.pop("rollout")["backend"]
    write_yaml(file, {**saved, "sampling": {**saved["sampling"], "backend": backend}})
    for path in (folder / "model").iterdir():
        path.unlink()
    (folder / "model").rmdir()
    assert [line["step"] for line in read_metrics(run(settings, resume=True))] == [1, 2]


def test_addresses_may_change_on_resume_and_the_backend_may_not() -> None:
    from alignkit.runs.config_file import check_same

    def written(**rollout: Any) -> dict[str, Any]:
        return RunConfig(**RUN, rollout=Rollout(**rollout)).describe()

    before = written(backend="vllm", urls=["http://a:1"])
    check_same(Path("run"), before, written(backend="vllm", urls=["http://b:2"], timeout=9))
    with pytest.raises(ConfigError, match=r"rollout.backend was 'vllm', is 'generate'"):
        check_same(Path("run"), before, written())


SAMPLER = """
    from alignkit import Sampled, Sampler, hookimpl


    class Fixed(Sampler):
        def __init__(self, setup, token=5):
            self.token = token

        def sample(self, request):
            return [[Sampled([self.token], False, [-0.5]) for _ in range(request.n)] for _ in request.prompts]

        def update(self, version, model):
            self.version = version


    @hookimpl
    def register_samplers():
        return {"fixed": Fixed, "broken": lambda setup: 5}
"""


def test_a_plugin_brings_a_sampler(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for entry in ("fixed", "broken"):
        folder = write_plugin(tmp_path / entry, entry, SAMPLER, f"some-{entry}", "alignkit.samplers")
        monkeypatch.syspath_prepend(str(folder))
    folder = run(settings, rollout={"backend": "fixed", "options": {"token": 7}})
    assert {line["completion/length"] for line in read_metrics(folder)} == {1.0}
    with pytest.raises(PluginError, match=r"sampler 'fixed' cannot be built: TypeError.*tokens"):
        run(settings, name="other", rollout={"backend": "fixed", "options": {"tokens": 7}})
    with pytest.raises(PluginError, match=r"sampler 'broken' must be an alignkit.Sampler, got int"):
        run(settings, name="other", rollout={"backend": "broken"})
    with pytest.raises(ConfigError, match=r"no backend is called 'fixd'. Did you mean 'fixed'"):
        run(settings, name="other", rollout={"backend": "fixd"})
