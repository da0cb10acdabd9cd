"""LD_LIBRARY_PATH for darkroom: where CUDA's libraries come from the machine, from Python's wheels, or from both (cuDNN often does).

    LD_LIBRARY_PATH=$(python3 libraries.py)

Wheels come last: they fill in what is not there.
"""

import glob
import os
import re
import site
import subprocess
import sys


def path():
    given = [folder for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    # What is named in this variable comes before what the loader finds by itself, so that is named, too.
    return ":".join(dict.fromkeys(given + installed() + wheels()))


def installed():
    """Folders of CUDA's libraries that the loader finds by itself."""
    try:
        known = subprocess.run(["ldconfig", "-p"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    except OSError:
        return []
    return [os.path.dirname(file) for file in re.findall(r"lib(?:cublas|cudart|cudnn|curand|nvrtc)\b.* => (.*)", known)]


def wheels():
    bases = {*site.getsitepackages(), site.getusersitepackages(), *sys.path}
    return sorted(folder for base in bases for folder in glob.glob(f"{base}/nvidia/*/lib"))


if __name__ == "__main__":
    print(path())
