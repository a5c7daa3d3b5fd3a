"""Prediction and feature extraction with saved models, on any number of processes.

    options.py          flags of `vitcls evaluate` and `vitcls predict`
    load_model.py       loading of a model, its image processor and the number of images per batch
    metrics.py          metrics for each kind of labels
    image_pass.py       one pass of images through a model, for everything in this list that needs outputs
    features.py         a frozen encoder: the pass that computes features, and the heads on them
    cuda_graphs.py      passes of one shape, repeated by a GPU without Python
    inputs.py           images for prediction, decoded in advance by threads; whether they trained the model
    prediction_rows.py  pixels -> rows of labels, probabilities or features
    feature_store.py    features that are kept by the content of the photo, for all commands
    output_table.py     a written table, which a person may edit
    outputs.py          rows -> table, CSV, JSON, Parquet; progress
    predictor.py        Predictor: a loaded model, for servers, Ray, Spark and datasets.map
    single_task.py      a classifier for one added task
    predict.py          the command `vitcls predict`
    intervals.py        confidence intervals
    stated_result.py    a result in words, and metrics as tables
    speed.py            speed and FLOPs of a model
    interventions.py    special tokens are hidden, or replaced with those of other photos
    token_names.py      names of special tokens in tables, reports and figures

The files in this folder are not pushed to the Hub.
"""
