"""The machine and the process: what all other folders use, and what knows nothing about models on the Hub.

errors.py       errors in one line, and errors that all processes raise
flags.py        checks of flags and their names; the flags themselves are in options.py of the folder that reads them
messages.py     messages, in the form that the running program shows
files.py        JSON, atomic writes, digests of files
system.py       versions, devices, memory
distributed.py  the Accelerator, FSDP2, and functions of the main process
"""
