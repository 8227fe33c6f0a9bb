"""The stages, one file each. Importing this package fills the catalog and imports nothing heavy."""

from align.stages.base import Stage, stages
from align.stages.evaluate import Evaluate
from align.stages.grpo import GRPO, RLOO
from align.stages.kto import KTO
from align.stages.pairs import Pairs
from align.stages.ppo import PPO
from align.stages.preference import Preference
from align.stages.pretrain import Pretrain
from align.stages.reward import RewardModel
from align.stages.sft import SFT
from align.stages.task import TaskTraining

__all__ = [
    "GRPO",
    "KTO",
    "PPO",
    "RLOO",
    "SFT",
    "Evaluate",
    "Pairs",
    "Preference",
    "Pretrain",
    "RewardModel",
    "Stage",
    "TaskTraining",
    "stages",
]
