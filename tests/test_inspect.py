"""Models looked at token by token: against the model's own word on each prefix and each sequence alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import EOS, alone, byte_tokenizer, ids_of, write_classifier
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.errors import AlignkitError, ConfigError, DataError, ModelError, RewardError
from alignkit.insight.inspect import pair_of, pair_ratios, reward_prefixes, write_html, write_json
from alignkit.insight.inspect.inspect_output import _coloured, _show_table, tokens
from alignkit.insight.inspect.prefixes import prefix_scores
from alignkit.insight.inspect.token_texts import token_texts
from alignkit.rewards.models import RewardModel
from helpers import write_tiny

TEXT = "Sure: 3 < 4"


# ------------------------------------------------------------------------------------------------- token texts


@settings(deadline=None)
@given(st.text(max_size=20), st.text(min_size=1, max_size=20))
def test_pieces_are_the_text_also_where_a_character_is_several_tokens(prompt: str, text: str) -> None:
    tokenizer = byte_tokenizer()
    made = token_texts(tokenizer, ids_of(prompt), ids_of(text))
    assert len(made) == len(ids_of(text))
    assert "".join(made) == text


def test_the_end_of_a_sequence_has_its_name() -> None:
    assert token_texts(byte_tokenizer(), ids_of("a"), [*ids_of("é"), EOS]) == ["", "é", "<|end|>"]


def test_a_character_that_is_never_finished() -> None:
    assert token_texts(byte_tokenizer(), ids_of("a"), ids_of("é")[:1]) == ["\ufffd"]


# ---------------------------------------------------------------------------------------------------- prefixes


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_every_prefix_has_the_score_that_it_has_alone(architecture: str, tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "reward", architecture)
    found = reward_prefixes(folder, TEXT, "Hi.")
    ids = [*ids_of(TEXT), EOS]
    want = [alone(folder, [*ids_of("Hi."), *ids[:n]]) for n in range(len(ids) + 1)]
    assert found.unit == "tokens"
    assert [found.start, *found.scores] == pytest.approx(want, abs=1e-5)
    assert found.changes == pytest.approx([b - a for a, b in itertools.pairwise(want)], abs=2e-5)
    assert "".join(found.pieces) == TEXT + "<|end|>"


def count_sequences(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    scores = model.scores
    monkeypatch.setattr(model, "scores", lambda sequences: counts.append(len(sequences)) or scores(sequences))
    return counts


def test_a_causal_model_is_asked_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = RewardModel(write_classifier(tmp_path / "reward"), "cpu", 1000)
    counts = count_sequences(model, monkeypatch)
    assert len(prefix_scores(model, [5], list(range(20, 32)))) == 13
    assert counts == [1, 2]


def test_a_decoder_that_looks_ahead_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = RewardModel(write_classifier(tmp_path / "reward"), "cpu", 1000)
    inner = model.model.base_model.forward

    def ahead(*arguments: Any, **given: Any) -> Any:  # every position sees the mean of all
        out = inner(*arguments, **given)
        mask = given.get("attention_mask", torch.ones(out.last_hidden_state.shape[:2]))[..., None]
        mean = (out.last_hidden_state * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        out.last_hidden_state = out.last_hidden_state + mean
        return out

    monkeypatch.setattr(model.model.base_model, "forward", ahead)
    counts = count_sequences(model, monkeypatch)
    ids = list(range(20, 32))
    got = prefix_scores(model, [5], ids)
    assert counts == [1, 2, 13]
    assert got == pytest.approx([model.scores([[5, *ids[:n]]])[0] for n in range(13)], abs=1e-5)


def test_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "reward")
    found = reward_prefixes(folder, "yes", [{"role": "user", "content": "q"}])
    prompt = [*ids_of("user:q"), EOS, *ids_of("assistant:")]
    assert found.start == pytest.approx(alone(folder, prompt), abs=1e-5)
    assert found.scores[-1] == pytest.approx(alone(folder, [*prompt, *ids_of("yes"), EOS]), abs=1e-5)


def test_a_run_stands_for_its_model(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "run/model")
    (tmp_path / "run/config.yaml").write_text("method: reward\n")
    assert reward_prefixes(tmp_path / "run", "ab").scores == reward_prefixes(folder, "ab").scores


def test_a_function_is_asked_word_by_word() -> None:
    seen: list[Any] = []

    def reward(prompts: Any, completions: Any, lengths: Any, ended: Any) -> list[float]:
        seen.extend(zip(prompts, completions, lengths, ended, strict=True))
        return [float(text.count("o")) for text in completions]

    found = reward_prefixes(reward, " so  it\nso", "p")
    assert (found.unit, found.pieces, found.start) == ("words", (" so", "  it", "\nso"), None)
    assert seen == [("p", " so", 1, False), ("p", " so  it", 2, False), ("p", " so  it\nso", 3, True)]
    assert found.scores == (1.0, 1.0, 2.0)
    assert found.changes == (0.0, 0.0, 1.0)


def test_what_is_no_reward_model(tmp_path: Path) -> None:
    three = write_classifier(tmp_path / "three", labels=3)
    with pytest.raises(ConfigError, match="has 3 labels; a reward model has 1"):
        reward_prefixes(three, "a")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="an adapter only; merge it into its base"):
        reward_prefixes(tmp_path / "adapter", "a")
    write_tiny(tmp_path / "lm")
    with pytest.raises(ConfigError, match="holds a LlamaForCausalLM, which is not a reward model"):
        reward_prefixes(tmp_path / "lm", "a")
    with pytest.raises(ConfigError, match=r"the folder .* does not exist"):
        reward_prefixes(str(tmp_path / "none"), "a")
    with pytest.raises(ConfigError, match="Did you mean 'numeric'"):
        reward_prefixes("numerical", "a")
    with pytest.raises(ConfigError, match="the text is empty; give an answer"):
        reward_prefixes(three, " ")
    with pytest.raises(RewardError, match="have 101 tokens, the model in "):
        reward_prefixes(write_classifier(tmp_path / "short", "gpt2"), "a" * 99, "p")


# ------------------------------------------------------------------------------------------------------- pairs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a policy that has left it, and an adapter on the base."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("models")
    write_tiny(folder / "base")
    generator = torch.Generator().manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    policy = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder / "run/model")
    tokenizer.save_pretrained(folder / "run/model")
    (folder / "run/config.yaml").write_text("method: dpo\n")
    return folder


def by_hand(folder: Path, prompt: str, answer: str, peft: bool = False) -> list[float]:
    """Log-probabilities of the answer's tokens and its end, in float64."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder.parents[1] / "base" if peft else folder)
    model = (PeftModel.from_pretrained(model, folder) if peft else model).double().eval()
    lead, ids = tokenizer(prompt)["input_ids"], [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(logps[i - 1, ids[i]]) for i in range(len(lead), len(ids))]


