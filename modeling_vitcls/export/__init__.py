"""Export a model to a graph that runs without this package: torch.export, ONNX or OpenVINO, compared with the model.

    exportable.py     load the model and image processor, and return its outputs by name
    tracing.py        trace the model to a graph, with dynamic image size if possible
    formats.py        write the graph to a file, and run the file in its runtime
    exporter.py       compare the file with the model, and write the file and its report
    transformers_js.py  a folder for transformers.js, in node and browsers

These files are not copied to the Hub. The required packages are the extra `export`.
"""
