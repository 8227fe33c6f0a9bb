"""A recipe bound to an output folder: what would run and why, and running it. The parts are in `align.runner`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from align.artifact import Artifact
from align.errors import AlignError, near_miss
from align.recipe import Recipe
from align.registry import Registry, home
from align.runner.devices import refuse_absent, refuse_crowd
from align.runner.execute import Graph, Options, look
from align.runner.files import refuse_unwritable
from align.runner.notes import note_recipe
from align.runner.plan import Planner, Step
from align.runner.worker import refuse_foreign

__all__ = ["Options", "Run", "Step", "default_out"]


@dataclass
class Run:
    """A recipe bound to an output folder."""

    recipe: Recipe
    out: Path
    folder: Path | None = None
    """For a recipe of one stage: write into exactly this folder, instead of one named after the stage's identity under `out`."""
    shared: bool = False
    """Whether what lies in `out` is of more than this recipe, as of single stages."""
    registry: Registry = field(default_factory=Registry)
    force: Sequence[str] = ()
    """Stages to run again, done or not, and with them what follows from them."""
    options: Options = field(default_factory=Options)

    def plan(self) -> list[Step]:
        """Every stage in order, resolved, with what is already done.

        Raises:
            AlignError: a reference leads nowhere.
        """
        return self._planner().plan()

    def execute(self, only: str | None = None) -> dict[str, Artifact]:
        """Run what is not up to date, register it, and return the artifact of every finished stage.

        Raises:
            AlignError: from `check`; `only` needs a stage that has not run; a stage is to run in more processes than this machine
                takes, or by DeepSpeed where there is none; a stage's folder or the registry cannot be made, or the folder holds
                what is no stage's; or stages failed, after the others have run.
        """
        self.check(only)
        planner = self._planner()
        plan = planner.plan()  # every reference is checked before anything runs
        notes = self.out / "preflight.json" if len(self.recipe.stages) > 1 else None  # single stages share their folder
        due = [step for step in plan if step.runs and only in (None, step.name)]
        for step in due:
            refuse_absent(step.stage)
            refuse_crowd(step.stage)
            refuse_unwritable(step.folder)
            refuse_unwritable(step.folder.parent)  # where its lock lies
            refuse_unwritable(step.log.parent)
            for folder in (self.registry.root, self.registry.root / step.draft.name):  # that of a name may be another user's
                refuse_unwritable(folder, "set ALIGN_HOME to a folder that can take the registry")
        if due and self.folder is not None:
            refuse_foreign(self.folder)
        looked = look([step.name for step in due], plan, notes)
        self._note(plan)
        steps = Graph(self.recipe, planner.resolve, self.registry, self.options, looked, notes).run(only)
        self._note(steps.values())  # a file that changed meanwhile led to another folder
        return {name: step.done for name, step in steps.items() if step.done is not None}

    def _note(self, steps: Iterable[Step]) -> None:
        if not self.shared:
            note_recipe(self.out, self.recipe.name, {step.name: step.folder for step in steps})

    def _planner(self) -> Planner:
        self.check()
        return Planner(self.recipe, self.out, self.registry, self.folder, frozenset(self.force))

    def check(self, only: str | None = None) -> None:
        """Raise `AlignError` where the recipe has no stage `only` or `force`, or `only` is none that `force` runs again."""
        for name in (*self.force, *([] if only is None else [only])):
            if name not in self.recipe.stages:
                raise AlignError(f"recipe {self.recipe.name!r} has no stage {name!r}{near_miss(name, self.recipe.stages)}")
        above = {only}
        for name in reversed(self.recipe.ordered()):
            above |= self.recipe.needs(name) if name in above else set()
        if only is not None and (idle := [name for name in self.force if name not in above]):
            raise AlignError(
                f"--force {idle[0]} has nothing to do: --only runs {only!r}, which does not follow from it; leave one of them out"
            )


def default_out(recipe: Recipe) -> Path:
    """Where a recipe writes unless told otherwise."""
    return home() / recipe.name
