"""Strategies on their own: what they refuse, virtual tokens against peft's own, references without a second copy, hand-over."""

import random
import warnings
from functools import partial

import pytest
import torch
from helpers import assert_close, assert_same, build, llama, padded, pairs, run, tokens
from peft import PeftModel
from pydantic import ValidationError
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from trl import SFTConfig

from align.data import write_rows
from align.engine import enable_forest
from align.errors import AlignError
from align.forest import Tree
from align.models import disable_dropout, load_causal_lm, load_language_model, load_reward_model, save_model
from align.pipeline import Run
from align.recipe import Recipe
from align.rollout import Sampling, complete
from align.runner.worker import quiet
from align.scoring import branch_logps
from align.stages import PPO, SFT, Preference, Pretrain, RewardModel
from align.trainers.objectives import LanguageModel
from align.trainers.objectives import RewardModel as Scores
from align.tuning.adapters import save_adapter
from align.tuning.strategies import SOFT, Tuning, strategies
from align.tuning.tune import Reference, trainable, tune, untouched

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
OPT = {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
DISTILBERT = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
BART = {"d_model": 32, "encoder_layers": 4, "encoder_ffn_dim": 48, "encoder_attention_heads": 4}
BART |= {"decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_attention_heads": 4, "max_position_embeddings": 64}
ARGUMENTS = {"freeze": {"train_last": 1}, **{name: {"num_virtual_tokens": 3} for name in SOFT}}
TRAINED = [name for name in strategies if name != "qlora"]
IDS = torch.tensor([tokens(random.Random(0), 12)])


def shape(kind, **more):
    return llama(**more) if kind == "llama" else build(kind, **(GPT2 if kind == "gpt2" else OPT), **more)


def tuned(name, model=None, folder=None, **arguments):
    return tune(llama() if model is None else model, Tuning(name, {**ARGUMENTS.get(name, {}), **arguments}), folder)


def shaken(model, spread=0.1):
    """`model` with what trains moved, as training would."""
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(spread * torch.randn_like(p))
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


# -- what is said before anything runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tuning": "loar"}, "unknown tuning 'loar'.*did you mean 'lora'"),
        ({"tuning": "lora", "tuning_args": {"rank": 4}}, "tuning 'lora' takes no 'rank'"),
        ({"tuning": "lora", "tuning_args": {"r": 0}}, "r=0: input should be greater than 0"),
        ({"tuning": "prefix", "tuning_args": {"num_virtual_tokens": "x"}}, "input should be a valid integer"),
        ({"tuning": "freeze"}, "needs one of train_last"),
        ({"tuning": "freeze", "tuning_args": {"train_last": 1, "freeze_first": 1}}, "needs one of train_last"),
        ({"tuning": "full", "use_peft": True}, "use_peft is another spelling"),
        ({"lora_r": 4}, "lora_r belongs to use_peft"),
        ({"tuning": "lora", "on_adapter": "continue"}, "goes on with the adapter as it is"),
        ({"tuning": "prefix", "engine": "trl"}, "tuning 'prefix' needs engine 'forest'"),
        ({"load_best_model_at_end": True, "eval_steps": 2, "save_steps": 3}, "saves every evaluation"),
    ],
)
def test_a_stage_is_refused_before_it_runs(fields, message):
    with pytest.raises(ValidationError, match=message):
        SFT(model="m", data="d", **fields)


def test_use_peft_is_another_spelling_of_lora():
    theirs = SFT(model="m", data="d", use_peft=True, lora_r=4, lora_alpha=2, use_dora=True)
    assert theirs.strategy == SFT(model="m", data="d", tuning="lora", tuning_args={"r": 4, "alpha": 2, "dora": True}).strategy
    with pytest.raises(ValidationError, match="random weights are trained in full"):
        Pretrain(data="d", architecture={"model_type": "llama"}, tuning="freeze", tuning_args={"train_last": 1})


