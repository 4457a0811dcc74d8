"""Publish the weights, config and class names of a training checkpoint as one small file."""

import argparse
import hashlib
import sys
from pathlib import Path

from _requirements import explain_missing

with explain_missing():
    from _arguments import add_trust_checkpoint, make_parser

    from backbones.errors import exit_on_user_error
    from backbones.files import write_bytes
    from backbones.weights import config_of, encode_checkpoint, load_checkpoint, use_safe_loading

# Entries of the config that only say where and how one run was started.
RUN_ONLY = ('work_dir', 'load_from', 'resume', 'launcher')
# Entries of the metadata that say which training the weights are from.
KEPT = ('epoch', 'iter', 'mmengine_version')
EXAMPLES = """\
examples:
  python tools/publish_model.py work_dirs/fpn_effv2_s2/iter_40000.pth fpn_effv2_s2.pth
      writes fpn_effv2_s2-1a2b3c4d.pth
  python tools/publish_model.py work_dirs/fpn_effv2_s2/iter_40000.pth fpn_effv2_s2.safetensors
      the same as safetensors, which cannot contain code
"""


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument('checkpoint', metavar='IN', help='a checkpoint that tools/train.py wrote')
    parser.add_argument(
        'out',
        metavar='OUT',
        type=Path,
        help='the file to write, .pth or .safetensors; the first 8 digits of the SHA-256 of its '
        'contents are added to its name',
    )
    add_trust_checkpoint(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with exit_on_user_error():
        use_safe_loading(args.trust_checkpoint)
        checkpoint = load_checkpoint(args.checkpoint)
        # EMAHook, if it was used, has saved the moving average under state_dict.
        tensors = checkpoint['state_dict']
        kind = 'their moving average (EMA)' if 'ema_state_dict' in checkpoint else 'plain'
        meta = published_meta(checkpoint)
        content = encode_checkpoint(tensors, meta, args.out.suffix)
        digest = hashlib.sha256(content).hexdigest()[:8]
        path = args.out.with_name(f'{args.out.stem}-{digest}{args.out.suffix}')
        write_bytes(path, content)
    dropped = sorted(checkpoint.keys() - {'state_dict', 'meta', *meta})
    classes = meta['dataset_meta'].get('classes', ())
    print(f'weights:  {len(tensors)} tensors, {kind}')
    print(f'inside:   {"the config" if "cfg" in meta else "no config"}, {len(classes)} class names')
    print(f'left out: {", ".join(dropped) or "nothing"}')
    print(f'written:  {path} ({len(content) / 2**20:.1f} MiB)')


def published_meta(checkpoint: dict) -> dict:
    """Return config, class names and colors, without paths and settings of the single run."""
    meta = {key: checkpoint['meta'][key] for key in KEPT if key in checkpoint['meta']}
    dataset_meta = checkpoint['meta'].get('dataset_meta') or {}
    meta['dataset_meta'] = {
        key: dataset_meta[key] for key in ('classes', 'palette') if key in dataset_meta
    }
    config = config_of(checkpoint)
    if config is not None:
        for key in RUN_ONLY:
            config.pop(key, None)
        meta['cfg'] = config.pretty_text
    # It tells a supernet from an ordinary model.
    if 'search_space' in checkpoint:
        meta['search_space'] = checkpoint['search_space']
    return meta


if __name__ == '__main__':
    sys.exit(main())
