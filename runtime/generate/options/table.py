"""The options of `generate`, as one table: the request, the command line, Python's signatures, sidecars, resumed runs,
`--from` and benchmark suites all read it. A new option is one row of `Options`.

Nothing here loads MLX, so that help stays instant."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from ltx2.runtime.errors import UsageError
from ltx2.runtime.generate.options.kinds import (
    Choice,
    File,
    Flag,
    Length,
    Number,
    Numbers,
    One,
    Option,
    Several,
    Text,
    Watcher,
    Whole,
)  # fmt: skip
from ltx2.runtime.generate.options.values import Extension, KeyPicture, Lora, Picture, Reference, Sound, Span

SIZE = ("width", "height", "frames")
PICTURE_GUIDANCE = ("cfg", "stg", "rescale", "modality_scale")
SOUND_GUIDANCE = ("audio_cfg", "audio_stg", "audio_rescale", "audio_modality_scale")
GUIDANCE = (*PICTURE_GUIDANCE, *SOUND_GUIDANCE, "stg_blocks", "skip_steps", "audio_skip_steps")
LED = ("negative_prompt", "steps", *GUIDANCE)
SHOWN = ("image", "keyframe", "keyframe_slots", "reference")
CONDITIONINGS = (*SHOWN, "image_crf", "reference_attention", "audio", "video", "retake", "keep", "extend")
# Options that matter only for making latents.
SAMPLING = (
    "prompt", "embeddings", "save_embeddings", "pipeline", "no_upscale", "steps", "negative_prompt", "lora",
    "distilled_lora", "checkpoint_every", "resume", "preview",
)  # fmt: skip


DFR = (
    "it is not known where its keyframe slots are, how its temporal rounds cut a clip into tiles and join them, and "
    "how its detailing LoRA sees stage 1's latents"
)


def _scale(text: str) -> Number:
    return Number(text, metavar="X", decides=True, costs=True)


@dataclass(frozen=True)
class Options:
    """The options of `generate`. None is the preset's default."""

    prompt: Text = Text("What the clip shows, and how it sounds.", decides=True, command=False, example="text in UTF-8")
    _: KW_ONLY

    pipeline: Choice[str | None] = Choice(
        "Plan of stages; default: what the model calls for.",
        choices=("distilled", "one-stage", "two-stage", "hq"),
        unbuilt={"dfr": DFR},
        decides=True,
        costs=True,
        sets=("steps", *GUIDANCE, "distilled_lora"),
    )
    width: Whole = Whole("Pixels; a multiple of 64 (32 with --no-upscale).", decides=True, costs=True)
    height: Whole = Whole("Pixels; a multiple of 64 (32 with --no-upscale).", decides=True, costs=True)
    frames: Length = Length(
        "Length of the clip: 8k+1 frames, such as 121; or auto: chosen from the prompt, between so many seconds.",
        metavar="N|auto[:MIN-MAX]",
        decides=True,
        costs=True,
    )
    fps: Number = Number("Frames per second.", decides=True, costs=True, least=1, most=240, example="24, 25 or 30")
    seed: Whole = Whole(
        "Same seed, same clip.",
        decides=True,
        least=0,
        most=(1 << 64) - 1,  # a key of MLX's generator has 64 bits
        range="between 0 and 2**64 - 1",
        example="10",
    )
    no_audio: Flag = Flag("Write no sound. The picture stays the same.", costs=True)
    no_video: Flag = Flag("Make the sound alone, as a .wav file.", decides=True, costs=True)
    no_upscale: Flag = Flag("One stage at full size, without the upscaler.", decides=True, costs=True)
    temporal_upscale: Flag = Flag("Twice the frame rate, by the temporal upscaler.", decides=True, costs=True)
    vae: Choice[str | None] = Choice(
        "Video decoder, where the model folder has both; default: conv.",
        choices=("conv", "diffusion"),
        costs=True,
    )

    steps: Whole = Whole("Denoise steps of stage 1.", decides=True, costs=True, least=1, example="30")
    negative_prompt: Text = Text(
        "What the clip must not be like; default: Lightricks' own.", metavar="TEXT", decides=True
    )
    cfg: Number = _scale("How strictly the picture follows the prompt; 1: not guided.")
    stg: Number = _scale("Guidance of the picture by a pass without attention in --stg-blocks; 0: none.")
    rescale: Number = _scale("How much of the picture's contrast from guidance is taken back, 0 to 1.")
    modality_scale: Number = _scale("How strictly the picture follows the sound; 1: not guided.")
    audio_cfg: Number = _scale("How strictly the sound follows the prompt; 1: not guided.")
    audio_stg: Number = _scale("Guidance of the sound by a pass without attention in --stg-blocks; 0: none.")
    audio_rescale: Number = _scale("How much of the sound's contrast from guidance is taken back, 0 to 1.")
    audio_modality_scale: Number = _scale("How strictly the sound follows the picture; 1: not guided.")
    stg_blocks: Numbers = Numbers("Blocks whose self-attention STG leaves out.", metavar="N[,N...]", decides=True)
    skip_steps: Whole = Whole(
        "Guide the picture only every (K+1)th step.", metavar="K", decides=True, least=0, example="1"
    )
    audio_skip_steps: Whole = Whole(
        "Guide the sound only every (K+1)th step.", metavar="K", decides=True, least=0, example="1"
    )
    lora: Several[Lora] = Several(
        "Add a LoRA, at strength S, or S in stage 1 and S2 in stage 2; repeatable.",
        form=Lora,
        decides=True,
    )
    distilled_lora: One[Lora] = One(
        "Distilled LoRA of two-stage and hq; default: the model folder's own.", form=Lora, decides=True
    )

    image: Several[Picture] = Several(
        "Show this image at a frame (default: 0, as the first frame); repeatable.",
        form=Picture,
        decides=True,
    )
    keyframe: Several[KeyPicture] = Several(
        "Show this image as a keyframe, at frame 0 too; repeatable.", form=KeyPicture, decides=True
    )
    keyframe_slots: Whole = Whole(
        "Single frames that stage 1 makes along, to hold fast motion.",
        metavar="N",
        decides=True,
        least=0,
        example="2",
    )
    image_crf: Whole = Whole(
        "Compress images first, at this H.264 quality, as in training; 0: do not.",
        metavar="N",
        decides=True,
        least=0,
        most=51,
        example="18 or 33, as models are trained with",
    )
    audio: One[Sound] = One("Make the picture to this sound, used from a second on.", form=Sound, decides=True)
    video: File = File("Make the sound to this picture.", decides=True, sets=(*SIZE, "fps"))
    retake: One[Span] = One(
        "Make these seconds of a clip anew, and keep the rest.",
        form=Span,
        decides=True,
        sets=(*SIZE, "fps"),
    )
    keep: Choice[str | None] = Choice(
        "With --retake: keep the whole sound, or the whole picture.",
        choices=("audio", "video"),
        decides=True,
        needs="retake",
    )
    extend: One[Extension] = One(
        "Make so many seconds more after a clip, or before it if negative.",
        form=Extension,
        decides=True,
        sets=(*SIZE, "fps"),
    )
    upscale: File = File(
        "Enlarge this clip, or its latents, in place of making one; a prompt refines it.",
        decides=True,
        sets=(*SIZE, "fps"),
        command=False,
    )
    reference: Several[Reference] = Several(
        "Control or source video for an IC-LoRA; repeatable.",
        form=Reference,
        decides=True,
        needs="lora",
    )
    reference_attention: Number = Number(
        "How much picture and reference see of each other, 0 to 1 (default).",
        metavar="X",
        decides=True,
        least=0,
        most=1,
        example="1",
        needs="reference",
    )

    embeddings: File = File(
        "Use saved prompt embeddings; skips the text encoder.", decides=True, replaces=("prompt", "negative_prompt")
    )
    save_embeddings: File = File("Save the prompt's embeddings.", repeated=False)
    noise: File = File("Start from these noises instead of the seed.", decides=True, replaces=("seed",))
    save_latents: File = File("Save the latents before they are decoded.", repeated=False)
    latents: File = File(
        "Decode these latents only.",
        replaces=SAMPLING,
        sets=(*SIZE, "noise"),  # an earlier run's noise is not what its decoder alone draws
    )
    memory_limit: Number = Number(
        "Stay below; default: what the GPU can use.",
        metavar="GB",
        least=1e-6,
        range="a positive number of GB (1e9 bytes)",
        example="24, for example",
        costs=True,
    )
    low_memory: Flag = Flag("Take as little as possible; slower.", costs=True)
    matmul: Choice[str] = Choice(
        "With quantized weights; auto: the fastest, measured once.",
        choices=("auto", "packed", "dequantized", "widened"),
        default="auto",
        costs=True,
    )
    split: Choice[str | None] = Choice(
        "How several machines share a stage; default: by guidance where each has a pass, else by sequence.",
        choices=("guidance", "sequence", "none"),
        costs=True,
    )
    checkpoint_every: Whole = Whole(
        "Keep the state after every N-th denoise step; 0: only after the last one.",
        default=1,
        metavar="N",
        least=0,
        example="1",
        recorded=False,
        needs="state",
    )
    resume: Flag = Flag("Continue a run that was cut off, with the same result.", recorded=False, needs="state")
    preview: File = File(
        "Write a small picture of the predicted clip there after every step.",
        metavar="DIR",
        recorded=False,
    )
    force: Flag = Flag("Replace a clip, or a saved file, that is already there.", recorded=False)
    crf: Whole = Whole(
        "H.264 quality of the mp4 file; 0: lossless, 51: worst.",
        default=19,
        metavar="N",
        least=0,
        most=51,
        example="19, the default, or less for a better picture",
    )
    no_metadata: Flag = Flag("Write no settings into the mp4 or mov file.")
    name: Text = Text("What failures call the clip, among others.", recorded=False, command=False)
    output: File = File("The clip's file that frames go to as they are decoded.", recorded=False, command=False)
    state: File = File("The file that a run is continued from.", recorded=False, command=False)
    progress: Watcher = Watcher("Called with every event of the run.", recorded=False, command=False)


