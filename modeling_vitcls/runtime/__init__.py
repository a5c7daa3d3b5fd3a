"""The machine and the process, without models and the Hub: what all other folders use.

errors.py       errors in one line, and errors that all processes raise
flags.py        checks of flags and their names; each folder has its flags in options.py
files.py        JSON, atomic writes, digests of files
staging.py      output folders: locked, and written completely or not at all
progress.py     progress of long work, in a terminal or a log file
system.py       versions, devices
own_state.py    what a Python function takes from its caller: defaults and random numbers
distributed.py  the Accelerator, FSDP2, and functions of the main process
"""
