"""Model folders by path, by name in `weights/`, or the only one there."""

from collections.abc import Sequence
from pathlib import Path

from ltx2.runtime.errors import Ltx2Error, ModelFolderError, UsageError
from ltx2.runtime.files.foreign import foreign_kind
from ltx2.runtime.files.paths import is_base_name
from ltx2.runtime.model.layout import model_folders

WEIGHTS = Path("weights")
MAKES = "ltx2 download ltx-2-distilled --convert --bits 4"
# Files that are no model: what they are, and the options of generate that take them.
TAKEN = {
    "lora": ("a LoRA", "add it to a model: --lora {path}"),
    "video": ("a clip", "repeat it with --from {path}, or change it with --retake, --extend, --video or --reference"),
    "sidecar": ("the record of a clip", "repeat it with --from {path}"),
    "picture": ("a picture", "show it with --image {path}"),
    "sound": ("a sound", "make a picture to it with --audio {path}"),
    "state": ("the state of a run", "give the command of that run again, with --resume"),
    "latents": ("latents", "decode them with --latents {path}"),
    "embeddings": ("embeddings", "use them with --embeddings {path}"),
    "noise": ("noise", "start from it with --noise {path}"),
}


def find_model(model: Path | None) -> Path:
    """The folder at a path, else of this name in `weights/`; None: the only one there.

    Raises UsageError where none is named and there is not exactly one, ModelFolderError for a name that is known for
    something else, and for a file that another option takes. What else is wrong with a folder is said by what opens it.
    """
    if model is None:
        return _only_one()
    named = WEIGHTS / model
    if not model.exists() and is_base_name(str(model)) and named.is_dir():
        model = named
    if not model.exists() and is_base_name(str(model)):
        _check_name(str(model))
    if not model.exists():
        names = [path.name for path in model_folders(WEIGHTS)]
        why = f"{WEIGHTS}/ has {', '.join(names)}" if names else f"and there is none in {WEIGHTS}/ either"
        raise ModelFolderError(f"there is no model folder {model}", why, _fix(names))
    if model.is_file():
        _check_file(model)
    return model


def _check_file(path: Path) -> None:
    """Raises ModelFolderError for a file that another option takes."""
    from ltx2.convert.inspect import inspect

    kind = (foreign_kind(path) or ("",))[0].removeprefix("is a ")
    if kind not in TAKEN:
        try:
            kind = inspect(path)["kind"]
        except Ltx2Error:  # what opens it says what is wrong
            return
    if kind in TAKEN:
        what, fix = TAKEN[kind]
        raise ModelFolderError(f"{path} is not a model folder", f"it is {what}", fix.format(path=path))


def _only_one() -> Path:
    models = model_folders(WEIGHTS)
    if len(models) == 1:
        return models[0]
    what, names = "no model is named", [path.name for path in models]
    if not models:
        raise UsageError(what, f"and there is none in {WEIGHTS}/", f"use -m MODEL; {_fix(names)}")
    raise UsageError(what, f"and {WEIGHTS}/ has {len(models)}", _fix(names))


def _fix(names: Sequence[str]) -> str:
    """How to name or get a model, with these in `weights/`."""
    return f"use -m {' or -m '.join(names)}" if names else f"{MAKES} makes one, and ltx2 convert of files"


def _check_name(name: str) -> None:
    """Raises ModelFolderError for a name that `download` knows."""
    from ltx2.convert.fetch.catalogue import catalogue

    known = catalogue()
    if name in known.bundles:
        why = "it is the name of what can be downloaded"
        fix = f"ltx2 download {name} --convert --bits 4, then use -m {name}-q4"
        raise ModelFolderError(f"there is no model folder {name}", why, fix)
    if name in known.published:
        why = "it is the name of a published file, which must be converted first"
        raise ModelFolderError(f"there is no model folder {name}", why, f"ltx2 download {name}, then ltx2 convert")
