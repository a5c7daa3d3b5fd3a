"""Speed and memory compared with other projects on the same work.

    comparison.py            paired measurements -> ratios with quartiles, after a check that both outputs agree
    peers.py                 other projects' ViTs, and ours with the same weights
    memory.py                peak memory of a process or GPU
    forward_passes.py        forward passes
    growth.py                forward passes by image size, patch size, tokens and batch
    growth_figure.py         the figure of growth.py
    training_steps.py        training steps without data loading
    inexact.py               merged and dropped patches, compared with the plain model
    training_runs.py         whole training runs in processes that take turns
    transformers_trainer.py  the process that runs transformers' Trainer
    image_processing.py      JPEG files -> pixel values
    predictions.py           JPEG files -> labels
    probes.py                linear probes with and without cached features
    attention_reads.py       reading attention, compared with a plain forward pass
    work.py                  all kinds of work by name
    tables.py                tables, JSON and Markdown files

New work is one more entry in a table: `FORWARD_PASSES` in forward_passes.py, `TRAINING_RUNS` in
training_runs.py, and so on. Nothing here is copied to the Hub.
"""
