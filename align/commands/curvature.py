"""``align curvature NAME --data …``: how sharp a model's loss is around its weights."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import AlignError
from align.runner.checkpoints import checkpoints as in_folder
from align.runner.checkpoints import step_of
from align.runner.files import refuse_unwritable

if TYPE_CHECKING:
    from align.diagnostics.curvature.load import Rows


def add(verbs: Any) -> None:
    parser = verbs.add_parser("curvature", help="eigenvalues, trace and sharpness of a model's loss on some rows")
    parser.add_argument("name", metavar="NAME", help="a registered model, a folder or a hub id; an adapter is measured as such")
    parser.add_argument("--data", required=True, metavar="FILE", help="rows on which the loss is measured")
    parser.add_argument("--eval_data", metavar="FILE", help="rows for the held-out loss; those of --data by default")
    parser.add_argument(
        "--kind", default=None, choices=("sft", "text", "preference"), help="what the rows are (default: by the model)"
    )
    parser.add_argument("--checkpoints", action="store_true", help="measure the stage's checkpoints, too, in order")
    parser.add_argument("--rows", type=int, default=32, help="rows used, the first ones")
    parser.add_argument("--max_length", type=int, default=512, help="longest row in tokens")
    parser.add_argument("--max_tokens_per_micro_batch", type=int, default=256, help="tokens in one pass")
    parser.add_argument("--steps", type=int, default=20, help="Lanczos steps")
    parser.add_argument("--probes", type=int, default=32, help="most probes for the trace")
    parser.add_argument("--seed", type=int, default=0, help="of the directions that are drawn")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: curvature/ in the model's folder)")
    parser.add_argument("--plan", action="store_true", help="show what would be measured, and stop")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(handler=curvature)


def curvature(options: argparse.Namespace) -> int:
    from align.registry import Registry, home

    if min(options.rows, options.steps, options.max_length, options.max_tokens_per_micro_batch) < 1:
        raise AlignError("--rows, --steps, --max_length and --max_tokens_per_micro_batch must be at least 1")
    if options.probes < 2:
        raise AlignError("--probes must be at least 2: the error of the trace is that of a mean")
    path = Registry().resolve(options.name).path
    places = _places(path, options.checkpoints)
    out = options.out or (Path(path) / "curvature" if Path(path).is_dir() else home() / "curvature" / Path(path).name)
    refuse_unwritable(out)
    if options.plan:
        told = "\n".join(f"measure  {name:<16} {place}" for name, place in places) + f"\nwrite    {out}"
        print(json.dumps({"measure": dict(places), "write": str(out)}, indent=1) if options.json else told)
        return 0
    from align.diagnostics.curvature.draw import draw
    from align.diagnostics.curvature.load import Rows
    from align.models import is_classifier
    from align.runner.files import write_atomically
    from align.runner.worker import quiet

    quiet()
    kind = options.kind or ("preference" if is_classifier(path) else "sft")
    rows = Rows(options.data, kind, options.rows, options.max_length, options.max_tokens_per_micro_batch)
    measured = [_measure(name, place, rows, options) for name, place in places]
    result = {**measured[-1], "checkpoints": measured[:-1]}
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "curvature.json", json.dumps(result, indent=1))
    draw(out / "curvature.svg", measured)
    print(json.dumps(result, indent=1) if options.json else _as_text(measured, out))
    return 0


def _places(path: str, checkpoints: bool) -> list[tuple[str, str]]:
    """Names and folders of what is measured, the model itself last."""
    if not checkpoints:
        return [("final", path)]
    if not (found := in_folder(Path(path) / "checkpoints")):
        raise AlignError(f"{path} has no checkpoints: train with save_steps, and save_total_limit large enough to keep them")
    return [*((f"step {step_of(place)}", str(place)) for place in found), ("final", path)]


def _measure(name: str, path: str, rows: Rows, options: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import replace

    from align.diagnostics.curvature.load import surface_of
    from align.diagnostics.curvature.measure import Settings, measure

    # First, as a mistake in these rows should not show after all the rest was measured.
    held = None if options.eval_data is None else surface_of(path, replace(rows, source=options.eval_data)).loss()
    found = measure(surface_of(path, rows), Settings(steps=options.steps, probes=options.probes, seed=options.seed), name)
    held = found["loss"] if held is None else held
    return {"name": name, "path": path, "held_out_loss": held, "held_out_perplexity": math.exp(min(held, 700.0)), **found}


def _as_text(measured: list[dict[str, Any]], out: Path) -> str:
    lines = []
    for one in measured:
        edges, cost, trace = one["largest_learning_rate"], one["cost"], one["trace"]
        held_out = one["held_out_loss"] != one["loss"]  # without --eval_data it is that of the rows that were measured
        told = {
            "parameters": f"{one['parameters']:,} on {one['tokens']:,} tokens",
            "held-out loss" if held_out else "loss": f"{one['held_out_loss']:.4f} (perplexity {one['held_out_perplexity']:.3f})",
            "eigenvalues": ", ".join(f"{value:.4g}" for value in one["top_eigenvalues"])
            + f"; lowest {one['lowest_eigenvalue']:.4g}",
            "trace": f"{trace['mean']:.4g} ± {trace['error']:.2g} ({trace['probes']} probes)",
            "sharpness": f"{one['sharpness']['rise']:.4g} within {one['sharpness']['rho']}",
            "stable below": ", ".join(f"{edge:.1e} ({name.replace('_', ' ')})" for name, edge in edges.items() if edge is not None),
            "cost": f"{cost['seconds']:.1f} s, {cost['products']} products, as long as {cost['training_steps']:.0f} training steps",
        }
        lines += [one["name"], *(f"  {key:<14} {value}" for key, value in told.items())]
    return "\n".join([*lines, str(out / "curvature.json"), str(out / "curvature.svg")])
