"""Evaluation, prediction and features of saved models, on any number of processes.

    load_model.py       name -> model; checks that it is a classifier
    metrics.py          metrics for each kind of labels, and for masked autoencoders
    evaluator.py        evaluate a model on a held-out split, and count each image exactly once
    evaluate.py         the program `vitcls evaluate`
    frozen.py           simple classifiers on frozen features, for `vitcls evaluate --frozen`
    inputs.py           images to predict, decoded ahead of the model
    prediction_rows.py  pixels -> rows of labels, probabilities or features
    outputs.py          rows -> table, CSV, JSON, Parquet; shards; progress
    predict.py          the program `vitcls predict`

Nothing here is copied to the Hub.
"""
