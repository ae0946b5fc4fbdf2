"""How students are judged."""