@pytest.mark.parametrize(
    ("name", "arguments", "model", "message"),
    [
        ("freeze", {}, llama, "needs one of train_last"),
        ("freeze", {"train_last": 3}, llama, "the model has 2 layers, not 3"),
        ("lora", {"target_modules": ["q_prj"]}, llama, "target_modules .*q_prj"),
        ("qlora", {}, llama, "loaded in 4 bits"),
        ("head", {}, lambda: shaken(build("bert", is_decoder=True, **BERT)), "its norms stand behind its layers.*set layers to 0"),
        ("adapter", {}, lambda: build("phi3", hidden_size=32, intermediate_size=48, num_hidden_layers=1), "fused"),
        ("adapter", {}, lambda: build("bloom", hidden_size=32, n_layer=1, n_head=4), "a width that its config does not hold"),
        ("bias_norm", {}, lambda: without_norms(llama()), "nothing would train"),
        ("prefix", {}, lambda: build("openai-gpt", n_embd=32, n_layer=1, n_head=4), "OpenAIGPTLMHeadModel has none"),
        ("prefix", {}, lambda: masked("albert", embedding_size=16, **BERT), "AlbertForMaskedLM has none"),
        ("prefix", {}, lambda: classifier("distilbert", **DISTILBERT), "DistilBertForSequenceClassification has none"),
        ("prefix", {}, lambda: classifier("t5", **T5), "T5ForSequenceClassification answers with scores"),
        ("prefix", {}, lambda: with_cache(classifier("bert", **BERT)), "does not know what transformers .* calls a model's cache"),
        ("prompt", {}, lambda: classifier("bart", **BART), "BartForSequenceClassification answers with scores"),
        (
            "pissa",
            {},
            lambda: build("mixtral", num_local_experts=4, **LLAMA),
            "the experts of MixtralForCausalLM are none: use 'lora'",
        ),
        (
            "dora",
            {},
            lambda: build("mixtral", num_local_experts=4, **LLAMA),
            "DoRA .* the experts of MixtralForCausalLM are none: use 'lora', or name other target_modules",
        ),
        (
            "ia3",
            {},
            lambda: build("olmo2", **LLAMA),
            "does not know which layers of Olmo2ForCausalLM to scale: set target_modules .* and, of these, feedforward_modules",
        ),
        ("prompt", {}, lambda: masked("bert", **BERT), "would move the places at which its answers are read: use tuning 'prefix'"),
    ],
)
def test_what_does_not_go_together_is_refused(name, arguments, model, message):
    with pytest.raises(AlignError, match=message):
        tune(model(), Tuning(name, arguments))


def masked(kind, **sizes):
    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_config(AutoConfig.for_model(kind, vocab_size=320, pad_token_id=0, **sizes))


def classifier(kind, **sizes):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, vocab_size=320, num_labels=3, **sizes))


def with_cache(model):
    """As models are since transformers 5.24: the trunk takes a ``cache``."""

    class Trunk(type(model.base_model)):
        def forward(self, input_ids=None, *, cache=None, **rest):
            return super().forward(input_ids, past_key_values=cache, **rest)

    model.base_model.__class__ = Trunk
    return model


def without_norms(model):
    for module in model.modules():
        for name, child in list(module.named_children()):
            if "Norm" in type(child).__name__:
                setattr(module, name, torch.nn.Identity())
    return model


def test_four_bits_need_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(AlignError, match=r"needs a CUDA GPU .* use tuning 'lora'"):
        load_causal_lm(str(tmp_path), four_bits=True)


# -- other models than decoders --------------------------------------------------------------------------------------------------


