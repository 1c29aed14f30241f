"""A synthetic search task with its own tokenizer and tiny model: what IGPO does, on a laptop, in minutes."""
