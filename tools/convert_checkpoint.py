"""Turn a published EfficientFormerV2 checkpoint into one that our configs and tools take as is."""

import argparse
import sys
from pathlib import Path

from _requirements import explain_missing

with explain_missing():
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
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'source',
        metavar='IN',
        help='a .pth or .safetensors file of the authors, of timm or of ours, timm://NAME or a URL',
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
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='read IN even if that may run code in it: only for files that you made yourself',
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with exit_on_user_error():
        check_out(args.out, args.overwrite)
        use_safe_loading(args.trust_checkpoint)
        checkpoint = read_checkpoint(args.source)
        try:
            conversion = convert(checkpoint, args.task)
        except CheckpointError as error:
            raise CheckpointError(f'{args.source}: {error}') from error
        content = encode_checkpoint(conversion.tensors, conversion.meta, args.out.suffix)
        with atomic_write(args.out) as partial:
            partial.write_bytes(content)
        report(conversion, args.out)


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse what cannot be written before the work is done."""
    if out.suffix not in ('.pth', '.safetensors'):
        raise ConfigError(f'OUT ends in .pth or .safetensors, not {str(out)!r}')
    if out.is_dir():
        raise ConfigError(f'{out} is a folder')
    if out.exists() and not overwrite:
        raise ConfigError(f'{out} exists; --overwrite replaces it')


def report(conversion: Conversion, out: Path) -> None:
    """Say what was recognised, what was taken over, and what was left out and why."""
    height, width = conversion.table_size
    kind = 'a backbone'
    if conversion.task != 'backbone':
        kind = f'{TASKS[conversion.task].title} with {conversion.num_classes} classes'
    parts = ', '.join(f'{name} {count}' for name, count in conversion.parts().items())
    print(
        f'recognised: EfficientFormerV2 {conversion.arch} in {LAYOUTS[conversion.layout]}, {kind}, '
        f'bias tables for pictures of {height}x{width}'
    )
    print(f'mapped:     {len(conversion.tensors)} tensors ({parts})')
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
