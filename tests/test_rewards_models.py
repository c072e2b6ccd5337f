"""Reward models from a folder: the tokens that they read, the position that they are read at, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import EOS, alone, byte_tokenizer, ids_of, write_classifier

from alignkit.data import load
from alignkit.data.tokenise import tokenise
from alignkit.errors import ConfigError, ModelError, RewardError
from alignkit.models.ranks import Ranks
from alignkit.pairwise import PAIRWISE, pairwise_ids
from alignkit.rewards import Answers, build_rewards, check_rewards
from alignkit.rewards.functions import RowError
from alignkit.rewards.models import RewardModel, trees


def answers(pairs: list[tuple[Any, Any]], ended: list[bool] | None = None) -> Answers:
    n = len(pairs)
    prompts, completions = ([pair[k] for pair in pairs] for k in (0, 1))
    return Answers(prompts, completions, {}, list(range(5, 5 + n)), [1] * n, ended or [True] * n)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_classifier(tmp_path_factory.mktemp("rm") / "reward")


PAIRS = [("What is it? ", "An owl."), ("Hi", " there"), ("A long question about foxes? ", "y"), ("Who? ", "")]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_scores_are_those_of_each_text_alone(architecture: str, max_tokens: int, tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / architecture, architecture)
    rewards = build_rewards({"use": folder, "max_tokens": max_tokens})
    found = rewards.score(answers(PAIRS, [True, False, True, True])).total
    texts = [
        [*ids_of("What is it? An owl."), EOS],
        ids_of("Hi there"),
        [*ids_of("A long question about foxes? y"), EOS],
    ]
    want = [alone(folder, ids) for ids in [*texts, [*ids_of("Who? "), EOS]]]
    assert found == pytest.approx(want, abs=1e-5)
    assert len({round(v, 3) for v in want}) == 4  # the model tells them apart
    assert rewards.names == [architecture]
    assert rewards.model_folder == folder


def test_the_tokens_are_those_that_training_has(folder: str) -> None:
    tokenizer = byte_tokenizer()
    rng = random.Random(3)
    words = ["an owl", "the <|end|> sign", "fox.", " a b", "end "]
    rows: list[dict[str, Any]] = [
        {"prompt": rng.choice(words) + f"{i}".replace("0", "o"), "completion": rng.choice(words)} for i in range(6)
    ]
    rows += [{"prompt": [{"role": "user", "content": r["prompt"]}],
              "completion": [{"role": "assistant", "content": r["completion"]}]} for r in rows]  # fmt: skip
    trained, _ = tokenise(load(rows[:6], "text"), tokenizer)
    chats, _ = tokenise(load(rows[6:], "text"), tokenizer)
    want = [alone(folder, [*e.prompt.tolist(), *e.completions[0].tokens.tolist()]) for e in [*trained, *chats]]
    found = build_rewards(folder).score(answers([(r["prompt"], r["completion"]) for r in rows])).total
    assert found == pytest.approx(want, abs=1e-5)


def test_chats_go_through_the_template_and_a_cut_answer_has_no_end(folder: str) -> None:
    prompt = [{"role": "user", "content": "Who?"}]
    answer = [{"role": "assistant", "content": "An owl"}]
    asked = [*ids_of("user:Who?"), EOS, *ids_of("assistant:")]
    whole = [*asked, *ids_of("An owl")]
    found = build_rewards(folder).score(answers([(prompt, answer), (prompt, answer)], [True, False])).total
    assert found == pytest.approx([alone(folder, [*whole, EOS]), alone(folder, whole)], abs=1e-5)


def test_the_order_of_answers_and_their_batch_mates_do_not_matter(folder: str) -> None:
    rewards = build_rewards(folder)
    together = rewards.score(answers(PAIRS)).total
    assert rewards.score(answers(PAIRS[::-1])).total[::-1] == pytest.approx(together, abs=1e-6)
    assert [rewards.score(answers([pair])).total[0] for pair in PAIRS] == pytest.approx(together, abs=1e-6)


def test_equal_answers_have_equal_scores(folder: str) -> None:
    # or the float noise of their batches would be a preference, once a group is divided by its standard deviation
    repeated = [PAIRS[0], *PAIRS, PAIRS[0], *PAIRS[::-1]] * 3
    found = build_rewards({"use": folder, "max_tokens": 64}).score(answers(repeated)).total
    assert len(set(found)) == len(PAIRS)


def test_an_ensemble_of_models(folder: str, tmp_path: Path) -> None:
    other = write_classifier(tmp_path / "other", seed=1)
    scores = build_rewards({"ensemble": [folder, other], "combine": "min"}).score(answers(PAIRS))
    first, second = (build_rewards(f).score(answers(PAIRS)).total for f in (folder, other))
    assert scores.total == [min(a, b) for a, b in zip(first, second, strict=True)]
    assert scores.total not in (first, second)
    assert list(scores.parts) == ["ensemble", "ensemble/reward", "ensemble/other"]


def test_the_model_is_frozen_whole_and_without_dropout(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "run" / "model", attention_dropout=0.5)
    model = RewardModel(folder, "cpu", 100)
    assert not model.model.training
    assert not any(p.requires_grad for p in model.model.parameters())
    assert {p.dtype for p in model.model.parameters()} == {torch.float32}
    assert build_rewards(folder).names == ["run"]  # a run's folder has its model in model/


# ------------------------------------------------------------------------------------------------- what is refused


def test_folders_that_hold_no_reward_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("[1")
    (tmp_path / "causal").mkdir()
    (tmp_path / "causal" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    write_classifier(tmp_path / "run" / "model")
    three = write_classifier(tmp_path / "three", labels=3)
    two = write_classifier(tmp_path / "two", labels=2)
    pairwise = write_classifier(tmp_path / "pairwise", **{PAIRWISE: True})
    for given, says in (
        (tmp_path / "empty", "holds no model: it has no config.json"),
        (tmp_path / "adapter", "holds no model: it has an adapter only"),
        (tmp_path / "run", r"run' is a run's folder; its model is in .*run/model$"),
        (tmp_path / "odd", "cannot read .*config.json"),
        (tmp_path / "missing", "missing' does not exist"),
        (tmp_path / "causal", "holds a LlamaForCausalLM, which is not a reward model"),
        (three, "has 3 labels; a reward model has 1"),
        (two, "has 2 labels; a reward model has 1"),
        (pairwise, "compares two completions; give it as `judge: "),
        ({"use": three}, "has 3 labels"),
    ):
        with pytest.raises(ConfigError, match=says):
            check_rewards(given)
    with pytest.raises(ConfigError, match=r"no option 'batch_size'. .*Options: max_tokens"):
        check_rewards({"use": write_classifier(tmp_path / "good"), "batch_size": 4})


def test_the_home_folder_is_written_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    there = write_classifier(tmp_path / "rm")
    rewards = build_rewards("~/rm")
    assert rewards.model_folder == there  # where a critic is loaded from
    assert rewards.names == ["rm"]
    asked = answers([("Who? ", "An owl")])
    assert rewards.score(asked).total == build_rewards(there).score(asked).total


def test_a_model_without_its_head_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_classifier(tmp_path / "headless")
    weights = load_file(f"{folder}/model.safetensors")
    del weights["score.weight"]
    save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
    check_rewards(folder)
    with pytest.raises(ModelError, match=r"lacks weights: score\.weight"):
        build_rewards(folder)


def test_a_folder_that_cannot_be_loaded(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "broken")
    Path(folder, "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match=r"cannot load a reward model from .*broken"):
        build_rewards(folder)


def test_an_answer_beyond_the_models_positions(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "short", "gpt2")
    with pytest.raises(RewardError, match=r"'short', row 6, .*: prompt and completion have 72 tokens, the model .* 64"):
        build_rewards(folder).score(answers([("a", "b"), ("a", "b" * 70)]))


def test_the_folder_is_not_changed(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "kept")
    before = {p.name: p.read_bytes() for p in Path(folder).iterdir()}
    build_rewards(folder).score(answers(PAIRS))
    assert {p.name: p.read_bytes() for p in Path(folder).iterdir()} == before
    assert json.loads(before["config.json"])["pad_token_id"] == EOS


# -------------------------------------------------------------------------------------------------- two completions


def test_equal_and_empty_answers_have_tokens_too() -> None:
    (tree,) = trees(byte_tokenizer(), ["Who?"], [["owl", "owl", ""]])
    assert tree.prompt == ids_of("Who?")
    assert tree.completions == [[*ids_of("owl"), EOS], [*ids_of("owl"), EOS], [EOS]]
    (tree,) = trees(byte_tokenizer(), ["Who?"], [["", " "]])
    assert (tree.prompt, tree.completions) == (ids_of("Who?"), [[EOS], [EOS]])


def test_what_a_pairwise_model_reads() -> None:
    assert pairwise_ids([1, 2], [3], [4, 5], 9) == [1, 2, 3, 9, 4, 5, 9]
    assert pairwise_ids([1], [3, 9], [9], 9) == [1, 3, 9, 9]
    assert pairwise_ids([1], [], [2], 9) == [1, 9, 2, 9]


class Two(Ranks):
    """One of two ranks, of which the other one makes three passes."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 2

    def most(self, n: int) -> int:
        return max(n, 3)


@pytest.mark.parametrize("given", [["a", "b"], [], ["far too long " * 9], None])
def test_a_rank_takes_part_in_all_passes_of_a_shared_model(given: list[str] | None, tmp_path: Path) -> None:
    """Also with fewer answers, none, or those that it cannot read: the other one waits for its part of the weights."""
    model = RewardModel(write_classifier(tmp_path / "gpt2", "gpt2"), "cpu", 1)
    want = [alone(model.folder, ids_of(text)) for text in given or [] if len(text) < 9]
    passes: list[int] = []
    model.grader.register_forward_hook(lambda *_: passes.append(1))
    model.ranks = Two()

    def sequences() -> list[list[int]]:
        if given is None:
            raise ValueError("planted by the test")
        return [ids_of(text) for text in given]

    if given is None or len("".join(given)) > 64:
        with pytest.raises((ValueError, RowError), match=r"planted|reads at most 64"):
            model.scores(sequences)
    else:
        assert model.scores(sequences) == pytest.approx(want, abs=1e-6)
    assert len(passes) == 3