def test_bert_with_its_first_layers_frozen():
    config = AutoConfig.for_model("bert", vocab_size=320, num_labels=5, **BERT)
    model = tuned("freeze", AutoModelForTokenClassification.from_config(config), train_last=None, freeze_first=3)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        name for name, _ in model.named_parameters() if name.startswith(("bert.encoder.layer.3.", "classifier.", "bert.pooler."))
    }


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "head"])
def test_an_encoder_s_task_head_always_trains(name):
    config = AutoConfig.for_model("bert", vocab_size=320, num_labels=3, **BERT)
    model = tuned(name, AutoModelForSequenceClassification.from_config(config))
    model.train()(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=torch.tensor([1])).loss.backward()
    trained = {path for path, p in model.named_parameters() if p.requires_grad}
    assert any("classifier" in path for path in trained)
    assert {path for path, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0} <= trained
    if name not in ("full", "freeze"):
        assert trainable(model)["trainable_share"] < 0.6


@pytest.mark.parametrize("name", ["lora", "ia3"])
@pytest.mark.parametrize(("kind", "sizes"), [("t5", T5), ("bart", BART)])
def test_the_head_of_an_encoder_with_a_decoder_trains_beside_an_adapter(name, kind, sizes, tmp_path):
    classifier(kind, decoder_start_token_id=0, **sizes).save_pretrained(tmp_path / "base")
    load = partial(AutoModelForSequenceClassification.from_pretrained, tmp_path / "base")
    model = shaken(tuned(name, load()))
    head = [p for path, p in model.named_parameters() if "classification_head.modules_to_save" in path and p.requires_grad]
    assert len(head) == 4
    save_adapter(model, tmp_path / "adapter")
    ids = torch.cat([IDS, torch.full((1, 1), model.config.eos_token_id)], dim=1)
    assert_close(logits(PeftModel.from_pretrained(load(), tmp_path / "adapter"), ids), logits(model, ids))


@pytest.mark.parametrize("name", ["prompt", "ptuning"])
def test_virtual_tokens_are_as_wide_as_the_embeddings(name):
    """ALBERT's are narrower than its layers."""
    model = tuned(name, classifier("albert", embedding_size=16, **BERT))
    model.train()(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=torch.tensor([1])).loss.backward()
    moved = [p.grad for path, p in model.named_parameters() if path.startswith("prompt_encoder")]
    assert all(grad.abs().max() > 0 for grad in moved)


def test_pissa_on_a_weight_that_has_fewer_components_than_the_rank(tmp_path):
    """Keys and values of one head of 8: with rank 16 peft gives their updates rank 8."""
    model = llama(num_key_value_heads=1)
    model.save_pretrained(tmp_path / "base")
    model = shaken(tuned("pissa", load_causal_lm(str(tmp_path / "base")), r=16))
    save_adapter(model, tmp_path / "pissa")
    assert_close(logits(load_causal_lm(str(tmp_path / "pissa"))), logits(model), 2e-5)


