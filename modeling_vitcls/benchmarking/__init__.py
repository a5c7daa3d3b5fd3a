"""Speed and memory benchmarks: this package compared with other projects, and models with and without a feature.

    comparison.py       paired speed measurements, output comparisons and peak memory measurements
    peers.py            forward passes and training steps, compared with those of the timm and transformers ViTs
    growth.py           forward passes by image size, patch size, number of tokens and batch size, with a figure
    own_features.py     comparisons within this package: merged and dropped patches, attention maps, linear probes
    image_files.py      processing of JPEG files into pixel values and into predicted labels
    training_runs.py    training runs including data loading, each program in a separate process
    work.py             table of the workloads for `vitcls benchmark --work`
    tables.py           tables, JSON and Markdown files

To add a benchmark, add a row to a table such as `FORWARD_PASSES` or `TRAINING_RUNS`. These files are not copied to the
Hub.
"""
