"""FewStep's door for ComfyUI, which imports the repository's root as a package.

There are no nodes yet, so this file registers nothing: ComfyUI says that it skips the folder. The tools are
in `toolkit` and need no host: `python -m toolkit.start demo`.

When nodes arrive, they are imported behind a guard that holds in ComfyUI, in pytest (which imports a root
`__init__.py` too) and for `python -m`: `if "folder_paths" in sys.modules and __package__:`.
"""