ROWS: Mapping[str, Option[Any, Any]] = {n: row for n, row in vars(Options).items() if isinstance(row, Option)}
# What benchmarks take: options that change time or memory.
COSTS = tuple(name for name, row in ROWS.items() if row.costs)


@dataclass(frozen=True)
class Clash:
    """An option (with some of its values: only then) that does not go with others."""

    option: str
    others: tuple[str, ...]
    why: str
    values: tuple[str, ...] = ()

    def of(self, given: Mapping[str, Any]) -> tuple[str, ...]:
        """The others that are given beside it."""
        if self.option not in given or (self.values and given[self.option] not in self.values):
            return ()
        return tuple(other for other in self.others if other in given)

    def error(self, given: Mapping[str, Any], other: str) -> UsageError:
        """The error for one of the others."""
        flag, beside = ROWS[self.option].flag, ROWS[other].flag
        spelt = f"{flag} {given[self.option]}" if self.values else flag
        return UsageError(f"{spelt} and {beside} do not go together", self.why, f"leave out {beside} or {flag}")


CLASHES = (
    Clash("pipeline", LED, "its steps are fixed and not guided", ("distilled",)),
    Clash("pipeline", ("distilled_lora",), "its one stage is guided", ("one-stage",)),
    Clash(
        "pipeline",
        ("no_upscale", "retake", "extend", "video", "no_video"),
        "it has two stages, and that leaves one",
        ("two-stage", "hq"),
    ),
    Clash("pipeline", ("skip_steps", "audio_skip_steps"), "its sampler predicts twice a step", ("hq",)),
    Clash(
        "audio",
        ("video", "retake", "extend", "no_audio", "no_video", *SOUND_GUIDANCE, "audio_skip_steps"),
        "the sound is given, and the picture is made to it",
    ),
    Clash(
        "video",
        ("retake", "extend", "no_audio", "no_video", *SHOWN, *SIZE, *PICTURE_GUIDANCE, "skip_steps"),
        "the picture is given, and the sound is made to it",
    ),
    Clash(
        "retake",
        ("extend", "no_video", *SHOWN, *SIZE),
        "the clip is given, and keeps its size",
    ),
    Clash(
        "extend",
        ("no_video", *SHOWN, *SIZE),
        "the clip is given, and keeps its size",
    ),
    Clash(
        "no_video",
        (
            *SHOWN,
            "width",
            "height",
            "no_audio",
            "preview",
            "crf",
            *PICTURE_GUIDANCE,
            "skip_steps",
            "audio_modality_scale",
        ),
        "only the sound is made",
    ),
    Clash(
        "upscale",
        (*SIZE, "fps", "pipeline", "no_upscale", "no_video", "lora", *LED, *CONDITIONINGS),
        "the clip is given, and is only enlarged",
    ),
    Clash("latents", ("upscale", *CONDITIONINGS, *GUIDANCE), "the latents are there, and are only decoded"),
)


