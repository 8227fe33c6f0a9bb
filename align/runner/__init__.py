"""The runner: what a stage is (plan, code), the process it runs in (worker, zygote, locks, stop) and the order of all (execute)."""
