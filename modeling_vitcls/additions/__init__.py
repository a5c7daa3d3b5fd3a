"""What is added to a finished model, whose old outputs stay equal to the bit.

extend.py        a finished model gets another head: read this file first
records.py       the folder is written, as a run writes it
add_class.py     classes of a classifier
add_task.py      a task with a classifier of its own
certificate.py   comparison of the old and the new model, to the bit
options.py       flags of the commands that add
"""
