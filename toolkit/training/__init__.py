"""Checkpoints, networks, data and the loop: the only room for diffusers, peft, transformers, accelerate."""
