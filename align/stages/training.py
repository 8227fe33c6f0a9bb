"""What the training stages have in common: rows to trees, a model made ready, the Trainer run, the result saved."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from align import processes
from align.artifact import TRACKING
from align.checkpointing import whole_weights
from align.encode import Encoder, set_chat_template
from align.engine import base_model, compile_forest, enable_forest
from align.errors import AlignError, near_miss
from align.forest import Tree
from align.heads import Head, head_of
from align.intake.store import TreeFile
from align.models import (
    best_device,
    ensure_pad_token,
    load_causal_lm,
    load_language_model,
    load_reward_model,
    load_tokenizer,
    save_model,
    settle_generation,
)
from align.progress import say
from align.runner.checkpoints import best_until, last_good, resuming, step_of
from align.runner.stop import saving_first
from align.scoring import SCORE_SCALE, branch_scores, dealt
from align.stages.base import Context, TrainingStage
from align.stages.fields import LaunchFields, OptimizerFields, SelectionFields
from align.stages.rows import encoded as encoded
from align.stages.rows import longest as longest
from align.stages.rows import quarantine_in as quarantine_in
from align.stages.rows import read_rows as read_rows
from align.stages.rows import rewritten
from align.stages.rows import rows_of as rows_of
from align.stages.rows import usable as usable
from align.trainers.callbacks import Checkpoints, Watch
from align.trainers.forest import ForestTrainer
from align.trainers.objectives import Objective, add_reference_logps
from align.tuning.tune import trainable, tune

TIMING = ("runtime", "per_second", "preparation_time")
"""Ends of names that the Trainer adds to an evaluation, and that are no measures."""


def tokenizer_of(stage: Any, room: int = 0) -> tuple[PreTrainedTokenizerBase, Encoder]:
    """The tokenizer of the stage's model with its chat template set, and an encoder of the stage's maximum length.

    Args:
        room: tokens of that length to leave for an answer.
    """
    tokenizer = load_tokenizer(stage.model, trust_remote_code=stage.trust_remote_code)
    set_chat_template(tokenizer, stage.chat_template)
    return tokenizer, Encoder(tokenizer, None if stage.max_length is None else stage.max_length - room)


def causal_lm(stage: Any) -> nn.Module:
    """The language model that the stage starts from."""
    return load_causal_lm(stage.model, **loading(stage))


def language_model(stage: Any) -> nn.Module:
    """The language model that the stage starts from, of whatever family."""
    return load_language_model(stage.model, **loading(stage))


def reward_model(stage: Any, path: str | None = None) -> nn.Module:
    """The model that the stage starts from, with a score head; or the one at `path`, merged."""
    options = loading(stage) if path is None else {**loading(stage), "on_adapter": "merge"}
    return load_reward_model(path or stage.model, **options)


def language_head(stage: Any, tokenizer: PreTrainedTokenizerBase) -> Head:
    """The output layer of the language model that the stage starts from, as it is now and stays.

    Raises:
        AlignError: it has none, or none for the tokenizer's new tokens.
    """
    try:
        head = head_of(base_model(causal_lm(stage)))
    except AlignError as error:
        raise AlignError(f"sft_coef: {error}") from error
    if len(tokenizer) > len(head.weight):
        raise AlignError(f"sft_coef: the language model knows {len(head.weight)} tokens, and the tokenizer {len(tokenizer)}")
    device = best_device()
    weight = head.weight.detach().clone().to(device)
    bias = None if head.bias is None else head.bias.detach().clone().to(device)
    return replace(head, weight=weight, bias=bias)


def loading(stage: Any) -> dict[str, Any]:
    """How the stage's model is loaded: arguments of `align.models.load_model`."""
    return {
        "dtype": stage.dtype,
        "trust_remote_code": stage.trust_remote_code,
        "on_adapter": stage.on_adapter,
        "four_bits": stage.strategy.name == "qlora",
    }


