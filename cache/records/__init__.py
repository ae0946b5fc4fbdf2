"""What a cache's records can hold (choices), what they are (records), and how logits become them (encoding)."""
