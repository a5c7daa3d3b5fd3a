"""What goes to the Hub, and whether it arrived.

    card.py             the model card
    rights.py           may this token push there? Asked before training, without a trace
    contents.py         which files of a model folder are published
    publish.py          the push: one commit, tried again where the network fails
    verify.py           the proof: a fresh process loads the commit and answers as the model does
    clean_process.py    that process
    connection.py       what the others share of talking to the Hub

Nothing here ships to the Hub itself.
"""
