"""Evaluation, prediction and features of saved models, on any number of processes.

    load_model.py       loads a model by name, and checks that the model is a classifier
    metrics.py          metrics for each kind of labels, and for masked autoencoders
    evaluator.py        evaluate a model on a held-out split, and count each image exactly once
    evaluate.py         the program `vitcls evaluate`
    frozen.py           simple classifiers on frozen features, for `vitcls evaluate --frozen`
    inputs.py           images for prediction, decoded in advance by threads
    prediction_rows.py  pixels -> rows of labels, probabilities or features
    outputs.py          rows -> table, CSV, JSON, Parquet; shards; progress
    predict.py          the program `vitcls predict`

None of these files is pushed to the Hub.
"""
