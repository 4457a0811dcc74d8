"""Convert a labelled dataset in any common layout to one that train.py reads, with a config."""

import argparse
import sys
from pathlib import Path

from _requirements import explain_missing

with explain_missing():
    from _arguments import make_parser, number

    from backbones.data import check_dataset
    from backbones.data.findings import count, listed
    from backbones.data.importing import FORMATS, choose_format, open_source, write_dataset
    from backbones.engine.config import load_config
    from backbones.errors import exit_on_user_error, raise_output_errors
    from backbones.inference.overview import draw_overview

# Places that are named for each kind of problem.
NOTED = 3
EXAMPLES = """\
examples:
  python tools/import_dataset.py cells.v3.zip --out data/cells
      a zip from Roboflow, with its own splits
  python tools/import_dataset.py streets/ --out data/streets --val 0.2 --group video
      new splits; frames of one video (names that differ in the last number only) stay together
  python tools/import_dataset.py VOC2012/ --out data/voc --task segmentation --ignore background
      the segmentation maps of a source that has boxes too

SOURCE is a folder, a zip or one annotation file: COCO, PASCAL VOC, YOLO (boxes or polygons),
LabelMe, CVAT for images, or segmentation maps as PNGs of indices or colors, such as CamVid's and
Cityscapes'. data/NAME gets the data, the config NAME.py for train.py, and overview.png. Images are
linked if possible, else copied.
exit code: 0 imported, 1 nothing was imported, or the result has errors
"""


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add('source', type=Path, metavar='SOURCE', help='a folder, a zip or an annotation file')
    add('--out', type=Path, required=True, metavar='data/NAME', help='the new folder')
    add('--format', choices=FORMATS, help='the format to read, if a source has several')
    add(
        '--task',
        choices=('detection', 'instances', 'segmentation'),
        help='boxes, masks of objects, or a class for every pixel (default: what the source has)',
    )
    add('--val', type=number(0, 1), metavar='SHARE', help='share of images for a new, random '
        'validation split (default: the splits of the source, else 0.2)')  # fmt: skip
    add('--group', choices=('folder', 'video'), help='what a new split keeps together')
    add('--seed', type=int, default=0, help='seed of the new split (default: 0)')
    add('--classes', nargs='+', default=(), metavar='NAME', help='the classes to import, in this '
        'order; or names for indices or colors, if the source has none')  # fmt: skip
    add('--ignore', nargs='+', default=(), metavar='NAME', help='classes to leave out')
    add('--overwrite', action='store_true', help='replace an earlier import in OUT, '
        'except configs that were changed')  # fmt: skip
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    with exit_on_user_error(), raise_output_errors(), open_source(args) as source:
        try:
            name, files = choose_format(source)
            print(f'{args.source}: {FORMATS[name][0]}, {count(len(files), "annotation file")}')
            written = write_dataset(source, name, files)
        finally:
            # After an error too: the notes say why nothing is left.
            for kind, places in source.notes.items():
                print('\n'.join(listed(kind, places, NOTED)))
    with exit_on_user_error(), raise_output_errors():
        counts = ', '.join(f'{len(part)} {split}' for split, part in written.splits.items())
        print(f'{written.task}, {len(written.classes)} classes: {", ".join(written.classes)}')
        print(f'{counts} images in {args.out}\n')
        path = args.out / f'{args.out.resolve().name}.py'
        report = check_dataset(load_config(str(path)), list(written.splits))
        print('\n'.join(report.lines()))
        if report.of('error'):
            return 1
        draw_overview(report.datasets, args.out / 'overview.png')
        print(f'look at {args.out / "overview.png"}, then:')
        print(f'  python tools/train.py {path}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
