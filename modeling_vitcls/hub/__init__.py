"""What goes to the Hub beside weights and code.

    card.py    the model card

Nothing here ships to the Hub itself.
"""
