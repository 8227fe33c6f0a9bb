"""What the processes of a stage do together."""

import pytest
from launched import launch_two

UNEVEN = """
one, both, none = (torch.zeros(2, requires_grad=True) for _ in range(3))
both.grad = torch.full((2,), 1.0 + processes.number())
if processes.number() == 1:
    one.grad = torch.ones(2)
processes.sum_gradients([one, both, none])
assert one.grad.tolist() == [1, 1] and both.grad.tolist() == [3, 3] and none.grad is None
"""

REFERENCE = """
import pytest
from helpers import llama, pairs
from align import reference
from align.engine import enable_forest
from align.registry import home
from align.scoring import branch_logps

measured = []
def noted(model, trees, max_tokens):
    measured.append(len(trees))
    return branch_logps(model, trees, max_tokens)

reference.branch_logps = noted
enable_forest(model := llama())
if processes.number() == 1:
    os.environ["ALIGN_HOME"] += "-of-the-second"  # where nothing is ever kept: it is told what the first finds
for count, none in ((9, False), (1, True)):  # of one tree the second has no share
    trees = pairs(count, count)
    found = reference.reference_logps(model, trees, 30, "dpo")
    shares = processes.gathered([measured.pop()])
    assert sum(shares) == count and (0 in shares) == none
    assert found == [pytest.approx(values, rel=1e-5) for values in branch_logps(model, trees, 30)]
    assert reference.reference_logps(model, trees, 30, "dpo") == found and not measured
    assert home().exists() == (processes.number() == 0)
"""

SHARDED = """
from torch.distributed.fsdp import fully_shard
from helpers import llama, pairs
from align.engine import enable_forest
from align.scoring import branch_logps

enable_forest(model := llama())
trees = pairs(6, 6)
alone = branch_logps(model, trees, 1)
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
for passes in (6 * processes.number(), 6 - 4 * processes.number()):
    found = branch_logps(model, trees[:passes], 1)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(alone[:passes]))
"""


KEPT = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from align import shards

processes.meet()
whole = torch.arange(6.0).reshape(3, 2)
shard = distribute_tensor(whole, init_device_mesh("cpu", (2,)), [Shard(0)])
kept = shards.kept({"shard": shard, "whole": whole})
assert kept.keys() == ({"shard", "whole"} if processes.number() == 0 else set()), kept
assert all(torch.equal(tensor, whole) for tensor in kept.values())
assert torch.equal(shards.dealt(whole, shard).to_local(), shard.to_local())
"""


STOPPED = """
import signal, threading
from pathlib import Path
from types import SimpleNamespace
from transformers import TrainerControl, TrainerState
from align.progress import History
from align.runner.stop import Stopped, listen, saving_first
from align.trainers import callbacks

def late(checkpoint, seal=callbacks.seal):
    threading.Event().wait(0.3)  # in which the other might leave
    seal(checkpoint)

callbacks.seal = late
processes.meet()
folder = Path("checkpoints").resolve()
(folder / "checkpoint-3").mkdir(parents=True, exist_ok=True)
args = SimpleNamespace(world_size=2, output_dir=folder, device="cpu", eval_strategy="no")
state = TrainerState(global_step=3, max_steps=9, epoch=0.5, is_world_process_zero=processes.number() == 0)
watch = callbacks.Checkpoints(History(Path("metrics.jsonl"), writes=state.is_world_process_zero), keep=1, minutes=None)
listen()
try:
    with saving_first():
        if processes.number() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        watch.on_step_end(args, state, control := TrainerControl())
        assert control.should_save
        watch.on_save(args, state, control)
    raise AssertionError("it went on")
except Stopped:
    assert [path.name for path in (folder / "checkpoint-3").iterdir()] == ["checksums.json"]
"""

PROGRAMS = {"uneven": UNEVEN, "reference": REFERENCE, "sharded": SHARDED, "kept": KEPT, "stopped": STOPPED}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_on_two_processes(program, tmp_path, monkeypatch):
    """UNEVEN: a gradient that one process alone has is summed, as of an expert that tokens of one alone came to; what nobody
    has a gradient of gets none. REFERENCE: each computes a share of the log-probs, and both have all. SHARDED: who has fewer passes
    than the other takes part in those of the other. KEPT: what is saved of shards is whole in the first process, and nothing in the
    other. STOPPED: where one is told to stop, both leave behind a checkpoint that is sealed.
    """
    (tmp_path / "script.py").write_text("\n".join(["import os, torch", "from align import processes", program, "processes.wait()"]))
    monkeypatch.setenv("ALIGN_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    launch_two([str(tmp_path / "script.py")], tmp_path)
