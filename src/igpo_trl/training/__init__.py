"""What makes a training step cheap: forwards without padding, and the count of what they cost."""
