"""What a training is, decided before it starts."""