PAIR = {"prompt": "1 red fox:", "chosen": " yes the owl", "rejected": " no"}


def test_ratios_are_those_of_the_two_models(models: Path) -> None:
    found = pair_ratios(str(models / "policy"), pair_of([PAIR], 1), str(models / "base"))
    for side, answer in ((found.chosen, PAIR["chosen"]), (found.rejected, PAIR["rejected"])):
        policy, base = (by_hand(models / name, PAIR["prompt"], answer) for name in ("policy", "base"))
        assert side.policy == pytest.approx(policy, abs=1e-4)
        assert side.ratios == pytest.approx([p - b for p, b in zip(policy, base, strict=True)], abs=2e-4)
        assert side.total == pytest.approx(sum(policy) - sum(base), abs=1e-3)
        assert "".join(side.pieces) == answer + "<|end|>"
        assert all(side.trained)
    assert found.margin == pytest.approx(found.chosen.total - found.rejected.total)
    assert found.margin != 0


def test_an_adapter_brings_its_reference_and_a_run_its_model(models: Path) -> None:
    found = pair_ratios(str(models / "run"), pair_of([PAIR], 1))
    assert found.reference == str(models / "base")
    assert found.chosen.policy == pytest.approx(
        by_hand(models / "run/model", PAIR["prompt"], PAIR["chosen"], True), abs=1e-4
    )
    assert found.chosen.reference == pytest.approx(by_hand(models / "base", PAIR["prompt"], PAIR["chosen"]), abs=1e-4)


