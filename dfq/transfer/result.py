"""What `distill` returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dfq.models import Model
from dfq.ptq.engine import QuantizedModel
from dfq.transfer.record import Round


@dataclass(frozen=True)
class Distillation:
    """A student that was taught.

    rounds: what each came to; teacher_top1: percent, of the labelled images where there were some, else None.
    """

    student: Model | QuantizedModel
    teacher: str
    rounds: tuple[Round, ...]
    teacher_top1: float | None

    @property
    def top1(self) -> float | None:
        """Percent of the labelled images that the student gets right."""
        return self.rounds[-1].top1

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "student": self.student.name,
            "student_bits": self.student.bits,
            "teacher": self.teacher,
            "teacher_top1": self.teacher_top1,
            "top1": self.top1,
            "agreement": self.rounds[-1].agreement,
            "images": self.rounds[-1].images,
            "rounds": [asdict(entry) for entry in self.rounds],
        }

    def describe(self) -> str:
        """A line or two for people."""
        last = self.rounds[-1]
        text = f"{self.student.name} taught by {self.teacher} on {last.images} images in {last.round} rounds"
        if last.top1 is not None and self.teacher_top1 is not None:
            return f"{text}: top-1 {last.top1:.2f} %, the teacher's {self.teacher_top1:.2f} %"
        if last.agreement is not None:
            return (
                f"{text}: they agree on {last.agreement:.1f} % of the generated images that were held out; what that "
                "means for real ones, only real ones tell"
            )
        return text
