"""Decoding: what happens between the logits of the next position and a finished text."""
