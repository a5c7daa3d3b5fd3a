"""Data sets on disk, without models. Nothing here ships to the Hub.

Read by training/sources.py:
    image_folder.py   a folder with a sub-folder of images per class -> splits with images and labels
Used by training, evaluation and analysis:
    held_out.py       which images are held out, and the record of them in results.json
    fingerprint.py    whether --resume continues on the data that a run was started with
"""
