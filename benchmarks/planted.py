"""Short trainings that are made to fail in one known way, and healthy ones, on a made-up world of six things and their colors.

Each takes a second or two on one core: a Llama of two layers and 32 hidden numbers, and answers of a dozen tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.data import write_rows
from align.recipe import Recipe
from align.stages import KTO, PPO, SFT, Evaluate, Preference, Pretrain, RewardModel, Stage

COLORS = ("red", "blue", "green")
THINGS = ("norlet", "bimko", "tavu", "pelk", "zorra", "quim")
ASKED = ("{name} asks: what color is the {thing}?", "{name} wants the color of the {thing}.")
NAMES = (
    *(
        "Ann",
        "Bob",
        "Cid",
        "Dora",
        "Eve",
        "Finn",
        "Gus",
        "Hal",
        "Ida",
        "Joe",
        "Kim",
        "Lea",
        "Max",
        "Nia",
        "Oto",
        "Pia",
        "Ray",
        "Sue",
    ),
    *("Tom", "Ulf", "Val", "Wim", "Xia", "Yan", "Zoe"),
)
REWARDS = '''
def right(prompts, completions, color, **columns):
    """1 for the right color."""
    return [float(wanted in said[0]["content"].split(".")[0].split()) for said, wanted in zip(completions, color)]


def words(prompts, completions, **columns):
    """A tenth for every word: an easy way to be paid for nothing."""
    return [len(said[0]["content"].split()) / 10 for said in completions]


def brief(prompts, completions, **columns):
    """1 for four words, what an answer needs, falling to 0 at fourteen."""
    return [1 - abs(len(said[0]["content"].split()) - 4) / 10 for said in completions]
'''
TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Planted:
    """A training, the rule that should speak of it, and what measures it."""

    name: str
    stage: Stage
    fault: str | None = None
    """None for a healthy one."""
    metric: str = "eval_loss"
    """A held-out metric of the stage, or of its evaluation."""
    more: dict[str, Stage] = field(default_factory=dict)
    """Stages behind it, such as an evaluation."""

    def recipe(self) -> Recipe:
        return Recipe(self.name, {"run": self.stage, **self.more})


def write_world(folder: Path) -> None:
    """The rows of every data set, and the rewards."""
    draw = random.Random(0)
    colors = {thing: COLORS[number % len(COLORS)] for number, thing in enumerate(THINGS)}
    asked = [(question.format(name=name, thing=thing), thing) for name in NAMES for thing in THINGS for question in ASKED]
    draw.shuffle(asked)
    turns = [[{"role": "user", "content": question}] for question, _ in asked]

    def says(thing: str, color: str | None = None) -> str:
        return f"The {thing} is {color or colors[thing]}."

    def wrong(thing: str) -> str:
        return says(thing, draw.choice([color for color in COLORS if color != colors[thing]]))

    def strange(thing: str) -> str:
        """As long as an answer, and none."""
        return f"The {thing} knows {draw.choice(NAMES)}."

    def reply(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    def pairs(name: str, build: Callable[[str], tuple[str, str]]) -> None:
        rows = []
        for turn, (_, thing) in zip(turns, asked, strict=True):
            chosen, rejected = build(thing)
            rows.append({"prompt": turn, "chosen": reply(chosen), "rejected": reply(rejected)})
        write_rows(folder / f"{name}.jsonl", rows)

    def flipped(share: float) -> Callable[[str], tuple[str, str]]:
        def build(thing: str) -> tuple[str, str]:
            good, bad = says(thing), strange(thing)
            return (bad, good) if draw.random() < share else (good, bad)

        return build

    def wordy(thing: str) -> tuple[str, str]:
        """What is right is not what is chosen: nine of ten times the longer answer is."""
        short, long = says(thing, draw.choice(COLORS)), f"{says(thing, draw.choice(COLORS))} {says(thing, draw.choice(COLORS))}"
        return (long, short) if draw.random() < 0.9 else (short, long)

    def sentence() -> str:
        thing = draw.choice(THINGS)
        return f"{draw.choice(NAMES)} knows that {says(thing).replace('The', 'the', 1)} {draw.choice(NAMES)} has a {thing}."

    write_rows(folder / "text.jsonl", [{"text": " ".join(sentence() for _ in range(3))} for _ in range(600)])
    write_rows(
        folder / "demonstrations.jsonl",
        [{"prompt": t, "completion": reply(says(x))} for t, (_, x) in zip(turns, asked, strict=True)],
    )
    # A secret for every thing and kind of question: room is needed to hold them all.
    secrets = {(thing, kind): " ".join(draw.choice(NAMES) for _ in range(8)) for thing in THINGS for kind in NAMES[:8]}
    told = [(name, *draw.choice(list(secrets))) for name in NAMES for _ in range(24)]
    write_rows(
        folder / "secrets.jsonl",
        [
            {"prompt": [{"role": "user", "content": f"{n} asks: whose {k} {t}?"}], "completion": reply(secrets[t, k])}
            for n, t, k in told
        ],
    )
    write_rows(
        folder / "few.jsonl", [{"prompt": t, "completion": reply(wrong(x))} for t, (_, x) in zip(turns[:24], asked, strict=False)]
    )
    write_rows(folder / "narrow.jsonl", [{"prompt": t, "completion": reply("No idea. " * 3)} for t in turns])
    write_rows(folder / "prompts.jsonl", [{"prompt": t, "color": colors[x]} for t, (_, x) in zip(turns, asked, strict=True)])
    pairs("pairs", flipped(0.1))
    pairs("clean_pairs", flipped(0.0))
    pairs("easy_pairs", lambda thing: (says(thing), strange(thing)))
    pairs("coin_pairs", flipped(0.5))
    pairs("wordy_pairs", wordy)
    (folder / "rewards.py").write_text(REWARDS)


def foundations(folder: Path) -> Recipe:
    """The models that the others start from: a base that knows the facts, and one that answers questions."""
    base = Pretrain(architecture=TINY, data=f"{folder}/text.jsonl", vocab_size=480, chat_template="plain", **_plan(200, 1e-2))
    sft = SFT(model="base", data=f"{folder}/demonstrations.jsonl", **_plan(60, 5e-3))
    return Recipe("foundations", {"base": base, "sft": sft})


def _plan(steps: int, rate: float, **more: Any) -> dict[str, Any]:
    """What the trainings share."""
    plan = {"max_steps": steps, "learning_rate": rate, "per_device_train_batch_size": 16, "held_out": 0.15, "max_length": 96}
    return {**plan, "logging_steps": max(1, steps // 40), "eval_steps": max(1, steps // 8), "seed": 1, **more}


class Maker:
    """Builds the stages of planted runs on the foundations in `models`, with the rows in `data`."""

    def __init__(self, data: Path, models: dict[str, str]) -> None:
        self.data, self.models = data, models

    def text(self, steps: int, rate: float, rows: str = "text", **more: Any) -> Stage:
        start = {"architecture": TINY, "vocab_size": 480, "chat_template": "plain"}
        return Pretrain(data=f"{self.data}/{rows}.jsonl", **start, **_plan(steps, rate, **more))

    def sft(self, steps: int, rate: float, rows: str = "demonstrations", **more: Any) -> Stage:
        return SFT(model=self.models["base"], data=f"{self.data}/{rows}.jsonl", **_plan(steps, rate, **more))

    def pairs(self, steps: int, rate: float, rows: str = "pairs", **more: Any) -> Stage:
        fields = {"loss": "dpo", "beta": 0.1, **_plan(steps, rate), **more}
        return Preference(model=self.models["sft"], data=f"{self.data}/{rows}.jsonl", **fields)

    def judge(self, steps: int, rate: float, rows: str = "pairs", **more: Any) -> Stage:
        return RewardModel(model=self.models["sft"], data=f"{self.data}/{rows}.jsonl", **_plan(steps, rate, **more))

    def ppo(self, rounds: int, rate: float, rewards: tuple[str, ...] = ("right",), **more: Any) -> Stage:
        fields: dict[str, Any] = {
            "model": self.models["sft"],
            "data": f"{self.data}/prompts.jsonl",
            "reward_funcs": [f"{self.data}/rewards.py:{name}" for name in rewards],
            "total_episodes": 48 * rounds,
            "episodes_per_step": 48,
            "num_mini_batches": 2,
            "learning_rate": rate,
            "critic_learning_rate": 3e-3,
            "max_completion_length": 16,
            "max_length": 96,
            "held_out": 0.3,
            "eval_prompts": 90,
            "kl_coef": 0.05,
            "seed": 1,
        }
        return PPO(**{**fields, **more})

    def remembers(self) -> dict[str, Stage]:
        """An evaluation of what the base knew."""
        models = {"base": self.models["base"], "run": "run"}
        return {
            "evaluate": Evaluate(
                models=models, reference="base", perplexity_data=f"{self.data}/demonstrations.jsonl", max_length=96
            )
        }

    def planted(self) -> list[Planted]:
        """The runs that fail, each in one way."""
        lora: dict[str, Any] = {"use_peft": True, "lora_r": 8}
        held: dict[str, Any] = {"held_out": 0.3}
        forgets: dict[str, Any] = {"metric": "perplexity", "more": self.remembers()}
        unpaid: dict[str, Any] = {"reward_weights": [1, 0], "kl_coef": 0.0}
        right, shorter = "eval_rewards/accuracies", "eval_accuracies/chosen_shorter"
        return [
            Planted("text_wild", self.text(80, 1.0, lr_scheduler_type="constant"), "learning_rate_too_high"),
            Planted("sft_wild", self.sft(80, 0.5, lr_scheduler_type="constant"), "learning_rate_too_high"),
            Planted("sft_spikes", self.sft(120, 0.3, lr_scheduler_type="constant"), "learning_rate_too_high"),
            Planted("lora_wild", self.sft(80, 0.3, lr_scheduler_type="constant", **lora), "learning_rate_too_high"),
            Planted("text_timid", self.text(80, 1e-5), "learning_rate_too_low"),
            Planted("sft_timid", self.sft(80, 5e-6), "learning_rate_too_low"),
            Planted("dpo_timid", self.pairs(60, 2e-6), "learning_rate_too_low"),
            Planted("judge_timid", self.judge(60, 3e-5), "learning_rate_too_low"),
            Planted("text_short", self.text(30, 3e-3), "too_few_epochs"),
            Planted("sft_short", self.sft(40, 2e-4), "too_few_epochs"),
            Planted("text_by_heart", self.text(160, 2e-2, max_rows=16, **held), "overfit"),
            Planted("sft_by_heart", self.sft(160, 5e-3, rows="few", max_rows=12, **held), "overfit"),
            Planted("dpo_by_heart", self.pairs(160, 1e-3, max_rows=32, beta=1.0, **held), "overfit"),
            Planted(
                "sft_one_row", self.sft(120, 3e-2, per_device_train_batch_size=1, lr_scheduler_type="constant"), "batch_too_small"
            ),
            Planted("lora_rank_1", self.sft(160, 3e-2, rows="secrets", use_peft=True, lora_r=1), "rank_too_low"),
            Planted("sft_forgets", self.sft(120, 5e-2, rows="narrow"), "forgetting", **forgets),
            Planted("dpo_both_fall", self.pairs(60, 5e-3, rows="clean_pairs", beta=0.05), "both_logps_fall", "eval_logps/chosen"),
            Planted("dpo_saturated", self.pairs(100, 5e-4, rows="easy_pairs", beta=1.0), "margins_saturated", right),
            Planted("dpo_wordy", self.pairs(60, 1e-3, rows="wordy_pairs"), "length_biased", shorter),
            Planted("judge_coin", self.judge(80, 3e-3, rows="coin_pairs"), "chance", "eval_accuracy"),
            Planted("judge_saturated", self.judge(100, 1e-2, rows="easy_pairs"), "saturated", "eval_accuracy"),
            Planted("judge_wordy", self.judge(60, 1e-3, rows="wordy_pairs"), "length_biased", shorter),
            Planted("ppo_clipped", self.ppo(10, 2e-2, num_ppo_epochs=8), "clip_share", "eval_score"),
            Planted("ppo_blind", self.ppo(12, 1e-3, critic_learning_rate=1e-7), "value_blind", "eval_score"),
            Planted("ppo_wordy", self.ppo(14, 3e-3, ("words",), kl_coef=0.0), "length_drift", **forgets),
            Planted("ppo_hacks", self.ppo(14, 3e-3, ("words", "brief"), **unpaid), "reward_hacking", "eval_brief"),
            Planted("ppo_still", self.ppo(12, 1e-5), "policy_stands_still", "eval_score"),
        ]

    def healthy(self) -> list[Planted]:
        """The runs that nothing is to be said of."""
        kto = {**_plan(60, 1e-3), "beta": 0.1}
        return [
            Planted("text", self.text(200, 1e-2)),
            Planted("sft", self.sft(80, 5e-3)),
            Planted("sft_linear", self.sft(100, 3e-3, lr_scheduler_type="linear", seed=2)),
            Planted("sft_small_batch", self.sft(240, 2e-3, per_device_train_batch_size=4)),
            Planted("lora", self.sft(120, 1e-2, use_peft=True, lora_r=8)),
            Planted("dpo", self.pairs(80, 6e-4)),
            Planted("simpo", self.pairs(60, 3e-4, loss="simpo", beta=2.0, gamma=1.0)),
            Planted("orpo", self.pairs(80, 1e-3, loss="orpo", beta=None, lam=0.1)),
            Planted("kto", KTO(model=self.models["sft"], data=f"{self.data}/pairs.jsonl", **kto)),
            Planted("judge", self.judge(120, 3e-3)),
            Planted("ppo", self.ppo(14, 1e-3)),
            Planted("ppo_seed_2", self.ppo(14, 1e-3, seed=2)),
        ]
