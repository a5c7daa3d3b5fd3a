"""Evaluation of saved models and of the classifiers of a run, on any number of processes.

evaluator.py        metrics of a model on labeled images
evaluate.py         the command `vitcls evaluate`
per_image.py        the file of `vitcls evaluate --per-image`
"""
