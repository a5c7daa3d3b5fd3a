"""Convert checkpoints of other projects to this package and back, with tables of rules for parameter names.

    weight_rules.py           rules for parameter names and shapes, applied in both directions
    random_weights.py         random values for every parameter, for conversions without a checkpoint
    head_transfer.py          keep, replace or drop the classifier
    from_transformers.py      convert models of transformers
    transformers_families.py  parameter names and configurations of transformers
    from_timm.py              convert models of timm, with rewrites of several parameters
    timm_modules.py           configuration fields from timm's modules
    timm_tables.py            parameter names of timm
    from_state_dict.py        convert published state dicts of DINO, DINOv2, DINOv3, DeiT, MAE, big_vision, ...
    source_files.py           load a published state-dict file: containers, family, reference model
    to_transformers.py        convert models of this package to transformers
    processors.py             convert preprocessing to an image processor
    source_models.py          load a model of timm or transformers by name
    parity_report.py          largest differences between source and converted model
    conversion_card.py        card of a converted model
    convert.py                implementation of scripts/convert.py

These files are not copied to the Hub.
"""
