"""Vision-language checkpoints: text rows train their language model, and all other weights stay bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from test_data_parallel import torchrun
from test_engine import lines, same
from torch import Tensor
from zoo import BASE, CPU, GEMMA, LAYOUTS, config, drop_dropout, examples, one_at_a_time

import alignkit
from alignkit.data import load
from alignkit.data.rows import FaultyRowsError
from alignkit.demo.base import tokenizer_from
from alignkit.errors import ModelError
from alignkit.insight.plan import plan
from alignkit.insight.plan.experts import count
from alignkit.models.adapters import add_lora
from alignkit.models.layouts import choose_layout
from alignkit.models.loading import classifier_like, load_model, readied
from alignkit.models.packing import batch_of
from alignkit.models.quantised import layers_4bit
from alignkit.models.scoring import Scorer
from alignkit.models.towers import auto_class, towers, trunk_of
from alignkit.reference.keys import fingerprint
from alignkit.rewards.models import RewardModel
from alignkit.rollout import sample
from alignkit.rollout_settings import Sampling
from exact import assert_rounding_only, exact_copy
from helpers import WORDS, killed_before, make_rows

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL = {**VISION, "image_size": 16, "patch_size": 4}
QWEN = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 48, "patch_size": 4,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
MOE = {"intermediate_size_mlp": 64, "num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
FAMILIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "qwen 2.5 vl": lambda text: tf.Qwen2_5_VLConfig(
        text_config={**BASE, "rope_parameters": MROPE, **text}, vision_config={**QWEN, "window_size": 16}
    ),
    "qwen 3 vl": lambda text: tf.Qwen3VLConfig(
        text_config={**BASE, "head_dim": 12, "rope_parameters": MROPE, **text},
        vision_config={**QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    ),
    "gemma 3": lambda text: tf.Gemma3Config(text_config={**GEMMA, **text}, vision_config=SMALL, mm_tokens_per_image=4),
    "mistral 3": lambda text: tf.Mistral3Config(
        text_config={**BASE, "model_type": "mistral", **text},
        vision_config={**SMALL, "model_type": "pixtral", "head_dim": 8},
    ),
    "llama 4": lambda text: tf.Llama4Config(
        text_config={**BASE, "head_dim": 12, **MOE, **text},
        vision_config={**SMALL, "projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16},
    ),
    "llava": lambda text: tf.LlavaConfig(
        text_config={**BASE, "model_type": "llama", **text}, vision_config={**SMALL, "model_type": "clip_vision_model"}
    ),
}


def fresh(name: str, **text: Any) -> Any:
    """A tiny model of that family, with weights large enough that a wrong mask changes its output."""
    torch.manual_seed(0)
    model = tf.AutoModelForImageTextToText.from_config(FAMILIES[name](text)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(parameter.dim() == 1).add_(torch.randn_like(parameter) * 0.2)
    drop_dropout(model)
    return model.train()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that writes a family's checkpoint, with a tokenizer and the settings of its images."""

    @cache
    def written(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        tokenizer = tokenizer_from([" ".join(WORDS), "0 1 2 3 4 5 6 7 8 9 yes no :"], 300)
        ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
        fresh(name, vocab_size=len(tokenizer), **ends).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file, size in (("preprocessor_config.json", 16), ("processor_config.json", 8)):
            (folder / file).write_text(json.dumps({"size": size}))
        return folder

    return written


@pytest.fixture
def run_in(tmp_path: Path) -> Callable[..., alignkit.Result]:
    """Return a function that runs DPO for two steps in a folder of its own."""

    def run(folder: Path, method: str = "dpo", **changes: Any) -> alignkit.Result:
        settings = {
            "model": str(folder), "output": tmp_path / "runs", "cache_file": tmp_path / "cache.sqlite",
            "batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "device": "cpu", "data": make_rows("pairs", 8),
        }  # fmt: skip
        return alignkit.run(method, **settings | changes)

    return run


OUTSIDE = {
    "qwen 2.5 vl": ["model.visual"],
    "qwen 3 vl": ["model.visual"],
    "llama 4": ["vision_model", "multi_modal_projector"],
}
IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8]])
some_families = pytest.mark.parametrize("name", ["qwen 2.5 vl", "gemma 3", "llama 4"])
all_families = pytest.mark.parametrize("name", FAMILIES)


def outside(name: str) -> list[str]:
    return OUTSIDE.get(name, ["model.vision_tower", "model.multi_modal_projector"])


