"""Comparisons of speed and memory with other projects on the same work.

    comparison.py       paired measurements, checks for equal outputs, peak memory
    peers.py            forward passes and training steps, compared with the ViTs of timm and transformers
    growth.py           forward passes by image size, patch size, tokens and batch size, with a figure
    own_features.py     models of this package with and without a feature: merged patches, attention, linear probes
    image_files.py      JPEG files to pixel values and to labels
    training_runs.py    complete training runs in processes that are measured alternately
    work.py             all kinds of work by name
    tables.py           tables, JSON and Markdown files

To add work, add an entry to a table, such as `FORWARD_PASSES` or `TRAINING_RUNS`. Nothing here is copied to the Hub.
"""
