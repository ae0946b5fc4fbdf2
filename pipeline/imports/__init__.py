"""Logits that other projects have stored."""
