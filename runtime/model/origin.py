"""A component's origin in its config.json: its model's version, and the Gemma that a transformer was trained with.
Another text encoder's states make no sense to it."""

from collections.abc import Mapping
from typing import Any

from ltx2.runtime.errors import MismatchError
from ltx2.runtime.model.layout import ModelFolder

MODEL_VERSION = "model_version"  # a key of files' metadata; files of the first release lack it
GEMMA_VERSION = "gemma_version"  # a text encoder's own; of a transformer, that of the text encoder it was trained with
ORIGIN_KEYS = frozenset({MODEL_VERSION, GEMMA_VERSION})
TUNED_SINCE = (2, 4)  # models from this version on are trained with a Gemma of their own


def model_version(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The leading whole numbers of a component's version: `2.3.rc1` is (2, 3). Empty, so before all others, where it
    has none."""
    numbers: list[int] = []
    for part in str(config.get(MODEL_VERSION, "")).replace("-", ".").split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


def check_gemma(
    transformer: Mapping[str, Any], text_encoder: Mapping[str, Any], names: tuple[str, str] | None = None
) -> str | None:
    """Check by their config.json that a transformer was trained with this text encoder; errors call the two by `names`.

    Returns a warning where neither tells. Raises MismatchError, which names both versions, where they do not match.
    """
    wanted, given = transformer.get(GEMMA_VERSION), text_encoder.get(GEMMA_VERSION)
    kind = str(text_encoder.get("model_type"))
    tuned = model_version(transformer) >= TUNED_SINCE
    fits = given is None if tuned else kind.startswith("gemma3")
    if wanted is not None:
        fits = wanted == given
    if not fits:
        first, second = names or ("the transformer", "the text encoder")
        trained = f"was trained with {wanted}" if wanted is not None else "names no fine-tuned text encoder"
        raise MismatchError(
            f"{second} is not the text encoder of {first}",
            f"the text encoder is {given or kind}, the transformer {trained}",
            "use the text encoder published with this transformer",
        )
    if wanted is None and tuned:
        return "neither the transformer nor the text encoder says whether they belong together"
    return None


def check_text_encoder(folder: ModelFolder) -> str | None:
    """`check_gemma` of a model folder that has both. Raises also what `ModelFolder.config` raises."""
    return check_gemma(folder.config("transformer"), folder.config("text_encoder"))
