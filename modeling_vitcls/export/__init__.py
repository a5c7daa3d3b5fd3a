"""A model as one graph that runs without this package: torch.export, ONNX, OpenVINO; each compared with the model.

    sources.py      a checkpoint or a preset -> the model, its image processor, and which of its answers are exported
    tracing.py      the model -> a graph, for images of any size where that is possible, else of one
    formats.py      the graph -> a file, and what that file answers when its own runtime reads it
    certificate.py  which images are tried, the largest differences, what a user of the file has to know
    exporting.py    all of it in order: `export_model`

Nothing here ships to the Hub. The packages of other projects are the extra `export`.
"""
