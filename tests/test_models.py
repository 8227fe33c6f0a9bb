"""What is saved loads with plain transformers and peft, and answers the same."""

import copy
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from helpers import VOCABULARY, assert_close, build, llama, pairs, tokens
from peft import AutoPeftModelForCausalLM, PeftModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from align.engine import enable_forest
from align.errors import AlignError
from align.forest import plant
from align.models import (
    build_model,
    disable_dropout,
    ensure_pad_token,
    is_adapter,
    load_causal_lm,
    load_config,
    load_reward_model,
    load_tokenizer,
    save_model,
    settle_generation,
    stop_token_ids,
)
from align.tuning.strategies import Tuning
from align.tuning.tune import tune

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LORA = Tuning("lora", {"r": 4})
LOADERS = {"causal": (load_causal_lm, AutoModelForCausalLM), "reward": (load_reward_model, AutoModelForSequenceClassification)}
IDS = torch.tensor([tokens(random.Random(0), 12)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"adapter_config\.json is damaged"),
        ('{"base_model_name_or_path": "owner/name"}', r"adapter_config\.json has no 'task_type'"),
        ('{"base_model_name_or_path": null, "task_type": "CAUSAL_LM", "peft_type": "LORA"}', "is an adapter of no base"),
    ],
)
def test_what_is_wrong_with_an_adapters_file_is_told(tmp_path, content, message):
    (tmp_path / "adapter_config.json").write_text(content)
    for load in (load_causal_lm, load_config):
        with pytest.raises(AlignError, match=message):
            load(str(tmp_path))


def shaken(model):
    """`model` with its trained parameters moved, as training would."""
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture
def base(tmp_path, tokenizer):
    """A folder with a base model."""
    folder = tmp_path / "base-model"
    save_model(llama(), tokenizer, folder)
    return str(folder)


def test_a_causal_model_and_its_tokenizer(tmp_path, tokenizer):
    model = llama(seed=3)
    expected = logits(model)
    assert enable_forest(model) is None
    save_model(model, tokenizer, tmp_path / "m")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), expected)
    assert torch.equal(logits(load_causal_lm(str(tmp_path / "m"))), expected)
    assert load_causal_lm(str(tmp_path / "m"), dtype="bfloat16").dtype == torch.bfloat16
    loaded = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    assert not list((tmp_path / "m").glob("*.bin"))
    # The forest's attention is how it was trained, not what it is.
    assert "align" not in (tmp_path / "m" / "config.json").read_text()


def test_a_reward_model(tmp_path, tokenizer):
    model = build("llama", score_head=True, **SIZES)
    expected = logits(model)
    save_model(model, tokenizer, tmp_path / "m")
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")), expected)
    assert torch.equal(logits(load_reward_model(str(tmp_path / "m"))), expected)


def test_a_new_score_head_starts_at_zero(base):
    model = load_reward_model(base)
    assert model.config.num_labels == 1
    assert (model.score.weight == 0).all()
    assert torch.equal(model.model.embed_tokens.weight, load_causal_lm(base).model.embed_tokens.weight)


def test_scores_on_right_padded_rows_equal_the_forest_s(tokenizer):
    """transformers reads the last token that is not padding, the forest the end of each path; 0 is no token of `pairs`."""
    model, trees = build("llama", score_head=True, **SIZES), pairs(5)
    ensure_pad_token(tokenizer, model)
    rows = [tree.prompt + branch for tree in trees for branch in tree.branches]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask).logits[:, 0]
        assert enable_forest(model) is None
        assert_close(model(forest=plant(trees), read="ends"), padded)


def test_lora_on_a_causal_model(tmp_path, base, tokenizer):
    model = shaken(tune(load_causal_lm(base), LORA, tmp_path / "a"))
    save_model(model, tokenizer, tmp_path / "a")
    expected = logits(model)
    assert not torch.equal(expected, logits(load_causal_lm(base)))
    assert is_adapter(str(tmp_path / "a"))
    assert not is_adapter(base)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "a")
    assert torch.equal(logits(plain), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")), expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "a").chat_template == tokenizer.chat_template
    merged = load_causal_lm(str(tmp_path / "a"))
    assert type(merged) is type(load_causal_lm(base))
    assert_close(logits(merged), expected)


def test_lora_on_a_reward_model_saves_its_head(tmp_path, base, tokenizer):
    model = load_reward_model(base)
    ensure_pad_token(tokenizer, model)
    model = shaken(tune(model, LORA, tmp_path / "a"))
    save_model(model, tokenizer, tmp_path / "a")
    expected = logits(model)
    assert expected.abs().min() > 0
    plain = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), tmp_path / "a")
    assert torch.equal(logits(plain), expected)
    assert_close(logits(load_reward_model(str(tmp_path / "a"))), expected)


