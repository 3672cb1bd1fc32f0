"""Decoding a Hugging Face causal LM: logits processors, generate loops, drafters, verifiers, constraints, by name.

from tokenloom import decode

model.generate(**inputs, do_sample=True, logits_processor=[decode.shaper("top-h")])
model.generate(**inputs, do_sample=True, custom_generate=decode.loop("cntp"))
"""

from tokenloom.decode.registry import Decoder as Decoder
from tokenloom.decode.registry import build as build
from tokenloom.decode.registry import decoder as decoder
from tokenloom.decode.registry import decoders as decoders
from tokenloom.decode.registry import loop as loop
from tokenloom.decode.registry import shaper as shaper
