"""Packages that a command or a flag brings in: one that is absent, or of which only a half is
installed, is a sentence.

    av = import_package("av", "videos need")
    fault_of("openvino")                # None; ABSENT; or what is wrong with it, in words
"""

import importlib

from extras.cli import UsageError

ABSENT = "it is absent"
PARTS = {                                              # what half of a package may lack
    "av": "open",
    "matplotlib": "use",
    "onnx": "ModelProto",
    "onnxruntime": "InferenceSession",
    "onnxscript": "script",
    "openvino": "Core",
    "tensorboard": "__version__",
    "transformers": "SegformerForSemanticSegmentation",
}


def fault_of(name):
    """-> None where a package can be used; ABSENT; or what is wrong with it."""
    try:
        module = importlib.import_module(name)
        if name in PARTS:
            getattr(module, PARTS[name])
    except ModuleNotFoundError as error:
        return ABSENT if error.name == name else describe(error)
    except Exception as error:                         # half a package can raise anything
        return describe(error)
    return None


def describe(error):
    """An error in one line, also where it has no message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


def import_package(name, needed, wanted=None):
    """-> the package. Raises UsageError where it cannot be used.

    needed: by what, "videos need"
    wanted: what pip is to install; None: a package of this name
    """
    fault = fault_of(name)
    if fault == ABSENT:
        raise UsageError(f"{needed} the package {name}: pip install {wanted or name}")
    if fault:
        raise UsageError(f"{needed} the package {name}, which is there but broken ({fault}): "
                         f"pip install --force-reinstall {wanted or name}")
    return importlib.import_module(name)