@pytest.mark.parametrize("name", ["freeze", "ffn", "attention", "bias_norm", "adapter", "lora", "ia3", "prompt"])
def test_an_encoder_with_a_decoder(name):
    model = tuned(name, build_t5())
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    moved = [path for path, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert moved
    assert all(p.requires_grad for path, p in model.named_parameters() if path in moved)
    assert trainable(model)["trainable_share"] < 0.7


def build_t5():
    from transformers import T5ForConditionalGeneration

    torch.manual_seed(0)
    return T5ForConditionalGeneration(AutoConfig.for_model("t5", vocab_size=320, decoder_start_token_id=0, **T5))


def build_bart():
    from transformers import BartForConditionalGeneration

    torch.manual_seed(0)
    return BartForConditionalGeneration(AutoConfig.for_model("bart", vocab_size=320, pad_token_id=0, **BART))


@pytest.mark.parametrize("make", [lambda: masked("distilbert", **DISTILBERT), build_bart], ids=["distilbert", "bart"])
def test_a_wider_model_loads_whatever_its_config_calls_the_width(make, tmp_path):
    model = shaken(tuned("adapter", make(), size=8))
    model.save_pretrained(tmp_path)
    assert_close(logits(type(model).from_pretrained(tmp_path)), logits(model))


def test_stacks_of_different_depth_are_counted_each_from_its_own_end():
    """Four layers of an encoder, two of a decoder: the last one is number 3 there and number 1 here."""
    trained = {path for path, p in tuned("freeze", build_bart(), train_last=1).named_parameters() if p.requires_grad}
    layers = {path.split(".")[1] + path.split(".")[3] for path in trained if ".layers." in path}
    assert layers == {"encoder3", "decoder1"}


def test_a_new_layer_has_a_place_of_its_own_in_the_cache():
    """GPT-Neo calls that place otherwise than most."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    model = build("gpt_neo", **sizes)
    before = logits(model)
    assert_close(logits(tuned("head", model)), before)


def test_a_masked_language_model_behind_learned_keys_is_loaded_again(tmp_path):
    base = masked("bert", **BERT)
    base.save_pretrained(tmp_path / "base")
    model = shaken(tuned("prefix", load_language_model(str(tmp_path / "base"))))
    model.save_pretrained(tmp_path / "prefix")
    assert logits(model).shape == logits(base).shape
    assert_close(logits(load_language_model(str(tmp_path / "prefix"))), logits(model))
    assert (logits(model) - logits(base)).abs().max() > 1e-3


# -- virtual tokens --------------------------------------------------------------------------------------------------------------


def shapes_of_trees():
    """Empty prompts with one and two branches, documents, shared prompts."""
    draw = random.Random(3)
    t = lambda n: tokens(draw, n)  # noqa: E731
    shared = t(5)
    return [
        Tree([], (t(4), t(3))),
        Tree(shared, (t(2), t(6))),
        Tree(shared, (t(3), t(1))),
        Tree(t(7), (), [False] * 3 + [True] * 4),
        Tree(t(4), (t(5),), [False, True, True, False]),
    ]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize("score_head", [False, True])
def test_virtual_tokens_on_the_forest_are_those_of_padded_rows(name, kind, score_head):
    """Losses and every gradient."""
    model = shaken(tuned(name, shape(kind, score_head=score_head)))
    assert enable_forest(model) is None
    goal, trees = (Scores(), pairs(4)) if score_head else (LanguageModel(), shapes_of_trees())
    ours = run(goal, model, trees, 30)
    with padded(model):
        assert_same(ours, run(goal, model, trees), 2e-5)
    if name == "prefix" and not score_head:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        disable_dropout(model.train())
        assert_same(run(goal, model, trees, 30), ours, 2e-5)
        with padded(model), pytest.raises(AlignError, match="cannot be combined with gradient_checkpointing"):
            run(goal, model, trees)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("name", SOFT)
def test_plain_peft_gives_the_same_answers(name, kind, tmp_path, tokenizer):
    save_model(shape(kind), tokenizer, tmp_path / "base")
    model = shaken(tuned(name, load_causal_lm(str(tmp_path / "base")), tmp_path / "soft"))
    save_model(model, tokenizer, tmp_path / "soft")
    plain = PeftModel.from_pretrained(shape(kind, seed=5).from_pretrained(tmp_path / "base"), tmp_path / "soft")
    theirs = logits(plain)[:, -IDS.shape[1] :]
    assert_close(logits(model), theirs, 1e-5)
    assert_close(logits(load_causal_lm(str(tmp_path / "soft"))), theirs, 1e-5)
    # Trained further, it starts where it was: also the network behind P-tuning's embeddings.
    further = load_causal_lm(str(tmp_path / "soft"), on_adapter="continue")
    assert_close(logits(further), theirs, 1e-5)
    assert trainable(further) == trainable(model)


@pytest.mark.parametrize("name", SOFT)
def test_answers_are_sampled_behind_virtual_tokens(name):
    """Greedy, with a cache and left padding, as one token after the other from the start of each row alone; also where the model
    has answered without them before.
    """
    model = shaken(tuned(name))
    prompts = [tokens(random.Random(n), n) for n in (3, 9, 5)]
    sampling = Sampling(6, temperature=0.0)
    with model.disable_adapter():
        without = complete(model, prompts, sampling, stop_ids=[])
    assert without == complete(llama(), prompts, sampling, stop_ids=[])
    found = complete(model, prompts, sampling, stop_ids=[])
    for prompt, completion in zip(prompts, found, strict=True):
        row = list(prompt)
        for _ in range(6):
            row.append(int(logits(model, torch.tensor([row]))[0, -1].argmax()))
        assert completion.tokens == row[len(prompt) :]
        said = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert said[0].tolist() == row


# -- the reference ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_the_reference_is_the_base_and_no_second_copy(name):
    base = logits(llama())
    model = tuned(name)
    start = logits(model)
    reference = Reference(model)
    with untouched(model):
        assert_close(logits(model), base, 1e-5)
    shaken(model)
    trained = logits(model)
    assert not torch.allclose(trained, start)
    with reference() as same:
        assert same is model
        assert_close(logits(model), base, 1e-5)
    assert torch.equal(logits(model), trained)
    kept = sum(start.numel() for _, start in reference.start)
    assert kept == (0 if name in ("lora", "rslora", "dora", "ia3", *SOFT) else trainable(model)["trainable_parameters"])


def test_the_reference_keeps_its_weights_under_autocast():
    """Autocast keeps 16-bit copies by parameter, and the reference's weights are others in the same parameters."""
    model = tuned("full")
    reference = Reference(model)
    with torch.autocast("cpu", torch.bfloat16):
        start = logits(model)
    shaken(model)
    with torch.autocast("cpu", torch.bfloat16):
        trained = logits(model)
        with reference() as same:
            assert torch.equal(logits(same), start)
        assert torch.equal(logits(model), trained)
    assert not torch.equal(trained, start)


# -- from stage to stage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ground(tmp_path, tokenizer):
    """A base, and rows for it."""
    save_model(llama(), tokenizer, tmp_path / "base")
    rows = [{"instruction": "How are you?", "input": "", "output": f"Fine, {n}"} for n in ("one", "two three", "four")]
    write_rows(tmp_path / "sft.jsonl", rows)
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": "Hello?", "chosen": f"one {n}", "rejected": f"two {n}"} for n in range(3)])
    return tmp_path


def stages(ground, first, second):
    """SFT by `first`, then DPO by `second`, both on the ground."""
    common = {"held_out": 0, "max_steps": 2, "learning_rate": 1e-2, "max_length": 64, "chat_template": "plain"}
    return {
        "sft": SFT(model=str(ground / "base"), data=str(ground / "sft.jsonl"), **common, **first),
        "dpo": Preference(model="sft", data=str(ground / "pairs.jsonl"), beta=0.1, **common, **second),
    }


def go(ground, first, second):
    artifacts = Run(Recipe("hand", stages(ground, first, second)), ground / "out").execute()
    return {name: artifact.path for name, artifact in artifacts.items()}, artifacts


def measured(monkeypatch):
    """The reference log-probs that DPO takes, as they are computed."""
    taken = []

    def spy(model, trees, max_tokens):
        taken.append((trees, branch_logps(model, trees, max_tokens)))
        return taken[-1][1]

    monkeypatch.setattr("align.reference.branch_logps", spy)
    return taken


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"tuning": "lora"}, {"tuning": "lora"}),
        ({"tuning": "lora"}, {"on_adapter": "continue"}),
        ({"tuning": "pissa"}, {"tuning": "prefix"}),
        ({"tuning": "dora"}, {"on_adapter": "continue"}),
        ({"tuning": "ptuning"}, {"on_adapter": "continue"}),
        ({"tuning": "head"}, {"tuning": "adapter"}),
        ({"tuning": "adapter"}, {"tuning": "ia3"}),
    ],
    ids=lambda fields: "-".join(fields.values()),
)
def test_the_second_stage_starts_where_the_first_ended(ground, first, second, monkeypatch):
    """DPO's reference log-probs are those of the model that SFT left: merged, or behind its adapter, which is continued."""
    taken = measured(monkeypatch)
    paths, artifacts = go(ground, first, second)
    ((trees, found),) = taken
    parent = load_causal_lm(paths["sft"])
    enable_forest(parent)
    expected = branch_logps(parent, trees, 100)
    assert_close(torch.tensor(found), torch.tensor(expected), 1e-5)
    child = load_causal_lm(paths["dpo"])
    assert (logits(child) - logits(parent)).abs().max() > 1e-4
    if "on_adapter" in second:  # the same adapter on the same base
        assert artifacts["dpo"].metrics["trainable_parameters"] == artifacts["sft"].metrics["trainable_parameters"]
        assert not list((ground / "out").glob("dpo-*/base"))
    assert 0 < artifacts["sft"].metrics["trainable_share"] < 1


