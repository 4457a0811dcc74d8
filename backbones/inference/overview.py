"""A sheet that shows datasets: annotated images, and counts of classes, sizes and objects."""

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS
from PIL import Image

from backbones.data.findings import CheckedDataset
from backbones.files import atomic_write

from .comparison import to_detections, to_map
from .drawing import Visualizer
from .palette import choose_palette
from .text import fit_text, font_for

SAMPLES = 8


def draw_overview(datasets: Sequence[CheckedDataset], path: Path) -> None:
    """Draw images of the first checked dataset, and counts of all of them."""
    from matplotlib.figure import Figure

    built = [build_dataset(checked.dataset) for checked in datasets]
    classes = built[0].metainfo['classes']
    # In inches: a line of text for each class.
    more = np.clip(0.16 * len(classes) - 4, 0.01, 200)
    figure = Figure(figsize=(16, 12 + more), layout='constrained')
    grid = figure.add_gridspec(4, 12, height_ratios=(4, 4, 4, more))
    for place, drawing in enumerate(draw_samples(built[0])):
        axes = figure.add_subplot(grid[place // 4, place % 4 * 3 : place % 4 * 3 + 3])
        axes.imshow(drawing[..., ::-1])
        axes.axis('off')
    axes = figure.add_subplot(grid[2:, :4])
    sizes, per_image, bottom = [], [], np.zeros(len(classes), int)
    for checked, dataset in zip(datasets, built, strict=True):
        counts = np.zeros(len(classes), int)
        for labels, size in contents(checked, dataset):
            counts[np.unique(labels).astype(int)] += 1
            sizes.append(size)
            per_image.append(len(labels))
        axes.barh(range(len(classes)), counts, left=bottom, label=checked.split)
        bottom += counts
    axes.set_yticks(range(len(classes)), [fit_text(name, 10, 300) for name in classes])
    for label in axes.get_yticklabels():
        font = Path(font_for(label.get_text()))
        # Names are no formulas.
        label.set(fontproperties=font, fontsize='small', parse_math=False)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.locator_params(axis='x', integer=True, min_n_ticks=1)
    axes.legend(fontsize='small')
    axes.set(title='images per class')
    axes = figure.add_subplot(grid[2, 4:8])
    places = Counter(sizes)
    axes.scatter(*zip(*places, strict=True), s=[20 + 200 * n / len(sizes) for n in places.values()])
    axes.set(title=f'sizes of {len(sizes)} images', xlabel='width', ylabel='height')
    axes = figure.add_subplot(grid[2, 8:])
    low, high = min(per_image), max(per_image)
    step = -(-(high - low + 1) // 40)
    axes.hist(per_image, bins=np.arange(low, high + step + 1, step) - 0.5)
    axes.locator_params(integer=True, min_n_ticks=1)
    unit = 'classes' if datasets[0].layout == 'segmentation' else 'objects'
    axes.set(title=f'{unit} per image', ylabel='images')
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=80, format='png')


def build_dataset(dataset: ConfigDict) -> BaseDataset:
    """Build a dataset of a config that yields whole images with their ground truth."""
    steps = [step for step in dataset.pipeline if step.type.startswith(('Load', 'Pack'))]
    # pycocotools prints that it reads a file.
    with redirect_stdout(io.StringIO()):
        return DATASETS.build({**dataset, 'pipeline': steps, 'test_mode': True})


def draw_samples(dataset: BaseDataset) -> Iterator[np.ndarray]:
    """Yield evenly spaced images of a dataset with their ground truth, drawn."""
    classes = dataset.metainfo['classes']
    palette = choose_palette(None, classes, dataset.metainfo.get('palette'))
    visualizer = Visualizer(classes, palette)
    for index in np.unique(np.linspace(0, len(dataset) - 1, SAMPLES).astype(int)).tolist():
        data = dataset[index]
        image, sample = data['inputs'], data['data_samples']
        if 'gt_sem_seg' in sample:
            truth = to_map(sample.gt_sem_seg, len(classes))
        else:
            truth = to_detections(sample.gt_instances)
        yield visualizer.draw(image.permute(1, 2, 0).numpy(), truth)


def contents(checked: CheckedDataset, dataset: BaseDataset) -> Iterator[tuple[Any, tuple]]:
    """Yield for each image the labels of its objects or its map, and its (width, height)."""
    if checked.layout == 'segmentation':
        for sample in checked.samples:
            values = np.asarray(Image.open(sample.seg_map))
            labels = sample.labels.classes_of_values()[np.unique(values)]
            yield labels[labels >= 0], values.shape[::-1]
    else:
        for info in map(dataset.get_data_info, range(len(dataset))):
            labels = [one['bbox_label'] for one in info['instances']]
            yield labels, (info['width'], info['height'])
