"""Check all images and annotations that a config reads, and list what is wrong with them."""

import argparse
import json
import sys
from pathlib import Path

from _requirements import explain_missing

with explain_missing():
    from _arguments import add_cfg_options, make_parser, parse, positive

    from backbones.data import check_dataset
    from backbones.data.config_datasets import SPLITS
    from backbones.data.findings import printable
    from backbones.engine.config import load_config
    from backbones.errors import ConfigError
    from backbones.files import write_text

EXAMPLES = """\
examples:
  python tools/check_dataset.py det_configs/mask_rcnn_effv2_s0.py
      all data that training and testing on COCO read
  python tools/check_dataset.py my_streets.py --split train --json found.json
      the training set alone; found.json gets all findings, not only the first of each kind

An error would end a run, or make it learn or measure something wrong. A warning is handled by the
rules of COCO and ADE20K, and says how: for example, crowd regions and images without objects.
exit code: 0 no errors, 1 errors, 2 the command line or the config is wrong
"""


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument('config', help='a config for mmdet or mmseg, as for train.py')
    parser.add_argument(
        '--split', nargs='+', choices=SPLITS, help='splits to check (default: all in the config)'
    )
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all findings to this file')
    parser.add_argument(
        '--workers', type=positive, metavar='N', help='processes (default: one per core)'
    )
    add_cfg_options(parser, 'train_dataloader.dataset.data_root=data/mine/')
    return parse(parser)


def main() -> int:
    args = parse_args()
    try:
        config = load_config(args.config, args.cfg_options)
        splits = args.split or [split for split in SPLITS if config.get(f'{split}_dataloader')]
        lacking = [split for split in splits if not config.get(f'{split}_dataloader')]
        if lacking:
            raise ConfigError(f'{args.config} has no {lacking[0]}_dataloader')
        report = check_dataset(config, splits, args.workers)
        if args.json:
            content = {'config': args.config, **report.as_dict()}
            write_text(args.json, printable(json.dumps(content, indent=1, ensure_ascii=False)))
    except (ConfigError, OSError) as error:
        print(f'\nerror: {error}', file=sys.stderr)
        return 2
    print('\n'.join(report.lines()))
    if args.json:
        print(f'all findings: {args.json}')
    return 1 if report.of('error') else 0


if __name__ == '__main__':
    sys.exit(main())
