"""Pure mathematics of diffusion and its distillation: torch and the standard library only.

Everything is written in sigma-space, ``x = x0 + sigma * eps`` with ``sigma = sigma_vp / alpha_vp``; the
unit-variance latent ``z = alpha * x`` appears only where a network is called.
"""
