"""Data classes of the checker: datasets, samples, findings, and the report of these."""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mmengine.config import ConfigDict

from .labels import LabelRules

ERROR = 'error'  # a run would fail, or learn or measure something wrong
WARNING = 'warning'  # it is handled as the reason says
LINES_PER_KIND = 20


@dataclass(frozen=True)
class Finding:
    """One error, or one warning."""

    severity: str  # ERROR or WARNING
    kind: str  # what findings are grouped by
    file: str  # the image, segmentation map or annotation file
    reason: str  # what is wrong, and its effect
    annotation: int | str | None = None  # its id, if there is one
    # The dataset's name for an image that --skip-bad can leave out; '' for an entry without image.
    image: str | None = None
    split: str = ''

    def __str__(self) -> str:
        where = self.file if self.annotation is None else f'{self.file}, id {self.annotation}'
        return printable(f'{where}: {self.reason}')


@dataclass(frozen=True)
class Sample:
    """An image to check, with its segmentation map if it has one."""

    path: str
    name: str  # the dataset's name for it
    size: tuple[int, int] | None = None  # (width, height) in the annotations, if given
    seg_map: str | None = None  # path
    labels: LabelRules | None = None  # how the segmentation map is read
    color_type: str = 'color'  # mmcv's flag for reading the image
    backend: str = 'cv2'  # mmcv's decoder
    decode: bool = True  # False: only read the size in the header


@dataclass
class CheckedDataset:
    """One dataset of a config, and the findings in it."""

    split: str
    dataset: ConfigDict
    layout: str  # see config_datasets.layout_of
    source: str  # an annotation file, a list or a folder
    samples: list[Sample] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    labeled: set[int] = field(default_factory=set)  # classes in its maps; also NO_CLASS

    def add(
        self,
        severity: str,
        kind: str,
        reason: str,
        file: str | Path | None = None,
        image: str | None = None,
        annotation: int | str | None = None,
    ) -> None:
        """Add a finding; ``file`` defaults to the source of the dataset."""
        where = str(file or self.source)
        found = Finding(severity, kind, where, reason, annotation, image, self.split)
        self.findings.append(found)

    def add_samples(
        self, folder: Path, sizes: dict[str, tuple[int, int] | None], suffix: str = ''
    ) -> None:
        """Add the images that exist in a folder, and an error for each missing one.

        ``sizes`` has the (width, height) of each image by its name; the file name is this name and
        ``suffix``.
        """
        listings: dict[str, dict[str, str]] = {}
        for name, size in sizes.items():
            path = os.path.join(folder, name + suffix)
            parent, base = os.path.split(path)
            if parent not in listings:
                present = os.listdir(parent) if os.path.isdir(parent) else []
                listings[parent] = {one.lower(): one for one in present} | {o: o for o in present}
            other = listings[parent].get(base) or listings[parent].get(base.lower())
            if other == base:
                self.samples.append(Sample(path, name, size))
                continue
            hint = f'; there is {other}, which differs in case' if other else ''
            hint += f'; mmdet reads {suffix} files only' if suffix else ''
            reason = f'{self.source} lists it, but it is not there{hint}'
            self.add(ERROR, 'missing image', reason, path, name)


@dataclass
class Report:
    """All findings in the datasets of a config."""

    datasets: Sequence[CheckedDataset]

    @property
    def images(self) -> dict[str, int]:
        """The number of images in every dataset."""
        return {f'{one.split}: {one.source}': len(one.samples) for one in self.datasets}

    @property
    def findings(self) -> list[Finding]:
        """All findings, in the order of datasets and files."""
        return [found for one in self.datasets for found in one.findings]

    def of(self, severity: str) -> list[Finding]:
        """Return the findings of a severity."""
        return [found for found in self.findings if found.severity == severity]

    def lines(self, severities: Sequence[str] = (ERROR, WARNING)) -> Iterator[str]:
        """Yield lines for the console: the first findings of every kind, then their numbers."""
        for severity in severities:
            groups: dict[tuple[str, str], list[Finding]] = defaultdict(list)
            for found in self.of(severity):
                groups[found.split, found.kind].append(found)
            for (split, kind), group in groups.items():
                yield from listed(f'\n{severity}, {split}: {kind}', group, LINES_PER_KIND)
        errors, warnings = len(self.of(ERROR)), len(self.of(WARNING))
        found = f'{count(errors, "error")}, {count(warnings, "warning")}'
        images = count(sum(self.images.values()), 'image')
        yield f'\n{images}: {found if errors or warnings else "nothing found"}'

    def as_dict(self) -> dict:
        """Return the report for JSON."""
        return {
            'images': self.images,
            'errors': len(self.of(ERROR)),
            'warnings': len(self.of(WARNING)),
            'findings': [asdict(found) for found in self.findings],
        }


def printable(text: str) -> str:
    """Escape bytes of file names that are not UTF-8, as in JSON."""
    return text.encode(errors='backslashreplace').decode()


def listed(title: str, items: Sequence[object], max_items: int) -> Iterator[str]:
    """Yield a title with the number of items, then the first items."""
    yield f'{title} ({len(items)})'
    yield from (f'  {item}' for item in items[:max_items])
    if len(items) > max_items:
        yield f'  ... and {len(items) - max_items} more'


def count(number: int, noun: str) -> str:
    """Return a number with its noun: '1 image', '2 images'."""
    return f'{number} {noun}' if number == 1 else f'{number} {noun}s'
