"""What a training step is made of: checked options, forwards without padding, metrics and costs."""