def make_ready(
    stage: Any, label: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase, longest: int | None, folder: Path | None
) -> nn.Module:
    """Embeddings that fit the tokenizer, a padding token, the stage's tuning strategy, the device, and the forest path (or a line
    that says why not).

    Args:
        longest: tokens in the longest path on the forest; None for a model that is not trained on it.
    """
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:  # type: ignore[operator]
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # type: ignore[operator]
    ensure_pad_token(tokenizer, model)
    if unset := settle_generation(base_model(model)):
        say(f"{label}: its generation_config sets {', '.join(unset)}, which does nothing there, and could not be saved: left out")
    continued = stage.on_adapter == "continue" and isinstance(model, PeftModel)  # a critic beside it has no adapter yet
    if not continued:
        model = tune(model, stage.strategy, folder)
    elif stage.launch is not None and stage.launch.shards_weights and model.active_peft_config.is_prompt_learning:  # type: ignore[union-attr]
        raise AlignError(f"virtual tokens train whole in every process: strategy must be ddp, not {stage.launch.strategy}")
    if stage.launch is not None and stage.launch.strategy == "fsdp2":
        _make_shardable(base_model(model))
    what = "the adapter goes on" if continued else f"tuning {stage.strategy.name}"
    count, share = trainable(model).values()
    say(f"{label}: {what}: {count:,} of {round(count / share):,} parameters train ({share:.2%})")
    if stage.strategy.name != "qlora":  # 4-bit weights are on the GPU already
        model.to(best_device())
    if longest is not None and getattr(stage, "engine", "forest") == "forest":
        if reason := enable_forest(model, longest):
            say(f"{label}: trains on padded rows, as {reason}")
        peft = getattr(model, "active_peft_config", None)
        if stage.torch_compile and peft is not None and peft.peft_type == "PREFIX_TUNING":
            say(f"{label}: the model runs uncompiled, as it would need a graph for each layer, whose keys are learned (prefix)")
        elif stage.torch_compile:
            say(f"{label}: compiling the model, which takes a while")
            if reason := compile_forest(model, precision(stage)):
                say(f"{label}: the model runs uncompiled, as {reason}")
    return model


def _make_shardable(model: nn.Module) -> None:
    """Have accelerate put each parameter of `model` into one group of shards. It makes a group of each of `_no_split_modules`, then
    one of the embedding and the head that shares its weight: so an encoder's block of embeddings must be none of the former.

    Raises:
        AlignError: other modules share a parameter (encoder and decoder an embedding, parts of a masked head a bias).
    """
    wanted: Any = model._no_split_modules
    model._no_split_modules = {name for name in wanted or () if not name.endswith("Embeddings")}  # type: ignore[assignment]
    together = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    holders: dict[nn.Parameter, dict[str, nn.Module]] = defaultdict(dict)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            holders[parameter][name] = module
    for named in holders.values():
        if len(named) > 1 and not all(module in together for module in named.values()):
            what = f"{' and '.join(named)} of {type(model).__name__} are one"
            raise AlignError(f"{what}, and only an embedding and its head are sharded together: strategy must be ddp, not fsdp2")


def precision(stage: LaunchFields) -> AbstractContextManager[None]:
    """Within, forward passes are as precise as those of training."""
    return torch.autocast(best_device(), torch.bfloat16, enabled=stage.in_bf16)


def teach_end_token(model: nn.Module, end: int) -> None:
    """Let `generate` stop at the end token that the data teach."""
    config: Any = getattr(model, "generation_config", None)
    if config is not None:
        known = config.eos_token_id
        known = [] if known is None else [known] if isinstance(known, int) else list(known)
        config.eos_token_id = [end, *(i for i in known if i != end)] if known != [end] else end


def with_reference(
    stage: TrainingStage, label: str, model: nn.Module, trees: Sequence[Tree], held: Sequence[Tree], *, common: bool
) -> tuple[Sequence[Tree], Sequence[Tree]]:
    """The same trees with the log-probs of their branches under `model` as it is now; see `add_reference_logps`."""

    def measured(part: Sequence[Tree], name: str) -> Sequence[Tree]:
        if not part:
            return part
        add = partial(add_reference_logps, model, max_tokens=stage.max_tokens_per_micro_batch, label=name, common=common)
        return rewritten(part, add) if isinstance(part, TreeFile) else add(part)

    # Apart, as evaluation takes the held-out ones: packed alike, they come out alike to the bit on any processor.
    with precision(stage):
        return measured(trees, label), measured(held, f"{label} (held out)")


