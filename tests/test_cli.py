"""The command line: what a mistake looks like, and what a program gets that reads the output."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from helpers import llama

from align.artifact import MANIFEST
from align.cli import main
from align.data import write_rows
from align.registry import ALIASES, Registry, home
from align.stages import stages
from align.stages.elsewhere import NOTHING_TO_SET, RENAMED, advice

REWARDS = """
def short(completions, **columns): return [-float(len(c[0]["content"])) for c in completions]
def one_too_few(completions, **columns): return [0.0] * (len(completions) - 1)
def not_a_number(completions, **columns): return [float("nan")] * len(completions)
def raises(completions, **columns): raise RuntimeError("the judge\\nis asleep")
def wants_answer(completions, answer): return [0.0] * len(completions)
"""
RECIPE = """
from align.recipe import Recipe
from align.stages import SFT

def recipe(model: str = "model", rate: float = 1e-3) -> Recipe:
    return Recipe("mine", {"sft": SFT(model=model, data="sft.jsonl", learning_rate=rate, max_steps=1)})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A folder with models, data, rewards and recipes, good and bad."""
    folder = tmp_path_factory.mktemp("inputs")
    model = llama()
    for name, changes in {
        "model": {},
        "no_template": {"chat_template": None},
        "no_stop": {"chat_template": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"},
        "no_eos": {"eos_token": None},
    }.items():
        changed = deepcopy(tokenizer)
        for attribute, value in changes.items():
            setattr(changed, attribute, value)
        model.save_pretrained(folder / name)
        changed.save_pretrained(folder / name)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    asked = [[{"role": "user", "content": f"say {word}"}] for word in words]
    said = [[{"role": "assistant", "content": word}] for word in words]
    write_rows(folder / "sft.jsonl", [{"messages": a + b} for a, b in zip(asked, said, strict=True)])
    write_rows(folder / "raw.jsonl", [{"prompt": f"say {word}:", "completion": f" {word}"} for word in words])
    write_rows(
        folder / "pairs.jsonl",
        [{"prompt": a, "chosen": b, "rejected": c} for a, b, c in zip(asked, said, said[::-1], strict=True)],
    )
    write_rows(folder / "prompts.jsonl", [{"prompt": a} for a in asked])
    files = {
        "empty.jsonl": "",
        "text.txt": "A fox.\n\nTwo foxes.\n",
        "modle.yaml": "modle: model\ndata: sft.jsonl",
        "columns.jsonl": '{"question_text": "a", "reply": "b"}\n',
        "role.jsonl": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assitant", "content": "b"}]}\n',
        "type.jsonl": '{"prompt": "a", "completion": 5}\n',
        "broken.jsonl": '{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n',
        "mine.py": REWARDS,
        "recipe.py": RECIPE,
        "typo.py": RECIPE.replace("max_steps", "max_step"),
        "crash.py": "import nothing_of_that_name",
        "leaves.py": "import sys\nsys.exit()",
        "unguarded.py": f"{RECIPE}\nfrom align.recipe import main\nmain(recipe)",
        "no_recipe.py": "x = 1",
        "raises.py": "settings = {}\n\n\ndef recipe():\n    return settings['model']\n",
        "needs.py": "def recipe(model, rate=1e-3):\n    return None\n",
        "undefined.py": "def recipe(model: 'Modle' = 'gpt2'):\n    return None\n",
        "plain.py": "from align.recipe import Recipe\n\ndef recipe():\n    return Recipe('mine', {'sft': {'stage': 'sft'}})\n",
        "class.py": "from align import recipe as r, stages\n\ndef recipe():\n    return r.Recipe('mine', {'sft': stages.SFT})\n",
        "names.py": "from align.recipe import Recipe\n\ndef recipe():\n    return Recipe('mine', ['sft'])\n",
        "none.yaml": "name: mine\nstages: {}",
        "stages.yaml": "name: mine\nstages: [sft]",
        "stage.yaml": "name: mine\nstage: {sft: {stage: sft, model: model, data: sft.jsonl}}",
        "fields.yaml": "stage: sft\nmodel: model\ndata: sft.jsonl",
        "launch.yaml": "launch: {num_proceses: 2}\nstages: {sft: {stage: sft, model: model, data: sft.jsonl}}",
        "key.yaml": "1: mine\nstages: {sft: {stage: sft, model: model, data: sft.jsonl}}",
        "long.yaml": f"name: {'m' * 100}\nstages: {{sft: {{stage: sft, model: model, data: sft.jsonl}}}}",
        "date.yaml": "name: 2026-02-30\nstages: {sft: {stage: sft, model: model, data: sft.jsonl}}",
        "twice.yaml": "stages:\n  sft: {stage: sft, model: model, data: a.jsonl}\n  sft: {stage: sft, model: model, data: b.jsonl}",
        "typo.yaml": "name: mine\nstages: {sft: {stage: sft, model: model, data: sft.jsonl, learning_rat: 1e-3}}",
        "top.yaml": "nam: mine\nstages: {sft: {stage: sft, model: model, data: sft.jsonl}}",
        "kind.yaml": "name: mine\nstages: {sft: {stage: stf, model: model, data: sft.jsonl}}",
        "name.yaml": "name: ../mine\nstages: {sft: {stage: sft, model: model, data: sft.jsonl}}",
        "number.yaml": "name: 5\nstages: {sft: {stage: sft, model: model, data: sft.jsonl}}",
        "bad.yaml": "name: [mine\nstages: }",
        "list.yaml": "- a\n- b",
        "config.yaml": "model_name_or_path: model\ndata: sft.jsonl\nlearning_rate: 5e-4\nmax_steps: 1\nseed: 3\nname: tuned\n"
        "lr_scheduler_kwargs: {min_lr_rate: 1e-1}\nlr_scheduler_type: cosine_with_min_lr\n",
    }
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


@pytest.fixture(autouse=True)
def _inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


SFT = "sft --model model --max_steps 1 --data "
PPO = "ppo --model model --data prompts.jsonl --total_episodes 4 --episodes_per_step 4 --max_completion_length 4 --reward_funcs "
GRPO = "grpo --model model --data prompts.jsonl --held_out 0 --max_completion_length 4 --reward_funcs "
PAIRS = " --model model --data pairs.jsonl --max_steps 1"
RUN = "run recipe.py "

MISTAKES = {
    "missing file": (SFT + "sfd.jsonl", r"sfd\.jsonl: no such file or folder \(did you mean 'sft.jsonl'\?\)"),
    "misspelt suffix": (SFT + "sft.jsnl --plan", r"sft\.jsnl: no such file or folder \(did you mean 'sft.jsonl'\?\)"),
    "missing column": (SFT + "columns.jsonl", "columns.jsonl row 1, .*column 'prompt' is missing; found question_text, reply"),
    "malformed row": (SFT + "role.jsonl", r"role\.jsonl row 2, field messages\[1\]\.role: got 'assitant', expected .*'assistant'"),
    "wrong type": (SFT + "type.jsonl", r"type\.jsonl row 1, field completion: got 5, expected"),
    "broken line": (SFT + "broken.jsonl", r"broken\.jsonl row 2, column \d+: invalid JSON"),
    "empty data": (SFT + "empty.jsonl", r"empty\.jsonl: no rows: it is empty"),
    "wrong kind of data": ("dpo --beta 0.1 --model model --data prompts.jsonl", r"prompts\.jsonl row 1, .*'chosen' is missing"),
    "nothing held in": (SFT + "sft.jsonl --held_out 0.9999", "no row is left to train on"),
    "too long": (SFT + "sft.jsonl --max_length 2", "none of the rows can be used|end token"),
    "unknown data set": (SFT + "owner/nothing", "owner/nothing: no such file or folder, and the hub gives no data set"),
    "bad_row": (SFT + "sft.jsonl --on_bad_row skip", "'on_bad_row' is 'skip': input should be 'raise' or 'quarantine'"),
    # what is written
    "an output that is a file": (SFT + "sft.jsonl --output_dir sft.jsonl", r"sft\.jsonl is a file, not a folder"),
    "an output below a file": (SFT + "sft.jsonl --output_dir sft.jsonl/a/b", r"sft\.jsonl is a file, not a folder"),
    "an output that cannot be made": (SFT + "sft.jsonl --output_dir /proc/x", r"nothing can be written into /proc \("),
    "an output among other files": (SFT + "sft.jsonl --output_dir .", "is not empty and no folder of align's"),
    "a run's output that is a file": (RUN + "--out sft.jsonl", r"sft\.jsonl is a file, not a folder"),
    "parts below a file": ("data split sft.jsonl --out raw.jsonl", r"raw\.jsonl is a file, not a folder"),
    # the model and its tokenizer
    "no chat template": ("sft --model no_template --data sft.jsonl", "the tokenizer has no chat template. Set chat_template"),
    "no such template": (SFT + "sft.jsonl --chat_template chatlm", "chat_template 'chatlm' is neither a file nor one of"),
    "template without end": (
        "sft --model no_stop --data sft.jsonl",
        "the chat template puts no end token of this tokenizer behind an assistant turn .* Set chat_template to 'plain'",
    ),
    "no end token": ("sft --model no_eos --data raw.jsonl", r"the tokenizer has no end token \(eos_token\)"),
    "no such model": ("sft --model modle --data sft.jsonl", r"no model 'modle' \(did you mean 'model'\?\): it is not a folder"),
    "no such folder": ("sft --model ./modle --data sft.jsonl", r"no model folder '\./modle' \(did you mean 'model'\?\)"),
    "a file for a model": ("sft --model ./sft.jsonl --data sft.jsonl", r"no model folder '\./sft\.jsonl'$"),
    "no such hub id": ("sft --model owner/nothing --data sft.jsonl", "cannot load a tokenizer from 'owner/nothing'"),
    "nothing to export": ("export owner/nothing --to there", "cannot load a tokenizer from 'owner/nothing'"),
    "nothing to measure": ("curvature owner/nothing --data sft.jsonl", "cannot load a config from 'owner/nothing'"),
    "no such version": ("sft --model model@3 --data sft.jsonl", "no model 'model' in the registry"),
    "a folder that is no model": (
        "sft --model . --data sft.jsonl",
        "is no model's folder: it holds neither a config.json nor a tokenizer",
    ),
    "no such layer": (SFT + "sft.jsonl --use_peft --lora_target_modules q_porj", "target_modules"),
    # rewards
    "no reward": (PPO.removesuffix("--reward_funcs "), "nothing judges the answers: set reward_funcs, reward_model or both"),
    "no such reward file": (PPO + "mien.py:short", r"reward file mien\.py does not exist .*did you mean 'mine\.py'"),
    "no such reward": (PPO + "mine.py:shrot", r"mine\.py has no 'shrot' \(did you mean 'short'\?\)"),
    "no such built-in": (PPO + "keywrd", r"unknown reward 'keywrd' \(did you mean 'keyword'\?\)"),
    "wrong count": (PPO + "mine.py:one_too_few", r"reward 'one_too_few' returned \d values; expected \d"),
    "not a number": (
        PPO + "mine.py:not_a_number",
        r"reward 'not_a_number', row 0 \(prompt 'say \w+'\): got nan; expected a finite number",
    ),
    "a reward that raises": (PPO + "mine.py:raises", "reward 'raises' raised RuntimeError: the judge is asleep"),
    "a column that is not there": (
        PPO + "mine.py:wants_answer",
        "reward 'wants_answer' needs a column 'answer'; the rows have: none",
    ),
    "too many weights": (PPO + "mine.py:short --reward_weights 1 2", "reward_weights has 2 numbers; there are 1 rewards"),
    "no such reward model": (PPO + "mine.py:short --reward_model juge", "no model 'juge'"),
    "nothing to evaluate on": (
        "eval --models.a model --perplexity_data sft.jsonl --max_length 2",
        "a: none of the rows can be used",
    ),
    "no model to evaluate": ("eval --data prompts.jsonl", "'models' is missing"),
    "a reference that is none": ("eval --models.a model --reference b", "reference 'b' is none of the models: a"),
    # fields
    "dpo without beta": ("dpo" + PAIRS, "'dpo' needs 'beta', and it has no default: set it"),
    "simpo with lam": ("simpo --beta 2 --gamma 1 --lam 0.1" + PAIRS, "'simpo' takes no 'lam'"),
    "no such loss": ("preference --loss dop" + PAIRS, r"unknown preference loss 'dop' \(did you mean 'dpo'\?\)"),
    "two losses": ("dpo --loss ipo --beta 0.1" + PAIRS, "use `align preference --loss ipo`"),
    "trl has no simpo here": ("simpo --engine trl --beta 2 --gamma 1" + PAIRS, "engine 'trl' runs the losses dpo, .* not 'simpo'"),
    "trl's dpo is not smoothed": (
        "dpo --engine trl --beta 0.1 --label_smoothing 0.1" + PAIRS,
        "TRL's DPO loss ignores label_smoothing",
    ),
    "trl's ipo averages": ("ipo --engine trl --beta 0.1" + PAIRS, "TRL's IPO loss averages log-probs over tokens; set average"),
    "ld_dpo without alpha": ("preference --loss ld_dpo --beta 0.1" + PAIRS, "'ld_dpo' needs 'alpha', and it has no default"),
    "ld_dpo with a weight above 1": (
        "preference --loss ld_dpo --beta 0.1 --alpha 2" + PAIRS,
        "'alpha' is 2: input should be less than or equal to 1",
    ),
    "kto is a stage": (
        "preference --loss kto --beta 0.1" + PAIRS,
        "kto is a stage of its own, .*: use `align kto`",
    ),
    "kto without beta": ("kto --model model --data pairs.jsonl", "'beta' is missing"),
    "kto on a row at a time": (
        "kto --beta 0.1 --per_device_train_batch_size 1" + PAIRS,
        "'per_device_train_batch_size' is 1: input should be greater than 1",
    ),
    "kto on demonstrations": ("kto --beta 0.1 --model model --data sft.jsonl", r"sft\.jsonl row 1, .* of kind sft, good for"),
    "no such estimator": (
        PPO + "mine.py:short --advantage_estimator gea",
        r"unknown advantage estimator 'gea' \(did you mean 'gae'",
    ),
    "answers as long as rows": (
        PPO + "mine.py:short --max_length 64 --max_completion_length 64",
        "max_completion_length takes all of max_length, and leaves no token for a prompt",
    ),
    "a group of one": (PPO + "mine.py:short --advantage_estimator rloo", "set num_generations to 2 or more"),
    "a critic for nothing": (PPO + "mine.py:short --critic adapter", "set use_peft, or take 'separate' or 'shared'"),
    "a critic on a base that pissa changed": (
        PPO + "mine.py:short --critic adapter --tuning lora --tuning_args.pissa true",
        "set use_peft, or take 'separate' or 'shared'",
    ),
    "rows without a weight": (PPO + "mine.py:short --ptx_data sft.jsonl", "ptx_data is mixed in with weight ptx_coef, which is 0"),
    "nothing to mix in": (PPO + "mine.py:short --ptx_coef 0.1 --plan", "there are no rows for it: set ptx_data"),
    "k1 in the loss": (PPO + "mine.py:short --kl_in loss", "kl_estimator 'k1' has a gradient of mean zero"),
    "groups that do not fit": (GRPO + "mine.py:short --num_generations 3", r"\(8\) must be a multiple of num_generations \(3\)"),
    "greedy groups": (GRPO + "mine.py:short --temperature 0", "'temperature' is 0: input should be greater than 0"),
    "prompts that fill no batch": (
        GRPO + "mine.py:short --engine trl --num_generations 2 --gradient_accumulation_steps 4",
        "8 prompts do not fill a batch, which takes 16",
    ),
    "grpo without a reward": (GRPO.removesuffix("--reward_funcs "), "nothing judges the answers"),
    "unknown flag": (SFT + "sft.jsonl --learning_rte 1", r"unknown flag --learning_rte \(did you mean 'learning_rate'\?\)"),
    "no flag": ("sft sft.jsonl", "'sft.jsonl' is not a flag"),
    "a number that is none": (SFT + "sft.jsonl --learning_rate fast", "'learning_rate' is 'fast': input should be a valid number"),
    "no steps at all": (
        "sft --model model --data sft.jsonl --max_steps 0",
        "'max_steps' is 0: give at least 1, or -1 for num_train",
    ),
    "epochs without end": (SFT + "sft.jsonl --num_train_epochs .inf", "'num_train_epochs' is inf: input should be a finite number"),
    "a flag that lost its value": (
        SFT + "sft.jsonl --learning_rate --bf16",
        "'learning_rate' is True: this is no switch: give it a",
    ),
    "a yes for a number": (RUN + "--set sft.max_steps=yes", "'max_steps' is True: this is no switch"),
    "a batch beyond all counting": (
        SFT + f"sft.jsonl --per_device_train_batch_size {10**30}",
        "'per_device_train_batch_size' is 10{30}: a whole number must be below",
    ),
    "a rate without end": (RUN + "--set sft.learning_rate=.inf", "'learning_rate' is inf: input should be a finite number"),
    "a margin that is none": ("simpo --beta 2 --gamma .nan" + PAIRS, "'gamma' is nan: input should be a finite number"),
    "a likelihood unlearned": (
        "preference --loss rpo --rpo_alpha -1 --beta 0.1" + PAIRS,
        "'rpo_alpha' is -1: input should be greater",
    ),
    "no such tracker": (
        SFT + "sft.jsonl --report_to tensorbord",
        r"report_to: no tracker 'tensorbord' \(did you mean 'tensorboard'",
    ),
    "a tracker that is not there": (
        SFT + "sft.jsonl --report_to kubeflow",
        "the package of the tracker 'kubeflow' is not installed",
    ),
    "a schedule with a stranger": (
        SFT + "sft.jsonl --lr_scheduler_kwargs.min_lr 1e-6",
        "lr_scheduler_kwargs .* of 'cosine': .* unexpected keyword argument 'min_lr'",
    ),
    "a schedule that lacks something": (
        PPO + "mine.py:short --lr_scheduler_type warmup_stable_decay",
        "of 'warmup_stable_decay': .* missing 1 required .* 'num_decay_steps'",
    ),
    "a seed below 0": (SFT + "sft.jsonl --seed -1", "'seed' is -1: input should be greater than or equal to 0"),
    "a seed of 33 bits": (
        "eval --models.a model --data prompts.jsonl --seed 4294967296",
        "'seed' is .* less than 4294967296",
    ),
    "no sources": (SFT + "[]", r"'data' is \[\]: list should have at least 1 item"),
    "a source without a name": (SFT + "['']", r"'data\.0' is '': string should have at least 1 character"),
    "a model without a name": (SFT + "sft.jsonl --model ''", "'model' is '': string should have at least 1 character"),
    "no such precision": (
        "eval --models.a model --data prompts.jsonl --dtype int8",
        "'dtype' is 'int8': input should be 'float32'",
    ),
    "a pull the other way": ("dpo --engine trl --beta -0.1" + PAIRS, "'beta' is -0.1: input should be greater than 0"),
    "no pull at all": ("orpo --lam 0" + PAIRS, "'lam' is 0: input should be greater than 0"),
    "more labels flipped than not": (
        "preference --loss robust --beta 0.1 --label_smoothing 0.5" + PAIRS,
        "'label_smoothing' is 0.5: input should be less than 0.5",
    ),
    "a number out of range": (SFT + "sft.jsonl --held_out 2", "'held_out' is 2: input should be less than 1"),
    "no such architecture field": (
        "pretrain --architecture.hiden_size 8 --data text.txt",
        r"a llama config has no 'hiden_size' \(did you mean 'hidden_size'\?\). The stage 'pretrain' would stop there",
    ),
    "an architecture field of the wrong type": (
        "pretrain --architecture.hidden_size abc --data text.txt",
        "architecture: Field 'hidden_size' expected int, got str",
    ),
    "an architecture that does not fit": (
        "pretrain --architecture.num_attention_heads 0 --data text.txt",
        "architecture: integer division or modulo by zero",
    ),
    "an architecture that cannot be built": (
        "pretrain --architecture.model_type bert --architecture.hidden_size 30 --data text.txt",
        "architecture: no model can be built of it: The hidden size",
    ),
    "a field that is missing and misspelt": (
        "sft --modle model --data sft.jsonl",
        r"unknown flag --modle \(did you mean 'model'\?\)",
    ),
    "a field that is missing": ("sft --model model", "'data' is missing: it must be set"),
    "numbers that do not fit": (PPO + "mine.py:short --num_mini_batches 3", r"episodes_per_step \(4\) must be a multiple of"),
    "two starts": ("pretrain --model model --architecture.hidden_size 8 --data raw.jsonl", "set either model .* or architecture"),
    "no such architecture": (
        "pretrain --architecture.model_type lama --data text.txt",
        "model_type 'lama' is unknown to transformers",
    ),
    "a name that is no name": (SFT + "sft.jsonl --name ../x", r"the name '\.\./x' must be letters"),
    # recipes
    "unknown verb": ("stf", r"invalid choice: 'stf' \(did you mean 'sft'\?\); known: run, pretrain"),
    "no such recipe": ("run compere", r"no recipe 'compere' \(did you mean 'compare'\?\)"),
    "unknown key in YAML": (
        "run typo.yaml",
        r"typo\.yaml, stage 'sft': unknown key 'learning_rat' \(did you mean 'learning_rate'\?\)",
    ),
    "unknown key in Python": ("run typo.py", r"typo\.py, SFT: unknown key 'max_step' \(did you mean 'max_steps'\?\)"),
    "unknown key at the top": ("run top.yaml", r"unknown key 'nam' \(did you mean 'name'\?\)"),
    "unknown stage in YAML": ("run kind.yaml", r"kind\.yaml, stage 'sft': unknown stage 'stf' \(did you mean 'sft'\?\)"),
    "a recipe's name": ("run name.yaml", r"name\.yaml: the name '\.\./mine' must be letters"),
    "a recipe's name is a number": ("run number.yaml", r"number\.yaml: the name 5 must be letters.*no text: put it in quotes"),
    "names that are too long together": ("run long.yaml", r"the name 'm{100}-sft' must .* have at most 100 of them"),
    "bad YAML": ("run bad.yaml", r"bad\.yaml is not YAML: while parsing .* \(line 2, column \d+\)$"),
    "a list for a recipe": ("run list.yaml", "expected a mapping with `name` and `stages`"),
    "a recipe that crashes": ("run crash.py", r"running the recipe crash\.py failed in line 1: ModuleNotFoundError"),
    "a recipe that leaves": ("run leaves.py", r"running the recipe leaves\.py failed in line 2: SystemExit"),
    "a recipe that runs itself": ("run unguarded.py", r"`main` runs the command again; write it behind `if __name__ == "),
    "a recipe that raises": ("run raises.py", r"`recipe` of raises\.py failed in line 5: KeyError: 'model'"),
    "a setting without a default": ("run needs.py --set rate=1", r"needs\.py needs the setting 'model', which has no default"),
    "a type that is not defined": ("run undefined.py", r"undefined\.py: a parameter .* 'Modle' is not defined"),
    "a mapping for a stage": ("run plain.py", r"recipe 'mine': 'sft' is a dict, not a stage"),
    "a class for a stage": ("run class.py", r"recipe 'mine': 'sft' is the class SFT, not a stage"),
    "a list of stages": ("run names.py", r"recipe 'mine': its stages are \['sft'\], not a mapping"),
    "a list of stages in YAML": ("run stages.yaml", r"stages\.yaml: `stages` is \['sft'\]; expected names of stages"),
    "no key `stages`": ("run stage.yaml", r"stage\.yaml: unknown key 'stage' \(did you mean 'stages'\?\)"),
    "the config of a stage for a recipe": ("run fields.yaml", "fields of one stage; `align sft --config fields.yaml` runs it"),
    "unknown key of a mapping in YAML": ("run launch.yaml", r"'launch\.num_proceses' \(did you mean 'num_processes'\?\)"),
    "another recipe's name": ("run crsh.py", r"no recipe 'crsh\.py' \(did you mean 'crash\.py'\?\)"),
    "a recipe without its suffix": ("run ./key", r"no recipe '\./key' \(did you mean 'key\.yaml'\?\)"),
    "no stages": ("run none.yaml", r"recipe 'mine': its stages are \{\}, not a mapping"),
    "a key that is a number": ("run key.yaml", r"key\.yaml: unknown key 1; a recipe has"),
    "a date that is none": ("run date.yaml", r"date\.yaml is not YAML: day is out of range"),
    "a stage twice": ("run twice.yaml", r"twice\.yaml is not YAML: the key 'sft' stands twice \(line 3, column \d+\)$"),
    "a file without a recipe": ("run no_recipe.py", r"no_recipe\.py defines no function `recipe`"),
    "unknown setting": (RUN + "--set rat=1", r"has no setting 'rat' \(did you mean 'rate'\?\); it has: model, rate"),
    "setting of one letter": (RUN + "--set r=1", r"has no setting 'r'; it has: model, rate"),
    "unknown stage in --set": (RUN + "--set stf.seed=1", r"has no stage 'stf' \(did you mean 'sft'\?\)"),
    "unknown field in --set": (RUN + "--set sft.sede=1", r"unknown key 'sede' \(did you mean 'seed'\?\)"),
    "wrong type in --set": (RUN + "--set sft.seed=one", "'seed' is 'one': input should be a valid integer"),
    "--set without a value": (RUN + "--set sft.seed", "write it as KEY=VALUE"),
    "--set of one key twice": (RUN + "--set sft.seed=1 --set sft.seed=2", "--set sft.seed is given twice, as '1' and as '2'"),
    "unknown stage in --only": (RUN + "--only stf", r"has no stage 'stf' \(did you mean 'sft'\?\)"),
    "unknown stage in --only of a plan": (RUN + "--only stf --plan", r"has no stage 'stf' \(did you mean 'sft'\?\)"),
    "unknown stage in --only of a check": ("check recipe.py --only stf", r"has no stage 'stf' \(did you mean 'sft'\?\)"),
    "a switch with an entry": (SFT + "sft.jsonl --plan.x", "--plan is no mapping with an entry 'x'"),
    "a switch with a value": (SFT + "sft.jsonl --plan false", "--plan is a switch and takes no 'false'"),
    "a list in parts": (SFT + "sft.jsonl --dataset_name raw.jsonl", "--data is given twice: write all of its values behind one"),
    "an optional list in parts": (
        SFT + "sft.jsonl --eval_data raw.jsonl --eval_data raw.jsonl",
        "--eval_data is given twice: write all of its values behind one",
    ),
    "a name that is empty": (SFT + "sft.jsonl --name=", "--name takes one value"),
    "an output without a name": (SFT + "sft.jsonl --output_dir=", "--output_dir takes one value"),
    "a run's output without a name": (RUN + "--out=", "argument --out: it names no file or folder"),
    "a check of an output without a name": ("check recipe.py --out=", "argument --out: it names no file or folder"),
    "a sweep over nothing": (RUN + "--plan --sweep sft.seed=1,,2", "--sweep sft.seed=1,,2: a value is missing"),
    "no seeds": (RUN + "--seeds 0", "--seeds must be at least 1"),
    "fewer than no attempts": (RUN + "--retries -1", "--retries must be at least 0"),
    "no time at all": (RUN + "--grace nan", "--grace must be at least 0"),
    "a script below a file": ("launch --slurm raw.jsonl/x.sh -- align run x", r"raw\.jsonl/x\.sh cannot be written \("),
    "a folder for a script": ("launch --slurm . -- align run x", r"\. is a folder: name a file in it for the output"),
    "hours that are no number": ("launch --slurm x.sh --hours nan -- align run x", "--hours must be above 0"),
    "data of a name that no file can have": (f"data check {'x' * 300}", "x: File name too long; name something shorter"),
    "a model of a name that no file can have": (f"chat {'x' * 300} --prompt x", "x: File name too long; name something shorter"),
    "an export below a file": ("export model --to raw.jsonl/x", r"raw\.jsonl is a file, not a folder: name another place for"),
    "a measurement below a file": ("curvature model --data sft.jsonl --out raw.jsonl/x", r"raw\.jsonl is a file, not a folder"),
    "unknown option": (RUN + "--outt=x", r"unknown argument '--outt=x' \(did you mean '--out'\?\); see `align run --help`"),
    "unknown option of a verb's verb": (
        "data check sft.jsonl --formt openai",
        r"unknown argument '--formt' \(did you mean '--format'\?\); see `align data check --help`",
    ),
    "no such config": ("sft --config nothing.yaml", r"--config nothing\.yaml: there is no such file"),
    "bad config": ("sft --config bad.yaml", r"bad\.yaml is not YAML"),
    "another toolkit's key": (SFT + "sft.jsonl --cutoff_len 128", r"unknown flag --cutoff_len: here it is 'max_length'; see"),
    "another toolkit's key in a recipe": (RUN + "--set sft.cutoff_len=128", "unknown key 'cutoff_len': here it is 'max_length'"),
    "a switch that is not needed": (
        SFT + "sft.jsonl --assistant_only_loss",
        "unknown flag --assistant_only_loss: leave it out, as the loss is on the assistant's words alone; see",
    ),
    "typo in the config": ("sft --config modle.yaml", r"--config modle\.yaml: unknown key 'modle' \(did you mean 'model'\?\)"),
    "more epochs than a life has": (SFT + "sft.jsonl --num_train_epochs 1e300", "should be less than or equal to 1000000"),
    "no DeepSpeed": (SFT + "sft.jsonl --launch.strategy deepspeed-zero2", r"launch\.strategy deepspeed-zero2 needs deepspeed: pip"),
    "a crowd": (SFT + "sft.jsonl --launch.num_processes 9999", "launch.num_processes: 9999 are too many for this machine"),
    "a flag with one dash": (SFT + "sft.jsonl -lr 1", "'-lr' is not a flag; write --KEY VALUE, or --data=-lr"),
    "entries before their whole": (SFT + "sft.jsonl --launch.num_processes 1 --launch {}", "--launch undoes what was said"),
    # registry and report
    "no such name": ("models show nothing", "no model 'nothing' in the registry"),
    "a word too many": ("models list nothing", "`align models list` takes no 'nothing'"),
    "no name": ("models lineage", "`align models lineage` needs a NAME"),
    "an alias of nothing": ("models alias mine ./nothing", r"no model folder '\./nothing'"),
    "a bad alias": ("models alias ../mine owner/name", r"the name '\.\./mine' must be letters"),
    "no such run": ("report nothing", "no run folder nothing"),
    "a folder that is no run": ("report model", "model holds no finished stage"),
    "a run that has not begun": ("status model", "no run folder model: no stage has begun there"),
}


def manifests(*folders):
    return [path for folder in folders for path in Path(folder).rglob(MANIFEST)]


def written():
    """Files under the home folder, but for what the first plan of a process found of this package's own modules."""
    return [path for path in home().rglob("*") if path.is_file() and path.parent != home() / "cache" / "code"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(mistake, capsys, folder):
    command, message = MISTAKES[mistake]
    before = sorted(folder.iterdir())
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert lines[-1].startswith("align: error: ")
    assert re.search(message, lines[-1]), lines[-1]
    assert len([line for line in lines if "error" in line.lower()]) == 1
    assert "Traceback" not in err
    assert out == ""
    assert Registry().all() == []
    assert manifests(folder, home()) == []
    assert written() == [], "no file is left"
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    "judged",
    [
        {"stage": "ppo", "model": "sft", "data": "prompts.jsonl", "reward_model": "model"},
        {"stage": "pairs", "model": "sft", "data": "prompts.jsonl", "reward_model": "model"},
        {"stage": "evaluate", "models": {"sft": "sft"}, "preference_data": "pairs.jsonl", "reward_models": {"rm": "model"}},
    ],
)
def test_a_language_model_for_a_judge_is_found_before_anything_runs(judged, capsys, tmp_path):
    recipe = {"sft": {"stage": "sft", "model": "model", "data": "sft.jsonl", "max_steps": 1}, "judged": judged}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"stages": recipe}))
    for more in ([], ["--plan"]):
        assert main(["run", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out"), *more]) == 2
        assert "is a language model, not a reward model: train one with `align reward`" in capsys.readouterr().err
        assert manifests(tmp_path) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reward_funcs": ["length_band(low=1)"]}, "reward 'length_band' needs 'high'"),
        ({"reward_funcs": ["length_band(low=5, high=2)"]}, "length_band needs 0 <= low <= high and high > 0"),
        ({"reward_funcs": ["length_band(low='few', high=2)"]}, "reward \"length_band(low='few', high=2)\": its values do not fit"),
        ({"reward_funcs": ["repetition"], "reward_weights": [1, 2]}, "reward_weights has 2 numbers; there are 1 rewards"),
        ({"reward_funcs": [{"reward": "repetition", "gate": {"reward": "keyword", "at_least": 1}}]}, "gate of reward 'repetition'"),
    ],
)
def test_rewards_that_do_not_fit_are_told_by_a_plan(fields, message, capsys, tmp_path):
    stage = {"stage": "ppo", "model": "model", "data": "prompts.jsonl", **fields}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"stages": {"judged": stage}}))
    assert main(["run", str(tmp_path / "r.yaml"), "--plan"]) == 2
    assert f"align: error: judged: {message}" in capsys.readouterr().err.replace("the gate", "gate")


