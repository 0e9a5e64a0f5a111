"""Checkpoints, networks, data and the training loop: the only room for diffusers, peft, transformers, accelerate."""
