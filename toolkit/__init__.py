"""FewStep: turns a diffusion model into a student that needs few steps and keeps its guidance dial.

`diffusion` is the mathematics, `methods` holds one file a distillation method, `runtime` runs students in
any host, `training` makes them, `evaluation` measures them, `demo` is the embedded example. Each module at
this level is a command: `python -m toolkit.start --help`.

This file stays free of imports: `toolkit.start` runs before anything is installed.
"""

__version__ = "0.1.0"
