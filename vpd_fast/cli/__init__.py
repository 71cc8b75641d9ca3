"""The command line `vpd-fast`, one file per command."""
