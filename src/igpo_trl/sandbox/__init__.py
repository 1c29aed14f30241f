"""A synthetic search task with its own tokenizer and tiny model, to try IGPO on a laptop in minutes."""
