"""Export a model to an ONNX graph, which runs without this package.

    options.py            flags of `vitcls export`
    exportable.py         load the model and its image processor, and name the model's outputs
    tracing.py            trace the model to a graph, with a dynamic image size if possible
    onnx_file.py          write the graph to a file, and run the file
    compare.py            compare the outputs of the file with the outputs of the model
    report.py             describe the file
    exporter.py           all of this, in order

The files in this folder are not copied to the Hub. The extra `export` installs the required
packages.
"""
