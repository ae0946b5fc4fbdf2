"""Stage 1: the teacher's answers to every view, stored once."""
