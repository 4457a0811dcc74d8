"""Try models in a browser: a page on this machine for images, videos and the camera.

MODEL is a config and its checkpoint, or a file that tools/export.py wrote, as for tools/infer.py.
Several models are shown side by side, and each gets every upload. Drawings and data are the same as
from tools/infer.py.

Needs pip install -r requirements/app.txt. The page loads nothing from other hosts. Uploads and
results are in a temporary folder; they are deleted after an hour, and when Ctrl-C ends the program.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from _requirements import explain_missing, wait_passively

wait_passively()
# Gradio reads it when it is imported.
os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'

with explain_missing():
    from _arguments import add_no_deploy, add_trust_checkpoint, make_parser, number, parse, positive

    from backbones.app.models import open_models, pair_up
    from backbones.errors import exit_on_user_error, import_optional
    from backbones.weights import use_safe_loading

LOCAL = ('127.0.0.1', 'localhost', '::1')
EXAMPLES = """\
examples:
  python tools/app.py seg_configs/fpn_effv2_s2.py fpn_s2.pth
      a page at http://127.0.0.1:7860
  python tools/app.py a.py work_dirs/a/best_mIoU_iter_9000.pth b.py work_dirs/b/iter_8000.pth
      two trainings side by side
  python tools/app.py mask_rcnn.py mask_rcnn.pth mask_rcnn.xml mask_rcnn.onnx --score-thr 0.5
      a checkpoint beside the files exported from it
  python tools/app.py fpn_s2.xml --host 0.0.0.0 --port 8000 --max-seconds 10 --max-megabytes 20
      a page for everybody in the network
"""


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument('models', nargs='+', metavar='MODEL', help='see above')
    parser.add_argument(
        '--score-thr',
        type=number(0, 1),
        default=0.3,
        metavar='SCORE',
        help='initial score threshold for detections (default: 0.3)',
    )
    parser.add_argument('--device', help='cpu, cuda:1, ... (default: a GPU if there is one)')
    parser.add_argument('--amp', action='store_true', help='mixed precision, as in infer.py')
    add_no_deploy(parser)
    add_trust_checkpoint(parser)
    server = parser.add_argument_group('server')
    server.add_argument(
        '--host',
        default=LOCAL[0],
        metavar='ADDRESS',
        help='address to listen on; 0.0.0.0 opens the page to the whole network, without a '
        'password or encryption (default: 127.0.0.1, this machine only)',
    )
    server.add_argument(
        '--port', type=positive, metavar='N', help='default: 7860, or the next free port'
    )
    uploads = parser.add_argument_group('uploads')
    uploads.add_argument(
        '--max-megabytes',
        type=positive,
        default=200,
        metavar='N',
        help='maximum size of a file (default: 200)',
    )
    uploads.add_argument(
        '--max-megapixels',
        type=number(0, 1000),
        default=50,
        metavar='N',
        help='maximum size of an image or a frame (default: 50)',
    )
    uploads.add_argument(
        '--max-seconds',
        type=number(0, 1e6),
        default=60,
        metavar='N',
        help='maximum length of a video; the rest is left out (default: 60)',
    )
    return parse(parser)


def main() -> None:
    args = parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit())
    folder = Path(tempfile.mkdtemp(prefix='app-'))
    try:
        with exit_on_user_error():
            serve(args, folder)
    finally:
        # A model that is still running may write results meanwhile.
        for _ in range(100):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
    # A normal exit would wait for browsers, and abort when a thread returns from a model.
    os._exit(0)


def serve(args: argparse.Namespace, folder: Path) -> None:
    """Open the models and answer browsers until Ctrl-C."""
    # Gradio reads these when it is imported; its page can read the files in these folders.
    os.environ['GRADIO_TEMP_DIR'] = os.environ['GRADIO_EXAMPLES_CACHE'] = str(folder)
    import_optional('gradio', 'tools/app.py', 'app')
    from backbones.app.page import Page

    use_safe_loading(args.trust_checkpoint)
    models = open_models(pair_up(args.models), device=args.device, amp=args.amp, deploy=args.deploy)
    page = Page(models, args.max_megapixels, args.max_seconds, args.score_thr, folder)
    url = page.serve(args.host, args.port, args.max_megabytes)
    print(f'{", ".join(models)}: {url} (Ctrl-C ends it)', flush=True)
    if args.host.strip('[]') not in LOCAL:
        print(
            f'warning: everybody who reaches {args.host} can use this page, without a password',
            file=sys.stderr,
            flush=True,
        )
    with suppress(SystemExit):
        page.blocks.block_thread()


if __name__ == '__main__':
    main()
