"""Teachers: their networks, their weights and the pixels that they want to see."""
