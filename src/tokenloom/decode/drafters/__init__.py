"""Drafters of speculative decoding, one module each; `tokenloom.decode.build("drafter", name, ...)` makes them."""