def check_usage(given: Mapping[str, Any]) -> None:
    """Raises UsageError for options that do not go together, and for one that lacks another."""
    check_clashes(given)
    check_needs(given)


def check_clashes(given: Mapping[str, Any]) -> None:
    """Raises UsageError for options that do not go together."""
    for clash in CLASHES:
        for other in clash.of(given):
            raise clash.error(given, other)


def check_needs(given: Mapping[str, Any]) -> None:
    """Raises UsageError for an option that lacks another."""
    for name in given:
        if (needed := ROWS[name].needs) and needed not in given:
            flag, row = ROWS[name].flag, ROWS[needed]
            what, why = f"{flag} has no effect without {row.flag}", ROWS[name].help.rstrip(".")
            fix = f"add {row.flag}{'' if row.command else f'={row.metavar}'}, or leave out {flag}"
            raise UsageError(what, f"what it is for: {why}", fix)


def repeated(earlier: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an earlier run with new ones in their place. What the new ones leave nothing to do, set, or do not
    go with is left out; so is what would leave nothing to do for those of them that decide.

    Raises UsageError for new options that do not go together, or with an earlier one that says what is made, such as
    --retake; and for one that lacks another.
    """
    check_clashes(given)
    dropped = {name for file in given for name in (*ROWS[file].replaces, *ROWS[file].sets)}
    dropped |= {row.name for row in ROWS.values() if any(n in given and ROWS[n].decides for n in row.replaces)}
    leading = {clash.option for clash in CLASHES}
    for clash in CLASHES:
        for other in clash.of({**earlier, **given}):
            if clash.option in given:
                dropped.add(other)
            elif other in leading & given.keys():
                dropped.add(clash.option)
            elif other in given and clash.option not in dropped:
                raise clash.error(earlier, other)
    kept = {name: value for name, value in earlier.items() if name not in dropped} | dict(given)
    kept = {name: value for name, value in kept.items() if name in given or ROWS[name].needs in ("", *kept)}
    check_needs(kept)
    return kept
