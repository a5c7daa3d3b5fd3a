"""Data sets on disk, without models. Nothing here ships to the Hub.

image_folder.py   a folder with a sub-folder of images per class -> splits with images and labels
"""
