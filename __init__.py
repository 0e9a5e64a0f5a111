"""FewStep's door for ComfyUI, which imports the repository's root as a package.

The guard holds in ComfyUI, in pytest (which imports a root `__init__.py` too) and for `python -m`. The tools
in `toolkit` need no host: `python -m toolkit.start demo`.
"""

import sys

if "folder_paths" in sys.modules and __package__:
    from .nodes import comfy_entrypoint as comfy_entrypoint

    WEB_DIRECTORY = "./web"
