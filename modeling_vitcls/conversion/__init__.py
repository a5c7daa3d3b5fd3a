"""Convert checkpoints of other projects to this package and back, with tables of rules for parameter names.

    any_checkpoint.py         any supported checkpoint -> a model folder, converted once and cached
    weight_rules.py           rules for parameter names and shapes in both directions, and treatment of the classifier
    random_weights.py         random values for every parameter, for conversions without a checkpoint
    from_transformers.py      convert models of transformers
    transformers_families.py  parameter names and configurations of the model families of transformers
    from_timm.py              convert models of timm: parameter names, and rewrites that involve several parameters
    timm_modules.py           reading of configuration fields from the modules of a timm model
    from_state_dict.py        convert published state dicts of DINO, DINOv2, DINOv3, DeiT, MAE, big_vision, ...
    source_files.py           load a published state-dict file, detect the family, and build the reference model
    to_transformers.py        convert models of this package to transformers
    equivalent_models.py      equivalent models with the same outputs but other configurations
    processors.py             convert preprocessing to an image processor
    source_models.py          load a model of timm or transformers by name
    parity_report.py          largest differences between source and converted model
    conversion_card.py        model card of a converted model
    convert.py                implementation of `vitcls convert`

These files are not copied to the Hub.
"""