@pytest.mark.parametrize("kind", LOADERS)
def test_an_adapter_on_an_adapter(tmp_path, base, tokenizer, kind):
    """The parent is merged; the child's folder carries what it was merged into, and needs nothing else."""
    parent = shaken(tune(load_causal_lm(base), LORA, tmp_path / "parent"))
    save_model(parent, tokenizer, tmp_path / "parent")
    load, auto = LOADERS[kind]
    merged = load(str(tmp_path / "parent"))
    if kind == "causal":
        assert_close(logits(merged), logits(parent))
    ensure_pad_token(tokenizer, merged)
    child = shaken(tune(merged, LORA, tmp_path / "child"))
    save_model(child, tokenizer, tmp_path / "child")
    expected = logits(child)
    shutil.rmtree(tmp_path / "parent")
    named = json.loads((tmp_path / "child" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str((tmp_path / "child" / "base").resolve())
    assert_close(logits(PeftModel.from_pretrained(auto.from_pretrained(named), tmp_path / "child")), expected)
    assert_close(logits(load(str(tmp_path / "child"))), expected)


@pytest.mark.parametrize("within", [False, True])
def test_an_adapter_that_was_moved_together_with_its_base(within, tmp_path, base, tokenizer):
    """As with the folder of a run; or, of an adapter on an adapter, one that another machine pulled: its base is within."""
    shutil.copytree(base, tmp_path / "run" / "sft")
    model = load_causal_lm(str(tmp_path / "run" / "sft"))
    model.merged_from = "an adapter" if within else None
    model = shaken(tune(model, LORA, tmp_path / "run" / "lora"))
    save_model(model, tokenizer, tmp_path / "run" / "lora")
    (tmp_path / "run").rename(tmp_path / "moved")
    if within:
        shutil.rmtree(tmp_path / "moved" / "sft")
    adapter = str(tmp_path / "moved" / "lora")
    assert_close(logits(load_causal_lm(adapter)), logits(model))
    assert load_config(adapter).vocab_size == VOCABULARY
    (tmp_path / "moved" / "lora").rename(tmp_path / "alone")
    if not within:
        with pytest.raises(AlignError, match="run/sft"):
            load_causal_lm(str(tmp_path / "alone"))


def test_a_reward_model_on_a_merged_adapter_has_its_trunk(tmp_path, base, tokenizer):
    parent = shaken(tune(load_causal_lm(base), LORA, tmp_path / "parent"))
    save_model(parent, tokenizer, tmp_path / "parent")
    reward = load_reward_model(str(tmp_path / "parent"))
    assert (reward.score.weight == 0).all()
    with torch.no_grad():
        theirs = load_causal_lm(str(tmp_path / "parent")).model(input_ids=IDS).last_hidden_state
        assert torch.equal(reward.model(input_ids=IDS).last_hidden_state, theirs)


@pytest.fixture
def bare():
    """A tokenizer of 320 tokens with an end token and nothing else special, like GPT-2's."""
    words = ["".join(random.Random(i).choices("abcdefgh", k=6)) for i in range(200)]
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(words, BpeTrainer(vocab_size=320, special_tokens=["<|eos|>"], initial_alphabet=ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|eos|>")
    assert len(tokenizer) == 320
    return tokenizer


@pytest.mark.parametrize("kind", LOADERS)
def test_an_adapter_on_a_model_with_a_token_more_than_its_base(tmp_path, bare, kind):
    """A padding token that was added in memory makes the embeddings longer than those on disk; the adapter must still load."""
    save_model(llama(), bare, tmp_path / "base-model")
    load, auto = LOADERS[kind]
    model = load(str(tmp_path / "base-model"))
    ensure_pad_token(bare, model)
    model = shaken(tune(model, LORA, tmp_path / "a"))
    save_model(model, bare, tmp_path / "a")
    assert_close(logits(PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "a" / "base"), tmp_path / "a")), logits(model))
    found = load(str(tmp_path / "a"))
    assert found.get_input_embeddings().weight.shape[0] == len(bare) == 321
    assert_close(logits(found), logits(model))


def test_an_adapter_on_random_weights(tmp_path, tokenizer):
    """A model that was never on disk is written beside its adapter."""
    model = shaken(tune(build_model({"model_type": "llama", **SIZES}, tokenizer), LORA, tmp_path / "a"))
    save_model(model, tokenizer, tmp_path / "a")
    assert_close(logits(load_causal_lm(str(tmp_path / "a"))), logits(model))


class TestPaddingToken:
    def test_one_that_is_there_is_kept(self, tokenizer):
        model, tokenizer = llama(), copy.deepcopy(tokenizer)
        ensure_pad_token(tokenizer, model)
        assert tokenizer.pad_token == "<|pad|>"
        assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
        assert model.get_input_embeddings().weight.shape[0] == 320

    @pytest.mark.parametrize("pad", [None, "<|eos|>"])
    def test_a_missing_one_and_the_end_token_are_replaced(self, bare, pad):
        """All 320 rows of the embeddings are in use: the new token needs one of its own, which changes no other token's logits."""
        model = llama()
        before, bare.pad_token = logits(model), pad
        ensure_pad_token(bare, model)
        assert bare.pad_token_id == model.config.pad_token_id == 320
        assert bare.eos_token_id != 320
        assert torch.equal(logits(model)[..., :320], before)
        assert model.get_input_embeddings().weight.shape[0] == 321

    def test_an_unknown_token_serves(self, bare):
        bare.add_special_tokens({"unk_token": "a"})
        model = llama()
        ensure_pad_token(bare, model)
        assert bare.pad_token == "a"
        assert model.get_input_embeddings().weight.shape[0] == 320

    def test_stories260k(self, real):
        folder = str(real / "models" / "stories260k")
        model, tokenizer = load_causal_lm(folder), load_tokenizer(folder)
        ensure_pad_token(tokenizer, model)
        assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
        assert tokenizer.pad_token_id < model.get_input_embeddings().weight.shape[0]
        assert model.config.pad_token_id == tokenizer.pad_token_id


def test_stop_tokens(tokenizer):
    model = llama()
    assert stop_token_ids(model, tokenizer) == [tokenizer.eos_token_id]
    model.generation_config.eos_token_id = [7, 9]
    assert stop_token_ids(model, tokenizer) == [7, 9, tokenizer.eos_token_id]


def test_settings_that_do_nothing_do_not_keep_a_model_from_being_saved(base, tmp_path, tokenizer):
    """Published generation configs have a temperature without `do_sample`; training changes their padding or end token."""
    file = Path(base) / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": 2}))
    model = load_causal_lm(base)
    assert settle_generation(model) == ["temperature", "top_p"]
    assert settle_generation(model) == []
    model.generation_config.eos_token_id = 5
    save_model(model, tokenizer, tmp_path / "saved")
    assert load_causal_lm(str(tmp_path / "saved")).generation_config.eos_token_id == 5


def test_random_weights(tokenizer):
    model = build_model({"model_type": "qwen3", **SIZES, "head_dim": 8}, tokenizer)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    with pytest.raises(AlignError, match="model_type 'lama' is unknown"):
        build_model({"model_type": "lama"}, tokenizer)
    with pytest.raises(AlignError, match="a llama config has no 'hiden_size'"):
        build_model({"model_type": "llama", "hiden_size": 3}, tokenizer)


def test_disable_dropout_makes_training_mode_deterministic():
    opt = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64, "word_embed_proj_dim": 32}
    for family, fields in (
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
        ("llama", {**SIZES, "attention_dropout": 0.5}),
        ("opt", {**opt, "attention_dropout": 0.5}),
        ("biogpt", SIZES),
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.5, "attention_dropout": 0.5}),
    ):
        model = build(family, **fields)
        expected = logits(model)
        model.train()
        assert not torch.allclose(model(input_ids=IDS).logits, expected)
        disable_dropout(model)
        assert_close(model(input_ids=IDS).logits, expected)