def training_arguments(stage: TrainingStage, context: Context, *, has_eval: bool) -> dict[str, Any]:
    """The stage's fields as arguments of `transformers.TrainingArguments` and its subclasses."""
    best = stage.keeps_best
    if best and not has_eval:
        what = "early_stopping_patience" if stage.early_stopping_patience else "load_best_model_at_end"
        raise AlignError(f"{what} needs held-out rows: set eval_data or held_out")
    steps = stage.eval_steps
    saves = steps if best else stage.save_steps  # what was measured must be there to be kept
    arguments: dict[str, Any] = {
        "output_dir": str(context.folder / "checkpoints"),
        "learning_rate": stage.learning_rate,
        "num_train_epochs": stage.num_train_epochs,
        "max_steps": stage.max_steps,
        "per_device_train_batch_size": stage.per_device_train_batch_size,
        "per_device_eval_batch_size": stage.per_device_train_batch_size,
        "gradient_accumulation_steps": stage.gradient_accumulation_steps,
        "max_grad_norm": stage.max_grad_norm,
        "weight_decay": stage.weight_decay,
        "adam_beta1": stage.adam_beta1,
        "adam_beta2": stage.adam_beta2,
        "warmup_steps": stage.warmup_ratio,
        "lr_scheduler_type": stage.lr_scheduler_type,
        "lr_scheduler_kwargs": stage.lr_scheduler_kwargs,
        "bf16": stage.bf16,
        "logging_steps": stage.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "eval_strategy": ("steps" if steps else "epoch") if has_eval else "no",
        "eval_steps": steps,
        "save_strategy": "steps" if saves else "epoch" if best else "no",
        "save_steps": saves or 500,
        "restore_callback_states_from_checkpoint": True,
        "load_best_model_at_end": best,
        # Otherwise the Trainer would note a best checkpoint all the same, for which `final_weights` would take it.
        "metric_for_best_model": f"eval_{stage.metric_for_best_model.removeprefix('eval_')}" if best else None,
        "greater_is_better": stage.best_is_greatest,
        "seed": stage.seed,
        "report_to": stage.report_to,
        "project": "align",
        "run_name": context.folder.name,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
    }
    if stage.gradient_checkpointing:  # passed only when set: newer versions of transformers warn about the name
        arguments["gradient_checkpointing"] = True
    if stage.torch_compile and stage.engine == "trl":  # on the forest it is done by `make_ready`
        arguments["torch_compile"] = True
    return arguments


def callbacks_of(stage: TrainingStage, context: Context) -> list[TrainerCallback]:
    """Progress and history, and early stopping where asked."""
    callbacks: list[TrainerCallback] = [
        Watch(context.name, context.history),
        Checkpoints(context.history, stage.save_total_limit, stage.save_minutes),
    ]
    if stage.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(stage.early_stopping_patience))
    return callbacks


def run_trainer(trainer: Any, stage: TrainingStage, context: Context, *, has_eval: bool) -> dict[str, Any]:
    """Train, resuming from the last checkpoint if there is one, and save; returns the metrics before and after."""
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(context.folder / TRACKING)  # not among the checkpoints, which come and go
    last = _last_good(context.folder / "checkpoints") if stage.resume_from_checkpoint else None
    context.history.rewind(-1 if last is None else step_of(last))
    if last is None and has_eval:
        measured = [name for name in _evaluated(trainer, stage) if name.startswith("eval_") and not name.endswith(TIMING)]
        check_metric(stage, measured)
    if last is not None:
        say(f"{context.name}: going on from step {step_of(last)}")
    try:
        with saving_first():
            if last is not None and (done := final_weights(last)):  # cut between the last step and the end of the stage
                trainer._load_from_checkpoint(str(done))
                trainer.state = TrainerState.load_from_json(str(last / "trainer_state.json"))
            else:
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, Watch):
                callback.close()
    best = trainer.state.best_global_step if stage.keeps_best else None
    if best is not None:
        say(f"{context.name}: kept the weights of step {best}, of {trainer.state.global_step}")
    elif has_eval and context.history.records[-1].get("eval_loss") is None:
        _evaluated(trainer, stage)
    save_trained(trainer, context.folder)
    return {**summary(context, best), **trainable(trainer.model)}


def _evaluated(trainer: Any, stage: TrainingStage) -> dict[str, float]:
    """The held-out metrics; of a model that `train` has not prepared yet, as it is. The Trainer would prepare it for evaluation
    alone, and accelerate prepares nothing twice: each process would train by itself, without a word. And FSDP2 takes no model
    without its optimizer.
    """
    prepared = trainer.accelerator._models
    untouched = not prepared
    if untouched:
        prepared.append(trainer.model)
    try:
        with precision(stage):  # which `train` puts into the model
            return dict(trainer.evaluate())
    finally:
        if untouched:
            prepared.clear()


def _last_good(folder: Path) -> Path | None:
    """What the first process finds: it alone may set a damaged checkpoint aside."""
    return processes.first(last_good(folder) if processes.number() == 0 else None)