def of_towers(path: str) -> bool:
    return any(part.startswith(("visual", "vision_", "multi_modal_projector")) for part in path.split("."))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits  # type: ignore[no-any-return]


def changed(before: Path, after: Path) -> set[str]:
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert old.keys() == new.keys()
    assert all(old[k].dtype == new[k].dtype for k in old)
    return {k for k in old if not torch.equal(old[k], new[k])}


# ------------------------------------------------------------------------------------------------------- the model


@all_families
def test_packed_rows_are_scored_as_by_the_whole_models_own_forward_of_text(name: str) -> None:
    model = fresh(name)
    with torch.no_grad():
        own, exact = one_at_a_time(model, examples()), one_at_a_time(exact_copy(model), examples())
    scorer = Scorer(readied(model, config(), CPU))
    assert choose_layout(scorer, examples(), config(), CPU).kind == "forest"
    for layout in LAYOUTS:
        batch = batch_of(examples(), layout, CPU)
        with torch.no_grad():
            assert_rounding_only(scorer(batch.rows, batch.targets).logps, own, exact, f"{name}, {layout}")


@all_families
def test_only_the_language_model_is_trained(name: str) -> None:
    model = readied(fresh(name), config(), CPU)
    assert towers(model) == outside(name)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if of_towers(n)}
    assert {n for n, p in model.named_parameters() if p.requires_grad}


@all_families
@pytest.mark.parametrize(
    "lora",
    [
        {"r": 2},
        {"r": 2, "target_modules": ["q_proj", "v_proj", "gate_proj"]},
        {"r": 2, "bias": "all", "layers_to_transform": [0]},
        {"r": 2, "exclude_modules": ["q_proj"]},
        {"r": 2, "exclude_modules": r".*\.q_proj"},
    ],
)
def test_lora_adapts_the_language_model_only(name: str, lora: dict[str, Any]) -> None:
    settings = config(lora=lora)
    assert settings.lora is not None
    model = readied(add_lora(fresh(name), settings.lora), settings, CPU)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(".v_proj.lora_" in n for n in trained)
    assert not any(map(of_towers, trained))
    assert not any("lora_" in n and of_towers(n) for n, _ in model.named_parameters())
    assert any(".q_proj.lora_" in n for n in trained) == ("exclude_modules" not in lora)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["qkv"]}, r"No modules were targeted .* The linear modules are .*q_proj"),
        ({"target_modules": ["qkv", "q_proj"]}, r"target_modules: 'qkv' matches no module .* Modules: .*q_proj"),
        ({"modules_to_save": ["merger"]}, r"modules_to_save: 'merger' matches no module .* Modules: .*q_proj"),
    ],
)
def test_a_module_of_the_towers_is_refused_and_not_offered(lora: dict[str, Any], message: str) -> None:
    settings = config(lora={"r": 2, **lora})
    assert settings.lora is not None
    with pytest.raises(ModelError, match=message) as error:
        add_lora(fresh("qwen 2.5 vl"), settings.lora)
    assert not any(f", {name}" in str(error.value) for name in ("visual", "qkv", "merger"))


def test_a_text_models_adapter_is_saved_for_its_own_task_as_before() -> None:
    config_of = add_lora(tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**BASE)), config(lora=2).lora).peft_config  # type: ignore[arg-type, attr-defined]
    assert config_of["default"].task_type == "CAUSAL_LM"
    assert config_of["default"].exclude_modules is None


def test_llama_4_by_itself_is_scored_though_its_prefix_names_nothing() -> None:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(FAMILIES["llama 4"]({}).text_config).float()
    assert trunk_of(model) is model.model
    scorer = Scorer(readied(model, config(), CPU))
    assert choose_layout(scorer, examples(), config(), CPU).kind == "forest"


def test_sequences_beyond_a_chunk_of_attention_are_scored_in_padded_rows() -> None:
    scorer = Scorer(readied(fresh("llama 4", attention_chunk_size=8), config(), CPU))
    assert choose_layout(scorer, examples(), config(), CPU).kind == "padded"


def test_a_family_that_needs_an_image_is_refused_by_name() -> None:
    made = tf.Blip2Config(
        text_config={
            "model_type": "opt", "vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 1, "ffn_dim": 64,
            "num_attention_heads": 4, "max_position_embeddings": 128, "word_embed_proj_dim": 48,
        },
        vision_config=SMALL, qformer_config={**VISION, "encoder_hidden_size": 16},
    )  # fmt: skip
    scorer = Scorer(readied(tf.Blip2ForConditionalGeneration(made), config(), CPU))
    with pytest.raises(ModelError, match=r"cannot score tokens with Blip2ForConditionalGeneration: .*'pixel_values'"):
        choose_layout(scorer, examples(), config(), CPU)


