"""Export a model to a graph that runs without this package: ONNX or OpenVINO.

    options.py            flags of `vitcls export`
    exportable.py         load the model and its image processor, and name the model's outputs
    tracing.py            trace the model to a graph, with a dynamic image size if possible
    formats.py            write the graph to a file in the format of a runtime
    measurement.py        measure the file on images, and its speed
    exporter.py           write the file and its report if its outputs match the outputs of the model

The files in this folder are not copied to the Hub. The extra `export` installs the required
packages.
"""
