"""The curvature of a model's loss: how steep the valley is that training walks in.

`spectrum` knows matrices only; `surface` makes a model's Hessian one; `landscape` walks along lines; `measure` does all of it.
"""