def final_weights(checkpoint: Path) -> Path | None:
    """Where a training that had ended with `checkpoint` has its result, or None if steps are left."""
    with resuming(checkpoint):
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
        if state["global_step"] < state["max_steps"] and not control.get("should_training_stop"):
            return None
        return best_until(checkpoint) or checkpoint


def save_trained(trainer: Any, folder: Path) -> None:
    """Write the model that was trained; of several processes the first writes, and the others hand over their shards."""
    accelerator = trainer.accelerator
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    weights = whole_weights(trainer) if sharded else None
    if trainer.is_world_process_zero():
        save_model(accelerator.unwrap_model(trainer.model), trainer.processing_class, folder, weights)


def check_metric(stage: SelectionFields, measured: Iterable[str]) -> None:
    """Raise `AlignError` before training where `metric_for_best_model` is none of the names that are `measured`."""
    names = [name.removeprefix("eval_") for name in measured]
    wanted = stage.metric_for_best_model.removeprefix("eval_")
    if stage.keeps_best and wanted not in names:
        raise AlignError(
            f"metric_for_best_model {wanted!r} is not measured here{near_miss(wanted, names)}; known: {', '.join(names)}"
        )


def summary(context: Context, best: int | None = None) -> dict[str, Any]:
    """First and last of every held-out metric, and the last training loss; up to the step `best`, whose weights are kept."""
    records = [record for record in context.history.records if best is None or record["step"] <= best]
    train_loss = next((record["loss"] for record in reversed(records) if "loss" in record), None)
    metrics: dict[str, Any] = {"train_loss": train_loss, **({} if best is None else {"best_step": best})}
    return metrics | held_out_metrics(records, but=TIMING)


def held_out_metrics(records: Sequence[Mapping[str, Any]], but: tuple[str, ...] = ()) -> dict[str, Any]:
    """The last value of every held-out metric in `records` of a history, and as ``NAME_before`` the first.

    Args:
        but: ends of names that are left out.
    """
    found: dict[str, Any] = {}
    for name in {key: None for record in records for key in record if key.startswith("eval_") and not key.endswith(but)}:
        values = [record[name] for record in records if name in record]
        found |= {name: values[-1], f"{name}_before": values[0]}
    return found


def train_on_forest(
    stage: TrainingStage,
    context: Context,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    trees: Sequence[Tree],
    held: Sequence[Tree],
    *,
    group_by_prompt: bool = False,
) -> dict[str, Any]:
    """Run the forest trainer."""
    trainer = ForestTrainer(
        model,
        objective,
        TrainingArguments(**training_arguments(stage, context, has_eval=bool(held))),
        trees,
        held or None,
        max_tokens=stage.max_tokens_per_micro_batch,
        tokenizer=tokenizer,
        callbacks=callbacks_of(stage, context),
        skip_non_finite=stage.on_non_finite == "skip",
        group_by_prompt=group_by_prompt,
    )
    return run_trainer(trainer, stage, context, has_eval=bool(held))


def seed_everything(stage: OptimizerFields) -> None:
    """Seed every generator that training uses."""
    set_seed(stage.seed)


def check_end_token(encoder: Encoder, rows: Sequence[Any], trees: Sequence[Tree]) -> None:
    """Make sure that an end token carries a loss somewhere: otherwise the model never learns to stop.

    Raises:
        AlignError: it does not.
    """
    end = encoder.end_of_answer(rows[0])
    for tree in trees:
        assert tree.prompt_mask is not None
        if any(token == end and counts for token, counts in zip(tree.prompt, tree.prompt_mask, strict=True)):
            return
    raise AlignError(
        f"the end token {encoder.tokenizer.convert_ids_to_tokens(end)!r} carries a loss in none of the {len(trees)} rows, "
        "so the model would never learn to stop; raise max_length (every answer was cut) or mend the chat template"
    )


def store_score_scale(stage: TrainingStage, context: Context, model: nn.Module, trees: Sequence[Tree]) -> dict[str, float]:
    """Mean and deviation of the scores of `trees`' answers, written beside the reward model for PPO to normalize by."""
    with precision(stage):  # a run that had ended when it was cut has a model that nobody prepared for it
        scored = dealt(trees, partial(branch_scores, model, max_tokens=stage.max_tokens_per_micro_batch))
    scores = [score for pair in scored for score in pair]
    scale = {"score_mean": statistics.fmean(scores), "score_std": statistics.pstdev(scores)}
    (context.folder / SCORE_SCALE).write_text(json.dumps(scale))
    return scale
