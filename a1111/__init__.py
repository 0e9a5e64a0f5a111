"""Students in A1111, Forge and reForge; `scripts/fewstep_a1111.py` is the door."""
