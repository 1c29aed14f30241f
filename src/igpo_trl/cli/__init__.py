"""The command line: `igpo`."""