def test_a_mistake_in_the_second_stage_is_found_before_the_first_runs(capsys, tmp_path):
    recipe = {"sft": {"stage": "sft", "model": "model", "data": "sft.jsonl", "max_steps": 1}}
    recipe["dpo"] = {"stage": "preference", "model": "sft", "data": "sft.jsonl", "beta": 0.1}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"name": "two", "stages": recipe}))
    assert main(["run", str(tmp_path / "two.yaml")]) == 2
    assert "align: error: dpo: sft.jsonl row 1, " in capsys.readouterr().err
    assert Registry().all() == []
    assert not (home() / "two").exists()


def two_stages(folder, second):
    """A recipe of SFT and a stage that goes on with its model."""
    first = {"stage": "sft", "model": "model", "data": "sft.jsonl", "max_steps": 1}
    stages = {"sft": first, "second": {"model": "sft", **second}}
    (folder / "two.yaml").write_text(yaml.safe_dump({"name": "two", "stages": stages}))
    return str(folder / "two.yaml")


def test_a_missing_parameter_of_the_second_stage_is_found_before_the_first_runs(capsys, tmp_path):
    """Its loss has no beta."""
    assert main(["run", two_stages(tmp_path, {"stage": "preference", "data": "pairs.jsonl"})]) == 2
    assert "align: error: second: preference loss 'dpo' needs 'beta'" in capsys.readouterr().err
    assert not Registry().all()


