"""How fast it is, against others on the same work.

    comparison.py            paired measurements -> ratios with quartiles
    agreement.py             nothing is measured unless the outputs agree
    peers.py                 other projects' ViTs, and ours with the same weights
    inference.py             forward passes, in turns
    training.py              training runs, in turns: whole processes, of which one runs while the other is suspended
    transformers_trainer.py  what runs in the other one: transformers' Trainer
    report.py                a table, a JSON file, and what they were measured on

New work is one more entry in a table: `FORWARD_PASSES` in inference.py, `TRAINING_RUNS` in training.py. Nothing here
ships to the Hub.
"""
