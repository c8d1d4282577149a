"""The commands of the command line: how each is asked for, and what it does. Nothing heavy is imported before a command runs."""
