"""The events of everything that takes long, as `pipe.stream` yields them and `progress=` is called with them: frozen
dataclasses. The last one says what was made."""

from ltx2.convert.delete import SourcesDeleted
from ltx2.convert.verify import Verified
from ltx2.quant.measure.calibrate import Calibrated
from ltx2.quant.report import Quantized
from ltx2.runtime.events import (
    BytesDone,
    Downloaded,
    DownloadPlanned,
    Event,
    Finishing,
    Loaded,
    Noted,
    PhaseDone,
    PhaseStarted,
    PlannedPhase,
    Previewed,
    PromptStarted,
    Section,
    StepDone,
    Warned,
    WorkPlanned,
    Written,
)
from ltx2.runtime.generate.records.clip import Generated, Saved

__all__ = [
    "BytesDone", "Calibrated", "DownloadPlanned", "Downloaded", "Event", "Finishing", "Generated", "Loaded", "Noted",
    "PhaseDone", "PhaseStarted", "PlannedPhase", "Previewed", "PromptStarted", "Quantized", "Saved", "Section",
    "SourcesDeleted", "StepDone", "Verified", "Warned", "WorkPlanned", "Written",
]  # fmt: skip
