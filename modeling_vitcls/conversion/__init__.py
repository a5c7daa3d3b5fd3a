"""Convert checkpoints of other projects to this package and back, with tables of rules for parameter names.

    any_checkpoint.py         any supported checkpoint -> a model folder, converted once and cached
    weight_rules.py           rules for parameter names and shapes in both directions, and choice of classifier
    random_weights.py         random values for every parameter, for conversions without a checkpoint
    from_transformers.py      convert models of transformers
    transformers_families.py  parameter names and configurations of transformers
    from_timm.py              convert models of timm: parameter names, and rewrites of several parameters
    timm_modules.py           configuration fields from timm's modules
    from_state_dict.py        convert published state dicts of DINO, DINOv2, DINOv3, DeiT, MAE, big_vision, ...
    source_files.py           load a published state-dict file: containers, family, reference model
    to_transformers.py        convert models of this package to transformers
    equivalent_models.py      other forms of a model with the same outputs
    processors.py             convert preprocessing to an image processor
    source_models.py          load a model of timm or transformers by name
    parity_report.py          largest differences between source and converted model
    conversion_card.py        card of a converted model
    convert.py                implementation of `vitcls convert`

These files are not copied to the Hub.
"""
