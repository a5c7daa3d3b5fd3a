"""Checkpoints of other projects -> ours and back: rules as tables, applied by one function.

    weight_rules.py           rules for parameter names and shapes, and their application in both directions
    random_weights.py         random values for every parameter, for conversions without a checkpoint
    head_transfer.py          keep, replace or drop the classifier
    from_transformers.py      models of transformers -> ours
    transformers_families.py  transformers' families as tables
    from_timm.py              timm's models -> ours; rewrites that rules cannot express
    timm_modules.py           timm's modules -> configuration fields
    timm_tables.py            timm's parameter names
    from_state_dict.py        published state dicts -> ours
    big_vision.py             big_vision's .npz checkpoints
    to_transformers.py        ours -> models of transformers
    processors.py             preprocessing of other projects -> our image processor
    source_models.py          name -> model of timm or transformers
    parity_report.py          largest differences between source and converted model
    conversion_card.py        card of a converted model
    convert.py                the program scripts/convert.py

Nothing here is copied to the Hub.
"""
