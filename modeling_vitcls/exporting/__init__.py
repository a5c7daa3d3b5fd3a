"""Export a model to an ONNX graph, which runs without this package.

    options.py            flags of `vitcls export`
    tracing.py            load the model, name its outputs, and trace it, with a dynamic image size if possible
    onnx_file.py          write the graph to a file, run the file, and compare its outputs with the model's
    exporter.py           all of this, in order, and the report of the file

The files in this folder are not copied to the Hub. The extra `export` installs the required
packages.
"""
