"""What was found in a dataset, and how it is told."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

ERROR = 'error'
WARNING = 'warning'
LINES_PER_KIND = 20


@dataclass(frozen=True)
class Finding:
    """One fault, or one thing that is treated in a special way.

    Attributes:
        severity: 'error': a run would fail, or learn or measure wrong things. 'warning': it is
            handled, as the reason says.
        kind: What findings are grouped by.
        file: The image, segmentation map or annotation file.
        reason: What is wrong, and what comes of it.
        annotation: Id of the annotation, where there is one.
        image: The image as the dataset names it, where the fault concerns only that one.
        split: 'train', 'val' or 'test'.
    """

    severity: str
    kind: str
    file: str
    reason: str
    annotation: int | str | None = None
    image: str | None = None
    split: str = ''

    @property
    def can_be_left_out(self) -> bool:
        """Whether a run can do without it: an image, or an entry that belongs to none."""
        return self.image is not None or self.kind in (
            'incomplete image',
            'incomplete annotation',
            'duplicate annotation id',
            'annotation of no image',
        )

    def __str__(self) -> str:
        where = self.file if self.annotation is None else f'{self.file}, id {self.annotation}'
        return f'{where}: {self.reason}'


@dataclass
class Report:
    """All that was found.

    Attributes:
        images: How many images every dataset has.
        findings: In the order of splits and files.
    """

    images: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def of(self, severity: str) -> list[Finding]:
        """The findings of a severity."""
        return [found for found in self.findings if found.severity == severity]

    def by_kind(self) -> dict[tuple[str, str, str], list[Finding]]:
        """The findings by (severity, split, kind): errors before warnings."""
        groups: dict[tuple[str, str, str], list[Finding]] = defaultdict(list)
        for found in self.of(ERROR) + self.of(WARNING):
            groups[found.severity, found.split, found.kind].append(found)
        return dict(groups)

    def lines(self) -> Iterator[str]:
        """What a person reads: at most twenty findings of a kind, then how many there are."""
        for (severity, split, kind), group in self.by_kind().items():
            yield f'\n{severity}, {split}: {kind} ({len(group)})'
            yield from (f'  {found}' for found in group[:LINES_PER_KIND])
            if len(group) > LINES_PER_KIND:
                yield f'  ... and {len(group) - LINES_PER_KIND} more'
        errors, warnings = len(self.of(ERROR)), len(self.of(WARNING))
        found = f'{count(errors, "error")}, {count(warnings, "warning")}'
        images = count(sum(self.images.values()), 'image')
        yield f'\n{images}: {found if self.findings else "nothing found"}'

    def as_dict(self) -> dict:
        """What a program reads."""
        return {
            'images': self.images,
            'errors': len(self.of(ERROR)),
            'warnings': len(self.of(WARNING)),
            'counts': [
                {'severity': severity, 'split': split, 'kind': kind, 'count': len(group)}
                for (severity, split, kind), group in self.by_kind().items()
            ],
            'findings': [asdict(found) for found in self.findings],
        }


def count(number: int, noun: str) -> str:
    """'1 image', '2 images'."""
    return f'{number} {noun}' if number == 1 else f'{number} {noun}s'
