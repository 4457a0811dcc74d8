"""A sheet that shows a dataset: annotated images, and how many of what there are."""

import io
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import mmcv
import numpy as np
from PIL import Image
from pycocotools.coco import COCO

from .drawing import Visualizer
from .masks import crop_masks
from .palette import Color, distinct_palette
from .results import Detections, Segmentation

SAMPLES = 8


def draw_overview(root: Path, classes: Sequence[str], colors: Sequence[Color] | None) -> Path:
    """Draw ``overview.png`` in a folder of COCO's or ADE20K's layout and return its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    visualizer = Visualizer(classes, colors or distinct_palette(classes))
    read = (
        overview_of_coco
        if (root / 'annotations/instances_train.json').is_file()
        else overview_of_maps
    )
    drawings, images_of_class, sizes, per_image, unit = read(root, visualizer)
    figure = Figure(figsize=(16, 12), layout='constrained')
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 12)
    for index, drawing in enumerate(drawings):
        axes = figure.add_subplot(grid[index // 4, index % 4 * 3 : index % 4 * 3 + 3])
        axes.imshow(drawing[..., ::-1])
        axes.axis('off')
    axes = figure.add_subplot(grid[2, :4])
    bottom = np.zeros(len(classes))
    for name, counts in images_of_class.items():
        values = np.array([counts[label] for label in range(len(classes))])
        axes.barh(range(len(classes)), values, left=bottom, label=name)
        bottom += values
    axes.set_yticks(range(len(classes)), classes, fontsize='small')
    axes.invert_yaxis()
    axes.legend(fontsize='small')
    axes.set(title='images of each class')
    axes = figure.add_subplot(grid[2, 4:8])
    places = Counter(sizes)
    axes.scatter(*zip(*places, strict=True), s=[20 + 200 * n / len(sizes) for n in places.values()])
    axes.set(title=f'sizes of {len(sizes)} images', xlabel='width', ylabel='height')
    axes = figure.add_subplot(grid[2, 8:])
    axes.hist(per_image, bins=min(max(max(per_image), 1), 40))
    axes.set(title=f'{unit} of an image', ylabel='images')
    path = root / 'overview.png'
    figure.savefig(path, dpi=80)
    return path


def spread(count: int) -> list[int]:
    """Numbers of samples, evenly over all."""
    return np.unique(np.linspace(0, count - 1, min(SAMPLES, count)).astype(int)).tolist()


def overview_of_coco(root: Path, visualizer: Visualizer) -> tuple:
    drawings, images_of_class, sizes, per_image = [], {}, [], []
    for path in sorted((root / 'annotations').glob('instances_*.json')):
        split = path.stem.removeprefix('instances_')
        content = json.loads(path.read_text(encoding='utf-8'))
        pairs = {(a['image_id'], a['category_id'] - 1) for a in content['annotations']}
        images_of_class[split] = Counter(label for _, label in pairs)
        counts = Counter(a['image_id'] for a in content['annotations'])
        sizes += [(image['width'], image['height']) for image in content['images']]
        per_image += [counts[image['id']] for image in content['images']]
        if split != 'train':
            continue
        coco = COCO()
        coco.dataset = content
        # It prints that it does.
        with redirect_stdout(io.StringIO()):
            coco.createIndex()
        for index in spread(len(content['images'])):
            entry = content['images'][index]
            objects = sorted(coco.imgToAnns[entry['id']], key=lambda a: a['area'])
            boxes = np.array([a['bbox'] for a in objects], np.float32).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            masks = None
            if objects and all('segmentation' in a for a in objects):
                masks = crop_masks(np.stack([coco.annToMask(a) for a in objects]).astype(bool))
            labels = np.array([a['category_id'] - 1 for a in objects], np.int64)
            image = mmcv.imread(str(root / split / entry['file_name']))
            drawings.append(visualizer.draw(image, Detections(boxes, None, labels, masks)))
    return drawings, images_of_class, sizes, per_image, 'objects'


def overview_of_maps(root: Path, visualizer: Visualizer) -> tuple:
    drawings, images_of_class, sizes, per_image = [], {}, [], []
    for folder in sorted((root / 'annotations').iterdir()):
        maps, counts = sorted(folder.iterdir()), Counter()
        images = sorted((root / 'images' / folder.name).iterdir())
        shown = spread(len(maps)) if folder.name == 'training' else []
        for index, (path, image) in enumerate(zip(maps, images, strict=True)):
            labels = np.asarray(Image.open(path))
            found = np.unique(labels[labels > 0]) - 1
            counts.update(found.tolist())
            sizes.append(labels.shape[::-1])
            per_image.append(len(found))
            if index in shown:
                drawn = Segmentation(labels - np.uint8(1))
                drawings.append(visualizer.draw(mmcv.imread(str(image)), drawn))
        images_of_class[folder.name] = counts
    return drawings, images_of_class, sizes, per_image, 'classes'