def test_a_misspelt_stage_is_told_of_where_it_stands(capsys, tmp_path):
    assert main(["run", two_stages(tmp_path, {"stage": "kto", "data": "pairs.jsonl", "beta": 0.1, "model": "stf"}), "--plan"]) == 2
    assert "align: error: stage 'second': no model 'stf' (did you mean 'sft'?)" in capsys.readouterr().err


def test_a_task_of_the_second_stage_that_is_none_is_found_before_the_first_runs(capsys, tmp_path):
    """So are its arguments."""
    for fields, said in (
        ({"task": "nre"}, "unknown task 'nre'"),
        ({"task": "ner", "task_args": {"stride": 1}}, "takes no 'stride'"),
    ):
        assert main(["run", two_stages(tmp_path, {"stage": "task", "data": "sft.jsonl", **fields})]) == 2
        assert said in capsys.readouterr().err
    assert not Registry().all()


def test_a_mistake_that_only_the_second_stage_can_see_keeps_the_first(capsys, tmp_path):
    """A reward that is not a number."""
    (tmp_path / "words.py").write_text("def words(completions, **columns):\n    return ['many'] * len(completions)\n")
    asks = {"stage": "pairs", "data": "prompts.jsonl", "max_completion_length": 4, "reward_funcs": [f"{tmp_path}/words.py:words"]}
    assert main(["run", two_stages(tmp_path, asks)]) == 2
    assert "align: error: second: " in capsys.readouterr().err
    assert [a.reference for a in Registry().all()] == ["two-sft@1"]
    assert [path.name.split("-")[0] for path in (home() / "two").glob("*/")] == ["sft"]


