"""The classifier on a frozen encoder: what a few photos are enough for.

    scenes.py            shots of one scene, which no fold divides
    head_search.py       geometry, scenes and classifiers of a run, on the features of its images
    class_statistics.py  means and covariances of classes
    linear_probe.py      a classifier of them, chosen and measured by cross-validation
    targets.py           one label per image, or several
    confidence.py        calibrated probabilities
    heads.py             the classifier of each task, in the model
    findings.py          possible problems of a result: how each is measured and judged, and where it is shown
    border.py            does the classifier read the border?
    camera.py            can it recognize who took the photo?
    pairs.py             are two classes one kind?
    curve.py             would more photos help?

The pass that computes features is in inference/features.py. Predictions are measured in evaluation/,
and a run is in training/frozen_run.py.
"""