def test_what_cannot_be_handed_over_says_why(ground):
    with pytest.raises(AlignError, match=r"virtual tokens .* cannot be merged .*; set on_adapter to continue"):
        go(ground, {"tuning": "prompt"}, {"tuning": "lora"})
    with pytest.raises(AlignError, match="is a whole model, not an adapter that could be continued"):
        go(ground, {"tuning": "freeze", "tuning_args": {"train_last": 1}}, {"on_adapter": "continue"})
    model = shaken(tuned("lora", load_causal_lm(str(ground / "base")), ground / "a"))
    save_model(model, *[__import__("transformers").AutoTokenizer.from_pretrained(ground / "base")], ground / "a")
    with pytest.raises(AlignError, match="an adapter of a language model; a reward model"):
        load_reward_model(str(ground / "a"), on_adapter="continue")


def test_the_critic_sits_beside_an_adapter_that_goes_on(ground):
    """On the same frozen base. Of another kind peft holds no two beside each other in this way."""
    write_rows(ground / "prompts.jsonl", [{"prompt": f"How are {n}?"} for n in ("you", "they", "we", "cats")])
    common = {"held_out": 0, "learning_rate": 1e-2, "max_length": 64, "chat_template": "plain"}

    def train(tuning):
        first = SFT(model=str(ground / "base"), data=str(ground / "sft.jsonl"), max_steps=2, tuning=tuning, **common)
        then = PPO(
            model="sft",
            data=str(ground / "prompts.jsonl"),
            reward_funcs=["length_band(low=2, high=4)"],
            max_completion_length=3,
            on_adapter="continue",
            critic="adapter",
            episodes_per_step=4,
            total_episodes=8,
            num_mini_batches=1,
            **common,
        )
        return Run(Recipe(tuning, {"sft": first, "ppo": then}), ground / tuning).execute()

    done = train("lora")
    assert done["ppo"].metrics["trainable_parameters"] == done["sft"].metrics["trainable_parameters"]
    with pytest.raises(AlignError, match="is for LoRA, and the model's adapter is of the kind IA3: take 'separate'"):
        train("ia3")


def test_an_adapter_of_a_reward_model_is_continued_with_its_head(ground, tokenizer):
    model = shaken(tuned("lora", load_reward_model(str(ground / "base")), ground / "r"))
    save_model(model, tokenizer, ground / "r")
    further = load_reward_model(str(ground / "r"), on_adapter="continue")
    assert_close(logits(further), logits(model), 1e-6)
    assert trainable(further) == trainable(model)
    stage = RewardModel(model=str(ground / "r"), data=str(ground / "pairs.jsonl"), on_adapter="continue", held_out=0, max_steps=1)
    assert (
        Run(Recipe("r", {"r": stage}), ground / "out").execute()["r"].metrics["trainable_parameters"]
        == trainable(model)["trainable_parameters"]
    )


def test_what_peft_and_trl_call_by_an_old_name_is_not_told_to_the_user(tmp_path):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        quiet()
        tune(llama(), Tuning("lora"))
        SFTConfig(output_dir=str(tmp_path), gradient_checkpointing=False, report_to=[], use_cpu=True)
    assert not [warning for warning in told if issubclass(warning.category, FutureWarning)]