def test_an_interruption_has_its_own_exit_code(monkeypatch, capsys):
    def cut(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("align.commands.run.load_recipe", cut)
        assert main(["run", "recipe.py"]) == 130
        assert capsys.readouterr().err == "align: interrupted\n", "no stage has begun"
    with monkeypatch.context() as patched:
        patched.setattr("align.runner.execute.work", cut)
        assert main(f"{SFT}sft.jsonl".split()) == 130
        assert capsys.readouterr().err == "align: interrupted; the same command continues with the stage that was cut\n"
    monkeypatch.setattr("align.data.RowStream", cut)
    for command in (["data", "check", "sft.jsonl"], ["reward", "test", "repetition", "--data", "pairs.jsonl"]):
        assert main(command) == 130
        assert capsys.readouterr().err == "align: interrupted\n", "there is no stage to go on with"


def test_what_is_for_a_closed_stderr_is_not_said_on_stdout(tmp_path):
    """Nor has a stage that runs without it any trouble."""
    stage = [*f"{SFT}sft.jsonl --json --output_dir".split(), f"{tmp_path}/out"]
    for words, code in ((["run", "nothing"], 2), (stage, 0)):
        command = f"exec {shlex.join([sys.executable, '-m', 'align', *words])} 2>&-"
        done = subprocess.run(["sh", "-c", command], env={**os.environ, "ALIGN_IN_PROCESS": "1"}, stdout=subprocess.PIPE)
        assert done.returncode == code
        assert (json.loads(done.stdout)["name"] == "sft") if code == 0 else (done.stdout == b"")


INTERRUPTED = """
import os, runpy, signal, sys

class Finder:
    @staticmethod
    def find_spec(name, *_):
        if name == "align.cli":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has background jobs ignore it
sys.meta_path.insert(0, Finder)
runpy.run_module("align", run_name="__main__")
"""


def test_ctrl_c_while_modules_are_imported_is_one_line():
    """That is the first second; it was a traceback through whatever was being imported."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "align: interrupted\n")
    scripts = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"align": "align.__main__:main"}, "the script begins there, too"


@pytest.mark.parametrize("begun", ['module("align"', 'path("pipelines/compare.py"'])
def test_the_end_looks_for_no_garbage(begun):
    """In torch's modules that took a second or two after the last line."""
    # What is registered first is called last.
    code = "import atexit, gc, runpy; atexit.register(lambda: print(gc.get_freeze_count() > 0)); "
    words = [sys.executable, "-c", code + f'runpy.run_{begun}, run_name="__main__")', "--help"]
    done = subprocess.run(words, capture_output=True, cwd=Path(__file__).parent.parent)
    assert done.stdout.endswith(b"True\n")


# -- help ----------------------------------------------------------------------------------------------------------------------


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(
        verb in text for verb in ("run", "pretrain", "sft", "reward", "ppo", "dpo", "orpo", "simpo", "eval", "models", "report")
    )
    assert main([]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("run", r"--grace GRACE [^-]* \(default: 60\.0\)"),
        ("curvature", r"--seed SEED [^-]* \(default: 0\)"),
        ("launch --slurm x", r"--hours HOURS [^-]* \(default: 24\.0\)"),
        ("data split", r"--held_out SHARE [^-]* \(default: 0\.05\)"),
        ("serve", r"--dtype DTYPE [^-]* \(default: auto\)"),
        ("chat", r"--votes FILE [^-]* \(default: runs/votes\.jsonl\) --temperature"),  # in words of its own, and once
    ],
)
def test_help_tells_every_default(command, told, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    assert re.search(told, " ".join(capsys.readouterr().out.split()))


def test_help_of_a_stage_begins_with_what_must_be_set_and_what_is_its_own(capsys):
    from align.stages import Preference

    assert main(["preference", "--help"]) == 0
    fields = re.findall(r"^  --(\w+) \((required)?", capsys.readouterr().out, re.MULTILINE)
    assert fields[:4] == [("data", "required"), ("model", "required"), ("loss", ""), ("learning_rate", "")]
    assert len({name for name, _ in fields}) == len(fields) == len(Preference.model_fields)
    assert not any(required for _, required in fields[2:])


def test_help_of_a_stage_names_the_choices_of_a_field(capsys):
    assert main(["sft", "--help"]) == 0
    text = capsys.readouterr().out
    assert "  --on_non_finite (default 'stop'; one of stop, skip, lower_learning_rate)\n        When a loss" in text
    assert all(len(line) <= 124 or line.startswith("  --") for line in text.splitlines()), "what is long is wrapped"


@pytest.mark.parametrize(
    "verb",
    [
        "pretrain",
        "sft",
        "reward",
        "ppo",
        "dpo",
        "orpo",
        "simpo",
        "ipo",
        "preference",
        "kto",
        "grpo",
        "rloo",
        "pairs",
        "evaluate",
        "eval",
    ],
)
def test_help_of_a_stage_explains_every_field(verb, capsys):
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"align {verb} ")
    assert "None\n" not in text.replace("default None", ""), "every field has a description"
    assert ("--loss " in text) == (verb == "preference")


