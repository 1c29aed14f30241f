"""`python -m igpo_trl` is `igpo`."""

from .cli.app import app

app(prog_name="igpo")
