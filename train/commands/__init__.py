"""The commands, by what they are for: each parses, calls and prints.

A command's options are its annotated parameters and the fields of its config (pipeline/commandline/options.py). What
takes long to import is imported by the command that needs it.
"""