def test_a_family_whose_language_model_loads_alone_is_loaded_whole() -> None:
    # AutoModelForCausalLM takes both configurations of Qwen3.5, and drops the encoder of images of the first
    assert auto_class(tf.Qwen3_5Config(), "causal") is tf.AutoModelForMultimodalLM
    assert auto_class(tf.Qwen3_5TextConfig(), "causal") is tf.AutoModelForCausalLM
    assert auto_class(tf.LlamaConfig(), "classifier") is tf.AutoModelForSequenceClassification


def test_a_model_that_names_no_language_model_is_refused() -> None:
    model = fresh("llava")
    model.get_decoder = lambda: model
    del model.model
    with pytest.raises(ModelError, match="LlavaForConditionalGeneration does not say which of its parts is the lang"):
        trunk_of(model)


# -------------------------------------------------------------------------------------------------------- the run


@all_families
def test_a_full_run_changes_the_language_model_and_nothing_else(
    name: str, folders: Callable[[str], Path], run_in: Callable[..., alignkit.Result]
) -> None:
    base = folders(name)
    result = run_in(base, save_every=1)
    saved = result.folder / "model"
    different = changed(base, saved)
    weights = load_file(saved / "model.safetensors")
    assert different == {k for k in weights if not of_towers(k)}
    assert any(map(of_towers, weights))
    whole: Any = tf.AutoModelForImageTextToText.from_pretrained(saved)
    assert torch.equal(logits(whole), logits(result.model))
    for file in ("preprocessor_config.json", "processor_config.json"):
        assert (saved / file).read_bytes() == (base / file).read_bytes()
    assert "AutoModelForMultimodalLM.from_pretrained(folder)" in (saved / "README.md").read_text()
    # neither weights nor optimiser state of the towers are in a checkpoint
    (checkpoint, *_) = sorted((result.folder / "checkpoints").iterdir(), reverse=True)
    kept = [key for file in checkpoint.glob("*.safetensors") for key in load_file(file)]
    assert any(".layers.0." in key for key in kept)
    assert not any(of_towers(key) and "inv_freq" not in key and "position_ids" not in key for key in kept)


@some_families
def test_an_adapter_is_saved_for_plain_peft_and_trained_further(
    name: str, folders: Callable[[str], Path], run_in: Callable[..., alignkit.Result]
) -> None:
    base = folders(name)
    first = run_in(base, lora=4)
    saved = first.folder / "model"
    assert not (saved / "model.safetensors").exists()
    assert "AutoPeftModel.from_pretrained(folder)" in (saved / "README.md").read_text()
    loaded: Any = peft.AutoPeftModel.from_pretrained(saved)
    torch.testing.assert_close(logits(loaded), logits(first.model), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(loaded), logits(tf.AutoModelForImageTextToText.from_pretrained(base)), atol=1e-3)
    further = run_in(saved)
    assert not same(further.model, first.model)
    merged = run_in(base, lora=4, merge_adapter=True)
    different = changed(base, merged.folder / "model")
    assert different
    assert not any(map(of_towers, different))


@pytest.mark.parametrize("lora", [None, 4])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    lora: int | None, folders: Callable[[str], Path], run_in: Callable[..., alignkit.Result]
) -> None:
    settings: dict[str, Any] = {"lora": lora, "save_every": 1, "max_steps": 3, "data": make_rows("pairs", 12)}
    base = folders("qwen 2.5 vl")
    whole = run_in(base, name="whole", **settings)
    with killed_before(2):
        run_in(base, name="halves", **settings)
    halves = run_in(base, name="halves", resume=True, **settings)
    assert lines(halves.folder) == lines(whole.folder)
    assert same(halves.model, whole.model)


@some_families
def test_every_form_of_the_reference_gives_the_same_losses(
    name: str, folders: Callable[[str], Path], run_in: Callable[..., alignkit.Result]
) -> None:
    # small rates: adapters off differ from a copy by rounding only
    def losses(reference: str, **changes: Any) -> list[float]:
        found = run_in(folders(name), reference=reference, learning_rate=1e-3, **changes)
        return [line["loss"] for line in lines(found.folder) if "loss" in line]

    assert losses("cached") == pytest.approx(losses("full", reference_cache=False), abs=1e-5)
    assert losses("adapter-off", lora=4) == pytest.approx(losses("full", lora=4, reference_cache=False), abs=1e-5)


