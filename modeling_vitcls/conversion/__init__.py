"""Convert checkpoints between other projects and this package.

Tables of rules map the names of the parameters.

    open_model.py             any supported checkpoint -> a model folder, converted once and cached
    weight_rules.py           rules for parameter names and shapes in both directions, and handling of the classifier
    from_transformers.py      conversion of transformers models
    transformers_families.py  parameter names and configurations of the model families of transformers
    from_timm.py              conversion of timm models: parameter names, and rewrites that involve several parameters
    timm_modules.py           configuration fields, read from the modules of a timm model
    from_state_dict.py        conversion of state dicts (DINO, DINOv2, MAE, ..., timm's models) through timm
    source_files.py           state-dict files: loading, and detection of the architecture
    to_transformers.py        conversion of ViTCLS models to transformers
    convert_models.py         the three conversions in memory, which compare outputs
    processors.py             conversion of preprocessing settings to an image processor
    source_models.py          loading of a timm or transformers model by name
    parity_report.py          largest output differences between the source and the converted model
    convert.py                implementation of `vitcls convert`

These files are not copied to the Hub.
"""
