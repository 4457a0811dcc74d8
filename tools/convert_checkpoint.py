"""Convert a published EfficientFormerV2 checkpoint to the layout of this package.

Only the backbone has other names in the authors' files; necks and heads are copied unchanged. They
are compared with a config's model when it is tested or run.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from _requirements import ROOT, explain_missing

with explain_missing():
    from _arguments import add_trust_checkpoint, make_parser
    from torch import Tensor

    from backbones import ARCHITECTURES, EfficientFormerV2
    from backbones.efficientformer_v2 import checkpoint_keys as keys
    from backbones.errors import CheckpointError, ConfigError, exit_on_user_error, first_of
    from backbones.files import write_bytes
    from backbones.weights import encode_checkpoint, read_checkpoint, use_safe_loading

LAYOUTS = {
    'snap': "the authors' layout",
    'timm': "timm's layout",
    'own': "this package's own layout",
}
# A tensor that only one kind of whole model has, and the start of our configs for that kind.
CONFIGS = {
    'bbox_head.retina_cls.weight': 'det_configs/retinanet_effv2_',
    'roi_head.mask_head.conv_logits.weight': 'det_configs/mask_rcnn_effv2_',
    'decode_head.scale_heads.0.0.conv.weight': 'seg_configs/fpn_effv2_',
}
EXAMPLES = """\
examples:
  python tools/convert_checkpoint.py eformer_s2_450.pth effv2_s2.safetensors
      the authors' ImageNet weights, for model.backbone.init_cfg.checkpoint
  python tools/convert_checkpoint.py timm://efficientformerv2_s0.snap_dist_in1k effv2_s0.pth
      timm's, from the Hugging Face hub
  python tools/convert_checkpoint.py authors_mask_rcnn_s2.pth mask_rcnn_s2.pth
      a whole model of the authors; prints the command to test it
  python tools/convert_checkpoint.py authors_mask_rcnn_s2.pth effv2_s2_coco.pth --task backbone
      its backbone alone
"""


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument(
        'source',
        metavar='IN',
        help="a .pth or .safetensors file in the authors', timm's or our layout, "
        'timm://NAME[@REVISION] or a URL',
    )
    parser.add_argument(
        'out', metavar='OUT', type=Path, help='the file to write, .pth or .safetensors'
    )
    parser.add_argument(
        '--task', choices=('backbone',), help='leave out neck and heads (default: all that IN has)'
    )
    parser.add_argument('--overwrite', action='store_true', help='replace OUT if it exists')
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
            tensors, report = convert(checkpoint, args.out, args.task == 'backbone')
            meta = {'dataset_meta': class_names(checkpoint)}
            content = encode_checkpoint(tensors, meta, args.out.suffix)
        except CheckpointError as error:
            raise CheckpointError(f'{args.source}: {error}') from error
        write_bytes(args.out, content)
        print(*report, sep='\n')


def convert(
    checkpoint: dict, out: Path, only_backbone: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors to write, and lines that say what was recognized, left out and why."""
    given = keys.tensors_of(checkpoint)
    prefix = keys.PREFIX if any(key.startswith(keys.PREFIX) for key in given) else ''
    backbone = {k.removeprefix(prefix): v for k, v in given.items() if k.startswith(prefix)}
    heads = {key: tensor for key, tensor in given.items() if not key.startswith(prefix)}
    own, layout = keys.to_own_layout(backbone), keys.layout_of(backbone)
    arch = recognize_arch(own, given)
    keys.check_complete(own, EfficientFormerV2(arch).state_dict(), backbone)

    left_out: dict[str, list[str]] = {}
    for key in backbone:
        if reason := keys.reason_left_out(key, backbone):
            left_out.setdefault(reason, []).append(prefix + key)
    if only_backbone and heads:
        left_out['neck and heads, because of --task backbone'] = list(heads)
        heads = {}
    tensors, parts = own, Counter(backbone=len(own))
    if heads:
        tensors = {f'{keys.PREFIX}{key}': tensor for key, tensor in own.items()} | heads
        parts = Counter(key.partition('.')[0] for key in tensors)
    height, width = table_size(own)
    report = [
        f'recognized: EfficientFormerV2 {arch} in {LAYOUTS[layout]}, bias tables for images of '
        f'{height}x{width}',
        f'converted:  {len(tensors)} tensors '
        f'({", ".join(f"{name} {count}" for name, count in parts.items())})',
    ]
    for reason, names in left_out.items():
        some = first_of(names, 2)
        report.append(f'left out:   {len(names)} tensors, {reason}: {some}')
    report.append(f'written:    {out}')
    if not heads:
        report.append(f'train with: --cfg-options model.backbone.init_cfg.checkpoint={out}')
    elif config := find_config(heads, arch, layout):
        report.append(f'test with:  python tools/test.py {config} {out}')
    return tensors, report


def recognize_arch(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Return which of ``ARCHITECTURES`` a backbone is, by the channels of its last stage."""
    last = own.get('stages.3.blocks.0.mlp.fc2.conv.weight')
    if last is None:
        raise CheckpointError(
            'no EfficientFormerV2 is recognized in the checkpoint, which has '
            f'the tensors {first_of(list(given))}'
        )
    for arch, row in ARCHITECTURES.items():
        if row['channels'][3] == len(last):
            return arch
    raise CheckpointError(
        f'the checkpoint has {keys.describe(own)}, which is none of {list(ARCHITECTURES)}'
    )


def table_size(own: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the height and width of the images that the bias tables are made for."""
    tables = (key for key in own if key.startswith('stages.3.blocks.') and key.endswith('.table'))
    rows, columns = own[next(tables)].shape[1:]
    # Stage 4 has a token for every 32 pixels.
    return 32 * rows, 32 * columns


def find_config(heads: Mapping[str, Tensor], arch: str, layout: str) -> str | None:
    """Return the config to test a whole model with, or None if we have none for its kind."""
    for mark, path in CONFIGS.items():
        if mark in heads:
            authors = f'{path}{arch}_authors.py'
            has_own = layout == 'snap' and (ROOT / authors).is_file()
            return authors if has_own else f'{path}{arch}.py'
    return None


def class_names(checkpoint: dict) -> dict:
    """Return class names and colors under mmengine's keys; mmdet 2 and mmseg 0.x use capitals."""
    meta = checkpoint.get('meta') or {}
    in_capitals = {name.lower(): meta[name] for name in ('CLASSES', 'PALETTE') if meta.get(name)}
    return meta.get('dataset_meta') or in_capitals


if __name__ == '__main__':
    sys.exit(main())
