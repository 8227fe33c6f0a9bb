"""Policy gradients on language models: PPO, REINFORCE, RLOO and GRPO, one trainer with an advantage estimator of the catalog."""