def test_the_caches_fingerprint_covers_the_language_model_and_its_adapters() -> None:
    model = fresh("qwen 2.5 vl")
    before = fingerprint(model, dtype=torch.float32)
    assert fingerprint(fresh("qwen 2.5 vl"), dtype=torch.float32) == before
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight[0, 0] += 1
    moved = fingerprint(model, dtype=torch.float32)
    assert moved != before
    settings = config(lora=2)
    assert settings.lora is not None
    adapted = add_lora(model, settings.lora)
    assert fingerprint(adapted, dtype=torch.float32, adapters=False) == moved
    assert fingerprint(adapted, dtype=torch.float32) != moved


@some_families
def test_completions_do_not_depend_on_the_prompts_beside_them(name: str) -> None:
    tokenizer = tokenizer_from([" ".join(WORDS), "0 1 2 3 4 5 6 7 8 9 yes no :"], 300)
    model = readied(fresh(name, vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=0), config(), CPU)
    prompts, sampling = [[5, 9, 14], [8, 30, 11, 41, 26, 17]], Sampling(max_new_tokens=6)
    both = sample(model, tokenizer, prompts, sampling, n=3, seed=1)
    alone = [sample(model, tokenizer, [p], sampling, n=3, seed=1, numbers=[i])[0] for i, p in enumerate(prompts)]
    assert both == alone
    assert len({tuple(one.tokens) for many in both for one in many}) > 1
    # after `generate`, the model scores other rows as if it had sampled nothing
    scorer = Scorer(model)
    assert choose_layout(scorer, examples(), config(), CPU).kind == "forest"


@some_families
def test_methods_that_sample_train_the_language_model(
    name: str, folders: Callable[[str], Path], run_in: Callable[..., alignkit.Result]
) -> None:
    asked = {
        "data": [{"prompt": row["prompt"]} for row in make_rows("text", 8)], "sampling": {"max_new_tokens": 5},
    }  # fmt: skip
    result = run_in(folders(name), "grpo", reward=_vowels, group_size=4, **asked)
    different = changed(folders(name), result.folder / "model")
    assert different
    assert not any(map(of_towers, different))
    judged = run_in(folders(name), "nash", judge={"bradley_terry": _vowels}, lora=2, **asked)
    assert (judged.folder / "model" / "adapter_config.json").is_file()


def _vowels(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(text.count(vowel) for vowel in "aeio")) for text in completions]


def test_a_base_in_4_bits_keeps_its_towers_as_they_are(
    folders: Callable[[str], Path], run_in: Callable[..., alignkit.Result]
) -> None:
    pytest.importorskip("bitsandbytes")
    base = folders("mistral 3")
    model, _ = load_model(config(model=str(base), quantize="nf4", lora=2), CPU)
    assert len(layers_4bit(model)) == 3 * 7
    result = run_in(base, quantize="nf4", lora=2, merge_adapter=True)
    different = changed(base, result.folder / "model")
    assert len(different) == 3 * 7
    assert not any(map(of_towers, different))


def test_a_loaded_model_is_trained_like_its_folder(
    folders: Callable[[str], Path], run_in: Callable[..., alignkit.Result]
) -> None:
    base = folders("gemma 3")
    model = tf.AutoModelForImageTextToText.from_pretrained(base)
    result = run_in(base, model=model, tokenizer=str(base))
    assert same(result.model, run_in(base).model)
    assert (result.folder / "model" / "processor_config.json").is_file()


def test_a_sharded_run_saves_the_whole_checkpoint(
    folders: Callable[[str], Path], tmp_path: Path, write_rows: Callable[..., str]
) -> None:
    base = folders("qwen 2.5 vl")
    settings = {
        "model": str(base), "output": str(tmp_path / "runs"), "cache_file": str(tmp_path / "cache.sqlite"),
        "batch_size": 4, "max_steps": 2, "learning_rate": 1e-4, "device": "cpu",
        "data": write_rows(make_rows("pairs", 8)), "name": "two", "fsdp": True,
    }  # fmt: skip
    done = torchrun(["run", "dpo", *[part for k, v in settings.items() for part in ("--set", f"{k}={v}")]])
    assert done.returncode == 0, done.stderr
    one = alignkit.run("dpo", **settings | {"name": "one", "fsdp": False})
    saved = tmp_path / "runs" / "two" / "model"
    assert not any(map(of_towers, changed(base, saved)))
    assert lines(tmp_path / "runs" / "two")[-1]["loss"] == pytest.approx(lines(one.folder)[-1]["loss"], abs=1e-5)


