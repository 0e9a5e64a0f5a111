"""FewStep's door for A1111, Forge and reForge, which run every file in this folder, and again at "Reload UI".

All extensions share one `sys.modules`, so ours are loaded under a name that no other has.
"""

import importlib
import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType

PACK = "fewstep_pack"

if importlib.util.find_spec("modules.sd_samplers_diffusers"):
    logging.getLogger("fewstep").warning(
        "FewStep: this is SD.Next, which needs no extension for students: `python -m toolkit.export STUDENT "
        "--to diffusers -o FOLDER` makes a folder for its models/Diffusers"
    )
else:
    for name in [name for name in sys.modules if name == PACK or name.startswith(f"{PACK}.")]:
        del sys.modules[name]  # an update takes effect at the next "Reload UI"
    pack = ModuleType(PACK)
    pack.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules[PACK] = pack
    script = importlib.import_module(f"{PACK}.a1111.script")
    script.register()
    FewStep = script.FewStep
