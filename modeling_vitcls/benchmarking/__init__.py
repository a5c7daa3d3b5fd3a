"""How fast it is, against others on the same work.

    comparison.py            paired measurements -> ratios with quartiles
    agreement.py             nothing is measured unless the outputs agree
    peers.py                 other projects' ViTs, and ours with the same weights
    photographs.py           JPEG files
    memory.py                by how much a process, or what is allocated on a GPU, grows

    inference.py             forward passes, in turns
    growth.py                forward passes by image size, patch size, tokens and batch: time, and memory
    growth_figure.py         the figure of it
    steps.py                 bare training steps: time, and memory
    inexact.py               merged and dropped patches against the plain model
    training.py              training runs, in turns: whole processes, of which one runs while the other is suspended
    transformers_trainer.py  what runs in the other one: transformers' Trainer
    pictures.py              from files to pixels
    prediction.py            from files to labels, each side in a process of its own
    probe.py                 a linear probe with cached features against one without
    attention.py             reading attention against a plain forward pass: time, and memory

    work.py                  all of these by name
    report.py                tables, a JSON file, a Markdown file, and what they were measured on

New work is one more entry in a table: `FORWARD_PASSES` in inference.py, `TRAINING_RUNS` in training.py, and so on.
Nothing here ships to the Hub.
"""
