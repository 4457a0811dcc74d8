"""Export a model to one file that computes results from pixels without this project.

Color normalization, box decoding and non-maximum suppression are inside the file; its metadata has
the preprocessing, class names and colors. The file is run and compared with PyTorch, and kept only
if the results are the same. Needs torch 2.9 or later and pip install -r requirements/export.txt.
docs/export.md describes inputs and outputs.
"""

import argparse
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

from _requirements import explain_missing

with explain_missing():
    from _arguments import (
        add_cfg_options,
        add_no_deploy,
        add_trust_checkpoint,
        image_size,
        make_parser,
        parse,
        positive,
    )

    from backbones.errors import exit_on_user_error
    from backbones.export.export import Options, export
    from backbones.weights import use_safe_loading

EXAMPLES = """\
examples:
  python tools/export.py seg_configs/fpn_effv2_s0.py CHECKPOINT fpn_s0.onnx
      segmentation maps of 512x512 images
  python tools/export.py det_configs/mask_rcnn_effv2_s0.py CHECKPOINT mask_rcnn_s0.onnx --dynamic
      boxes, scores, labels and masks of images of any size
  python tools/export.py det_configs/retinanet_effv2_s0.py CHECKPOINT retinanet_s0.xml \\
      --size 640x640 --batch 4 --cfg-options model.test_cfg.score_thr=0.3
      for OpenVINO (with a .bin beside it), four images at once, high scores only
  python tools/export.py seg_configs/fpn_effv2_s0.py CHECKPOINT fpn_s0_int8.xml --int8
      8-bit integers, if mIoU on the validation set drops by one point at most
  python tools/export.py seg_configs/fpn_effv2_s0.py CHECKPOINT fpn_s0.mlpackage
      for Core ML, which runs on Apple's machines only, so that the file is not compared
"""


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument('config', help='the config that the model was trained with')
    parser.add_argument('checkpoint', help='a checkpoint of the whole model')
    parser.add_argument(
        'out',
        metavar='OUT',
        type=Path,
        help='the file to write: .onnx (onnxruntime), .xml (OpenVINO) or .mlpackage (Core ML: '
        'segmentors and backbones)',
    )
    parser.add_argument(
        '--size',
        type=image_size,
        metavar='HEIGHTxWIDTH',
        help="size of the input (default: a segmentor's crop size, a detector's test scale); "
        'images are resized, for detection also padded, which changes scores a little',
    )
    parser.add_argument(
        '--dynamic',
        action='store_true',
        help='any height and width, from 33 pixels on (RetinaNet: 129, Mask R-CNN: 65)',
    )
    parser.add_argument(
        '--batch',
        type=batch_size,
        default=1,
        metavar='N|dynamic',
        help='images per batch; dynamic: any number (default: 1)',
    )
    parser.add_argument(
        '--logits', action='store_true', help='output logits instead of a segmentation map'
    )
    parser.add_argument(
        '--backbone-only', action='store_true', help="output the backbone's feature maps only"
    )
    add_no_deploy(parser)
    parser.add_argument(
        '--image',
        metavar='FILE',
        help='compare file and model on this image (default: the first validation image of the '
        'config, else a portrait)',
    )
    int8 = parser.add_argument_group('int8, for .onnx and .xml')
    int8.add_argument(
        '--int8',
        action='store_true',
        help='quantize the network to 8 bits: a quarter of the size, faster on CPUs. The file is '
        "kept only if its metric on the config's validation set drops by --max-drop at most",
    )
    int8.add_argument(
        '--calibration-images',
        type=positive,
        default=300,
        metavar='N',
        help='training images for measuring the ranges of activations (default: 300)',
    )
    int8.add_argument(
        '--max-drop',
        type=float,
        default=1.0,
        metavar='POINTS',
        help='maximum loss of mIoU or AP, in hundredths; if int8 loses more, some layers stay '
        'float (default: 1.0)',
    )
    add_trust_checkpoint(parser)
    add_cfg_options(parser, 'model.test_cfg.rcnn.score_thr=0.3')
    return parse(parser)


def batch_size(text: str) -> int | None:
    """Parse a number from 1 on, or 'dynamic' into None."""
    if text == 'dynamic':
        return None
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 1 on nor 'dynamic'")
    return int(text)


def main() -> None:
    args = parse_args()
    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    with exit_on_user_error():
        use_safe_loading(args.trust_checkpoint)
        say = partial(print, flush=True)
        export(args.config, args.checkpoint, args.out, options, args.cfg_options, say)


if __name__ == '__main__':
    sys.exit(main())