# -- single stages -------------------------------------------------------------------------------------------------------------


def run_json(command, capsys):
    assert main(command.split()) == 0
    return json.loads(capsys.readouterr().out)


def test_a_stage_lands_in_exactly_the_output_dir(capsys, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = tmp_path / "a" / "b"
    artifact = run_json(f"{SFT}sft.jsonl --output_dir {target} --json", capsys)
    assert artifact["path"] == str(target)
    assert artifact["name"] == "sft"
    assert {file.name for file in target.iterdir()} >= {
        "model.safetensors",
        "tokenizer.json",
        MANIFEST,
        "config.yaml",
        "metrics.jsonl",
    }
    assert AutoModelForCausalLM.from_pretrained(target).config.vocab_size == 320
    assert AutoTokenizer.from_pretrained(target).chat_template
    assert Registry().get("sft@1").path == str(target)


def test_a_home_that_takes_no_registry_is_told_of_before_anything_trains(monkeypatch, tmp_path, capsys):
    """The output folder is elsewhere, and can be written."""
    monkeypatch.setenv("ALIGN_HOME", "/proc/x")
    assert main(f"{SFT}sft.jsonl --output_dir {tmp_path}/out".split()) == 2
    assert "nothing can be written into /proc (" in (told := capsys.readouterr().err)
    assert "set ALIGN_HOME to a folder that can take the registry" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("taken", ["home/registry/sft", "logs"])
def test_a_folder_that_is_another_users_is_told_of_before_anything_trains(taken, tmp_path, capsys):
    """Where several share a home, the folder of a name in its registry, or that of a run's logs, may be somebody else's."""
    (tmp_path / taken).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / taken).symlink_to("/proc")
    assert main(f"{SFT}sft.jsonl --output_dir {tmp_path}/out".split()) == 2
    assert f"nothing can be written into {tmp_path / taken} (" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_recipe_in_another_encoding_is_told_of_as_that(tmp_path, capsys):
    (tmp_path / "latin.yaml").write_bytes("# grün\nname: x".encode("latin-1"))
    assert main(["run", str(tmp_path / "latin.yaml")]) == 2
    assert "latin.yaml is not UTF-8 text (invalid start byte at byte 4): save it as UTF-8" in capsys.readouterr().err


