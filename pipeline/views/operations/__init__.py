"""What the operations of views have in common; the operations themselves are in kinds/."""
