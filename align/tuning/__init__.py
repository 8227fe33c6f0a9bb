"""What of a model is trained, by name: one strategy a function of the catalog in `align.tuning.strategies`.

`align.tuning.tune.tune(model, Tuning("lora", {"r": 8}))` applies one to any transformers model.
"""