# --------------------------------------------------------------------------------------- rewards, critics and plans


def test_a_reward_model_of_a_family_without_a_classifier_is_refused_with_the_reason(
    folders: Callable[[str], Path], run_in: Callable[..., alignkit.Result]
) -> None:
    refused = pytest.raises(ModelError, match="no sequence classifier for qwen2_5_vl, a multimodal model, so it cannot")
    with refused:
        run_in(folders("qwen 2.5 vl"), "reward")
    with refused:
        classifier_like(fresh("qwen 2.5 vl"))


def test_a_critic_on_the_policys_trunk_works_for_every_family(
    folders: Callable[[str], Path], run_in: Callable[..., alignkit.Result]
) -> None:
    data = [{"prompt": row["prompt"]} for row in make_rows("text", 8)]
    settings: dict[str, Any] = {"reward": _vowels, "data": data, "sampling": {"max_new_tokens": 5}}
    result = run_in(folders("qwen 2.5 vl"), "ppo", critic="shared", **settings)
    assert not any(map(of_towers, changed(folders("qwen 2.5 vl"), result.folder / "model")))
    with pytest.raises(ModelError, match="or a separate critic; use a text model, or critic: shared"):
        run_in(folders("qwen 2.5 vl"), "ppo", **settings)


def test_a_reward_model_of_gemma_3_scores_in_plain_transformers(
    folders: Callable[[str], Path], run_in: Callable[..., alignkit.Result]
) -> None:
    base = folders("gemma 3")
    saved = run_in(base, "reward", name="scores").folder / "model"
    old, new = (load_file(folder / "model.safetensors") for folder in (base, saved))
    assert all(torch.equal(old[k], new[k]) for k in old if of_towers(k))
    assert any(not torch.equal(old[k], new[k]) for k in old if not of_towers(k))
    plain: Any = tf.AutoModelForSequenceClassification.from_pretrained(saved)
    ids = [5, 9, 14, 20, 3]
    with torch.no_grad():
        want = plain.eval()(input_ids=torch.tensor([ids])).logits.item()
    (got,) = RewardModel(str(saved), CPU, 1000).scores([ids])
    assert want != 0
    assert got == pytest.approx(want, abs=1e-5)


@some_families
def test_a_plan_counts_no_gradient_of_the_towers(name: str, folders: Callable[[str], Path]) -> None:
    settings = {"method": "dpo", "model": str(folders(name)), "data": make_rows("pairs", 8), "batch_size": 4}
    made = plan(settings, gpu=False)
    model: Any = tf.AutoModelForImageTextToText.from_pretrained(folders(name))
    trained = sum(p.nbytes for n, p in model.named_parameters() if not of_towers(n))
    most = {part: max(p.get(part, 0) for p in made.memory.phases.values()) for part in ("optimiser", "gradients")}
    assert most == {"optimiser": 2 * trained, "gradients": trained}


def test_a_token_of_text_passes_no_weight_of_the_towers() -> None:
    model = fresh("llama 4")
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    whole, outside_it = sum(sizes.values()), sum(n for path, n in sizes.items() if of_towers(path))
    experts = sum(n for path, n in sizes.items() if ".experts." in path)
    found = count(model)
    assert found is not None
    assert (found.weights, found.experts) == (whole, experts)
    assert found.active == whole - outside_it - experts // 2  # each token is sent to one of two experts


# ------------------------------------------------------------------------------------------------------- the rows


@pytest.mark.parametrize("cell", ["x.png", ["x.png"], [{"bytes": b"...", "path": None}], {"bytes": b"...", "path": ""}])
def test_a_row_with_an_image_in_a_column_of_its_own_is_refused_by_name(cell: object) -> None:
    rows = make_rows("pairs", 3)
    rows[1]["images"] = cell
    message = r"row 2, column 'images': found a cell that is not empty; remove the row, .*only text is trained, not im"
    with pytest.raises(FaultyRowsError, match=message) as error:
        load(rows, "pairs")
    assert len(error.value.faults) == 1


@pytest.mark.parametrize("cell", [None, "", [], {}, [None], {"bytes": None, "path": None}])
def test_a_row_whose_column_of_images_is_empty_is_text(cell: object) -> None:
    for column in ("image", "images", "videos", "audio"):
        assert len(load([{**row, column: cell} for row in make_rows("pairs", 3)], "pairs")) == 3
