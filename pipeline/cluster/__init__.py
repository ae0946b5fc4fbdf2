"""Builds on a Ray cluster: workers answer there, and what they answer is committed here."""
