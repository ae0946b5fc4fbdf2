"""What a cache's records can hold (choices), what they are (records), how logits become them (encoding), and which
samples are mixed with each other (pairs)."""
