"""Evaluation of saved models and of the classifiers of a run, on any number of processes.

evaluator.py        metrics of a model on labeled images, and the file of `vitcls evaluate --per-image`
evaluate.py         the command `vitcls evaluate`: labels matched by name, results as tables
token_effects.py    what special tokens hold, and what their places are worth
"""
