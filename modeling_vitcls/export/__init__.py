"""A model as one graph that runs without this package: torch.export, ONNX, OpenVINO; each compared with the model.

    exportable.py     checkpoint or preset -> model, image processor and the outputs that are exported
    tracing.py        model -> graph, with variable image sizes where possible
    formats.py        graph -> file, and the outputs of that file in its own runtime
    export_report.py  images that are compared, largest differences, facts for users of the file
    exporter.py       the program scripts/export.py

Nothing here is copied to the Hub. The packages of other projects are the extra `export`.
"""