@pytest.mark.parametrize("settings", [{"bias": "all"}, {"init_lora_weights": "pissa"}], ids=["bias", "pissa"])
def test_the_reference_is_the_base_where_switching_the_adapter_off_is_not(
    settings: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(models / "base")
    for module in base.modules():
        if isinstance(module, torch.nn.Linear) and settings.get("bias"):
            module.bias = torch.nn.Parameter(torch.zeros(module.out_features))
    base.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    adapted.peft_config["default"].base_model_name_or_path = str(models / "base")
    adapted.save_pretrained(tmp_path / "policy")
    AutoTokenizer.from_pretrained(models / "base").save_pretrained(tmp_path / "policy")
    found = pair_ratios(str(tmp_path / "policy"), pair_of([PAIR], 1))
    for side, answer in ((found.chosen, PAIR["chosen"]), (found.rejected, PAIR["rejected"])):
        assert side.reference == pytest.approx(by_hand(models / "base", PAIR["prompt"], answer), abs=1e-4)


def test_turns_that_are_not_learned_do_not_count(models: Path, tmp_path: Path) -> None:
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(models / "policy", tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(models / "policy")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    answer = {"role": "assistant", "content": "red"}
    row = {
        "prompt": [{"role": "user", "content": "owl"}],
        "chosen": [answer, {"role": "user", "content": "big hill"}, {"role": "assistant", "content": "fox"}],
        "rejected": [{"role": "assistant", "content": "blue"}],
    }
    found = pair_ratios(str(tmp_path / "policy"), pair_of([row], 1), str(models / "base")).chosen
    read = "".join(p for p, t in zip(found.pieces, found.trained, strict=True) if t)
    assert read == "red<|end|>fox<|end|>"
    assert found.total == pytest.approx(sum(r for r, t in zip(found.ratios, found.trained, strict=True) if t))
    assert found.total != pytest.approx(sum(found.ratios))


def test_pairs_and_models_that_do_not_fit(models: Path, tmp_path: Path) -> None:
    rows = [PAIR, {**PAIR, "rejected": PAIR["chosen"]}]
    with pytest.raises(DataError, match=r"row 2 is dropped \(identical answers\)"):
        pair_of(rows, 2)
    with pytest.raises(DataError, match="row 3 does not exist; it has 2 rows"):
        pair_of(rows, 3)
    row = pair_of(rows, 1)
    with pytest.raises(
        ConfigError, match="is not an adapter, so it has no base to use as the reference; give --reference"
    ):
        pair_ratios(str(models / "policy"), row)
    other = tmp_path / "other"
    write_tiny(other)
    byte_tokenizer().save_pretrained(other)
    with pytest.raises(ModelError, match="have different tokens"):
        pair_ratios(str(models / "policy"), row, str(other))
    with pytest.raises(ModelError, match=r"the folder .* does not exist"):
        pair_ratios(str(tmp_path / "a/none"), row, str(models / "base"))
    with pytest.raises(AlignkitError, match="lacks"):
        pair_ratios(write_classifier(tmp_path / "rm"), row, str(models / "base"))


# ------------------------------------------------------------------------------------------------ what is shown


def test_strengths_are_parts_of_the_largest_value() -> None:
    made = tokens(["a", "\x1b[31mb", "c"], [0.5, -2.0, 0.0], [1, 2, 3])
    assert [t["strength"] for t in made] == [0.25, -1.0, 0.0]
    assert made[1]["text"] == "\ufffd[31mb"  # nothing may steer the terminal
    assert [t["strength"] for t in tokens(["a"], [0.0], [1])] == [0.0]


def test_colours_of_the_terminal() -> None:
    made = _coloured(tokens(["a", "[b]", "c"], [0.1, -2.0, 1.0], [0, 0, 0]))
    assert made.plain == "a[b]c"
    styles = {made.plain[s.start : s.end]: str(s.style) for s in made.spans}
    assert styles == {"[b]": "black on #e08640", "c": "black on #9fcae2"}  # 75 % and 37.5 % of the way from white


def test_tokens_that_the_table_leaves_out_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    values = [0.0, *(0.1 * n for n in range(1, 13))]
    _show_table(tokens(list("abcdefghijklm"), values, values), ("n", "token", "change", "score"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [str(n) for n in range(4, 14)]
    assert lines[-1] == "3 of 13 tokens with smaller values are not listed"


def test_html_is_inert_and_json_whole(tmp_path: Path) -> None:
    found = reward_prefixes(lambda completions: [float(len(c)) for c in completions], "<script>x</script> y", "<b>")
    write_html(found, tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert "<script" not in text
    assert "<b>" not in text
    assert "&lt;script&gt;x&lt;/script&gt;" in text
    write_json(found, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["changes"] == [0.0, 2.0]


@pytest.fixture
def call(command: Callable[..., Any]) -> Callable[..., Any]:
    """Run `alignkit inspect ARGUMENTS`."""
    return partial(command, "inspect")


def test_the_command_for_rewards(call: Callable[..., Any], tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "reward")
    code, out, err = call(
        "reward", folder, "--prompt", "Hi", "--text", "[b]no[/b]", "--json", "a.json", "--html", "a.html"
    )
    assert (code, err) == (0, "")
    assert out.startswith("[b]no[/b]<|end|>\n")
    score = json.loads((tmp_path / "a.json").read_text())["scores"][-1]
    assert f"score {score:.4g} of the answer" in out
    assert (tmp_path / "a.html").is_file()


def test_the_command_for_pairs(call: Callable[..., Any], models: Path, tmp_path: Path) -> None:
    given = ("pair", "--policy", models / "policy", "--reference", models / "base", "--beta", "2")
    answers = [part for k, v in PAIR.items() for part in (f"--{k}", v)]
    code, out, err = call(*given, *answers, "--json", "a.json", "--html", "a.html")
    assert (code, err) == (0, "")
    margin = json.loads((tmp_path / "a.json").read_text())["margin"]
    assert f"margin h(chosen) - h(rejected) = {margin:+.4f} nats; times beta 2: {2 * margin:+.4f}" in out
    assert "h = " in (tmp_path / "a.html").read_text()
    (tmp_path / "p.jsonl").write_text(json.dumps(PAIR) + "\n")
    assert call(*given, "--data", "p.jsonl", "--row", 1)[1] == out
    code, _, err = call(*given, "--chosen", "a")
    assert (code, err) == (2, "error: give either --data and --row, or --prompt, --chosen and --rejected\n")