def test_the_same_command_again_does_nothing(capsys, tmp_path):
    command = f"{SFT}sft.jsonl --output_dir {tmp_path}/out --json"
    assert run_json(command, capsys) == run_json(command, capsys)
    assert len(Registry().all()) == 1
    (plan,) = run_json(command + " --plan", capsys)
    expected = {"stage": "sft", "runs": False, "reason": "up to date", "folder": f"{tmp_path}/out", "seconds_last_time": None}
    assert plan == expected
    assert main(f"{SFT}sft.jsonl --seed 1 --output_dir {tmp_path}/out".split()) == 2
    assert "holds another result (sft@1; changed: seed 0 -> 1)" in capsys.readouterr().err


def test_a_plan_of_a_stage_runs_nothing(capsys, tmp_path):
    (plan,) = run_json(f"{SFT}sft.jsonl --plan --json --output_dir {tmp_path}/out", capsys)
    assert plan["runs"] is True
    assert main(f"{SFT}sft.jsonl --plan".split()) == 0
    assert capsys.readouterr().out == "run   sft            never ran\n"
    assert not (tmp_path / "out").exists()
    assert written() == []


def test_a_tilde_behind_an_equals_sign_is_the_users_folder(monkeypatch, tmp_path, capsys):
    """No shell reads it there: a folder called ~ was made where the command was given."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("model: model\ndata: sft.jsonl\nlearning_rate: 1e-4\n")
    (plan,) = run_json("sft --config=~/c.yaml --output_dir=~/out --plan --json", capsys)
    assert plan["folder"] == f"{tmp_path}/out"
    (plan,) = run_json("run recipe.py --out=~/run --plan --json", capsys)
    assert plan["folder"].startswith(f"{tmp_path}/run/sft-")
    assert main(["data", "convert", "sft.jsonl", "--to", "sharegpt", "--out=~/other.jsonl"]) == 0
    assert (tmp_path / "other.jsonl").is_file()


def test_the_plan_of_a_sweep_has_its_reasons_below_each_other(capsys):
    """The names of branches are longer than those of stages."""
    assert main(f"{RUN}--sweep sft.learning_rate=1e-4,2.5e-4 --plan".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1 < len(lines), lines


def test_names_from_hugging_face_mean_the_same(capsys):
    ours = run_json("sft --model model --data sft.jsonl --max_steps 1 --plan --json", capsys)
    assert run_json("sft --model_name_or_path model --dataset_name=sft.jsonl --max-steps 1 --plan --json", capsys) == ours


def test_what_other_toolkits_call_a_field_is_one_here():
    """And what is said to need no switch has none, in any stage."""
    fields = {field for name in stages for field in stages[name].model_fields}
    assert set(RENAMED.values()) <= fields
    assert not NOTHING_TO_SET.keys() & fields
    assert advice("simpo_gamma", stages["preference"].model_fields) == ": here it is 'gamma'"
    assert advice("simpo_gamma", stages["sft"].model_fields) == "", "not where there is no such field"


def test_two_names_of_one_field_are_refused_together(capsys, tmp_path):
    """The last one won without a word."""
    (tmp_path / "c.yaml").write_text("model: model\nmodel_name_or_path: other\ndata: sft.jsonl\nlearning_rate: 1e-4\n")
    (tmp_path / "r.yaml").write_text("stages: {sft: {stage: sft, model: model, data: sft.jsonl, learning_rate: 1e-4}}\n")
    for command in (
        "sft --model model --model_name_or_path other --data sft.jsonl --learning_rate 1e-4 --plan",
        f"sft --config {tmp_path}/c.yaml --plan",
        f"run {tmp_path}/r.yaml --set sft.model=model --set sft.model_name_or_path=other --plan",
    ):
        assert main(command.split()) == 2, command
        assert "'model' and 'model_name_or_path' are two names of one field" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("model: other\ndata: sft.jsonl\nlearning_rate: 1e-4\n")
    assert main(f"sft --config {tmp_path}/c.yaml --model_name_or_path model --plan".split()) == 0  # flags win


def test_flags_win_over_the_config_file(capsys):
    command = (
        "sft --config config.yaml --dataset_name raw.jsonl --model model --seed 4 --lr_scheduler_kwargs.min_lr_rate 0.2 --json"
    )
    artifact = run_json(command, capsys)
    config = artifact["config"]
    assert artifact["name"] == "tuned"
    assert (config["learning_rate"], config["max_steps"]) == (5e-4, 1), "from the file"
    assert (config["data"], config["seed"], config["lr_scheduler_kwargs"]) == (["raw.jsonl"], 4, {"min_lr_rate": 0.2}), "from flags"


def test_the_config_that_a_stage_left_runs_it_again_with_one_change(capsys):
    """It has the name of the stage, and every field: also those that may be set only without others, as tuning and use_peft."""
    left = run_json(SFT + "sft.jsonl --use_peft --lora_r 2 --name small --json", capsys)
    again = f"sft --config {left['path']}/config.yaml --name small"
    assert main([*again.split(), "--plan"]) == 0
    assert capsys.readouterr().out.split() == ["skip", "small", "up", "to", "date"]
    assert main([*again.split(), "--seed", "7", "--plan"]) == 0
    assert "changed: seed 0 -> 7" in capsys.readouterr().out
    assert main(["dpo", "--config", f"{left['path']}/config.yaml", "--beta", "0.1", "--plan"]) == 2
    assert "it is of the stage 'sft', and this verb runs Preference" in capsys.readouterr().err


def test_no_mixed_precision_is_not_what_yaml_makes_of_it(capsys):
    """YAML reads a bare ``no`` as False."""
    (plan,) = run_json(SFT + "sft.jsonl --launch.mixed_precision no --plan --json", capsys)
    assert plan["runs"]


def test_text_is_no_yaml(capsys):
    """To YAML the first is a comment and the second a mapping."""
    command = "pairs --model model --data prompts.jsonl --reward_funcs mine.py:short --plan --json"
    assert main([*command.split(), "--stop_strings", "### User:", "User:"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["runs"]


def test_one_value_is_enough_for_a_list(capsys):
    config = run_json(SFT + "sft.jsonl --use_peft --lora_target_modules q_proj --json", capsys)["config"]
    assert config["lora_target_modules"] == ["q_proj"]
    (plan,) = run_json(SFT + "raw.jsonl sft.jsonl --report_to tensorboard --plan --json", capsys)
    assert plan["runs"]


@pytest.mark.parametrize(
    "command",
    [
        SFT + "sft.jsonl",
        "reward" + PAIRS,
        "dpo --beta 0.1" + PAIRS,
        "preference --loss ld_dpo --beta 0.1 --alpha 0.5" + PAIRS,
        "kto --beta 0.5 --per_device_train_batch_size 16" + PAIRS,
    ],
)
@pytest.mark.parametrize("adapter", ["", " --use_peft --lora_r 2"])
def test_trl_is_one_word_away(command, adapter, capsys):
    """The same fields, rows and registry, and the same held-out loss before and after a step over all rows."""
    command += f"{adapter} --held_out 0.4 --learning_rate 1e-2 --warmup_ratio 0 --json"
    ours, theirs = run_json(command, capsys), run_json(f"{command} --engine trl", capsys)
    assert theirs["version"] == 2
    # A reward model's head starts at zero and barely moves in a step; the spread of its scores shows that it does.
    telling = "score_std" if command.startswith("reward") else "eval_loss"
    assert ours["metrics"][telling] != pytest.approx(ours["metrics"].get(f"{telling}_before", 0), rel=1e-3)
    for name in ("eval_loss_before", "eval_loss", telling):
        assert theirs["metrics"][name] == pytest.approx(ours["metrics"][name], rel=1e-4)
    assert {path.name for path in Path(theirs["path"]).iterdir()} >= {path.name for path in Path(ours["path"]).iterdir()}


@pytest.mark.parametrize("command", [SFT + "sft.jsonl", "reward" + PAIRS, "dpo --beta 0.1" + PAIRS, "kto --beta 0.5" + PAIRS])
def test_trl_stops_at_a_loss_that_is_not_finite(command, capsys):
    command += " --engine trl --per_device_train_batch_size 2 --learning_rate 1e30 --warmup_ratio 0 --max_steps 4"
    assert main(command.split()) == 2
    assert re.search(r"(loss|norm) is \w+ at step \d; no update was made", capsys.readouterr().err)


def test_a_stage_for_people(capsys):
    assert main((SFT + "sft.jsonl --name mine").split()) == 0
    first, *metrics = capsys.readouterr().out.splitlines()
    assert first == f"mine@1  {Registry().get('mine').path}"
    assert [line.split()[0] for line in metrics] == list(Registry().get("mine").metrics)


def test_an_evaluation_for_people_is_a_table(capsys):
    command = "eval --models.first model --models.second model --data prompts.jsonl --max_completion_length 4"
    assert main([*command.split(), "--greedy", "false", "--reward_funcs", "repetition"]) == 0
    reference, header, *rows = capsys.readouterr().out.splitlines()
    assert reference.startswith("evaluate@1  ")
    assert header.split() == ["model", "repetition", "reward", "tokens", "per", "answer"]
    assert [row.split()[0] for row in rows] == ["first", "second"]


def test_an_evaluation_without_a_reward_keeps_what_was_said(capsys):
    command = "eval --models.first model --data prompts.jsonl --max_completion_length 4 --greedy false --json"
    artifact = run_json(command, capsys)
    assert 1 <= artifact["metrics"]["models"]["first"]["mean_completion_tokens"] <= 4
    samples = [json.loads(line) for line in (Path(artifact["path"]) / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8
    assert samples[0]["answers"]["first"]["sampled"].keys() == {"text", "reward"}
    assert samples[0]["answers"]["first"]["sampled"]["reward"] is None
    assert any(sample["answers"]["first"]["sampled"]["text"] for sample in samples)


def test_a_stage_continues_the_registered_model_of_its_own_name(capsys):
    run_json(SFT + "sft.jsonl --json", capsys)
    artifact = run_json("sft --model sft --data sft.jsonl --max_steps 1 --json", capsys)
    assert artifact["parents"] == {"sft": "sft@1"}
    assert artifact["version"] == 2


# -- pipelines -----------------------------------------------------------------------------------------------------------------


def test_a_recipe_runs_to_its_report(capsys, tmp_path):
    results = run_json(f"run recipe.py --out {tmp_path}/out --set sft.seed=2 --json", capsys)
    assert results["stages"]["sft"]["reference"] == "mine-sft@1"
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert {file.name for file in (tmp_path / "out").iterdir() if file.is_file()} == {
        "recipe.json",
        "results.json",
        "report.md",
        "report.html",
    }
    (plan,) = run_json(f"run recipe.py --out {tmp_path}/out --set sft.seed=2 --plan --json", capsys)
    assert plan["reason"] == "up to date"
    (plan,) = run_json(f"run recipe.py --out {tmp_path}/out --set rate=2e-3 --plan --json", capsys)
    assert plan["reason"] == "changed: learning_rate 0.001 -> 0.002, seed 2 -> 0"


def test_a_report_can_be_written_again(capsys, tmp_path):
    assert main(f"run recipe.py --out {tmp_path}/out".split()) == 0
    written = (tmp_path / "out" / "report.md").read_text()
    (tmp_path / "out" / "report.md").unlink()
    capsys.readouterr()
    assert main(["report", f"{tmp_path}/out"]) == 0
    assert f"{tmp_path}/out/report.md" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.md").exists()
    assert "mine-sft@1" in written
    assert run_json(f"report {tmp_path}/out --json", capsys) == json.loads((tmp_path / "out" / "results.json").read_text())


@pytest.mark.parametrize("command", ["chat .", "run dpo --plan"])
def test_a_working_folder_that_is_gone_is_told_in_one_line(capsys, tmp_path, monkeypatch, command):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(command.split()) == 2
    expected = "align: error: the folder that this command was given in is gone: change to one that is there\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("run", ["out", "."])
def test_a_report_written_again_is_called_after_the_recipe(capsys, tmp_path, monkeypatch, run):
    """Whatever its folder is called, and however that is named: nothing changed, so nothing is written."""
    assert main(f"run recipe.py --out {tmp_path}/out".split()) == 0
    written = [(path, path.read_text()) for path in (tmp_path / "out").iterdir() if path.is_file()]
    monkeypatch.chdir(tmp_path / "out" if run == "." else tmp_path)
    assert main(["report", run]) == 0
    assert [(path, path.read_text()) for path in (tmp_path / "out").iterdir() if path.is_file()] == written


def test_a_run_under_the_home_folder_goes_by_its_name(capsys):
    assert main(["run", "recipe.py"]) == 0
    (home() / "mine" / "report.md").unlink()
    for verb in ("doctor", "report"):
        capsys.readouterr()
        assert main([verb, "mine"]) == 0
        assert "sft" in (told := capsys.readouterr().out) or f"{home()}/mine/report.md" in told
    assert (home() / "mine" / "report.md").is_file()


def test_one_stage_has_no_report(capsys, tmp_path):
    run_json(f"{SFT}sft.jsonl --output_dir {tmp_path}/out --json", capsys)
    before = sorted((tmp_path / "out").iterdir())
    assert main(["report", f"{tmp_path}/out"]) == 2
    assert "is the folder of one stage" in capsys.readouterr().err
    assert sorted((tmp_path / "out").iterdir()) == before


def test_a_script_is_the_same_command(capsys, tmp_path, monkeypatch):
    """`python recipe.py --plan` is `align run recipe.py --plan`, also where the recipe registers a stage of its own."""
    import runpy

    own = 'from align.stages.base import Stage, stage\n\n@stage("a_stage_of_a_script")\nclass Own(Stage):\n    "Own."\n'
    script = tmp_path / "script.py"
    script.write_text(f"{own}{RECIPE}\nif __name__ == '__main__':\n    from align.recipe import main\n    main(recipe)\n")
    monkeypatch.setattr("sys.argv", [str(script), "--plan"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out == "run   sft            never ran\n"


# -- registry ------------------------------------------------------------------------------------------------------------------


def test_the_registry_for_people_and_programs(capsys):
    assert main(["models", "list"]) == 0
    empty = capsys.readouterr()
    assert "is empty" in empty.err
    assert run_json("models list --json", capsys) == []
    run_json(SFT + "sft.jsonl --name first --json", capsys)
    second = run_json("sft --model first --data sft.jsonl --max_steps 1 --name second --json", capsys)

    assert [a["name"] for a in run_json("models list --json", capsys)] == ["first", "second"]
    assert run_json("models show second --json", capsys) == run_json("models show second@1 --json", capsys) == second
    lineage = run_json("models lineage second --json", capsys)
    assert [(step["depth"], step["reference"]) for step in lineage] == [
        (0, "second@1"),
        (1, "first@1"),
        (2, str(Path("model").resolve())),
    ]

    assert main(["models", "list"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [["first@1", "sft"], ["second@1", "sft"]]
    assert main(["models", "show", "second"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == second
    assert main(["models", "lineage", "second"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["second@1  (sft)", "  first@1  (sft)"]


def test_aliases_are_listed_and_shown(capsys):
    assert main(["models", "alias", "small", "./model"]) == 0
    (row,) = run_json("models list --json", capsys)
    assert (row["name"], row["stage"], row["path"]) == ("small", "alias", str(Path("model").resolve()))
    assert run_json("models show small --json", capsys) == row
    assert run_json("models show gpt2 --json", capsys)["path"] == ALIASES["gpt2"], "a shipped one"
    assert main(["models", "list"]) == 0
    assert capsys.readouterr().out.split() == ["small", "alias", row["path"]]
    assert run_json("models delete small --json", capsys) == row
    assert run_json("models list --json", capsys) == []
    assert main(["models", "delete", "gpt2"]) == 2, "a shipped one stays"


def test_what_changes_the_registry_tells_programs_too(capsys, tmp_path):
    """``--json`` was taken there and did nothing."""
    row = run_json("models alias small ./model --json", capsys)
    assert (row["name"], row["path"]) == ("small", str(Path("model").resolve()))
    made = run_json(f"{SFT}sft.jsonl --json", capsys)
    assert run_json(f"models push sft {tmp_path}/shelf --json", capsys) == {
        "reference": "sft@1",
        "where": f"{tmp_path}/shelf/sft/1",
    }
    pulled = run_json(f"models pull sft {tmp_path}/shelf --json", capsys)
    assert (pulled["version"], pulled["identity"]) == (2, made["identity"])
    assert run_json("models delete sft@2 --json", capsys) == pulled


def test_plans_that_are_no_stages_tell_programs_too(capsys):
    plan = run_json("reward test repetition --data sft.jsonl --plan --json", capsys)
    assert plan == {"data": "sft.jsonl", "max_rows": 64, "model": None, "rewards": ["repetition"]}
    model = str(Path("model").resolve())
    plan = run_json("curvature model --data sft.jsonl --plan --json", capsys)
    assert plan == {"measure": {"final": model}, "write": f"{model}/curvature"}


def test_an_alias_can_be_trained_on(capsys):
    assert main(["models", "alias", "small", "./model"]) == 0
    artifact = run_json("sft --model small --data sft.jsonl --max_steps 1 --json", capsys)
    assert artifact["parents"] == {"small": str(Path("model").resolve())}
