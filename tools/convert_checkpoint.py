"""Convert a published EfficientFormerV2 checkpoint to one that our configs and tools load."""

import argparse
import sys
from collections import Counter
from pathlib import Path

from _requirements import explain_missing

with explain_missing():
    from _arguments import add_trust_checkpoint, make_parser

    from backbones.efficientformer_v2.checkpoint_keys import enumerate_keys
    from backbones.engine.conversion import LAYOUTS, TASKS, Conversion, convert
    from backbones.errors import CheckpointError, ConfigError, exit_on_user_error
    from backbones.files import atomic_write
    from backbones.weights import encode_checkpoint, read_checkpoint, use_safe_loading

EXAMPLES = """\
examples:
  python tools/convert_checkpoint.py eformer_s2_450.pth effv2_s2.safetensors
      the authors' ImageNet weights, for model.backbone.init_cfg.checkpoint
  python tools/convert_checkpoint.py timm://efficientformerv2_s0.snap_dist_in1k effv2_s0.pth
      timm's, from the Hugging Face hub
  python tools/convert_checkpoint.py authors_mask_rcnn_s2.pth mask_rcnn_s2.pth
      a whole model of the authors; what to test it with is printed
  python tools/convert_checkpoint.py authors_mask_rcnn_s2.pth effv2_s2_coco.pth --task backbone
      its backbone alone
"""


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument(
        'source',
        metavar='IN',
        help='a .pth or .safetensors file of the authors, of timm or of ours, '
        'timm://NAME[@REVISION] or a URL',
    )
    parser.add_argument(
        'out', metavar='OUT', type=Path, help='the file to write, .pth or .safetensors'
    )
    parser.add_argument(
        '--task',
        choices=('backbone', *TASKS),
        help='what to make: the backbone alone, or a whole model (default: all that IN holds)',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace OUT where it exists')
    add_trust_checkpoint(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with exit_on_user_error():
        if args.out.exists() and not args.overwrite:
            raise ConfigError(f'{args.out} exists; --overwrite replaces it')
        use_safe_loading(args.trust_checkpoint)
        checkpoint = read_checkpoint(args.source)
        try:
            conversion = convert(checkpoint, args.task)
            content = encode_checkpoint(conversion.tensors, conversion.meta, args.out.suffix)
        except CheckpointError as error:
            raise CheckpointError(f'{args.source}: {error}') from error
        with atomic_write(args.out) as partial:
            partial.write_bytes(content)
        report(conversion, args.out)


def report(conversion: Conversion, out: Path) -> None:
    """Say what was recognized, what was converted, and what was left out and why."""
    height, width = conversion.table_size
    kind, parts = 'a backbone', Counter(backbone=len(conversion.tensors))
    if conversion.task != 'backbone':
        kind = f'{TASKS[conversion.task].title} with {conversion.num_classes} classes'
        parts = Counter(key.partition('.')[0] for key in conversion.tensors)
    counts = ', '.join(f'{name} {count}' for name, count in parts.items())
    print(
        f'recognized: EfficientFormerV2 {conversion.arch} in {LAYOUTS[conversion.layout]}, {kind}, '
        f'bias tables for images of {height}x{width}'
    )
    print(f'converted:  {len(conversion.tensors)} tensors ({counts})')
    for reason, keys in conversion.left_out.items():
        print(f'left out:   {len(keys)} tensors, {reason}: {enumerate_keys(keys, 2)}')
    print(f'written:    {out} ({out.stat().st_size / 2**20:.1f} MiB)')
    if conversion.config is None:
        print(f'train with: --cfg-options model.backbone.init_cfg.checkpoint={out}')
    else:
        print(f'test with:  python tools/test.py {conversion.config} {out}')
        if not conversion.meta.get('dataset_meta'):
            print('note:       no class names are known for these classes')


if __name__ == '__main__':
    sys.exit(main())