def with_config(path):
    llama().config.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: load_causal_lm(path), "cannot load a model from"),
        (lambda path: load_tokenizer(path), "is no model's folder: it holds neither a config.json nor a tokenizer"),
        (lambda path: load_tokenizer(with_config(path)), "holds no tokenizer: copy the one that the model was trained with"),
        (lambda path: load_tokenizer(f"{path}/vocab.json"), "cannot load a tokenizer from"),
        (lambda path: load_causal_lm(path, dtype="float8"), "dtype 'float8' is not one of float32, bfloat16, float16"),
        (lambda path: tune(llama(), Tuning("lora", {"target_modules": ["q_prj"]})), "target_modules"),
    ],
)
def test_mistakes_are_named(tmp_path, call, message):
    with pytest.raises(AlignError, match=message):
        call(str(tmp_path))


def test_a_model_of_several_is_refused(tmp_path):
    """The larger Gemma 3 read pictures, too: their config has no vocabulary, and a vision tower's places are not those of words."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    config = AutoConfig.for_model("gemma3", text_config={**SIZES, "vocab_size": 99}, vision_config=vision)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(AlignError, match=r"is a Gemma3ForConditionalGeneration, made of several models .*take one for text alone"):
        load_causal_lm(str(tmp_path))


def test_pickles_are_not_loaded(tmp_path, base):
    """A folder whose weights are a pickle is refused, even though torch could read it."""
    shutil.copytree(base, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(llama().state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(AlignError, match="cannot load a model"):
        load_causal_lm(str(tmp_path / "pickled"))


@pytest.mark.parametrize("load", [load_config, load_tokenizer, load_causal_lm], ids=["config", "tokenizer", "model"])
def test_a_config_with_a_value_of_the_wrong_type_is_named(tmp_path, base, load):
    shutil.copytree(base, tmp_path / "damaged")
    config = tmp_path / "damaged" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": "wide"}))
    with pytest.raises(AlignError, match=r"cannot load a .*: .*'hidden_size' expected int, got str"):
        load(str(tmp_path / "damaged"))


def test_weights_that_were_cut_are_named(tmp_path, base):
    """As by a download or a copy that was broken off."""
    shutil.copytree(base, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AlignError, match="cannot load a model"):
        load_causal_lm(str(tmp_path / "cut"))
