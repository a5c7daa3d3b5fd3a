"""The programs of the `vitcls` command: flags, one call into the package, and what is printed.

    parsing.py         recipes and flags -> options; one-line errors and exit statuses
    finetune.py        vitcls finetune
    pretrain.py        vitcls pretrain
    evaluate.py        vitcls evaluate
    predict.py         vitcls predict
    convert.py         vitcls convert
    inspect_tokens.py  vitcls inspect
    push.py            vitcls push
    export.py          vitcls export
    benchmark.py       vitcls benchmark
    demo.py            vitcls demo
    space.py           vitcls space
    env.py             vitcls env

A program has OPTIONS (a dataclass whose fields are the flags) and `run(options)`. It has `check(options)` if its flags
have to be checked before torch is imported. At the top a program imports only the standard library, tyro, parsing.py
and options.py. Nothing here is copied to the Hub.
"""
