"""`python -m igpo_trl` is `igpo`."""

from .cli import app

app(prog_name="igpo")
